"""One SVF convolution: the paper's three layers against fold, chain and gram, forward and backward.

Shapes: the distinct convolutions of ResNet-50's layers 2-4 at output stride 8, 321 px, batch 2.
Run with ``make bench-layer``; the table at the end gives the median time, its quartiles' distance,
the ratio to ``reference`` within the run, and the bytes kept for the backward pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fss.measure import saved_bytes
from svf_fast import SVFConv2d

BATCH, SIZE = 2, 41  # 321 px at stride 8

# name: in, out, kernel, dilation, stride
SHAPES = {
    "layer2 conv1 256→128 1×1": (256, 128, 1, 1, 1),
    "layer2 conv2 128→128 3×3": (128, 128, 3, 1, 1),
    "layer2 conv3 128→512 1×1": (128, 512, 1, 1, 1),
    "layer2 downsample 256→512 1×1 /2": (256, 512, 1, 1, 2),
    "layer3 conv1 1024→256 1×1": (1024, 256, 1, 1, 1),
    "layer3 conv2 256→256 3×3 d2": (256, 256, 3, 2, 1),
    "layer3 conv3 256→1024 1×1": (256, 1024, 1, 1, 1),
    "layer3 downsample 512→1024 1×1": (512, 1024, 1, 1, 1),
    "layer4 conv1 2048→512 1×1": (2048, 512, 1, 1, 1),
    "layer4 conv2 512→512 3×3 d4": (512, 512, 3, 4, 1),
    "layer4 conv3 512→2048 1×1": (512, 2048, 1, 1, 1),
    "layer4 downsample 1024→2048 1×1": (1024, 2048, 1, 1, 1),
}


def _layer(shape: tuple[int, ...], strategy: str) -> SVFConv2d:
    torch.manual_seed(0)
    fan_in, fan_out, kernel, dilation, stride = shape
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, padding, dilation, bias=False)
    return SVFConv2d.from_conv(conv, strategy)


def _gradients(layer: SVFConv2d, x: torch.Tensor, grad_y: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x), (x, layer.S), grad_y))


def _check(layer: SVFConv2d, shape: tuple[int, ...], x: torch.Tensor) -> None:
    """No time is worth printing of a layer that is wrong: gradients against float64 first."""
    x, exact = x[:1, :, :9, :9], _layer(shape, "reference").double()
    grad_y = torch.randn_like(layer(x))
    pairs = zip(
        _gradients(layer, x, grad_y), _gradients(exact, x.double(), grad_y.double()), strict=True
    )
    for got, truth in pairs:
        error = (got.double() - truth).norm() / truth.norm()
        assert error < 5e-6, f"relative error {error:.1e} against float64"


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram"))
@pytest.mark.parametrize("name", SHAPES)
def test_layer(benchmark, name: str, strategy: str) -> None:
    shape = SHAPES[name]
    layer = _layer(shape, strategy)
    size = 2 * SIZE - 1 if shape[-1] == 2 else SIZE
    x = torch.randn(BATCH, shape[0], size, size).requires_grad_()
    _check(layer, shape, x.detach())
    grad_y = torch.randn_like(layer(x))

    def step() -> None:
        torch.autograd.grad(layer(x), (x, layer.S), grad_y)

    benchmark.group = name
    benchmark.extra_info["variant"] = strategy
    with saved_bytes(layer) as saved:
        y = layer(x)  # alive until counted, so that no address is used twice
    benchmark.extra_info["saved_bytes"] = saved.total
    del y
    benchmark.pedantic(step, rounds=11, warmup_rounds=2)
