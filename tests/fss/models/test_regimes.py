from __future__ import annotations

import math

import pytest
import torch

from fss.config import ModelConfig, OptimizerConfig, RegimeConfig
from fss.models import build_model
from fss.models.regimes import apply_regime, build_optimizer, build_scheduler


@pytest.fixture
def model():
    return build_model(ModelConfig(backbone="resnet18", width=4, weights="none", channels=8))


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["svf", "full"])
def test_an_unknown_layer_is_refused(model, name):
    with pytest.raises(ValueError, match="layers: expected .*'layer5'"):
        apply_regime(model, RegimeConfig(name=name, layers=("layer5",)))


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
