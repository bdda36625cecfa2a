from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import fss
from fss.config import ModelConfig, OptimizerConfig, RegimeConfig
from fss.models import build_model
from fss.models.regimes import apply_regime
from fss.training.optimizer import build_optimizer, build_scheduler, hold_masters


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


REGIMES = sorted((Path(fss.__file__).parent / "configs" / "regimes").glob("*.yaml"))


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-3))
    hold_masters(optimizer)
    return optimizer


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.bfloat16().to(parameter.dtype)  # the same in both dtypes


@pytest.mark.parametrize("path", REGIMES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_in_bfloat16_are_those_of_float32(model, path, name):
    """Each regime: whatever trains takes up steps that its own 16 bits would round away."""
    settings = yaml.safe_load(path.read_text())
    apply_regime(model, RegimeConfig(**settings.get("regime", settings)))
    wide = copy.deepcopy(model.bfloat16()).float()
    steppers = optimizer_of(model, name), optimizer_of(wide, name)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    start = {key: p.detach().float().clone() for key, p in trained.items()}
    for step in range(3):
        for network, optimizer in zip((model, wide), steppers, strict=True):
            give_gradients(network, step)
            optimizer.step()
    for key, parameter in wide.named_parameters():
        if key not in trained:
            continue
        narrow = trained[key]
        held = steppers[0].state[narrow].get("master", narrow)
        assert held.dtype == torch.float32
        torch.testing.assert_close(held.detach(), parameter.detach(), msg=key)
        assert torch.equal(narrow, parameter.to(narrow.dtype)), key
        assert (held != start[key]).float().mean() > 0.9, key


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_masters_are_in_the_state(name):
    """Saved after two steps and loaded into another process's optimizer: the same third step."""
    model = Net().bfloat16()
    optimizer = optimizer_of(model, name)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    again = copy.deepcopy(model)
    loaded = optimizer_of(again, name)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for network, stepping in ((model, optimizer), (again, loaded)):
        give_gradients(network, 2)
        stepping.step()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        for entry, value in optimizer.state[p].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, loaded.state[q][entry])


def test_gradients_and_memory_stay_those_of_the_parameters():
    model = Net().bfloat16()
    optimizer = optimizer_of(model, "sgd")
    places = [p.data_ptr() for p in model.parameters()]
    give_gradients(model, 0)
    gradients = [p.grad for p in model.parameters()]
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_parameters_have_no_masters(dtype):
    model = Net().to(dtype)
    optimizer = optimizer_of(model, "adamw")
    give_gradients(model, 0)
    optimizer.step()
    assert not any("master" in state for state in optimizer.state.values())
