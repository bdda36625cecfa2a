"""The table of the main job says what its runs did."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks.few_shot import regimes, training
from benchmarks.gpu.processes import Ended
from fss.runs.folder import RunFolder

# mIoU of the two episode seeds by (regime, training seed)
SCORES = {("freeze", 1): [0.1, 0.2], ("freeze", 2): [0.2, 0.2], ("svf", 1): [0.2, 0.3]}
SCORES[("svf", 2)] = [0.3, 0.4]


def result(settings: dict[str, str]) -> dict:
    values = SCORES[settings["regime.name"], int(settings["seed"])]
    score = {"values": values, "mean": sum(values) / len(values)}
    return {
        "test": {"miou": score, "fb_iou": score, "episodes_per_seed": 7, "seeds": [1, 2]},
        "saved_bytes_per_step": 3 * 2**20,
        "step_seconds_median": 0.5,
        "peak_memory_bytes": 9,
        "parameters": {"trained_backbone": 1234 * (settings["regime.name"] == "svf")},
        "config": {
            "model": {"backbone": "resnet50"},
            "data": {"shots": 1, "size": 129},
            "batch_size": 4,
            "steps": 10,
        },
        "machine": {"gpu": None, "cpu": "a processor", "threads": 1},
        "versions": {"torch": "2"},
        "commit": "abc",
    }


@pytest.fixture
def tabulated(monkeypatch, tmp_path):
    def run(*arguments: str) -> tuple[str, dict]:
        name = tmp_path / "results" / "table"
        monkeypatch.setattr(
            regimes, "make_run", lambda config, folder, settings, *_: result(settings)
        )
        command = ["regimes.py", "--config", "demo", "--folds", "0", "--out", str(tmp_path)]
        command += ["--regimes", "freeze", "svf", "--results", str(name), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert regimes.main() == 0
        assert name.with_suffix(".png").stat().st_size > 1000
        return name.with_suffix(".md").read_text(), json.loads(
            name.with_suffix(".json").read_text()
        )

    return run


def test_several_seeds_are_averaged_and_paired(tabulated):
    table, summary = tabulated("--seeds", "1", "2")
    freeze, svf = summary["rows"]
    assert freeze["miou"]["values"] == pytest.approx([0.15, 0.2])
    assert svf["miou"]["mean"] == pytest.approx(0.3)
    rows = [line for line in table.splitlines() if line.startswith("| svf")]
    assert "| 1,234 | 30.0 | **30.0** ± 7.1 | +12.5 ± 3.5 |" in rows[0]
    assert "7 novel episodes for each of 2 seeds" in table and "2 training seeds" in table


def test_of_one_seed_the_spread_is_that_of_the_episodes(tabulated):
    table, _ = tabulated("--seeds", "1")
    assert "| 15.0 | **15.0** ± 7.1 | – |" in table and "deviation over them" in table


def test_other_data_have_a_column(tabulated, monkeypatch, tmp_path):
    asked = []

    def evaluated(command):
        folder = tmp_path / command[4]
        asked.append(command[3:])
        folder.mkdir(parents=True)
        score = 0.1 if "freeze" in folder.name else 0.2
        content = {"source": "coco", "fold": 3, "episodes_per_seed": 5, "seeds": [1]}
        content |= {"miou_sampled": {"mean": score}, "episodes": {"cat": 5, "dog": 0}}
        (folder / "eval_coco_fold3.json").write_text(json.dumps(content))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(training.subprocess, "run", evaluated)
    arguments = ("--seeds", "1", "--elsewhere", "--source coco --fold 3 --seeds '[1, 2]'")
    table, summary = tabulated(*arguments)
    assert [row["elsewhere"]["mean"] for row in summary["rows"]] == [0.1, 0.2]
    assert "| mIoU, other data |" in table and "| 20.0 ± 0.0 |" in table
    assert "coco, fold 3, 5 episodes for each of 1 seeds; mean over the 1 classes" in table
    assert asked[0][2:] == ["--source", "coco", "--fold", "3", "--seeds", "[1, 2]"]
    assert tabulated(*arguments)[0] == table
    assert len(asked) == 2  # a score that is there is kept


def test_an_evaluation_that_fails_ends_it(monkeypatch, tmp_path):
    failed = type("Done", (), {"returncode": 2})
    monkeypatch.setattr(training.subprocess, "run", lambda command: failed)
    with pytest.raises(SystemExit, match="the evaluation ended with 2"):
        training.score_elsewhere(tmp_path, "--source coco --fold 0")


def test_folds_with_all_their_runs_are_tabulated(tabulated, monkeypatch, tmp_path, capsys):
    """Where time was too short for the others, another call goes on."""

    def stopped(config, folder, settings, *_):
        if settings["data.fold"] == "2" and settings["regime.name"] == "svf":
            return None
        return result(settings)

    monkeypatch.setattr(regimes, "make_run", stopped)
    arguments = ["regimes.py", "--config", "demo", "--folds", "0", "2", "--seeds", "1"]
    arguments += ["--regimes", "freeze", "svf", "--seconds", "60", "--at-once", "2"]
    arguments += ["--out", str(tmp_path), "--results", str(tmp_path / "table")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert regimes.main() == 1
    assert "baseline-svf-fold2-seed1: not ended" in capsys.readouterr().out
    assert "| fold 0 | mIoU, novel" in (tmp_path / "table.md").read_text()


def test_a_run_that_the_time_stops_is_gone_on_with(monkeypatch, tmp_path):
    """`run` sends SIGTERM at the limit, upon which `fss train` saves; see their own tests."""
    folder, asked = tmp_path / "run", []
    monkeypatch.setattr(RunFolder, "entries", ("steps",))

    def stopped(command, log, limit, grace):
        asked.append((command, limit, grace))
        folder.mkdir(exist_ok=True)
        (folder / "last.pt").touch()
        return Ended(None, 50.0)

    def ended(command, log, limit, grace):
        asked.append((command, limit, grace))
        (folder / "result.json").write_text('{"steps": 2}')
        return Ended(0, 1.0)

    deadline = time.monotonic() + 50
    monkeypatch.setattr(training, "run", stopped)
    assert training.make_run("demo", folder, {"steps": "2"}, deadline=deadline) is None
    monkeypatch.setattr(training, "run", ended)
    assert training.make_run("demo", folder, {"steps": "2"}, deadline=deadline) == {"steps": 2}
    (first, limit, grace), (second, *_) = asked
    assert first[-1] == "--overwrite" and second[-1] == "--resume" and first[:-1] == second[:-1]
    assert 45 < limit <= 50 and grace == training.SAVING
