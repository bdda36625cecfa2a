"""Blocks whose last convolution reads a weighed map (squeeze-and-excitation), as in RegNet-Y.

The classes do what torchvision's ResBottleneckBlock and timm's Bottleneck of RegNet do.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import svf_fast
from svf_fast import Fused
from svf_fast.fusion.structure import ResidualBlock, StageNames, examine
from tests.svf_fast.ops.test_block import compare, frozen, step
from tests.svf_fast.saved_bytes import saved_by


def unit(inputs, outputs, kernel=1, relu=True, **options) -> nn.Sequential:
    padding = kernel // 2
    parts = [nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options)]
    parts += [nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else [])]
    return nn.Sequential(*parts)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def _scale(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))

    def forward(self, x):
        return self._scale(x) * x


class Mean(SqueezeExcitation):
    """As timm's SEModule is written."""

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)
        return x * self.fc2(functional.relu(self.fc1(means))).sigmoid()


class RegNetBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1, groups=3, gate=None):
        super().__init__()
        projects = stride > 1 or inputs != outputs
        self.proj = unit(inputs, outputs, relu=False, stride=stride) if projects else None
        self.f = nn.Sequential()
        self.f.a = unit(inputs, outputs)
        self.f.b = unit(outputs, outputs, 3, stride=stride, groups=groups)
        if gate is not None:
            self.f.se = gate
        self.f.c = unit(outputs, outputs, relu=False)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        way = x if self.proj is None else self.proj(x)
        return self.activation(way + self.f(x))


GATED = {
    "torchvision": lambda: RegNetBlock(12, 12, gate=SqueezeExcitation(12, 3)),
    "timm": lambda: RegNetBlock(12, 12, groups=12, gate=Mean(12, 5)),
    "stride": lambda: RegNetBlock(12, 18, stride=2, gate=SqueezeExcitation(18, 3)),
}


def plain(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(frozen(GATED[name]()))


def fused(name: str, **options) -> nn.Sequential:
    model = svf_fast.convert(plain(name), None, progress=False, **options)
    assert isinstance(model[0], Fused) and not model[0].unfused_reason()
    return model


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_without_a_gate_is_a_bottleneck(stride):
    found = examine(RegNetBlock(12, 12, stride))
    names = tuple(StageNames(f"f.{x}.0", f"f.{x}.1", x != "c") for x in "abc")
    shortcut = None if stride == 1 else StageNames("proj.0", "proj.1", False)
    assert found == ResidualBlock("", names, (), shortcut)


@pytest.mark.parametrize("name", GATED)
def test_the_gate_is_found(name):
    found = examine(GATED[name]())
    assert isinstance(found, ResidualBlock) and len(found.stages) == 3
    assert found.gate == "f.se" and found.called == ("f.se",)
    assert not any("se" in conv for conv in found.convs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GATED)
def test_gradients_within_twice_the_error_of_the_reference(
    name, dtype, layout, recompute, poisoned_memory
):
    model = fused(name).to(dtype)
    model[0].recompute = recompute
    x = torch.randn(2, 12, 9, 11, dtype=dtype).contiguous(memory_format=layout)
    compare(model, x, name)
    gate = model[0].f.se
    assert len(list(svf_fast.svf_parameters(gate))) == 2  # its own layers train as well
    for parameter in svf_fast.svf_parameters(gate):
        parameter.requires_grad_(False)
    compare(model, x, name)


def test_the_original_forward_gives_the_same_where_it_cannot_be_fused():
    model, x = fused("stride").double(), torch.randn(2, 12, 9, 11, dtype=torch.float64)
    expected = step(model, x)
    handle = model[0].f.b.register_forward_hook(lambda *_: None)
    assert model[0].unfused_reason() == "f.b has a hook"
    for mine, exact in zip(step(model, x), expected, strict=True):
        assert (mine - exact).norm() <= 1e-12 * exact.norm()
    handle.remove()
    assert not model[0].unfused_reason()
    calls = []
    model[0].f.se.register_forward_hook(lambda *_: calls.append(1))
    assert not model[0].unfused_reason()  # the gate is called as it is
    step(model, x)
    assert calls == [1]
    model[0].f.se = nn.Identity()
    assert "f.se was SqueezeExcitation at conversion" in model[0].unfused_reason()


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_are_two_maps_before_the_gate_one_in_it_and_one_after(recompute):
    model = fused("torchvision")
    model[0].recompute = recompute
    x, kept = torch.randn(2, 12, 9, 11, requires_grad=True), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    maps = [t for t in kept.values() if t.shape == x.shape]
    assert len(maps) == 3 if recompute else 4  # y of a and b, b's output, y of c
    report = svf_fast.memory_report(model, (2, 12, 9, 11))
    assert report.saved_bytes == saved_by(model, torch.randn(2, 12, 9, 11))


def test_8_bits_on_both_sides_of_the_gate():
    model, x = fused("torchvision"), torch.randn(2, 12, 65, 67)
    exact, before = step(model, x), saved_by(model, x)
    model[0].keeps_int8 = True
    y, dx, *dS = step(model, x)
    assert torch.equal(y, exact[0]) and torch.equal(dx, exact[1])
    for mine, other in zip(dS, exact[2:], strict=True):
        assert (mine - other).norm() < 0.05 * other.norm()
    # y of b and of c; y of a makes the input of b, and the gate keeps what it weighs
    assert before - saved_by(model, x) > 1.4 * x.nbytes
    assert svf_fast.memory_report(model, x.shape).saved_bytes == saved_by(model, x)


def test_copies_pickles_and_merges():
    model, x = fused("torchvision").double(), torch.randn(2, 12, 9, 11, dtype=torch.float64)
    expected = step(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not again[0].unfused_reason()
        assert all(torch.equal(a, b) for a, b in zip(step(again, x), expected, strict=True))
    merged = svf_fast.merge(model)
    assert type(merged[0]) is RegNetBlock
    torch.testing.assert_close(merged(x), expected[0], rtol=1e-12, atol=1e-12)


class Shift(SqueezeExcitation):
    def forward(self, x):
        return x + self._scale(x)


class Smaller(SqueezeExcitation):
    def forward(self, x):
        return self._scale(x)


class Overwriting(SqueezeExcitation):
    def forward(self, x):
        return x.mul_(self._scale(x))


class BeforeTheSecond(RegNetBlock):
    def forward(self, x):
        return self.activation(x + self.f.c(self.f.b(self.f.se(self.f.a(x)))))


@pytest.mark.parametrize(
    "block, reason",
    [
        (RegNetBlock(6, 6, gate=Shift(6, 2)), "'f.se' (Shift) stands where a ReLU would fit"),
        (RegNetBlock(6, 6, gate=Smaller(6, 2)), "'f.se' (Smaller) stands where a ReLU would fit"),
        (
            RegNetBlock(6, 6, gate=Overwriting(6, 2)),
            "'f.se' (Overwriting) stands where a ReLU would fit",
        ),
        (
            BeforeTheSecond(6, 6, gate=SqueezeExcitation(6, 2)),
            "'f.se' (SqueezeExcitation) stands where a ReLU would fit",
        ),
    ],
)
def test_what_is_no_gate_before_the_last_of_three(block, reason):
    assert examine(block) == reason
