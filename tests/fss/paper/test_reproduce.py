from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fss.paper.runs
from fss.cli import main
from fss.training.base_learner import BaseTrainer
from fss.training.trainer import Trainer

# Smaller than scaled down: seconds for a table.
SETTINGS = {
    "data": {"size": 33, "min_area": 0.01},
    "model": {"width": 4, "weights": "none", "channels": 8},
    "steps": 3,
    "batch_size": 2,
    "validation_every": 2,
    "validation_episodes": 3,
    "test_episodes": 4,
    "test_seeds": [1, 2],
    "pictures": 0,
    "log_every": 1,
    "accelerator": "cpu",
}


@pytest.fixture
def command(tmp_path):
    """Runs `fss reproduce` on a tiny network; returns the exit status."""
    path = tmp_path / "tiny.yaml"

    def run(*arguments: str, scale_down: bool = True, **settings) -> int:
        path.write_text(yaml.safe_dump(SETTINGS | settings))
        options = ["--settings", str(path), "--out", str(tmp_path / "out")]
        options += ["--scale-down"] if scale_down else []
        return main(["reproduce", *arguments, *options])

    return run


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The folders of the runs that are trained, as they begin."""
    folders: list[str] = []
    original = fss.paper.runs.train

    def note(config, **options):
        folders.append(f"{Path(config.out).parent.name} {options['resume']}")
        return original(config, **options)

    monkeypatch.setattr(fss.paper.runs, "train", note)
    return folders


def result(tmp_path: Path, table: str) -> dict:
    return json.loads((tmp_path / "out" / "scaled-down" / f"{table}.json").read_text())


def test_two_rows_from_nothing_to_the_comparison(command, trained, tmp_path, capsys):
    assert command("T16", "--rows", "2", "r50-baseline-svf", "--folds", "0", "1") == 0
    assert trained == ["r50-baseline-batch-norm False"] * 2 + ["r50-baseline-svf False"] * 2
    printed = capsys.readouterr().out
    kept = result(tmp_path, "T16")
    assert (tmp_path / "out" / "scaled-down" / "T16.md").read_text().strip() == printed.strip()
    assert "**Scaled down: resnet18 of width 4, shapes, 33 px, 3 steps of 2" in printed
    assert "Set in every run, whatever the table says: batch_size 2, data.min_area 0.01" in printed
    assert "| BN weight and bias (scaled down) | 1 |" in printed and "/ 61.93 (-" in printed

    norms, svf = kept["rows"]
    assert (norms["run"], svf["label"]) == ("r50-baseline-batch-norm", "S (SVF)")
    for row in (norms, svf):
        assert set(row["folds"]) == {"0", "1"} and row["not_run"] == {}
        ours = sum(row["folds"].values()) / 2
        theirs = sum(row["paper"]["folds"][:2]) / 2
        assert row["mean"] == pytest.approx(ours)
        assert row["difference"] == pytest.approx(ours - theirs)
        for fold in (0, 1):
            by_fold = row["folds"][str(fold)] - row["paper"]["folds"][fold]
            assert row["folds_difference"][str(fold)] == pytest.approx(by_fold)
            path = tmp_path / "out" / "scaled-down" / "pascal-5i" / row["run"] / f"1shot-fold{fold}"
            test = json.loads((path / "result.json").read_text())
            assert row["folds"][str(fold)] == pytest.approx(100 * test["test"]["miou"]["mean"])
            assert test["config"]["data"]["fold"] == fold
    trains = [
        json.loads(
            (tmp_path / "out/scaled-down/pascal-5i" / row["run"])
            .joinpath("1shot-fold0/result.json")
            .read_text()
        )["parameters"]["trained_backbone"]
        for row in (norms, svf)
    ]
    assert trains[0] > trains[1] > 0


def test_what_is_finished_is_kept_also_for_another_table(command, trained):
    assert command("T16", "--rows", "r50-baseline-svf", "--folds", "0") == 0
    assert command("T16", "--rows", "r50-baseline-svf", "--folds", "0") == 0
    assert command("T20", "--rows", "r50-baseline-svf", "--folds", "0") == 0
    assert trained == ["r50-baseline-svf False"]


def test_an_interrupted_table_goes_on(command, trained, tmp_path, capsys, monkeypatch):
    original = Trainer._loss

    def loss(self, batch):
        if self.step == 1:
            monkeypatch.setattr(Trainer, "_loss", original)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    arguments = ("T19", "--rows", "1", "5", "--folds", "3")
    assert command(*arguments) == 130
    assert "T19.md, the same command goes on" in capsys.readouterr().err
    assert [row["not_run"] for row in result(tmp_path, "T19")["rows"]] == [{"3": "not run yet"}] * 2
    assert main(["reproduce", "T19", "--list", "--scale-down", "--out", str(tmp_path / "out")]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "folds in progress: 3, not started: 0 1 2" in listed[1]
    assert command(*arguments) == 0
    assert trained == [f"r50-baseline-factors-{name}" for name in ("U False", "U True", "SV False")]
    assert all(not row["not_run"] for row in result(tmp_path, "T19")["rows"])


def test_a_run_that_fails_does_not_end_the_table(command, tmp_path, capsys, monkeypatch):
    original = Trainer._loss

    def loss(self, batch):
        if self.config.regime.name == "freeze":
            raise FloatingPointError("loss: expected a finite number, got nan")
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    assert command("T16", "--rows", "2", "4", "--folds", "2") == 0
    norms, svf = result(tmp_path, "T16")["rows"]
    assert norms["not_run"] == {"2": "failed: loss: expected a finite number, got nan"}
    assert norms["mean"] is None and norms["difference"] is None
    assert svf["mean"] is not None
    printed = capsys.readouterr().out
    assert "- BN weight and bias 1-shot fold 2: failed: loss: expected a finite" in printed


def test_rows_that_cannot_run_say_why(command, trained, tmp_path, capsys):
    assert command("T15", "--rows", "3", "--folds", "0", "--shots", "1") == 0
    assert command("T12", "--rows", "2", "--folds", "0", precision="64-false") == 0
    assert trained == []
    printed = capsys.readouterr().out
    assert "- PGNet 1-shot fold 0: quoted: PGNet has no public code of its authors'" in printed
    assert "- baseline† 1-shot fold 0: precision: expected one of 32-true" in printed


def test_other_settings_are_not_mixed_with_finished_runs(command, capsys):
    assert command("T16", "--rows", "4", "--folds", "0") == 0
    assert command("T16", "--rows", "4", "--folds", "0", steps=4, log_every=2) == 2
    error = capsys.readouterr().err
    assert "result.json belongs to another run: steps: expected 4, the checkpoint has 3" in error


def test_a_run_from_before_a_setting_has_its_default(command, trained, tmp_path, capsys):
    assert command("T16", "--rows", "4", "--folds", "0") == 0
    (path,) = (tmp_path / "out").rglob("result.json")
    finished = json.loads(path.read_text())
    del finished["config"]["tf32"], finished["config"]["graph"]
    path.write_text(json.dumps(finished))
    assert command("T16", "--rows", "4", "--folds", "0", graph="off") == 0
    assert command("T16", "--rows", "4", "--folds", "0", tf32="all") == 2
    assert "tf32: expected 'all', the checkpoint has 'convolutions'" in capsys.readouterr().err
    assert trained == ["r50-baseline-svf False"]


def test_more_test_episodes_need_no_other_training(command, trained, tmp_path):
    """Scaled down in proportion: 4 of 1000, so 16 of 4000."""
    assert command("T14", "--rows", "r50-baseline-svf", "--folds", "1") == 0
    assert trained == ["r50-baseline-svf False"]
    folder = tmp_path / "out" / "scaled-down" / "coco-20i" / "r50-baseline-svf" / "1shot-fold1"
    assert json.loads((folder / "test-16.json").read_text())["episodes_per_seed"] == 16
    assert not (folder / "eval.json").exists()  # which is the run's own, of fss eval
    assert [list(row["folds"]) for row in result(tmp_path, "T14")["rows"]] == [["1"]] * 3


def test_pfenet(command, tmp_path):
    assert command("T1", "--rows", "r50-pfenet-svf", "--folds", "3") == 0
    one, five = result(tmp_path, "T1")["rows"]
    assert (one["not_run"], five["not_run"]) == ({}, {})
    assert (one["shots"], five["shots"]) == (1, 5)


@pytest.fixture
def learned(monkeypatch) -> list[str]:
    """The folders of the base learners that are trained, as they begin."""
    folders: list[str] = []
    original = fss.paper.runs.train_base

    def note(config, resume, overwrite):
        folders.append(f"{'/'.join(Path(config.out).parts[-3:])} {resume}")
        few = dataclasses.replace(config, validation_images=4)
        return original(few, resume, overwrite)

    monkeypatch.setattr(fss.paper.runs, "train_base", note)
    return folders


def test_rows_of_bam_share_a_base_learner(command, trained, learned, tmp_path, capsys):
    """It is a run as the others are: of both shots, of the next row, and kept."""
    assert command("T1", "--rows", "vgg16-bam-svf", "--folds", "3") == 0
    assert learned == ["pascal-5i/base-resnet18/fold3 False"]
    assert len(trained) == 2
    kept = result(tmp_path, "T1")
    assert [row["not_run"] for row in kept["rows"]] == [{}, {}]
    base = tmp_path / "out" / "scaled-down" / "pascal-5i" / "base-resnet18" / "fold3"
    test = json.loads((base / "result.json").read_text())
    assert test["config"]["data"]["fold"] == 3 and test["config"]["steps"] == 3
    assert kept["base_learners"]["base-resnet18"]["3"] == pytest.approx(100 * test["miou"])
    assert "BAM's base learner base-resnet18, mIoU of the base classes: fold 3" in (
        capsys.readouterr().out
    )
    weights = torch.load(base / "base.pt")["state_dict"]
    run = base.parents[1] / "vgg16-bam-svf" / "5shot-fold3" / "last.pt"
    model = torch.load(run)["model"]
    head = {key: value for key, value in weights.items() if key.startswith("base_learner.")}
    assert head and all(torch.equal(model[key], value) for key, value in head.items())


def test_a_base_learner_that_fails_is_not_tried_again(
    command, trained, learned, tmp_path, monkeypatch
):
    monkeypatch.setattr(BaseTrainer, "fit", lambda self: _refuse())
    assert command("T1", "--rows", "vgg16-bam-svf", "--folds", "3") == 0
    assert len(learned) == 1 and trained == []
    one, five = result(tmp_path, "T1")["rows"]
    assert "base learner" in one["not_run"]["3"] and "truncated" in one["not_run"]["3"]
    assert one["not_run"] == five["not_run"]


def test_base_weights_that_are_given_are_not_trained(command, learned, tmp_path):
    model = SETTINGS["model"] | {"base_weights": "none"}
    assert (
        command("T1", "--rows", "vgg16-bam-svf", "--folds", "3", "--shots", "1", model=model) == 0
    )
    assert learned == []


def test_with_several_processes_a_failure_ends_all(command, monkeypatch, capsys):
    """One that goes on to the next run would wait for the others for ever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(fss.paper.runs, "train", lambda *_, **__: _refuse())
    assert command("T16", "--rows", "4", "--folds", "0") == 2
    assert "photo 17 is truncated" in capsys.readouterr().err


def _refuse():
    raise OSError("photo 17 is truncated")


def test_metric_of_table_3(command, tmp_path):
    assert command("T3", "--rows", "2", "--folds", "0", "--shots", "1") == 0
    (row,) = result(tmp_path, "T3")["rows"]
    run = tmp_path / "out" / "scaled-down" / "pascal-5i" / row["run"] / "1shot-fold0"
    test = json.loads((run / "result.json").read_text())["test"]
    assert row["folds"]["0"] == pytest.approx(100 * test["fb_iou"]["mean"])
    # the paper gives no fold of it
    assert row["difference"] is None and row["folds_difference"] == {}


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_all_rows_are_listed_with_their_state(arguments, tmp_path, capsys):
    out = tmp_path / "runs"
    finished = out / "pascal-5i" / "r50-baseline-svf" / "1shot-fold2" / "result.json"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    assert main(["reproduce", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    printed, figures = printed[:-11], printed[-11:]
    assert [line.partition(": ")[0] for line in figures] == [f"F{n}" for n in range(2, 13)]
    assert len(printed) == 24 + 152 + 2
    assert printed[0].startswith("T1: Pascal-5i, mIoU; Pascal-5i: what `fss data prepare pascal`")
    assert (
        "  3  PGNet: quoted: PGNet has no public code of its authors'; the numbers of its paper"
        in (printed)
    )
    # Tables 1 and 3 have 5 shots too
    lines = [line for line in printed if line.endswith("holds; r50-baseline-svf: 1 of 8 finished")]
    assert len(lines) == 2
    lines = [line for line in printed if line.endswith("holds; r50-baseline-svf: 1 of 4 finished")]
    assert len(lines) == 17
    assert printed[-2] == "152 rows: 150 hold, 2 are quoted."
    assert printed[-1].startswith("Trainings that they share: 1 of 420")


def test_rows_that_cannot_run_are_counted(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("precision: 64-false")
    assert main(["reproduce", "--list", "--settings", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    reason = "cannot run: r50-baseline-rotated-scale: precision: expected one of 32-true"
    assert printed[-14].startswith(f"  4  R S' Rᵀ W: {reason}")
    assert printed[-13] == "152 rows: 0 hold, 2 are quoted, 150 cannot run."


def test_one_table_is_listed_by_shots_and_folds(capsys):
    assert main(["reproduce", "T16", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "  4  r50-baseline-svf, 1-shot: S (SVF); folds not started: 0 1 2 3" in printed
    assert main(["reproduce", "T12", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "  6  r50-cyctr-freeze, 1-shot: CyCTR†; folds not started: 0 1 2 3" in printed
    assert main(["reproduce", "T15", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    quoted = "quoted: PGNet has no public code of its authors'; the numbers of its paper"
    assert f"  3  –, 1-shot: PGNet; {quoted}" in printed
    assert main(["reproduce", "T7", "--list"]) == 0
    assert "T7: Pascal-5i, the factors of U S Vᵀ (means of T19)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"fold": 2}}, "settings: data.fold cannot be set for all rows; give --folds"),
        ({"data": {"shots": 5}}, "settings: data.shots cannot be set for all rows; give --shots"),
        ({"out": "elsewhere"}, "settings: out cannot be set for all rows; give --out"),
        ({"regime": {"kernel": "3x3"}}, "settings: regime cannot be set for all rows; rows differ"),
    ],
)
def test_settings_that_are_the_tables(command, capsys, settings, message):
    assert command("T16", **settings) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["T25"], "table: expected one of T1, T2, T3"),
        (["X5"], "T24, or a figure such as F3; got 'X5'"),
        (["T16"], "data.root: expected the folder of Pascal-5i, got nothing; give --data.root"),
        (["T16", "--rows", "9", "--scale-down"], "rows: expected names or numbers of 1 r50"),
        (["T16", "--folds", "4", "--scale-down"], "folds: expected numbers of 0, 1, 2, 3; got 4"),
        (["T16", "--shots", "5", "--scale-down"], "shots: expected numbers of 1; got 5"),
        (["T16", "--settings", "nowhere.yaml"], "settings: expected a YAML file at nowhere.yaml"),
        (["T16", "--tables", "nowhere"], "tables: expected files like T16.yaml in nowhere"),
    ],
)
def test_a_users_error_is_one_line(arguments, message, capsys):
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("fss: ") and message in error and "\n" not in error


def test_photos_take_the_place_of_the_embedded_ones(monkeypatch, capsys):
    """--data.root with --scale-down: small, but of the data set."""
    monkeypatch.setattr(
        fss.paper.runs,
        "train",
        lambda config, **_: sys.exit(f"{config.data.source} {config.data}"),
    )
    with pytest.raises(SystemExit, match=r"^pascal .*root='photos'.* fold=2.*size=65"):
        main(["reproduce", "T16", "--scale-down", "--data.root", "photos", "--folds", "2"])
