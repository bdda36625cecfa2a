"""The figures to reach on a GPU, each with what is predicted and what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.tables import Result, Results, median, of_roofline, rows, table
from benchmarks.race.peers import PEERS

GIB = 2**30
STEP = {"size": 641, "shots": 5, "dtype": "bfloat16", "channels_last": True}
BACKBONE = {"size": 641, "batch": 6, "dtype": "bfloat16", "channels_last": True}


class Figure(NamedTuple):
    """A target: what is measured must be at most, or at least, so much."""

    name: str
    target: float
    measured: Callable[[Results], float | None]
    predicted: Callable[[Results], str | None] = lambda _: None
    at_least: bool = False
    unit: str = ""

    def met(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target

    def text(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.2f}{self.unit}"


def time_over(base: str, level: str, **settings: Any) -> Callable[[Results], float | None]:
    """Return a figure: our median over that of a peer in the same race."""

    def ratio(results: Results) -> float | None:
        for result in results.of(level, cuda=True, **settings):
            ours, theirs = (median(rows(result).get(name)) for name in ("svf_fast", base))
            if ours is not None and theirs is not None:
                return ours / theirs
        return None

    return ratio


def peak_over(base: str, level: str, **settings: Any) -> Callable[[Results], float | None]:
    def ratio(results: Results) -> float | None:
        for result in results.of(level, cuda=True, **settings):
            ours, theirs = (rows(result).get(name, {}) for name in ("svf_fast", base))
            if "peak_bytes" in ours and "peak_bytes" in theirs:
                return ours["peak_bytes"] / theirs["peak_bytes"]
        return None

    return ratio


def over_the_best(results: Results) -> float | None:
    """Return our time over that of the fastest other way to train S, from races with both."""
    ratios = [
        ours / theirs
        for ours, row in _rivals(results)
        if (theirs := median(row)) is not None and ours is not None
    ]
    return max(ratios, default=None)


def peak_over_the_best(results: Results) -> float | None:
    """Return our peak over that of the same fastest peer."""
    timed = [
        (theirs / ours, row, result)
        for result in results.of("backbone", cuda=True, every=True, **BACKBONE)
        for row in _others(result)
        if (theirs := median(row)) is not None
        and (ours := median(rows(result).get("svf_fast"))) is not None
    ]
    if not timed:
        return None
    _, row, result = min(timed, key=lambda entry: entry[0])
    own = rows(result)["svf_fast"]
    if "peak_bytes" not in own or "peak_bytes" not in row:
        return None
    return own["peak_bytes"] / row["peak_bytes"]


def _rivals(results: Results) -> Iterator[tuple[float | None, Result]]:
    for result in results.of("backbone", cuda=True, every=True, **BACKBONE):
        ours = median(rows(result).get("svf_fast"))
        yield from ((ours, row) for row in _others(result))


def _others(result: Result) -> list[Result]:
    """Return the rows of the other peers that train S."""
    return [
        row
        for name, row in rows(result).items()
        if not name.startswith("svf_fast") and name in PEERS and PEERS[name].trains == "S"
    ]


def roofline_share(results: Results) -> float | None:
    for result in results.of("backbone", cuda=True, **BACKBONE):
        taken = median(rows(result).get("svf_fast"))
        if taken is not None:
            return of_roofline("svf_fast", taken, result["settings"], results)
    return None


def step_peak(results: Results) -> float | None:
    for result in results.of("step", cuda=True, batch=1, **STEP):
        row = rows(result).get("svf_fast", {})
        if "peak_bytes" in row:
            return row["peak_bytes"] / GIB
    return None


def slowest_elementwise(results: Results) -> float | None:
    """Return the least share of a copy's rate; 0 if an op failed."""
    shares = [
        row.get("fraction_of_copy", 0.0)
        for result in results.of("elementwise", cuda=True)
        for group in result["groups"]
        for row in group["rows"]
        if group["name"] == "bfloat16"
    ]
    return min(shares, default=None)


def predicted_ratio(*bases: str) -> Callable[[Results], str | None]:
    """Predict our time over the fastest base's, both captured, from the code's launches."""

    def text(results: Results) -> str | None:
        for found in _predicted(results):
            taken = {name: row["in a graph"]["device_seconds"] for name, row in found.items()}
            ours = taken["svf_fast"]
            best = {gpu: min(taken[base][gpu] for base in bases) for gpu in ours}
            return _by_gpu({gpu: f"{ours[gpu] / best[gpu]:.2f}" for gpu in ours})
        return None

    return text


def predicted_share(results: Results) -> str | None:
    """Predict the roofline at measured rates over the time of the captured step."""
    for found in _predicted(results):
        least = found["svf_fast"]["roofline_seconds"]
        taken = found["svf_fast"]["in a graph"]["device_seconds"]
        return _by_gpu({gpu: f"{100 * least[gpu] / taken[gpu]:.0f} %" for gpu in taken})
    return None


def _predicted(results: Results) -> Iterator[dict[str, Result]]:
    """Yield the predictions with the settings of the race, by peer."""
    for result in results.of("predictions", size=BACKBONE["size"]):
        for group in result["groups"]:
            if group["batch"] == BACKBONE["batch"]:
                yield {row["peer"]: row for row in group["rows"]}


def _by_gpu(texts: dict[str, str]) -> str:
    return ", ".join(f"{text} ({gpu.split()[0]})" for gpu, text in texts.items())


def predicted_saved(level: str, over: str = "") -> Callable[[Results], str | None]:
    """Predict a peak by the saved bytes, which are most of it, counted without a GPU."""

    def text(results: Results) -> str | None:
        groups = itertools.chain.from_iterable(r["groups"] for r in results.of("memory"))
        for group in groups:
            if group["level"] != level or "641 px" not in group["name"]:
                continue
            if "bfloat16" not in group["name"]:
                continue
            saved = {row["peer"]: row["saved_bytes"] for row in group["rows"]}
            if over:
                return f"{saved['svf_fast'] / saved[over]:.2f} of what is saved"
            return f"{saved['svf_fast'] / GIB:.2f} GiB are saved"
        return None

    return text


FIGURES = (
    Figure(
        "layers 2-4: time over the official chain's",
        0.45,
        time_over("official", "backbone", **BACKBONE),
        predicted_ratio("official"),
    ),
    Figure("step: time over the official chain's", 0.45, time_over("official", "step", **STEP)),
    Figure(
        "layers 2-4: peak over the official chain's",
        0.17,
        peak_over("official", "backbone", **BACKBONE),
        predicted_saved("backbone", "official"),
    ),
    Figure(
        "step: peak over the official chain's",
        0.17,
        peak_over("official", "step", **STEP),
        predicted_saved("step", "official"),
    ),
    Figure(
        "layers 2-4: time over the best peer's",
        0.75,
        over_the_best,
        # of those whose launches are counted; torch.compile's are not
        predicted_ratio("official", "recomposed, BN folded"),
    ),
    Figure("layers 2-4: peak over that peer's", 1.0, peak_over_the_best),
    Figure(
        "layers 2-4: time over the frozen bound's",
        1.15,
        time_over("frozen bound", "backbone", **BACKBONE),
        predicted_ratio("frozen bound"),
    ),
    Figure("step: time over the frozen bound's", 1.15, time_over("frozen bound", "step", **STEP)),
    Figure(
        "layers 2-4: share of the roofline",
        0.60,
        roofline_share,
        predicted_share,
        at_least=True,
        unit="%",
    ),
    Figure(
        "5-shot episode at 641 px, bfloat16: peak",
        2.0,
        step_peak,
        predicted_saved("step"),
        unit=" GiB",
    ),
    Figure(
        "slowest element-wise op: share of a copy's rate",
        0.85,
        slowest_elementwise,
        at_least=True,
        unit="%",
    ),
    Figure(
        "cosine_max, N = 6561, C = 2048: time over the dense one's",
        0.35,
        time_over("official", "prior", size=641, dtype="bfloat16"),
        # a product over half the supports, against a product and its two gradients over all
        lambda _: f"{0.5 / 3:.2f} of its FLOPs",
    ),
)


def check(results: Results) -> list[tuple[Figure, str, float | None, bool | None]]:
    """Return each figure with its prediction, its measured value and whether it is reached."""
    checked = []
    for figure in FIGURES:
        value = figure.measured(results)
        verdict = None if value is None else figure.met(value)
        checked.append((figure, figure.predicted(results) or "—", value, verdict))
    return checked


def markdown(results: Results) -> str:
    lines = []
    for figure, predicted, value, verdict in check(results):
        bound = f"{'≥' if figure.at_least else '≤'} {figure.text(figure.target)}"
        shown = "—" if value is None else figure.text(value)
        word = {None: "—", True: "yes", False: "**no**"}[verdict]
        lines.append([figure.name, bound, predicted, shown, word])
    head = ["", "target", "predicted", "measured", "reached"]
    note = (
        f"bfloat16, channels_last. Predicted times: captured in a CUDA graph. {_where(results)} "
        "— : not measured, or not predicted."
    )
    return f"{table(head, lines)}\n\n{note}\n"


def _where(results: Results) -> str:
    """Describe the GPU, and the time of the kernels alone."""
    facts = results.facts
    if facts is None:
        return "Measured: no GPU has run it yet."
    parts = [f"Measured: {facts['gpu']}, torch {facts['torch']}."]
    for result in results.of("profile", cuda=True):
        for group in result["groups"]:
            taken = {row["peer"]: row["kernel_seconds"] for row in group["rows"]}
            ratios = [
                f"{taken['svf_fast'] / taken[base]:.2f} of {name}"
                for base, name in (("official", "official's"), ("frozen bound", "the bound's"))
                if "svf_fast" in taken and base in taken
            ]
            if ratios:
                told = " and ".join(ratios)
                parts.append(
                    f"Kernels alone, {group['name']}, commit {result['commit']}: {told} time."
                )
    return " ".join(parts)
