"""The tables in benchmarks/results are what render.py makes of the files beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import render
from benchmarks.files import RESULTS
from benchmarks.gpu import figures, tables

RACED = [path for path in sorted(RESULTS.glob("*.json")) if render._raced(path)]


@pytest.mark.parametrize("path", RACED, ids=lambda path: path.stem)
def test_table_is_up_to_date(path: Path) -> None:
    assert render.markdown(path) == path.with_suffix(".md").read_text()


def test_figures_are_up_to_date() -> None:
    assert figures.markdown(tables.Results(RESULTS)) == (RESULTS / render.FIGURES).read_text()
