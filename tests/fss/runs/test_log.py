from __future__ import annotations

import math

import pytest

from fss.runs.folder import RunFolder
from fss.runs.log import read_log

NAMES = {3: "cat", 7: 'dog, "big"'}


def row(step: int) -> dict:
    return {
        "step": step,
        "loss": step / 3,
        "lr": 0.1,
        "backbone_lr": None,
        "step_seconds": 0.5,
        "images_per_second": 4.0,
        "peak_memory_bytes": 1000,
        "skipped_steps": 0,
        "unreadable": 0,
    }


def write(folder, steps, start=0):
    log = RunFolder(folder).open_log(NAMES, start)
    for step in steps:
        log.train(row(step))
        scores = {"miou": 0.25, "fb_iou": 0.5, "train_miou": 0.75}
        log.validation({"step": step, **scores}, {3: 0.5, 7: 0.0})
    log.close()


def test_tables(tmp_path):
    write(tmp_path, [1, 2])
    train, validation = read_log(tmp_path / "train.csv"), read_log(tmp_path / "validation.csv")
    assert train["step"] == [1, 2] and train["loss"] == [1 / 3, 2 / 3]
    assert math.isnan(train["backbone_lr"][0])
    assert validation == {
        "step": [1, 2],
        "miou": [0.25, 0.25],
        "fb_iou": [0.5, 0.5],
        "train_miou": [0.75, 0.75],
        "cat": [0.5, 0.5],
        'dog, "big"': [0.0, 0.0],
    }
    assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_what_a_killed_run_logged_after_its_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3])
    with (tmp_path / "train.csv").open("a") as file:
        file.write("4,0.")
    write(tmp_path, [3, 4], start=2)
    assert read_log(tmp_path / "train.csv")["step"] == [1, 2, 3, 4]
    assert read_log(tmp_path / "validation.csv")["step"] == [1, 2, 3, 4]


def test_a_new_run_begins_with_empty_tables(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert read_log(tmp_path / "train.csv")["step"] == [1]


def test_a_row_that_is_being_written(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,")
    assert read_log(path, growing=True) == {"step": [1], "loss": [0.5]}
    assert math.isnan(read_log(path)["loss"][1])
    path.write_text("step,loss\n1\n2,0.5\n")
    with pytest.raises(ValueError, match=r"log.csv: .*line 2: expected 2 values, got 1"):
        read_log(path, growing=True)
