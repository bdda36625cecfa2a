"""Tests that need a GPU, `test_gpu_*.py`: without one they are skipped, counted with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import svf_fast
from fss.models import build_backbone

HERE = Path(__file__).parent
LAYERS = ("layer2", "layer3", "layer4")


def pytest_collection_modifyitems(items) -> None:
    if torch.cuda.is_available():
        return
    without = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if HERE in item.path.parents and item.path.name.startswith("test_gpu_"):
            item.add_marker(without)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 products with the error of float32, by cuDNN as by our kernels."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def frozen(network: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms as after training and a weak direction in each layer.

    The weak direction, a small singular value, is guarded: its gradient takes the other way.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight[0].mul_(1e-3)
    return network.eval().requires_grad_(False)


@pytest.fixture
def trunk(device) -> Callable[..., nn.Module]:
    """``trunk()``: layers 2-4 of a narrow ResNet-50, converted, channels_last on the GPU."""

    def make(on: torch.device = device, trains: str = "S") -> nn.Module:
        torch.manual_seed(1)
        backbone = frozen(build_backbone("resnet50", width=16))
        parts = nn.Sequential(*(backbone.get_submodule(name) for name in LAYERS))
        svf_fast.convert(parts, None, progress=False, trains=trains)
        return parts.to(on, memory_format=torch.channels_last)

    return make


@pytest.fixture
def maps(device) -> Callable[..., torch.Tensor]:
    """``maps()``: an input of the trunk, [2, 64, 33, 29], whose gradient is asked for."""

    def make(on: torch.device = device) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 64, 33, 29, generator=generator).relu_().to(on)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    return make


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2)


@pytest.fixture
def gradients() -> Callable[..., list[torch.Tensor]]:
    """``gradients(model, x, dtype)``: the output, dx and every dS of a step by autocast."""

    def run(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x, *svf_fast.svf_parameters(model)]
        with autocast(x.device, dtype):
            y = model(x)
        grad_y = torch.linspace(-1, 1, y.numel(), device=x.device).reshape(y.shape).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]

    return run
