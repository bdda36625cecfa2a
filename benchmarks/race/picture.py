"""The picture of the race: saved memory against time, a dot a peer."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fss.colors import BLUE, ORANGE
from fss.files import atomic_write

MIB = 2**20
GRAY = "#6b6b6b"
SHORT = {  # names that fit beside a dot
    "official": "official SVF",
    "official, checkpoint per block": "checkpoint per block",
    "torch.compile of official": "compiled official",
    "torch.compile of recomposed": "compiled recomposed",
    "torch.compile of official, memory budget": "compiled, budget",
    "svf_fast, 8 bits, supports computed again": "8 bits, supports again",
    "full": "full fine-tuning",
    "frozen bound": "frozen (bound)",
}


def draw(results: list[dict], path: Path) -> None:
    """Draw one panel for the first group of each result."""
    figure = Figure(figsize=(4.9 * len(results), 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    placed = []
    for axes, result in zip(panels, results, strict=True):
        settings = result["settings"]
        rows = [row for row in result["groups"][0]["rows"] if row.get("seconds")]
        unit, of_a_second = ("s", 1) if settings["device"] == "cpu" else ("ms", 1000)
        points = {
            row["peer"]: (of_a_second * statistics.median(row["seconds"]), row["saved_bytes"] / MIB)
            for row in rows
        }
        for row in rows:
            low, _, high = statistics.quantiles(row["seconds"] * 2, n=4, method="inclusive")
            saved = points[row["peer"]][1]
            low, high = of_a_second * low, of_a_second * high
            axes.plot([low, high], [saved, saved], color=GRAY, linewidth=1, zorder=2)
            axes.scatter(*points[row["peer"]], zorder=3, **_style(row["peer"]))
        where = f"{settings['size']} px, batch {settings['batch']}, {settings['dtype']}"
        if result["level"] == "step":
            where = f"{settings['shots']}-shot, {where}"
        axes.set_title(f"{result['title']}\n{where}", fontsize=10, loc="left")
        axes.set_xlabel(f"forward + backward, {unit}")
        axes.set_xlim(0, 1.22 * max(x for x, _ in points.values()))
        axes.set_ylim(0, 1.12 * max(y for _, y in points.values()))
        axes.grid(alpha=0.2)
        axes.text(0.015, 0.02, "↙ better", transform=axes.transAxes, color=GRAY, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        placed.append((axes, points))
    panels[0].set_ylabel("saved for the backward pass, MiB")
    figure.draw_without_rendering()  # the positions of the axes, which the labels go by
    figure.set_layout_engine("none")
    for axes, points in placed:
        _label(axes, points)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=160)


def _style(name: str) -> dict:
    if name == "svf_fast":
        return {"s": 230, "color": ORANGE, "marker": "*", "edgecolor": "black", "linewidth": 0.6}
    if name == "frozen bound":
        return {"s": 46, "facecolor": "white", "edgecolor": GRAY, "linewidth": 1.4}
    if name.startswith("svf_fast"):
        return {"s": 46, "color": ORANGE}
    return {"s": 46, "color": BLUE if name == "official" else GRAY}


def _label(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Place each name where it covers least of dots, names and what is outside the axes."""
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in pixels.values()]
    # those in a crowd first: they have the least choice
    crowd = sorted(
        points,
        key=lambda name: -sum(abs(pixels[name] - other).max() < 60 for other in pixels.values()),
    )
    for name in crowd:
        bold = {"fontweight": "bold"} if name == "svf_fast" else {}
        best = None
        for distance, (dx, dy, ha, va) in itertools.product((9, 16, 26, 38), _SIDES):
            text = axes.annotate(
                SHORT.get(name, name),
                points[name],
                xytext=(dx * distance, dy * distance),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": GRAY, "linewidth": 0.5, "shrinkB": 3}
                if distance > 9
                else None,
                **bold,
            )
            # of the text alone: an annotation's own extent has the line to the dot too
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)
            covered = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, frame)
            cost = 100 * (covered + outside) + 10 * distance
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        taken.append(best[2])


_SIDES = [
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.8, 0.8, "left", "bottom"),
    (0.8, -0.8, "left", "top"),
    (-0.8, 0.8, "right", "bottom"),
    (-0.8, -0.8, "right", "top"),
]


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height
