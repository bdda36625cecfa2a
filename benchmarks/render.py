"""Tables and the picture of the race, from the results: results/*.md, race.png, docs/benchmarks.md.

python -m benchmarks.render
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.files import RESULTS
from benchmarks.gpu import figures
from benchmarks.gpu.tables import TABLES, Results, median, table, weights_of
from benchmarks.race.picture import draw
from fss.files import atomic_write

MIB = 2**20
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- race: from benchmarks/render.py -->", "<!-- end of race -->"
FIGURES = "figures.md"
PAGE_RESULTS = ("backbone", "step")
BASES = ("official", "frozen bound")

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[RESULTS], help="folders of results, each alone"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="of which a block is replaced")
    options = parser.parse_args()
    for folder in options.results:
        render(folder, options.page)
    return 0


def render(folder: Path, page: Path) -> None:
    """Write the tables and pictures of a folder, and the page if it shows them."""
    for path in sorted(folder.glob("*.json")):
        if _raced(path):
            _write(path.with_suffix(".md"), markdown(path))
            print(path.with_suffix(".md"))
    _write(folder / FIGURES, figures.markdown(Results(folder)))
    print(folder / FIGURES)
    on_gpu = [path for path in sorted(folder.glob("*.json")) if _on_gpu(path)]
    if on_gpu:
        picture = folder / "race-gpu.png"
        draw([json.loads(path.read_text()) for path in on_gpu], picture)
        print(picture)
    paths = [folder / f"{name}.json" for name in PAGE_RESULTS]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        print(f"no {' or '.join(PAGE_RESULTS)} among {folder}: page left as it is")
        return
    picture = folder / "race.png"
    draw([json.loads(path.read_text()) for path in paths], picture)
    print(picture)
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: expected the lines {BEGIN} and {END}, found not both")
    block = _block(paths, picture, page)
    _write(page, f"{before}{begin}\n{block}{end}{after}")
    print(page)


def markdown(path: Path) -> str:
    """Format the table of one file of results, with its origin."""
    result = json.loads(path.read_text())
    if result["level"] in TABLES:
        shown = TABLES[result["level"]](result, Results(path.parent))
        return f"{shown}\n\n{_machine(result)}\n"
    if result["level"] == "loading":
        # needs packages that a machine for races may not have
        from benchmarks.few_shot import loading

        return f"{loading.table(result)}\n\n{_machine(result)}\n"
    if result["level"] == "memory":
        return f"{_memory(result['groups'])}\n\n{_memory_origin(result)}\n"
    groups = result["groups"]
    if len(groups) > 3:
        parts = [_matrix(groups)]
    else:
        parts = []
        for group in groups:
            name = f"**{group['name']}**\n\n" if len(groups) > 1 else ""
            parts.append(name + _table(group["rows"]))
    return "\n\n".join([*parts, f"{_origin(result)} {LEGEND}\n{_machine(result)}"]) + "\n"


def ratio(row: Row, rows: list[Row], base: str) -> float | None:
    """Return the median over that of peer `base` in the same run."""
    bases = [median(other) for other in rows if other["peer"] == base]
    own = median(row)
    return own / bases[0] if own is not None and bases and bases[0] is not None else None


def spread(row: Row) -> float:
    """Return the interquartile range, in seconds."""
    if len(row["seconds"]) < 2:
        return 0.0
    low, _, high = statistics.quantiles(row["seconds"], n=4, method="inclusive")
    return high - low


def _table(rows: list[Row]) -> str:
    bases = [base for base in BASES if any(row["peer"] == base for row in rows)]
    head = ["", "forward + backward, ms", *(f"÷ {base}" for base in bases)]
    head += ["saved MiB", "peak MiB", "resident MiB", "error"]
    lines = []
    for row in rows:
        name = f"**{row['peer']}**" if row["peer"] == "svf_fast" else row["peer"]
        cells = [name]
        seconds = median(row)
        if seconds is None:
            cells.append(_why_not(row))
        else:
            cells.append(f"{_figure(1e3 * seconds)} ± {_figure(1e3 * spread(row))}")
        cells += [_optional(ratio(row, rows, base), ".2f") for base in bases]
        cells += [_mib(row.get(key)) for key in ("saved_bytes", "peak_bytes", "resident_bytes")]
        of_block = f" ({row['block_error']:.0e})" if "block_error" in row else ""
        cells.append(_optional(row.get("error"), ".0e") + of_block)
        lines.append(cells)
    return table(head, lines)


def _matrix(groups: list[dict]) -> str:
    """Format a row per group, a column per peer: time (ratio to official), saved and peak bytes."""
    peers = list(dict.fromkeys(row["peer"] for group in groups for row in group["rows"]))
    lines = []
    ratios: dict[str, list[float]] = {peer: [] for peer in peers}
    for group in groups:
        cells = [group["name"]]
        rows = {row["peer"]: row for row in group["rows"]}
        for peer in peers:
            row = rows.get(peer, {"reason": "not run"})
            seconds = median(row)
            if seconds is None:
                cells.append(_why_not(row))
                continue
            of_official = ratio(row, group["rows"], "official")
            if of_official is not None:
                ratios[peer].append(of_official)
            cells.append(
                f"{1e3 * seconds:.1f} ± {1e3 * spread(row):.1f} ({_optional(of_official, '.2f')}), "
                f"{_mib(row['saved_bytes'])} / {_mib(row.get('peak_bytes'))} MiB"
            )
        lines.append(cells)
    means = [f"{statistics.geometric_mean(r):.2f}" if r else "–" for r in ratios.values()]
    lines.append(["geometric mean of the ratios", *means])
    text = "Forward and backward in ms ± interquartile range (ratio to official), saved / peak."
    return f"{table(['', *peers], lines)}\n\n{text}"


def _memory(groups: list[dict]) -> str:
    """Format a row per peer, a column per figure; a row per figure if there are more of them.

    A cell has the saved MiB, and the peak if it was measured.
    """
    peers = list(dict.fromkeys(row["peer"] for group in groups for row in group["rows"]))
    lines = [["saved MiB", *(group["name"] for group in groups)]]
    for peer in peers:
        cells = [f"**{peer}**" if peer == "svf_fast" else peer]
        for group in groups:
            row = next((row for row in group["rows"] if row["peer"] == peer), {})
            cell = _mib(row.get("saved_bytes"))
            if "peak_bytes" in row:
                cell += f" (peak {_mib(row['peak_bytes'])})"
            elif "peak_reason" in row:
                cell += f" (peak: {row['peak_reason']})"
            cells.append(cell)
        lines.append(cells)
    if len(groups) > len(peers):
        lines = [list(cells) for cells in zip(*lines, strict=True)]
    return table(lines[0], lines[1:])


def _memory_origin(result: dict) -> str:
    counted = {
        row["peer"]: row["counted_on"] for group in result["groups"] for row in group["rows"]
    }
    if set(counted.values()) == {"shapes"}:
        how = (
            "All counted on shapes, for a CPU. A training step with dropout; base learners with 60 "
            "base classes. Freeze and full as `fss train` runs them; official: the paper's layers "
            "and the dense prior. "
        )
    else:
        how = "svf_fast and the prior mask are counted on a forward pass, the others on shapes. "
    rows = [row for group in result["groups"] for row in group["rows"]]
    measured = any("peak_bytes" in row for row in rows)
    peak = "Peak: of a step, above what was resident before. " if measured else ""
    return (
        "One image or episode. Saved: what autograd keeps from the forward pass, parameters left "
        "out; bfloat16 by autocast, its casts of weights counted where autograd keeps them. "
        f"{how}{peak}"
        f"Weights: {weights_of(result['settings'])}.\n{_machine(result)}"
    )


def _machine(result: dict) -> str:
    machine = result["machine"]
    gpu = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{gpu}, torch {result['versions']['torch']}, commit {result['commit']}, "
        f"{result['date']}, `{result['command']}`."
    )


def _origin(result: dict) -> str:
    settings = result["settings"]
    what = [f"{settings['size']} px", f"batch {settings['batch']}", settings["dtype"]]
    if result["level"] == "step":
        what.insert(1, f"{settings['shots']}-shot")
    if settings["channels_last"]:
        what.append("channels_last")
    if result["level"] in ("block", "backbone", "step"):
        what.append(f"weights {weights_of(settings)}")
    rounds = max(
        (len(row.get("seconds", ())) for group in result["groups"] for row in group["rows"]),
        default=0,
    )
    return (
        f"{result['title']}: {', '.join(what)}. Median ± interquartile range of {rounds} rounds "
        "in turns."
    )


LEGEND = (
    "Saved: what autograd keeps from the forward pass, parameters left out. Peak: of the process, "
    "on a GPU of its tensors, above what was resident before the step. Resident: the tensors that "
    "live between steps. "
    "Error: of the gradients, relative to the official chain in float64, and in 16 bits in "
    "brackets the largest of a block alone, which decides where many layers amplify it; a row that "
    "fails there has no speed."
)


def _block(paths: list[Path], picture: Path, page: Path) -> str:
    """Format the part of the page between the two lines."""
    parts = [f"![saved memory against time, a dot a peer]({_relative(picture, page)})", ""]
    for path in paths:
        result = json.loads(path.read_text())
        parts += [_table(result["groups"][0]["rows"]), "", _origin(result), _machine(result), ""]
    tables = [path for path in sorted(picture.parent.glob("*.md")) if _raced(path)]
    tables = [path for path in tables if path.with_suffix(".json") not in paths]
    tables.append(picture.with_name(FIGURES))
    links = ", ".join(f"[{path.stem}]({_relative(path, page)})" for path in tables)
    return "\n".join([*parts, LEGEND + (f" More tables: {links}." if links else ""), ""])


def _raced(table: Path) -> bool:
    results = table.with_suffix(".json")
    return results.is_file() and "level" in json.loads(results.read_text())


def _on_gpu(results: Path) -> bool:
    """Return whether they are a race on a GPU, of a plotted level, with a time of svf_fast."""
    result = json.loads(results.read_text())
    if result.get("level") not in PAGE_RESULTS or result["settings"]["device"] == "cpu":
        return False
    rows = result["groups"][0]["rows"]
    return any(row["peer"] == "svf_fast" and row.get("seconds") for row in rows)


def _relative(path: Path, page: Path) -> str:
    """Return the path as a link in the page."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _why_not(row: Row) -> str:
    if "reason" in row:
        return f"– ({row['reason']})"
    return "no speed: not exact" if row.get("exact") is False else "–"


def _mib(value: int | None) -> str:
    return "–" if value is None else _figure(value / MIB)


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    sys.exit(main())
