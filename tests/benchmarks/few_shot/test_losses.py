"""Losses of runs beside each other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.few_shot.losses import main, table


def run(folder, losses):
    folder.mkdir()
    rows = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses, 1))
    (folder / "train.csv").write_text(f"step,loss\n{rows}")
    (folder / "validation.csv").write_text("step,miou\n")
    return folder


def test_writes_table_picture_and_numbers(tmp_path, capsys):
    exact = run(tmp_path / "a", np.linspace(1, 0.5, 60))
    other = run(tmp_path / "b", np.linspace(1, 0.5, 60) + (np.arange(60) >= 20) * 0.005)
    assert main([f"exact={exact}", f"8 bits={other}", "--name=two", f"--results={tmp_path}"]) == 0
    first, second = capsys.readouterr().out.splitlines()[2:4]
    assert first == "| exact | 0.7076 | – | – | 0.0000 |"
    assert second.split(" | ")[2:4] == ["21", "–"]
    assert (tmp_path / "two.md").is_file() and (tmp_path / "two.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "two.json").read_text())["losses"]["8 bits"]) == 60


def test_wants_runs_of_one_length(tmp_path):
    runs = [f"{n}={run(tmp_path / str(n), [1.0] * n)}" for n in (20, 30)]
    with pytest.raises(SystemExit):
        main([*runs, "--name=two", f"--results={tmp_path}"])
    assert not (tmp_path / "two.json").exists()


def test_a_difference_counts_from_the_step_after_it():
    losses = {"a": np.zeros(60), "b": np.where(np.arange(60) == 4, 0.02, 0.0)}
    assert "| b | 0.0000 | 5 | 5 | 0.0003 |" in table(losses)
