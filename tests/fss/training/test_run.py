from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fss.evaluation.metrics import EpisodeIoU
from fss.runs.log import read_log
from fss.training.run import build_fabric, train
from fss.training.trainer import Trainer

ROOT = Path(__file__).parents[3]


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


def last(config) -> dict:
    return torch.load(Path(config.out) / "last.pt", weights_only=True)


@pytest.mark.parametrize(("optimizer", "workers"), [("sgd", 1), ("adamw", 0)])
def test_resume_is_bit_for_bit(tiny, tmp_path, interrupt, same, optimizer, workers):
    """6 steps at once, and 3 + 3 with ctrl-C in the third: dropout, momentum, schedule and logs."""
    settings = {
        "steps": 6,
        "validation_every": 2,
        "log_every": 2,
        "optimizer": {"name": optimizer},
        "data": {"workers": workers},
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


@pytest.mark.parametrize("regime", ["freeze", "svf", "full"])
def test_a_run_trains_what_its_regime_says_and_reports(tiny, regime):
    config = tiny(regime={"name": regime}, pictures=2, optimizer={"schedule": "constant"})
    before = Trainer(config, build_fabric(config)).network.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    result = train(config)
    after = last(config)["model"]
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    kind = {name.rpartition(".")[2] for name in moved if name.startswith("backbone.")}
    assert kind == {"freeze": set(), "svf": {"S"}, "full": {"weight"}}[regime]
    assert any(not name.startswith("backbone.") for name in moved)

    folder = Path(config.out)
    assert json.loads((folder / "result.json").read_text()) == result
    assert {"best.pt", "last.pt", "config.yaml", "episodes.png", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert result["step_seconds_median"] > 0 and result["peak_memory_bytes"] > 0
    assert result["saved_bytes_per_step"] > 0
    assert (result["parameters"]["trained_backbone"] > 0) == (regime != "freeze")
    assert len(result["test"]["miou"]["values"]) == 2
    assert result["versions"]["torch"] == torch.__version__
    assert result["config"] == config.to_dict()
    assert not list(folder.glob("*.tmp"))


def test_training_learns(tiny):
    config = tiny(
        steps=25, optimizer={"name": "adamw"}, model={"dropout": 0.0}, regime={"name": "full"}
    )
    train(config)
    loss = read_log(Path(config.out) / "train.csv")["loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])


def test_the_miou_in_training_is_of_what_was_trained_on(tiny, monkeypatch):
    """Each step's predictions, summed class by class until the validation."""
    seen: list[tuple] = []
    original = Trainer._loss

    def loss(self, batch):
        prediction = []
        hook = self.model.register_forward_hook(lambda *call: prediction.append(call[2]))
        result = original(self, batch)
        hook.remove()
        seen.append((prediction[0].logits.argmax(1), batch))
        return result

    monkeypatch.setattr(Trainer, "_loss", loss)
    config = tiny(steps=4, validation_every=2)
    train(config)
    expected = []
    for steps in (seen[:2], seen[2:]):
        metric = EpisodeIoU(sorted({int(c) for _, batch in steps for c in batch["class_id"]}))
        for prediction, batch in steps:
            for one, mask, c in zip(
                prediction, batch["query_mask"], batch["class_id"], strict=True
            ):
                metric.update(one, mask, int(c))
        expected.append(metric.result().miou)
    assert read_log(Path(config.out) / "validation.csv")["train_miou"] == expected
    assert expected[0] != expected[1]


def test_foreground_weight_weighs_the_loss(tiny, tmp_path):
    losses = []
    for weight in (1.0, 5.0):
        config = tiny(steps=1, foreground_weight=weight, out=str(tmp_path / str(weight)))
        train(config)
        losses += read_log(Path(config.out) / "train.csv")["loss"]
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint_before(tiny, monkeypatch):
    original = Trainer._loss
    monkeypatch.setattr(
        Trainer,
        "_loss",
        lambda self, batch: original(self, batch) * (float("nan") if self.step == 2 else 1),
    )
    config = tiny(steps=4, save_every=2, log_every=4, optimizer={"schedule": "constant"})
    message = (
        "loss: expected a finite number, got nan at step 3 with learning rate 0.01; lower "
        "optimizer.lr, or train in precision 32-true. .*last.pt is from before"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(config)
    state = last(config)
    assert state["step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tiny, monkeypatch):
    monkeypatch.setattr(
        "fss.training.trainer.Trainer._loss",
        lambda self, batch: sum((p * 1e30).square().sum() for p in self._trained()),
        raising=False,
    )
    monkeypatch.setattr(
        Trainer,
        "_trained",
        lambda self: [p for p in self.network.parameters() if p.requires_grad],
        raising=False,
    )
    original = Trainer._settle
    monkeypatch.setattr(Trainer, "_settle", lambda self: self._pending.clear() or original(self))
    monkeypatch.setattr(Trainer, "_log_training", lambda self, *window: {})
    with pytest.raises(FloatingPointError, match="expected finite numbers, got others at step 1"):
        train(tiny(save_every=1))


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


def test_a_fold_that_the_source_does_not_have(tiny):
    with pytest.raises(ValueError, match="data.fold: expected 0 to 3, .*got 9"):
        train(tiny(data={"fold": 9}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_a_gpu_that_is_not_there(tiny):
    with pytest.raises(ValueError, match="accelerator: expected a GPU for cuda, found none"):
        train(tiny(accelerator="cuda"))


def test_bf16_trains(tiny):
    result = train(tiny(precision="bf16-mixed", steps=2))
    assert result["steps"] == 2


def test_two_processes_compute_what_one_does(tiny, tmp_path):
    """Without dropout, weights and ignored pixels the averaged gradients are the batch's."""
    settings = {
        "model": {"dropout": 0.0},
        "data": {"rotate": 0.0, "scale": (1.0, 1.0)},
        "test_seeds": [1],
    }
    one = tiny(out=str(tmp_path / "one"), **settings)
    two = tiny(out=str(tmp_path / "two"), devices=2, **settings)
    train(one)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two.to_dict()))
    command = [sys.executable, "-m", "fss.cli", "train", "--config", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = last(one)["model"], last(two)["model"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    episodes = [json.loads((tmp_path / x / "result.json").read_text()) for x in ("one", "two")]
    assert episodes[0]["test"]["episodes"] == episodes[1]["test"]["episodes"]


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
