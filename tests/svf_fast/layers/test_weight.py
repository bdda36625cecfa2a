"""The weight of an SVF layer is composed when it is read: a write to it would be lost."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from svf_fast import SVFConv2d, SVFLinear


def makers() -> list:
    return [
        lambda: SVFConv2d(4, 6, 3),
        lambda: SVFConv2d(4, 6, 1, groups=2),
        lambda: SVFLinear(5, 6),
    ]


def no_grad(write):
    def run(layer):
        with torch.no_grad():
            write(layer)

    return run


def set_data(layer):
    layer.weight.data = torch.zeros_like(layer.weight)


def set_item(layer):
    layer.weight[0] = 0


def multiply(layer):
    weight = layer.weight
    weight *= 2


WRITES = {
    "copy_": no_grad(lambda layer: layer.weight.copy_(torch.zeros_like(layer.weight))),
    "with gradients": lambda layer: layer.weight.mul_(2),
    "nn.init": lambda layer: nn.init.zeros_(layer.weight),
    "nn.init.kaiming_normal_": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "through data": lambda layer: layer.weight.data.normal_(),
    "data": set_data,
    "through detach": lambda layer: layer.weight.detach().clamp_(0),
    "an item": no_grad(set_item),
    "a view": no_grad(lambda layer: layer.weight.view(-1)[:3].fill_(1)),
    "an operator": no_grad(multiply),
    "out": no_grad(lambda layer: torch.zeros(layer.weight.shape, out=layer.weight)),
    "foreach": no_grad(lambda layer: torch._foreach_mul_([layer.weight], 2.0)),
}


@pytest.mark.parametrize("make", makers(), ids=("conv", "grouped", "linear"))
@pytest.mark.parametrize("way", WRITES)
def test_a_write_is_refused(make, way):
    layer = make()
    before = layer.composed_weight()
    with pytest.raises(RuntimeError, match="expected it to be read, got a write.*write to S"):
        WRITES[way](layer)
    assert torch.equal(layer.composed_weight(), before)


@pytest.mark.parametrize("make", makers(), ids=("conv", "grouped", "linear"))
def test_replacing_it_is_refused(make):
    layer = make()
    for value in (nn.Parameter(torch.zeros_like(layer.weight)), torch.zeros(3), None):
        with pytest.raises((KeyError, AttributeError)):
            layer.weight = value
    with pytest.raises((AttributeError, RuntimeError)):
        layer.weight.requires_grad = False
    with pytest.raises((KeyError, TypeError, AttributeError)):
        prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("make", makers(), ids=("conv", "grouped", "linear"))
def test_reading_it_is_as_before(make):
    layer = make()
    W = layer.merged().weight.detach()
    torch.testing.assert_close(layer.weight.clone(), W)
    assert type(layer.weight.clone()) is type(layer.weight * 2) is torch.Tensor
    copied = layer.weight.clone()
    copied.zero_()  # of its own
    layer.weight.square().sum().backward()
    expected = 2 * layer.S.detach()  # ‖W‖² = ΣS²
    torch.testing.assert_close(layer.S.grad, expected, rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.save({"W": layer.weight.detach().cpu()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)["W"]
    assert type(kept) is torch.Tensor and torch.equal(kept, layer.weight)


def test_a_module_that_uses_its_layers_weight():
    layer = SVFLinear(5, 6)
    x = torch.randn(3, 5)
    y = functional.linear(x, layer.weight, layer.bias)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, layer(x))
    compiled = torch.compile(lambda x: functional.linear(x, layer.weight), backend="eager")
    torch.testing.assert_close(compiled(x) + layer.bias, y)
