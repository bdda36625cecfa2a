"""Loss and mIoU of runs, in training and in validation (the paper's Figures 2, 3 and 7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fss.report.plot import (
    INK,
    Plot,
    figure_style,
    legend_above,
    new_figure,
    save_plot,
    series_style,
    write_png,
)
from fss.report.runs import ReportedRun, read_run
from fss.runs.folder import RunFolder


def draw_curves(runs: Sequence[ReportedRun], folder: Path) -> Plot:
    """Draw the curves of runs for a page; see `plot_curves`."""
    names = ", ".join(run.name for run in runs)
    text = f"Training loss, mIoU in training and in validation against the step of {names}"
    return save_plot(plot_curves(runs), folder, "curves", text)


def draw_own_curves(folder: RunFolder, result: dict[str, Any]) -> None:
    """Draw the curves of one run into its folder.

    Args:
        folder: of the run.
        result: what result.json will hold.
    """
    run = read_run(folder, folder.path.resolve().name, result)
    write_png(plot_curves([run]), folder.curves, dpi=110)


def plot_curves(runs: Sequence[ReportedRun]) -> Figure:
    """Plot the loss, mIoU in training, and mIoU of validation and, with its spread, of the test."""
    with figure_style():
        figure = new_figure(10.4, 3.9)
        loss, seen, iou = figure.subplots(1, 3)
        for number, run in enumerate(runs):
            style = series_style(number)
            _draw_loss(loss, run, style)
            _draw_percent(seen, run, "train_miou", style)
            _draw_iou(iou, run, style)
        loss.set(title="Training loss", xlabel="step", ylabel="loss (nats per pixel)")
        seen.set(title="mIoU, training (base classes)", xlabel="step", ylabel="mIoU (%)")
        classes = {run.config.validation_classes for run in runs}
        which = f"{classes.pop()} classes" if len(classes) == 1 else "novel or base classes"
        iou.set(title=f"mIoU, validation ({which})", xlabel="step", ylabel="mIoU (%)")
        if any(run.result for run in runs):
            iou.plot([], [], "*", color=INK, markersize=10, linestyle="", label="test ± std")
        for axes in (loss, seen, iou):
            axes.grid(True)
            axes.set_xlim(left=0)
        for axes in (seen, iou):
            axes.set_ylim(bottom=0)
        legend_above(figure, iou, 5)
    return figure


def _draw_loss(axes, run: ReportedRun, style: dict) -> None:
    if not run.train:
        return
    steps, values = run.train["step"], np.array(run.train["loss"])
    window = max(1, len(values) // 20)
    line = {"color": style["color"], "linestyle": style["linestyle"]}
    if window > 1:
        axes.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
        # the mean of fewer rows where the log begins, so that the curve begins there too
        sums = np.cumsum(np.insert(values, 0, 0.0))
        ends = np.arange(1, len(values) + 1)
        begins = np.maximum(0, ends - window)
        values = (sums[ends] - sums[begins]) / (ends - begins)
    if len(values) < 3:
        line["marker"] = style["marker"]
    axes.plot(steps, values, linewidth=1.8, **line)


def _draw_iou(axes, run: ReportedRun, style: dict) -> None:
    label = run.name if run.result else f"{run.name} (in progress)"
    _draw_percent(axes, run, "miou", style, label=label)
    if run.result:
        test = run.result["test"]
        spread = test["miou"].get("std")
        axes.errorbar(
            test["step"],
            100 * test["miou"]["mean"],
            yerr=None if spread is None else 100 * spread,
            color=style["color"],
            marker="*",
            markersize=12,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            capsize=3,
            zorder=3,
        )


def _draw_percent(axes, run: ReportedRun, column: str, style: dict, **settings) -> None:
    steps, values = run.validation.get("step", []), run.validation.get(column)
    if values is None:  # a log of before the column
        steps, values = [], []
    marks = {"markersize": 5} if len(steps) < 40 else {"marker": ""}
    percent = [100 * value for value in values]
    axes.plot(steps, percent, linewidth=1.8, **settings, **{**style, **marks})
