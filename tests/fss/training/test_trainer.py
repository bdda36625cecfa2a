"""How a step is computed: accumulation, precision, determinism, early stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fss.data import EpisodeDataset
from fss.evaluation.metrics import EpisodeIoU, Score
from fss.processes import build_fabric
from fss.runs.log import read_log
from fss.training.run import train
from fss.training.trainer import Trainer


def last(config) -> dict:
    return torch.load(Path(config.out) / "last.pt", weights_only=True)


def log(config, name: str = "train.csv") -> dict[str, list[float]]:
    return read_log(Path(config.out) / name)


def test_training_learns(tiny):
    config = tiny(
        steps=25, optimizer={"name": "adamw"}, model={"dropout": 0.0}, regime={"name": "full"}
    )
    train(config)
    loss = log(config)["loss"]
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
    config = tiny(steps=4, validation_every=2, foreground_weight=50.0, optimizer={"lr": 0.1})
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
    assert log(config, "validation.csv")["train_miou"] == expected
    assert expected[0] != expected[1]


def test_foreground_weight_weighs_the_loss(tiny, tmp_path):
    losses = []
    for weight in (1.0, 5.0):
        config = tiny(steps=1, foreground_weight=weight, out=str(tmp_path / str(weight)))
        train(config)
        losses += log(config)["loss"]
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
    monkeypatch.setattr(Trainer, "_log_steps", lambda self, *window: {})
    with pytest.raises(FloatingPointError, match="expected finite numbers, got others at step 1"):
        train(tiny(save_every=1))


def test_accumulated_parts_are_the_big_batch(tiny, tmp_path):
    """Without dropout and ignored pixels the means of equal parts have equal weight.

    Weights are in float64; Fabric gives predictions back in float32, whose rounding is left.
    """
    settings = {
        "batch_size": 4,
        "model": {"dropout": 0.0},
        "data": {"rotate": 0.0, "scale": (1.0, 1.0)},
        "precision": "64-true",
    }
    whole = tiny(out=str(tmp_path / "whole"), **settings)
    parts = tiny(out=str(tmp_path / "parts"), accumulate=4, **settings)
    train(whole)
    train(parts)
    assert log(whole)["loss"] == pytest.approx(log(parts)["loss"], rel=1e-6)
    a, b = last(whole)["model"], last(parts)["model"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-8, msg=name)
    memory = [last(config)["saved_bytes"] for config in (whole, parts)]
    assert memory[1] < 0.4 * memory[0]


def test_a_step_needs_equal_parts(tiny):
    with pytest.raises(ValueError, match="accumulate: expected a divisor of batch_size 2, got 3"):
        tiny(accumulate=3)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_every_precision_trains(tiny, precision):
    result = train(tiny(precision=precision))
    assert result["steps"] == 3 and result["skipped_steps"] == 0
    assert all(0 < loss < 5 for loss in log(tiny())["loss"])


def test_fp16_scales_the_loss_skips_overflows_and_counts_them(tiny, monkeypatch):
    original = Trainer._step_optimizer

    def overflow(self) -> None:
        if self.step == 1:
            next(p for p in self.network.parameters() if p.grad is not None).grad.fill_(torch.inf)
        original(self)

    monkeypatch.setattr(Trainer, "_step_optimizer", overflow)
    config = tiny(precision="16-mixed", optimizer={"schedule": "constant"})
    trainer = Trainer(config, build_fabric(config))
    assert trainer.fabric.strategy.precision.scaler.get_scale() == 2**16
    result = train(config)
    assert result["skipped_steps"] == 1
    assert log(config)["skipped_steps"] == [0, 1, 1]
    assert last(config)["precision"]["scale"] == 2**15
    assert last(config)["skipped"] == 1


def test_deterministic_runs_have_the_same_bits(tiny, tmp_path):
    runs = [
        tiny(out=str(tmp_path / name), deterministic=True, regime={"name": "full"})
        for name in ("one", "two")
    ]
    for config in runs:
        train(config)
        assert not torch.are_deterministic_algorithms_enabled()
    a, b = (last(config) for config in runs)
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert log(runs[0])["loss"] == log(runs[1])["loss"]


def scores(monkeypatch, *miou: float) -> None:
    """Validations that give these."""
    values = iter(miou)
    monkeypatch.setattr(
        "fss.training.trainer.evaluate",
        lambda model, dataset, classes, *_, **__: Score(
            next(values), 0.5, dict.fromkeys(classes, 0.0), dict.fromkeys(classes, 1)
        ),
    )


def test_early_stop_counts_validations_without_a_higher_miou(tiny, monkeypatch, capsys):
    scores(monkeypatch, 0.1, 0.3, 0.3, 0.2)
    config = tiny(steps=20, validation_every=1, early_stop=2)
    result = train(config)
    assert result["steps"] == 4 and result["stopped_early"]
    assert result["best_validation"]["step"] == 2
    assert "stopped early after step 4: 2 validations without more than 30.00" in (
        capsys.readouterr().err
    )
    assert log(config, "validation.csv")["step"] == [1, 2, 3, 4]
    assert train(config, resume=True)["steps"] == 4


def test_without_early_stop_a_run_goes_on(tiny, monkeypatch):
    scores(monkeypatch, 0.3, 0.2, 0.1)
    result = train(tiny(validation_every=1))
    assert result["steps"] == 3 and not result["stopped_early"]


def test_validation_on_base_classes_shows_none_of_the_novel(tiny):
    config = tiny(validation_classes="base", steps=1)
    trainer = Trainer(config, build_fabric(config))
    novel = set(trainer.source.folds[0])
    assert not novel & set(trainer.validation_episodes.classes)
    assert not novel & trainer.validated.keys() and novel == trainer.classes.keys()
    train(config)
    columns = log(config, "validation.csv").keys()
    assert columns - {"step", "miou", "fb_iou", "train_miou"} == set(trainer.validated.values())


@pytest.mark.parametrize(
    ("regime", "message"),
    [
        ({}, "sync_batch_norm: every batch norm uses its stored statistics"),
        (
            {"batch_norm": "both", "batch_norm_statistics": "batch"},
            "sync_batch_norm: expected several processes on GPUs, .*got 1 on CPU. Omit it",
        ),
    ],
)
def test_batch_norms_that_cannot_be_synchronized(tiny, regime, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(sync_batch_norm=True, regime=regime))


@pytest.mark.parametrize(
    ("every", "expected"),
    [(3, [3, 6, 9]), ("1 epoch", None), ("0.5 epochs", None), ("99 epochs", [9]), (0, [9])],
)
def test_validations_by_steps_and_by_epochs(tiny, every, expected):
    """Of 17 photos, which make four whole batches."""
    config = tiny(steps=9, batch_size=4, validation_every=every, validation_episodes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpisodeDataset, "epoch", property(lambda self: 17))
        train(config)
    steps = {"1 epoch": [4, 8, 9], "0.5 epochs": [2, 4, 6, 8, 9]}.get(every, expected)
    assert log(config, "validation.csv")["step"] == steps


def test_the_epoch_is_that_of_the_listed_photos(tiny):
    config = tiny(validation_every="2 epochs", batch_size=4)
    trainer = Trainer(config, build_fabric(config))
    assert trainer.validation_every == 2 * (len(trainer.dataset.queries) // 4) > 8
