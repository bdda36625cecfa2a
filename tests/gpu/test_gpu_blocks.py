"""Residual blocks on a GPU against float64 on the CPU: the 2x rule."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import svf_fast
from fss.models.backbone import BasicBlock, Bottleneck
from svf_fast import Fused
from tests.svf_fast.tolerance import ROUNDINGS, accumulated, assert_error_within


def projection(in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


# Of ResNet-18 and ResNet-50, and one of odd numbers of channels: in channels, width, stride, …
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: Bottleneck(256, 64, dilation=2),
    "bottleneck, shortcut": lambda: Bottleneck(128, 64, 1, 1, projection(128, 256)),
    "bottleneck, stride": lambda: Bottleneck(64, 32, 2, 1, projection(64, 128, 2)),
    "stride on conv1": lambda: Bottleneck(64, 32, 2, 1, projection(64, 128, 2), "conv1"),
    "bottleneck, odd channels": lambda: Bottleneck(36, 9),
    "basic": lambda: BasicBlock(64, 64),
    "basic, shortcut": lambda: BasicBlock(32, 64, 2, 1, projection(32, 64, 2)),
    "bottleneck, sum": lambda: Bottleneck(256, 64, last_relu=False),
    "bottleneck, shortcut, sum": lambda: Bottleneck(
        64, 32, 2, 1, projection(64, 128, 2), last_relu=False
    ),
    "basic, sum": lambda: BasicBlock(64, 64, last_relu=False),
}
FORMATS = (torch.channels_last, torch.contiguous_format)
DRAWS = 7


@functools.cache
def _networks(name: str, seed: int) -> tuple[nn.Module, nn.Module, nn.Module, torch.Tensor]:
    """Ours and the paper's layers in float32, those in float64, and an input, on the CPU."""
    torch.manual_seed(seed)
    plain = nn.Sequential(_frozen(BLOCKS[name]()))
    ours = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    assert isinstance(ours[0], Fused)
    official = svf_fast.convert(plain, None, "reference", fuse=False, progress=False)
    channels = next(m.V.shape[1] for m in ours.modules() if isinstance(m, svf_fast.SVFConv2d))
    x = torch.randn(3, channels, 13, 11).relu()
    return ours, official, copy.deepcopy(official).double(), x


def networks(name: str, seed: int) -> tuple[nn.Module, nn.Module, nn.Module, torch.Tensor]:
    """Copies: a test moves them and changes their dtype."""
    return copy.deepcopy(_networks(name, seed))


def _frozen(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return block.eval().requires_grad_(False)


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and every dS."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    leaves = [x, *svf_fast.svf_parameters(model)]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def arriving(truth: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A gradient that is zero where the last ReLU is near its kink."""
    y = truth(x.double()).detach()
    return torch.where(y.abs() < 0.05, 0, torch.randn_like(y))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_float32_within_twice_the_error_of_the_papers_layers(name, layout, device):
    ours, official, truth, x = networks(name, seed=0)
    grad = arriving(truth, x)
    exact = step(truth, x.double(), grad)
    x = x.to(device).contiguous(memory_format=layout)
    got, expected = (step(model.to(device), x, grad) for model in (ours, official))
    for index, values in enumerate(zip(got, expected, exact, strict=True)):
        magnitude = 3 * accumulated(values[2], torch.float32)  # a gradient passes three layers
        what = f"{name} {('y', 'dx')[index] if index < 2 else f'dS {index - 2}'}"
        assert_error_within(*values, magnitude=magnitude, channel_dim=None, name=what)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_16_bit_within_twice_the_error_of_the_papers_layers(name, dtype, layout, device):
    """Medians over draws: inner ReLUs round across their kinks in either, and not in both."""
    mine, theirs = [], []
    for seed in range(DRAWS):
        ours, official, truth, x = networks(name, seed)
        x = x.to(dtype)
        grad = arriving(truth, x)
        exact = step(truth, x.double(), grad)
        x = x.to(device).contiguous(memory_format=layout)
        for model, errors in ((ours, mine), (official, theirs)):
            got = step(model.to(device, dtype), x, grad)
            assert all(tensor.isfinite().all() for tensor in got)
            errors.append([_error(*pair) for pair in zip(got, exact, strict=True)])
    for index, (own, reference) in enumerate(
        zip(torch.tensor(mine).T, torch.tensor(theirs).T, strict=True)
    ):
        floor = 3 * ROUNDINGS[dtype] * torch.finfo(dtype).eps
        assert own.median() <= 2 * reference.median() + floor, f"{name}, tensor {index}"


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.cpu().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_poisoned_memory(dtype, device, poisoned_memory):
    """Whatever `empty` returns is written before it is read."""
    for name in ("bottleneck", "bottleneck, stride", "basic"):
        ours, _, truth, x = networks(name, seed=0)
        grad = arriving(truth, x)
        x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
        for tensor in step(ours.to(device, dtype), x, grad):
            assert tensor.isfinite().all(), name
