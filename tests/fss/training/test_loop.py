"""A run stopped, resumed, refused: the same bits as in one go, or an error that says why not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fss.runs.log import read_log
from fss.training.run import train
from fss.training.trainer import Trainer


def last(config) -> dict:
    return torch.load(Path(config.out) / "last.pt", weights_only=True)


@pytest.fixture
def interrupt(monkeypatch):
    """Presses ctrl-C in the middle of a step."""

    def at(step: int) -> None:
        original = Trainer._loss

        def loss(self, batch):
            if self.step == step - 1:
                monkeypatch.setattr(Trainer, "_loss", original)
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, batch)

        monkeypatch.setattr(Trainer, "_loss", loss)

    return at


@pytest.mark.parametrize(
    ("optimizer", "workers", "precision"),
    [("sgd", 1, "32-true"), ("adamw", 0, "32-true"), ("sgd", 0, "bf16-true")]
    + [("adamw", 0, "bf16-true")],
)
def test_resume_is_bit_for_bit(tiny, tmp_path, interrupt, same, optimizer, workers, precision):
    """6 steps at once, and 3 + 3 with ctrl-C in the third: dropout, momentum, schedule and logs."""
    settings = {
        "steps": 6,
        "validation_every": 2,
        "log_every": 2,
        "optimizer": {"name": optimizer},
        "data": {"workers": workers},
        "precision": precision,
    }
    whole = tiny(out=str(tmp_path / "whole"), **settings)
    halves = tiny(out=str(tmp_path / "halves"), **settings)
    train(whole)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 6, saved; .*config.yaml --resume"):
        train(halves)
    assert last(halves)["step"] == 3
    torch.rand(10)
    config = yaml.safe_load((tmp_path / "halves" / "config.yaml").read_text())
    train(type(halves).from_dict(config), resume=True)

    one, two = last(whole), last(halves)
    for name in ("step", "best", "model", "optimizer", "scheduler", "random", "saved_bytes"):
        assert same(one[name], two[name]), name
    assert len(one["seconds"]) == len(two["seconds"]) == 6
    for log, columns in (("train.csv", ("step", "loss", "lr")), ("validation.csv", None)):
        tables = [read_log(tmp_path / run / log) for run in ("whole", "halves")]
        for column in columns or tables[0]:
            assert tables[0][column] == tables[1][column]
    results = [json.loads((tmp_path / x / "result.json").read_text()) for x in ("whole", "halves")]
    assert results[0]["test"] == results[1]["test"]


def test_dropout_makes_the_resumed_random_state_matter(
    tiny, tmp_path, interrupt, same, monkeypatch
):
    """The test above would notice: without the random state the weights differ."""
    whole, halves = (tiny(out=str(tmp_path / x), steps=4) for x in ("whole", "halves"))
    train(whole)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(halves)
    monkeypatch.setattr("fss.training.loop.restore_random_state", lambda state: None)
    torch.rand(10)
    train(halves, resume=True)
    assert not same(last(whole)["model"], last(halves)["model"])


def test_a_run_is_not_overwritten_unasked(tiny):
    config = tiny(steps=1)
    train(config)
    before = (Path(config.out) / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="out: .* already holds a run .*--resume.*--overwrite"):
        train(config)
    assert (Path(config.out) / "last.pt").read_bytes() == before
    train(config, overwrite=True)
    assert read_log(Path(config.out) / "train.csv")["step"] == [1]


def test_resume_needs_a_checkpoint(tiny):
    with pytest.raises(FileNotFoundError, match="--resume: expected a checkpoint at .*last.pt"):
        train(tiny(), resume=True)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr: expected 0.5, the checkpoint has 0.01"),
        ({"steps": 9}, "steps: expected 9, the checkpoint has 1"),
        ({"data": {"fold": 1}}, "data.fold: expected 1, the checkpoint has 0"),
    ],
)
def test_resume_refuses_other_settings(tiny, override, difference):
    train(tiny(steps=1))
    with pytest.raises(ValueError, match=f"belongs to another run: {difference}"):
        train(tiny(**{"steps": 1} | override), resume=True)


def test_resuming_says_which_checkpoint_is_damaged(tiny, interrupt):
    """Each entry left out, or of another type: an error of one line, or the run as it was."""
    config = tiny(steps=2, validation_every=1)
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    path = Path(config.out) / "last.pt"
    whole = torch.load(path, weights_only=True)
    refused = set()
    for name in whole:
        left_out = {key: value for key, value in whole.items() if key != name}
        for damaged in (left_out, whole | {name: "x"}, whole | {name: {}}):
            torch.save(damaged, path)
            try:
                train(config, resume=True)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused.add(name)
                continue
            assert name in {"base_classes", "precision", "saved_bytes", "unreadable"}
    assert refused >= whole.keys() - {"base_classes"}
