"""How a step is computed: schedule, accumulation, precision, determinism, early stop."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fss.config import OptimizerConfig
from fss.evaluation.metrics import Score
from fss.models.regimes import build_optimizer, build_scheduler
from fss.processes import build_fabric, determinism, synchronise_batch_norms, torchrun_layout
from fss.runs.log import read_log
from fss.training.run import train
from fss.training.trainer import Trainer


def last(config) -> dict:
    return torch.load(Path(config.out) / "last.pt", weights_only=True)


def log(config, name: str = "train.csv") -> dict[str, list[float]]:
    return read_log(Path(config.out) / name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


def test_poly_is_the_published_schedule_and_the_factor_is_on_every_group():
    config = OptimizerConfig(lr=0.0025, lr_factor=10, schedule="poly")
    optimizer = build_optimizer(Net(), config)
    scheduler = build_scheduler(optimizer, config, 50)
    for step in range(50):
        head, backbone = (group["lr"] for group in optimizer.param_groups)
        assert head == pytest.approx(0.025 * (1 - step / 50) ** 0.9, rel=1e-9)
        assert backbone == pytest.approx(head / 10)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0


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


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
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


def test_determinism_is_on_within_and_restored_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(KeyError), determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()


def scores(monkeypatch, *miou: float) -> None:
    """Validations that give these."""
    values = iter(miou)
    monkeypatch.setattr(
        "fss.trainer.evaluate",
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
            "sync_batch_norm: expected several processes on GPUs, .*got 1 on CPU. Leave it out",
        ),
    ],
)
def test_batch_norms_that_cannot_be_synchronised(tiny, regime, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(sync_batch_norm=True, regime=regime))


def test_synchronised_batch_norms_on_gpus(tiny):
    class Two:
        device, world_size = torch.device("cuda"), 2

    regime = tiny(regime={"batch_norm": "both", "batch_norm_statistics": "batch"}).regime
    model = synchronise_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), regime, Two())
    assert isinstance(model[0], nn.SyncBatchNorm)


def test_the_layout_of_torchrun(monkeypatch):
    assert torchrun_layout() is None
    for name, value in (("RUN_ID", "x"),):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torchrun_layout() == (4, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun: expected as many processes on each machine"):
        torchrun_layout()
