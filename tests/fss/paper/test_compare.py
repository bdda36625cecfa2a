"""Our numbers beside the paper's, by fold and for the mean."""

from __future__ import annotations

import pytest

from fss.paper.compare import compared_rows, markdown
from fss.paper.plan import PlannedRun
from fss.paper.runs import origin
from fss.paper.tables import default_folder, load_table
from fss.runs.folder import RunFolder

T16, T3, T9, T15 = (load_table(name, default_folder()) for name in ("T16", "T3", "T9", "T15"))


def scored(table, number, miou, tmp_path):
    """The rows of the result where one row, from 1, has these scores by fold."""
    row = table.rows[number - 1]
    runs = [PlannedRun(row, 1, fold, RunFolder(tmp_path)) for fold in range(4)]
    for fold, score in miou.items():
        runs[fold].test = {table.metric: {"mean": score / 100, "std": None}}
    (compared,) = compared_rows(table, runs)
    return compared


def line(table, compared) -> str:
    result = {"table": table.name, "title": table.title, "metric": table.metric}
    result |= {"rows": [compared], "scaled_down": False, "settings": {}, "source": None}
    result |= {"base_learners": {}, "command": "fss"}
    return next(text for text in markdown(result) if text.startswith(f"| {compared['label']}"))


def test_a_single_fold_has_its_difference(tmp_path):
    compared = scored(T16, 4, {2: 68.99}, tmp_path)
    assert compared["folds_difference"] == {2: pytest.approx(1.0)}
    assert compared["difference"] == pytest.approx(1.0)
    assert compared["paper_of_these_folds"] == 67.99
    assert line(T16, compared) == (
        "| S (SVF) | 1 | – / 67.42 | – / 71.57 | 68.99 / 67.99 (+1.00) | – / 61.57 | **68.99** | "
        "67.14 | +1.00 |"
    )


def test_all_folds_have_theirs_and_the_mean_is_the_papers(tmp_path):
    compared = scored(T16, 1, {0: 65.6, 1: 70.0, 2: 64.12, 3: 60.0}, tmp_path)
    assert compared["folds_difference"] == pytest.approx({0: 0, 1: -0.28, 2: 0, 3: -0.27})
    # 65.07 as printed, not the mean of the printed folds
    assert compared["difference"] == pytest.approx(64.93 - 65.07)
    assert "70.00 / 70.28 (-0.28)" in line(T16, compared)


@pytest.mark.parametrize(("table", "number"), [(T3, 2), (T9, 6), (T9, 7)])
def test_where_the_paper_has_no_folds_there_is_the_mean_alone(table, number, tmp_path):
    one = scored(table, number, {0: 50.0}, tmp_path)
    assert one["folds_difference"] == {} and one["difference"] is None
    assert "50.00 / – | – / –" in line(table, one)
    four = scored(table, number, dict.fromkeys(range(4), 50.0), tmp_path)
    assert four["folds_difference"] == {}
    assert four["difference"] == pytest.approx(50 - table.rows[number - 1].paper[1].mean)


def test_what_is_quoted_has_the_papers_numbers(tmp_path):
    compared = scored(T15, 3, {}, tmp_path)
    assert compared["mean"] is None and compared["difference"] is None
    assert line(T15, compared).startswith("| PGNet | 1 | – / 56.00 | – / 66.90 |")


@pytest.mark.parametrize(("commit", "end"), [("a1b2", ", commit a1b2."), (None, ".")])
def test_outside_of_git_a_table_names_no_commit(commit, end):
    machine = {"gpu": None, "cpu": "a CPU", "threads": 2}
    source = {"machine": machine, "versions": {"torch": "2.13"}, "commit": commit}
    lines = [*origin({"source": source, "command": "fss compare bam"})]
    assert lines == ["", f"a CPU, 2 threads, torch 2.13{end}", "", "    fss compare bam"]
