from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fss.config import ModelConfig, OptimizerConfig, RegimeConfig
from fss.models import build_model
from fss.models.regimes import apply_regime
from fss.training.optimizer import build_optimizer, build_scheduler


@pytest.fixture
def model():
    return build_model(ModelConfig(backbone="resnet18", width=4, weights="none", channels=8))


@pytest.mark.parametrize(
    ("config", "lr", "decay"),
    [
        (OptimizerConfig(), 0.0015, 1e-4),
        (OptimizerConfig(backbone_lr=0.5, backbone_weight_decay=0.0), 0.5, 0.0),
    ],
)
def test_the_backbone_has_its_own_settings(model, config, lr, decay):
    apply_regime(model, RegimeConfig())
    optimizer = build_optimizer(model, config)
    head, backbone = optimizer.param_groups
    assert (head["lr"], head["weight_decay"]) == (0.015, 1e-4)
    assert (backbone["lr"], backbone["weight_decay"]) == (pytest.approx(lr), decay)
    assert (head["momentum"], backbone["momentum"]) == (0.9, 0.9)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_adamw(model):
    apply_regime(model, RegimeConfig(name="freeze"))
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=5e-4))
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rates_of_every_step(model, schedule):
    config, steps = OptimizerConfig(schedule=schedule), 40
    apply_regime(model, RegimeConfig())
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, steps)
    for step in range(steps + 1):
        factor = (1 + math.cos(math.pi * step / steps)) / 2 if schedule == "cosine" else 1.0
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.015 * factor, 0.0015 * factor], rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


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
