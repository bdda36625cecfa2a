"""Loss and mIoU of runs, in training and in validation (the paper's Figures 2, 3 and 7)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
from fss.report.runs import ReportedRun, names_instead, read_run
from fss.runs.folder import RunFolder


@dataclass(frozen=True)
class Panel:
    """A panel of `plot_panels`.

    Attributes:
        label: the regime in words.
        run: None if there is none yet.
        steps_per_epoch: None if nobody knows; the panel is then against steps.
        missing: instead of the curves of a run that is not there.
    """

    label: str
    run: ReportedRun | None
    steps_per_epoch: float | None = None
    missing: str = ""


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
    """Plot the loss, mIoU in training, and mIoU of validation and, with its spread, of the test.

    Against steps, with epochs above; if the epochs of the runs have other numbers of steps, against
    epochs. Epochs are omitted where a run does not know them.
    """
    lengths = {run.steps_per_epoch for run in runs}
    known = None not in lengths
    unit = "epoch" if known and len(lengths) > 1 else "step"
    names = names_instead(run.name for run in runs)
    with figure_style():
        figure = new_figure(10.4, 3.9, names)
        loss, seen, iou = figure.subplots(1, 3)
        for number, run in enumerate(runs):
            style = series_style(number)
            length = (unit == "epoch" and run.steps_per_epoch) or 1
            _draw_loss(loss, run, style, length)
            _draw_percent(seen, run, "train_miou", style, length)
            _draw_iou(iou, run, style, length)
        loss.set(title="Training loss", xlabel=unit, ylabel="loss (nats per pixel)")
        seen.set(title="mIoU, training (base classes)", xlabel=unit, ylabel="mIoU (%)")
        classes = {run.config.validation_classes for run in runs}
        which = f"{classes.pop()} classes" if len(classes) == 1 else "novel or base classes"
        iou.set(title=f"mIoU, validation ({which})", xlabel=unit, ylabel="mIoU (%)")
        if unit == "step" and known:
            for axes in (loss, seen, iou):
                _add_epochs(axes, *lengths)
        if any(run.result for run in runs):
            iou.plot([], [], "*", color=INK, markersize=10, linestyle="", label="test ± std")
        for axes in (loss, seen, iou):
            axes.grid(True)
            axes.set_xlim(left=0)
        for axes in (seen, iou):
            axes.set_ylim(bottom=0)
        legend_above(figure, iou, 5)
    return figure


def plot_panels(panels: Sequence[Panel]) -> Figure:
    """Plot mIoU in training and in validation against the epoch, a panel a run."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    training, validation = series_style(0), series_style(1)
    with figure_style():
        figure = new_figure(10.4, 2.9 * rows + 0.4)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for place, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            letter = chr(ord("a") + place)
            axes.set_title(f"({letter}) {panel.label}", fontsize=9)
            if panel.run is None:
                axes.set_xticks([])
                words = textwrap.fill(textwrap.shorten(panel.missing, 120), 24)
                axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
                continue
            if panel.run.result is None:
                axes.set_title(f"({letter}) {panel.label} (in progress)", fontsize=9)
            axes.set_xlabel("step" if panel.steps_per_epoch is None else "epoch")
            axes.grid(True)
            length = panel.steps_per_epoch or 1
            _draw_percent(axes, panel.run, "train_miou", training, length, label="training")
            _draw_percent(axes, panel.run, "miou", validation, length, label="validation")
            axes.set_xlim(left=0)
        for axes in grid[:, 0]:
            axes.set_ylabel("mIoU (%)")
        grid[0, 0].set_ylim(bottom=0)
        drawn = [a for a, panel in zip(grid.flat, panels, strict=False) if panel.run is not None]
        if drawn:
            legend_above(figure, drawn[0])
    return figure


def _add_epochs(axes: Axes, length: int) -> None:
    """Count epochs of so many steps above."""
    above = axes.secondary_xaxis(
        "top", functions=(lambda step: step / length, lambda epoch: epoch * length)
    )
    above.xaxis.set_major_locator(MaxNLocator(5))
    above.set_xlabel("epoch", fontsize=8)
    above.tick_params(labelsize=8)
    above.spines["top"].set_visible(True)


def _draw_loss(axes: Axes, run: ReportedRun, style: dict, length: int) -> None:
    if not run.train:
        return
    steps, values = np.array(run.train["step"]) / length, np.array(run.train["loss"])
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


def _draw_iou(axes: Axes, run: ReportedRun, style: dict, length: int) -> None:
    label = run.name if run.result else f"{run.name} (in progress)"
    _draw_percent(axes, run, "miou", style, length, label=label)
    if run.result:
        test = run.result["test"]
        spread = test["miou"].get("std")
        axes.errorbar(
            test["step"] / length,
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


def _draw_percent(
    axes: Axes, run: ReportedRun, column: str, style: dict, length: int, **settings: Any
) -> None:
    """Draw a column of the validation log against steps in units of `length`."""
    steps, values = run.validation.get("step", []), run.validation.get(column)
    if values is None:  # a log of before the column
        steps, values = [], []
    marks = {"markersize": 5} if len(steps) < 40 else {"marker": ""}
    percent = [100 * value for value in values]
    where = [step / length for step in steps]
    axes.plot(where, percent, linewidth=1.8, **settings, **{**style, **marks})
