"""IoU of each class of the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fss.report.plot import (
    INK,
    Plot,
    figure_style,
    legend_above,
    new_figure,
    save_plot,
    series_style,
)
from fss.report.runs import ReportedRun, names_instead

_BAR = 0.17  # inches


def draw_classes(runs: Sequence[ReportedRun], folder: Path) -> Plot | None:
    """Draw bars, a group a class, the highest IoU first; None before any run is tested.

    Runs that were tested on the same classes share a panel.
    """
    tested = [(number, run) for number, run in enumerate(runs) if run.result]
    if not tested:
        return None
    panels: dict[tuple[str, ...], list[tuple[int, ReportedRun]]] = {}
    for number, run in tested:
        panels.setdefault(tuple(sorted(run.result["test"]["iou"])), []).append((number, run))
    heights = [len(names) * (len(own) * _BAR + 0.14) + 0.55 for names, own in panels.items()]
    with figure_style():
        figure = new_figure(
            10.4, sum(heights) + 0.5, names_instead(run.name for run in runs) | _numbers(runs)
        )
        grid = figure.subplots(
            len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
        )
        for axes, (names, own) in zip(grid[:, 0], panels.items(), strict=True):
            _draw_panel(axes, names, own)
            if len(panels) > 1:
                folds = sorted({run.config.data.fold for _, run in own})
                axes.set_title(f"fold {', '.join(map(str, folds))}")
        grid[-1, 0].set_xlabel("IoU (%), bar: mean over test seeds, line: ± standard deviation")
        grid[0, 0].set_xlim(left=0)
        if len(tested) > 1 and len(panels) == 1:
            legend_above(figure, grid[0, 0])
        elif len(tested) > 1:
            for axes in grid[:, 0]:
                axes.legend(loc="lower right")
    return save_plot(figure, folder, "classes", "IoU of each test class, by run")


def _numbers(runs: Sequence[ReportedRun]) -> dict[str, str]:
    """Return the number of each tested class; of runs from before it was kept, its place."""
    numbers: dict[str, str] = {}
    for run in runs:
        test = run.result["test"] if run.result else {"iou": {}}
        places = {name: f"tested class {place}" for place, name in enumerate(test["iou"], 1)}
        known = {name: f"class {number}" for name, number in test.get("class_ids", {}).items()}
        numbers |= places | known
    return numbers


def _draw_panel(axes, names: tuple[str, ...], runs: list[tuple[int, ReportedRun]]) -> None:
    def best(name: str) -> float:
        return max(run.result["test"]["iou"][name]["mean"] for _, run in runs)

    ordered = sorted(names, key=best, reverse=True)
    unit = 1 / (len(runs) + 0.14 / _BAR)
    for place, (number, run) in enumerate(runs):
        spreads = [run.result["test"]["iou"][name] for name in ordered]
        means = [100 * spread["mean"] for spread in spreads]
        stds = [100 * (spread.get("std") or 0) for spread in spreads]
        where = np.arange(len(ordered)) + (place - (len(runs) - 1) / 2) * unit
        axes.barh(where, means, 0.86 * unit, color=series_style(number)["color"], label=run.name)
        axes.errorbar(means, where, xerr=stds, fmt="none", ecolor=INK, elinewidth=1, capsize=1.5)
        for y, mean, std in zip(where, means, stds, strict=True):
            axes.annotate(
                f"{mean:.1f}",
                (mean + std, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
    axes.set_yticks(range(len(ordered)), ordered)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    axes.margins(y=0.01)
