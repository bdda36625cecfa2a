"""The tables in benchmarks/results are what render.py makes of the files beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import render
from benchmarks.files import RESULTS
from benchmarks.gpu import figures, tables
from fss.config import METHODS
from fss.paper import methods
from fss.settings import flat_settings, read_settings

RACED = [path for path in sorted(RESULTS.glob("*.json")) if render._raced(path)]


@pytest.mark.parametrize("path", RACED, ids=lambda path: path.stem)
def test_table_is_up_to_date(path: Path) -> None:
    assert render.markdown(path) == path.with_suffix(".md").read_text()


def test_figures_are_up_to_date() -> None:
    assert figures.markdown(tables.Results(RESULTS)) == (RESULTS / render.FIGURES).read_text()


def test_the_page_of_methods_has_the_memory_that_was_counted() -> None:
    result = json.loads((RESULTS / "memory-methods.json").read_text())
    rows = []
    for group in result["groups"]:
        name, *_, dtype = group["name"].split(", ")
        saved = {row["peer"]: row["saved_bytes"] / 2**30 for row in group["rows"]}
        frozen, paper, full, ours = (saved[n] for n in ("freeze", "official", "full", "svf_fast"))
        share = (ours - frozen) / (paper - frozen)
        if dtype == "float32":
            cells = (
                f"{frozen:.2f} | {paper:.2f} | {full:.2f} | **{ours:.2f}** | {100 * share:.0f} %"
            )
            rows.append(f"| `{name}` | {cells} |")
    assert len(rows) == len(METHODS)
    assert "\n".join(rows) in (render.PAGE.with_name("methods.md")).read_text()


SIDE_BY_SIDE = [RESULTS / f"methods-{data}.json" for data in ("clothing", "pascal")]


@pytest.mark.parametrize("path", SIDE_BY_SIDE, ids=lambda path: path.stem)
def test_the_table_of_methods_side_by_side_is_up_to_date(path: Path) -> None:
    table = "\n".join(methods.markdown(json.loads(path.read_text()))) + "\n"
    assert table == path.with_suffix(".md").read_text()


def test_the_methods_on_pascal_ran_with_the_settings_that_are_kept() -> None:
    ran = json.loads(SIDE_BY_SIDE[1].read_text())["settings"]
    path = Path(render.__file__).parent / "few_shot" / "methods-pascal.yaml"
    kept = flat_settings(read_settings(path))
    kept.pop("optimizer.backbone_lr")  # of the first run's regime, which has no use for it
    assert kept == {name: ran[name] for name in kept}


def test_the_page_of_methods_has_what_they_scored() -> None:
    found = [
        {(row["method"], row["regime"]): row for row in json.loads(path.read_text())["rows"]}
        for path in SIDE_BY_SIDE
    ]
    lines = []
    for method in METHODS:
        cells = []
        for rows in found:
            frozen, svf = (rows.get((method, name), {}) for name in ("freeze", "svf_layers3-4"))
            cells += [f"{row['miou']:.1f}" if "miou" in row else "–" for row in (frozen, svf)]
            shown = "{:+.1f} ({:+.1f} to {:+.1f})".format(*svf.get("difference", [0, 0, 0]))
            cells.append(shown if "difference" in svf else "")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    assert "\n".join(lines) in render.PAGE.with_name("methods.md").read_text()
    matched = " and ".join(f"{rows['matching', '']['miou']:.1f}" for rows in found)
    assert f"without training, has {matched}" in render.PAGE.with_name("methods.md").read_text()
