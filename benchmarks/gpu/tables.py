"""Tables of what a GPU showed and what it should: ceilings, predictions, kernels, `fss train`."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.roofline import ATTAINABLE, CEILINGS, measured_ceilings, passes, seconds
from benchmarks.race.levels import Settings

GIB = 2**30
KERNELS = 12  # of each peer that the table of a profile shows

Result = dict[str, Any]


class Results:
    """All results of a folder."""

    def __init__(self, folder: Path) -> None:
        found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        self._results = {path: r for path, r in found.items() if "level" in r}

    def of(
        self, level: str, cuda: bool = False, every: bool = False, **settings: Any
    ) -> Iterator[Result]:
        """Yield the results of a level with these settings, only those on a GPU with `cuda`.

        Those with a suffix, races of some peers apart from the one that counts, only with `every`.
        """
        for result in self._results.values():
            if result.get("suffix") and not every:
                continue
            given = result["settings"]
            device = str(given.get("device", "cpu")).startswith("cuda")
            same = all(given.get(key) == value for key, value in settings.items())
            if result["level"] == level and same and (device or not cuda):
                yield result

    @property
    def facts(self) -> dict[str, Any] | None:
        """Return the facts of the GPU; None without one."""
        found = [result["groups"][0]["facts"] for result in self.of("facts", cuda=True)]
        return found[-1] if found else None


def rows(result: Result) -> dict[str, Result]:
    """Return the rows of the first group by peer."""
    return {row["peer"]: row for row in result["groups"][0]["rows"]}


def median(row: Result | None) -> float | None:
    return statistics.median(row["seconds"]) if row and row.get("seconds") else None


def facts_table(result: Result, _: Results) -> str:
    facts = result["groups"][0]["facts"]
    shown = {
        **{name: value for name, value in facts.items() if not name.endswith("_per_second")},
        "copy, bytes read and written": f"{facts['copy_bytes_per_second'] / 1e12:.2f} TB/s",
        "bfloat16 matrix product": f"{facts['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s",
    }
    return table(["", ""], [[name, str(value)] for name, value in shown.items()])


def elementwise_table(result: Result, _: Results) -> str:
    lines = []
    for group in result["groups"]:
        for row in group["rows"]:
            taken = median(row)
            if taken is None:
                cells = [row.get("reason", "no speed: not exact"), "–", "–"]
            else:
                rate = row["bytes"] / taken
                cells = [
                    f"{1e6 * taken:.0f}",
                    f"{rate / 1e12:.2f}",
                    f"{row['fraction_of_copy']:.2f}",
                ]
            lines.append([row["peer"], group["name"], *cells])
    shape = "×".join(map(str, result["settings"]["shape"]))
    head = ["", "dtype", "µs", "TB/s", "of a copy's rate"]
    return table(head, lines) + f"\n\nMaps {shape}, channels_last; bytes as each op needs them."


def replay_table(result: Result, results: Results) -> str:
    lines = []
    for group in result["groups"]:
        by_name = {row["peer"]: row for row in group["rows"]}
        bases = [median(by_name.get(name)) for name in ("official", "frozen bound")]
        settings = result["settings"] | {"batch": group["batch"]}
        for name, row in by_name.items():
            taken = median(row)
            if taken is None:
                cells = [row.get("reason", "no speed: not exact"), *["–"] * 3]
            else:
                ratios = ["–" if base is None else f"{taken / base:.2f}" for base in bases]
                part = of_roofline(name, taken, settings, results)
                cells = [f"{1e3 * taken:.2f}", *ratios, _share(part)]
            lines.append([name, group["name"], *cells])
    head = ["replayed", "", "ms", "÷ official", "÷ frozen bound", "of the roofline"]
    return table(head, lines)


def roofline_table(result: Result, results: Results) -> str:
    """Format counts and predictions, and what a GPU took for the same step."""
    lines = []
    pairs = [(group, row) for group in result["groups"] for row in group["rows"]]
    for group, row in pairs:
        settings = result["settings"] | {"batch": group["batch"]}
        name = row["peer"]
        predicted = [f"{1e3 * row['predicted_seconds'][gpu]:.2f}" for gpu in CEILINGS]
        eager, replayed = measured(name, settings, results), replay(name, settings, results)
        cells = [
            group["name"],
            str(row["passes"]),
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['flops'] / 1e9:.0f}",
        ]
        cells += predicted
        for taken in (eager, replayed):
            part = of_roofline(name, taken, settings, results)
            cells.append("—" if taken is None else f"{1e3 * taken:.2f} ({_share(part)})")
        lines.append([f"**{name}**" if name == "svf_fast" else name, *cells])
    head = ["", "", "passes", "GB", "GFLOP", *(f"{gpu}, ms, predicted" for gpu in CEILINGS)]
    head += ["ms, measured (of the roofline)", "replayed"]
    rates = "; ".join(
        f"{gpu} {c['memory'] / 1e12:g} TB/s, {c['bfloat16'] / 1e12:g} TFLOP/s"
        for gpu, c in CEILINGS.items()
    )
    note = (
        f"Predicted, not measured: datasheet ({rates}) × {ATTAINABLE['memory']:.2f} for memory and "
        f"× {ATTAINABLE['bfloat16']:.2f} for products, pass by pass. The roofline is the same sum "
        "at the full measured rates."
    )
    return f"{table(head, lines)}\n\n{note}"


def predictions_table(result: Result, results: Results) -> str:
    """Format the predictions from the code's launches, on the device and on the host."""
    host = host_seconds(results)
    lines, unknown = [], set()
    for group, row in ((g, r) for g in result["groups"] for r in g["rows"]):
        eager, graph = (row[mode] for mode in ("eager", "in a graph"))
        official = next(other for other in group["rows"] if other["peer"] == "official")
        gpus = list(eager["device_seconds"])
        unknown |= set(eager["unknown"])
        waits = host.get(row["peer"])
        cells = [
            group["name"],
            f"{eager['launches']}, {graph['launches']}",
            f"{graph['bytes'] / 1e9:.1f}, {graph['l2_bytes'] / 1e9:.1f}",
            f"{graph['flops'] / 1e9:.0f}",
            "–" if waits is None else f"{1e3 * waits:.1f}",
        ]
        for gpu in gpus:
            for mode in ("eager", "in a graph"):
                own, other = row[mode]["device_seconds"][gpu], official[mode]["device_seconds"][gpu]
                if mode == "eager" and waits is not None:
                    own, other = max(own, waits), max(other, host["official"])
                cells.append(f"{1e3 * own:.1f} ({own / other:.2f})")
        lines.append([f"**{row['peer']}**" if row["peer"] == "svf_fast" else row["peer"], *cells])
    head = ["", "", "launches eager, graph", "GB of DRAM, L2", "GFLOP", "host, ms"]
    head += [f"{gpu}, {mode}" for gpu in gpus for mode in ("eager, ms", "graph, ms")]
    note = (
        "Predicted, not measured, from the launches of the code (ratio to official): the longest "
        "of DRAM, L2 and products for each kernel at what its kind attained on an H200 (4.3 TB/s, "
        "798 TFLOP/s; H100 3.0 TB/s, A100 in proportion), its start, and 1.75 µs from kernel to "
        f"kernel, assumed. Weights: {weights_of(result['settings'])}. "
    )
    if host:
        note += (
            "Eager: the longer of device and host; the host as `host.json` has it on its machine, "
            "in float32 and without the launcher in C."
        )
    else:
        note += "Eager without what the host takes, which is not measured."
    if unknown:
        note += f" Counted by their operands alone: {', '.join(sorted(unknown))}."
    return f"{table(head, lines)}\n\n{note}"


def weights_of(settings: Result) -> str:
    """Return the name of the weights."""
    return "random" if settings["weights"] == "none" else Path(settings["weights"]).stem


def host_table(result: Result, _: Results | None = None) -> str:
    """Format medians and quartiles in µs, and the ratio of ours to the paper's layers."""
    peers = list(dict.fromkeys(row["peer"] for row in result["groups"][0]["rows"]))
    head = ["", "S changed before", *(f"{name}, µs" for name in peers), "svf_fast ÷ official"]
    lines = []
    for group in result["groups"]:
        for changed in (True, False):
            by_name = {r["peer"]: r for r in group["rows"] if r["changed"] == changed}
            cells = [
                f"{1e6 * row['median']:.0f} ({1e6 * row['low']:.0f}-{1e6 * row['high']:.0f})"
                for row in by_name.values()
            ]
            ratio = by_name["svf_fast"]["median"] / by_name["official"]["median"]
            lines.append([group["name"], "yes" if changed else "no", *cells, f"{ratio:.2f}"])
    note = "Forward and backward: medians and quartiles, the peers in turns."
    return f"{table(head, lines)}\n\n{note}"


def host_seconds(results: Results) -> dict[str, float]:
    """Return by peer the median host time of a step on the GPU's path, S changed before."""
    for result in results.of("host"):
        for group in result["groups"]:
            if group["path"] == "GPU path" and group["what"] == "layers 2-4":
                return {row["peer"]: row["median"] for row in group["rows"] if row["changed"]}
    return {}


def measured(name: str, settings: Result, results: Results) -> float | None:
    """Return the median seconds of a step of layers 2-4 with these settings, raced on a GPU."""
    for result in results.of("backbone", cuda=True, **_same(settings)):
        taken = median(rows(result).get(name))
        if taken is not None:
            return taken
    return None


def replay(name: str, settings: Result, results: Results) -> float | None:
    same = {key: value for key, value in _same(settings).items() if key != "batch"}
    for result in results.of("replay", cuda=True, **same):
        for group in result["groups"]:
            if group["batch"] == settings["batch"]:
                return median({row["peer"]: row for row in group["rows"]}.get(name))
    return None


def of_roofline(name: str, taken: float | None, settings: Result, results: Results) -> float | None:
    """Return the roofline's seconds at the measured ceilings over the seconds taken."""
    if taken is None or results.facts is None:
        return None
    step = passes(settings_of(settings), name)
    return seconds(step, measured_ceilings(results.facts)) / taken


def profile_table(result: Result, _: Results) -> str:
    """Format a line per peer and batch, then the longest kernels of each."""
    lines, parts = [], []
    for group in result["groups"]:
        for row in group["rows"]:
            cells = [statistics.median(row["seconds"]), statistics.median(row["host_seconds"])]
            cells.append(row["kernel_seconds"])
            shown = [f"{1e3 * value:.2f}" for value in cells]
            lines.append([row["peer"], group["name"], *shown, f"{row['launches']:.0f}"])
            kernels = [
                [f"`{kernel_name(kernel['name'])}`", f"{kernel['launches']:.1f}", f"{taken:.0f}"]
                for kernel in row["kernels"][:KERNELS]
                for taken in [kernel["microseconds"]]
            ]
            head = [f"{row['peer']}, {group['name']}", "launches", "µs a step"]
            parts.append(table(head, kernels))
    head = ["", "", "step, ms", "host, ms", "kernels, ms", "launches"]
    note = (
        "Host: until the step is queued. Kernels: the sum of their times, one after another. "
        "Launches: with memsets, and those that change S."
    )
    return "\n\n".join([table(head, lines), note, *parts])


def kernel_name(name: str) -> str:
    """Shorten a kernel's name: without common parts, and no longer than 90 characters."""
    for common in (
        "void ", "(anonymous namespace)::", "at::native::", "gpu_kernel_impl_nocast<",
        "c10::BFloat16, ",
    ):  # fmt: skip
        name = name.replace(common, "")
    return name[:90]


def train_table(result: Result, _: Results) -> str:
    lines = []
    for group in result["groups"]:
        rows = group["rows"]
        for row in rows:
            if "step_seconds" not in row:
                cells = [row.get("reason", "not finished"), *["–"] * 4]
            else:
                theirs = [
                    other["step_seconds"]
                    for other in rows
                    if (other["regime"], other["mode"]) == ("paper's layers", "eager")
                    and "step_seconds" in other
                ]
                taken = row["step_seconds"]
                cells = [
                    f"{1e3 * taken:.1f}",
                    f"{taken / theirs[0]:.2f}" if theirs else "–",
                    f"{row['images_per_second']:.0f}",
                    f"{row['peak_bytes'] / GIB:.2f}",
                    f"{row['saved_bytes'] / GIB:.2f}",
                ]
            name = ", ".join([row["regime"], row["mode"], *row.get("told", ())])
            lines.append([name, group["name"], *cells])
    head = ["", "", "step, ms", "÷ paper's layers, eager", "images/s", "peak GiB", "saved GiB"]
    settings = result["settings"]
    batch = ", ".join(f"{count} at {size} px" for size, count in settings["batch"].items())
    photos = "rendered photos" if settings["photos"] == "none" else "Pascal-5i in part"
    note = (
        f"{settings['backbone']}, bfloat16, episodes of a step: {batch}; {photos}. Step: median "
        "of the last steps, without loading; images per second with it. Peak: of the whole run."
    )
    return f"{table(head, lines)}\n\n{note}"


def settings_of(given: Result) -> Settings:
    """Read settings from those of a results file."""
    return Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})


def _same(settings: Result) -> Result:
    keys = ("size", "batch", "dtype", "channels_last", "stride_on", "width", "backbone")
    return {key: settings[key] for key in keys}


def _share(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.0f} %"


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join([_line(head), rule, *(_line(cells) for cells in lines)])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


TABLES: dict[str, Callable[[Result, Results], str]] = {
    "facts": facts_table,
    "elementwise": elementwise_table,
    "profile": profile_table,
    "replay": replay_table,
    "roofline": roofline_table,
    "train": train_table,
    "predictions": predictions_table,
    "host": host_table,
}
