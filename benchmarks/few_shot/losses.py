"""Losses of runs on the same episodes, step by step: results/NAME.json, .md and .png.

    python -m benchmarks.few_shot.losses exact=RUN "8 bits=RUN" chain=RUN --name int8-training

The first run is what the others are compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.files import RESULTS, command
from fss.files import write_json
from fss.report.plot import figure_style, legend_above, new_figure, series_style, write_png
from fss.runs.folder import RunFolder

Losses = Mapping[str, NDArray[np.float64]]
LAST = 50  # steps over which the end of a run is averaged
WINDOW = 10  # steps over which curves are smoothed
APART = (1e-3, 1e-2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot.losses")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--name", required=True, help="of the files, without their endings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    folders = dict(run.rpartition("=")[::2] for run in options.runs)
    losses = {
        label: np.asarray(RunFolder(Path(folder)).logs()[0]["loss"])
        for label, folder in folders.items()
    }
    if "" in losses or len({len(loss) for loss in losses.values()}) > 1:
        parser.error("runs: expected LABEL=FOLDER of runs with as many logged steps each")
    path = options.results / f"{options.name}.json"
    rows = {label: [float(f"{x:.6g}") for x in loss] for label, loss in losses.items()}
    write_json(path, {"command": command(), "losses": rows})
    path.with_suffix(".md").write_text(table(losses))
    write_png(draw(losses), path.with_suffix(".png"))
    print(table(losses))
    return 0


def table(losses: Losses) -> str:
    """Return the mean loss at the end, and when each run parts from the first by how much."""
    first, *_ = losses.values()
    parts = " | ".join(f"first step off by {size:g}" for size in APART)
    lines = [f"| | mean loss of the last {LAST} steps | {parts} | mean difference |"]
    lines.append("| --- |" + " ---: |" * (2 + len(APART)))
    for label, loss in losses.items():
        off = np.abs(loss - first)
        steps = [
            str(1 + int((off > size).argmax())) if (off > size).any() else "–" for size in APART
        ]
        cells = [label, f"{loss[-LAST:].mean():.4f}", *steps, f"{off.mean():.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(losses: Losses) -> Figure:
    """Plot the losses, smoothed, and below how far each is from the first run's."""
    first, *_ = losses.values()
    kernel = np.ones(WINDOW) / WINDOW
    with figure_style():
        figure = new_figure(6.4, 4.6)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for number, (label, loss) in enumerate(losses.items()):
            style = series_style(number) | {"marker": ""}
            steps = np.arange(WINDOW, len(loss) + 1)
            above.plot(steps, np.convolve(loss, kernel, "valid"), label=label, **style)
            if number:
                off = np.abs(loss - first)
                below.semilogy(1 + np.arange(len(loss)), np.where(off > 0, off, np.nan), **style)
        above.set_ylabel(f"loss, mean of {WINDOW} steps")
        below.set_ylabel(f"off {next(iter(losses))} by")
        below.set_xlabel("step")
        for axes in (above, below):
            axes.grid(True)
        legend_above(figure, above)
    return figure


if __name__ == "__main__":
    sys.exit(main())
