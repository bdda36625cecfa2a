"""What rows of `benchmarks.few_shot.supports` say: chosen rates, the table, the curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.gpu import tables
from fss.files import atomic_write
from fss.report.plot import figure_style, legend_above, new_figure, series_style, write_png

Row = dict[str, Any]
Counts = NDArray[np.int64]
"""Intersection and union of the object, then of the background, of each query [N, 4]."""

RESAMPLES = 2000


def chosen_rate(rows: Mapping[str, Row], regime: str, shots: int, fold: int) -> float:
    """Return the rate with the highest mIoU over the base classes of a fold, on training photos.

    Raises:
        ValueError: a rate without a trial, or with fewer than others.
    """
    trials = _trials(rows, regime, shots, fold)
    if not trials or len({frozenset(classes) for classes in trials.values()}) > 1:
        found = ", ".join(f"{len(classes)} of {rate:g}" for rate, classes in trials.items())
        raise ValueError(
            f"{regime}: expected as many trials of each of its rates, found {found or 'none'}; "
            "run --kinds search to its end"
        )
    score = base_scores(rows, regime, shots, fold)
    return max(score, key=lambda rate: score[rate])


def base_scores(rows: Mapping[str, Row], regime: str, shots: int, fold: int) -> dict[float, float]:
    """Return mIoU over a fold's base classes by rate, of what the held-out views chose."""
    trials = _trials(rows, regime, shots, fold)
    return {rate: miou(classes) for rate, classes in sorted(trials.items())}


def _trials(
    rows: Mapping[str, Row], regime: str, shots: int, fold: int
) -> dict[float, dict[int, list[list[int]]]]:
    """Return the counts of the queries of a fold's base classes by rate, then by class."""
    trials: dict[float, dict[int, list[list[int]]]] = {}
    for row in rows.values():
        kinds = (row.get("kind"), row.get("regime"), row.get("shots"))
        if kinds == ("search", regime, shots) and row["fold"] != fold:
            classes = trials.setdefault(row["rate"], {})
            classes.setdefault(row["class_id"], []).extend(kept(row)["queries"])
    return trials


def kept(row: Row) -> dict[str, Any]:
    """Return the check whose values were kept."""
    return next(check for check in row["checks"] if check["step"] == row["best_step"])


def miou(classes: Mapping[int, Sequence[Sequence[int]]]) -> float:
    """Average the object's IoU, of the summed counts of each class, over classes."""
    sums = [np.asarray(each).sum(0) for each in classes.values()]
    return float(np.mean([s[0] / max(1, s[1]) for s in sums]))


def fb_iou(classes: Mapping[int, Sequence[Sequence[int]]]) -> float:
    """Average the IoU of object and background, of the counts summed over all classes."""
    total = np.sum([np.asarray(each).sum(0) for each in classes.values()], axis=0)
    return float((total[0] / max(1, total[1]) + total[2] / max(1, total[3])) / 2)


def paired(
    before: Mapping[int, Sequence[Counts]], after: Mapping[int, Sequence[Counts]]
) -> tuple[float, float, float]:
    """Return the difference of mIoU and its 95 % interval, by bootstrap over classes and sets.

    Classes are sampled with replacement, and of each its support sets with all their queries.

    Args:
        before, after: by class, the counts [N, 4] of each support set, in the same order.
    """
    rng = np.random.default_rng(0)
    names = sorted(before)
    pairs = {
        c: np.array([(b.sum(0), a.sum(0)) for b, a in zip(before[c], after[c], strict=True)])
        for c in names
    }

    def difference(chosen: Iterable[NDArray[np.int64]]) -> float:
        sums = [each.sum(0) for each in chosen]
        return float(np.mean([a[0] / max(1, a[1]) - b[0] / max(1, b[1]) for b, a in sums]))

    drawn = []
    for _ in range(RESAMPLES):
        classes = [pairs[names[i]] for i in rng.integers(len(names), size=len(names))]
        drawn.append(difference(x[rng.integers(len(x), size=len(x))] for x in classes))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return difference(pairs.values()), float(low), float(high)


def wins(before: Counts, after: Counts) -> float:
    """Return the share of episodes with a higher IoU of the object; equal ones count a half."""
    first, second = _ious(before), _ious(after)
    return float(((second > first) + 0.5 * (second == first)).mean())


def _ious(counts: Counts | list[list[int]]) -> NDArray[np.float64]:
    rows = np.asarray(counts)
    return rows[:, 0] / np.maximum(1, rows[:, 1])


def summary(rows: Mapping[str, Row], regimes: Iterable[str]) -> dict[str, Any]:
    """Compute the table of each number of shots, over the support sets that all regimes have.

    Every regime is paired with no tuning (``difference``), and the first one with the others
    (``first_ahead``).
    """
    result: dict[str, Any] = {}
    for shots in (1, 5):
        final = [r for r in rows.values() if r.get("kind") == "final" and r["shots"] == shots]
        done = {(r["regime"], r["class_id"], r["number"]): r for r in final}
        regimes = list(regimes)
        sets = sorted(
            {key[1:] for key in done if all((name, *key[1:]) in done for name in regimes)}
        )
        if not sets:
            continue
        before = _collect(done[(regimes[0], *each)] for each in sets)
        first = _collect((done[(regimes[0], *each)] for each in sets), tuned=True)
        lines = {"untuned": _line(before, before)}
        for name in regimes:
            chosen = [done[(name, *each)] for each in sets]
            after = _collect(chosen, tuned=True)
            line = _line(before, after)
            if name != regimes[0]:
                line["first_ahead"] = paired(after, first)
            line["rates"] = sorted({r["rate"] for r in chosen})
            line["best_step"] = statistics.mean(r["best_step"] for r in chosen)
            forgot = [r for r in chosen if r["others"]]
            if forgot:
                ious = [
                    np.concatenate([_ious(r[key]) for r in forgot])
                    for key in ("others", "others_untuned")
                ]
                line["others"] = float(np.subtract(*ious).mean())
            lines[name] = line
        episodes = sum(len(x) for each in before.values() for x in each)
        result[str(shots)] = {"sets": len(sets), "episodes": episodes, "rows": lines}
    return result


def _collect(rows: Iterable[Row], tuned: bool = False) -> dict[int, list[Counts]]:
    classes: dict[int, list[Counts]] = {}
    for row in rows:
        check = kept(row) if tuned else row["checks"][0]
        classes.setdefault(row["class_id"], []).append(np.asarray(check["queries"]))
    return classes


def _line(before: dict[int, list[Counts]], after: dict[int, list[Counts]]) -> dict[str, Any]:
    whole = {c: np.concatenate(each) for c, each in after.items()}
    line: dict[str, Any] = {"miou": miou(whole), "fb_iou": fb_iou(whole)}
    if after is not before:
        line["difference"] = paired(before, after)
        line["wins"] = wins(
            *(np.concatenate([y for each in x.values() for y in each]) for x in (before, after))
        )
    return line


def table(result: Mapping[str, Any]) -> str:
    """Return the tables as Markdown, percent."""
    parts = []
    for shots, each in result.items():
        head = ["tuned", "mIoU", "difference, 95 %", "episodes won", "FB-IoU", "other classes"]
        first = next(name for name in each["rows"] if name != "untuned")
        head.append(f"{first} ahead by, 95 %")
        lines = []
        for name, row in each["rows"].items():
            cells = [name, f"{100 * row['miou']:.1f}", "", "", f"{100 * row['fb_iou']:.1f}", "", ""]
            for column, key in ((2, "difference"), (6, "first_ahead")):
                if key in row:
                    middle, low, high = (100 * x for x in row[key])
                    cells[column] = f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
            if "wins" in row:
                cells[3] = f"{100 * row['wins']:.0f} %"
            if "others" in row:
                cells[5] = f"{100 * row['others']:+.1f}"
            lines.append(cells)
        count = f"{each['sets']} support sets, {each['episodes']} episodes"
        parts.append(f"{shots}-shot, {count}\n\n{tables.table(head, lines)}")
    return "\n\n".join(parts) + "\n"


def curves(rows: Mapping[str, Row], shots: int) -> dict[str, dict[int, float]]:
    """Return mIoU of the queries by regime and step, over the classes that all regimes have."""
    found = [r for r in rows.values() if r.get("kind") == "curve" and r["shots"] == shots]
    regimes = sorted({r["regime"] for r in found})
    classes = [{r["class_id"] for r in found if r["regime"] == name} for name in regimes]
    common = set.intersection(*classes) if classes else set()
    result: dict[str, dict[int, float]] = {}
    for name in regimes:
        chosen = [r for r in found if r["regime"] == name and r["class_id"] in common]
        steps: dict[int, dict[int, list[list[int]]]] = {}
        for row in chosen:
            for check in row["checks"]:
                steps.setdefault(check["step"], {})[row["class_id"]] = check["queries"]
        result[name] = {
            s: miou(each) for s, each in sorted(steps.items()) if len(each) == len(common)
        }
    return result


def write(
    rows: Mapping[str, Row],
    regimes: Sequence[str],
    about: Mapping[str, Any],
    name: Path,
) -> str:
    """Write NAME.json, and what there is of NAME.md and NAME.png (curves); return the table.

    Args:
        rows: by name; the JSON file has them too, so that another machine can go on.
        regimes: names, in the order of the table.
        about: command, machine, commit.
        name: path of the files without their ending.
    """
    result = summary(rows, regimes)
    drawn = {str(k): found for k in (1, 5) if (found := curves(rows, k))}
    rates = {
        f"{shots}-shot": {
            regime: {str(fold): base_scores(rows, regime, shots, fold) for fold in range(4)}
            for regime in regimes
        }
        for shots in (1, 5)
    }
    name.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "tables": result, "curves": drawn, "rates": rates, "rows": rows}
    with atomic_write(name.with_suffix(".json")) as file:  # a thousand rows: not indented
        file.write(json.dumps(content).encode())
    text = table(result)
    if "machine" in about:
        text += f"\n{_told(rows, about)}\n"
    if result:
        name.with_suffix(".md").write_text(text)
    if drawn:
        write_png(plot_curves(drawn), name.with_suffix(".png"))
    return text


def _told(rows: Mapping[str, Row], about: Mapping[str, Any]) -> str:
    """Return what was kept of the trained values, and how it was measured."""
    shares = ", ".join(sorted({f"{row.get('share', 1.0):g}" for row in rows.values()}))
    machine = about["machine"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"Kept at a share of {shares} of the way from the untuned to the trained values. The last "
        f"session of those that made the rows: {machine['cpu']}, {threads} a process, "
        f"torch {about['versions']['torch']}, commit {about['commit']}, `{about['command']}`."
    )


def plot_curves(drawn: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Plot mIoU of the queries against steps, a panel for each number of shots."""
    with figure_style():
        figure = new_figure(4.6 * len(drawn) + 0.6, 3.2)
        grid = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (shots, regimes) in zip(grid, drawn.items(), strict=True):
            axes.set_title(f"{shots}-shot", fontsize=9)
            for number, (name, points) in enumerate(regimes.items()):
                values = [100 * value for value in points.values()]
                axes.plot(list(points), values, label=name, markersize=4, **series_style(number))
            axes.set_xlabel("steps of tuning on the supports")
            axes.grid(True)
        grid[0].set_ylabel("mIoU of the queries (%)")
        legend_above(figure, grid[0])
    return figure
