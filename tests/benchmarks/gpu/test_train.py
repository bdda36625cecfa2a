"""The table of `fss train` on a GPU: its commands are right, and a row that is there is kept."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import render
from benchmarks.gpu import tables, train
from fss.cli import build_parser

FOUND = {"step_seconds": 0.1, "images_per_second": 80.0, "peak_bytes": 2**30, "saved_bytes": 2**29}


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Call the module with a stand-in for a run; return its status and the rows it asked for."""

    def call(measure, *arguments: str) -> tuple[int, list[train.Row]]:
        asked = []

        def measured(row, options, runs):
            asked.append(row)
            return measure(row)

        monkeypatch.setattr(train, "_measured", measured)
        command = ["gpu_train.py", "--device", "cpu", "--results", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return train.main(), asked

    return call


def rows(folder) -> dict[tuple, dict]:
    groups = json.loads((folder / "train.json").read_text())["groups"]
    return {tuple(r[f] for f in train.Row._fields): r for g in groups for r in g["rows"]}


@pytest.mark.parametrize("photos", ["none", "somewhere"])
def test_every_command_is_one_that_fss_takes(monkeypatch, tmp_path, photos):
    monkeypatch.setattr(train, "RENDERED", 2)
    command = ["gpu_train.py", "--device", "cpu", "--results", str(tmp_path), "--photos", photos]
    monkeypatch.setattr(sys, "argv", command)
    options = train._arguments()
    planned = train._rows(options)
    assert len(planned) == len(set(planned)) == 4 * 2 * 4
    strategies = []
    for row in planned:
        parsed = build_parser().parse_args(train._command(row, options, tmp_path / "run")).train
        assert (parsed.data.size, parsed.data.shots) == (row.size, row.shots)
        assert parsed.precision == "bf16-mixed" and parsed.model.backbone == "resnet50"
        assert parsed.graph == {"eager": "off", "captured": "auto"}[row.mode]
        strategies.append((parsed.regime.name, parsed.regime.strategy))
    assert set(strategies) == {
        ("svf", "auto"),
        ("svf", "reference"),
        ("full", "auto"),
        ("freeze", "auto"),
    }


def test_a_second_call_runs_what_is_missing(called, tmp_path):
    def killed(row):
        if row.regime == "full":
            raise KeyboardInterrupt
        return dict(FOUND)

    with pytest.raises(KeyboardInterrupt):
        called(killed, "--cases", "473x1")
    assert len(rows(tmp_path)) == 3 and rows(tmp_path)[473, 1, "full", "eager"]["unfinished"]
    status, asked = called(lambda row: dict(FOUND), "--cases", "473x1")
    assert status == 0 and len(asked) == 6
    # what may have ended the other call comes last
    assert [row.regime for row in asked[:2]] == ["freeze", "svf"] and asked[-1].regime == "full"
    assert all("step_seconds" in row for row in rows(tmp_path).values())
    assert called(lambda row: dict(FOUND), "--cases", "473x1") == (0, [])


def test_no_run_begins_after_the_time(called, tmp_path):
    assert called(lambda row: dict(FOUND), "--seconds", "0") == (1, [])


def test_a_run_that_fails_says_why_and_the_others_go_on(called, tmp_path):
    def failing(row):
        if row.regime == "full":
            raise RuntimeError("no memory for that\nmore")
        return dict(FOUND) | {"step_seconds": 0.2 if row.regime == "paper's layers" else 0.1}

    status, asked = called(failing, "--cases", "473x1")
    assert status == 1 and len(asked) == 8
    result = json.loads((tmp_path / "train.json").read_text())
    table = tables.train_table(result, tables.Results(tmp_path))
    assert "| svf, eager | 473 px, 1-shot | 100.0 | 0.50 | 80 | 1.00 | 0.50 |" in table
    assert "| full, captured | 473 px, 1-shot | RuntimeError: no memory for that |" in table
    result["groups"][0]["rows"][4]["told"] = ["graph: steps run eagerly, because"]
    told = tables.train_table(result, tables.Results(tmp_path))
    assert "| svf, captured, graph: steps run eagerly, because | 473 px" in told
    assert "8 at 473 px" in table and "rendered photos" in table
    assert render.markdown(tmp_path / "train.json").startswith(table)


def test_an_error_of_the_users_is_told(monkeypatch, tmp_path):
    """The real command, which refuses a size."""
    command = ["gpu_train.py", "--device", "cpu", "--results", str(tmp_path), "--batch", "1"]
    command += ["--cases", "66x1", "--regimes", "svf", "--photos", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert train.main() == 1
    assert all("data.size" in row["reason"] for row in rows(tmp_path).values())
