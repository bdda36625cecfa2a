"""Forwards that switch autocast or gradients, and fused modules called by the names they had."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import svf_fast
from svf_fast import Fused
from svf_fast.fusion.blocks import FusedChain, FusedSequential, ResidualUnit
from svf_fast.fusion.graph import Misfit
from svf_fast.fusion.norm import Norm
from svf_fast.fusion.plain import plain_conv
from svf_fast.fusion.structure import examine, find

Context = Callable[[], contextlib.AbstractContextManager]


class Chain(nn.Module):
    context: Context = contextlib.nullcontext

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, image: Tensor) -> Tensor:
        with self.context():
            y = self.bn(self.conv(image))
        return functional.relu(y)


class Block(nn.Module):
    context: Context = contextlib.nullcontext

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, inp: Tensor) -> Tensor:
        with self.context():
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(inp)))))
        return functional.relu(y + inp)


class Layer(nn.Conv2d):
    """Not plain because of its forward, yet a convolution."""

    context: Context = contextlib.nullcontext

    def __init__(self):
        super().__init__(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@contextlib.contextmanager
def gradients_set() -> object:
    """Switch by calls, not by a context manager of torch."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(before)


CONTEXTS = {
    "autocast off": (functools.partial(torch.autocast, "cpu", enabled=False), "autocast"),
    "autocast on": (functools.partial(torch.autocast, "cpu"), "autocast"),
    "autocast to half": (functools.partial(torch.autocast, "cpu", torch.float16), "autocast"),
    "autocast of a GPU off": (functools.partial(torch.autocast, "cuda", enabled=False), "autocast"),
    "no_grad": (torch.no_grad, "gradients"),
    "set_grad_enabled": (functools.partial(torch.set_grad_enabled, False), "gradients"),
    "enable_grad": (torch.enable_grad, "gradients"),
    "gradients set": (gradients_set, "gradients"),
    "inference_mode": (torch.inference_mode, "inference mode"),
    "inference_mode off": (functools.partial(torch.inference_mode, False), "inference mode"),
}
EVERY = pytest.mark.parametrize("name", CONTEXTS)


def switching(kind: type[nn.Module], name: str) -> nn.Module:
    """Make a module whose forward runs in a context."""
    module = make(kind)
    module.__class__ = type(kind.__name__, (kind,), {"context": staticmethod(CONTEXTS[name][0])})
    return module


def decorated(kind: type[nn.Module], decorator: Callable) -> nn.Module:
    """Make a module whose forward is decorated."""
    module = make(kind)
    module.__class__ = type(kind.__name__, (kind,), {"forward": decorator(kind.forward)})
    return module


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def reason_of(name: str) -> str:
    return f"its forward switches {CONTEXTS[name][1]}"


@EVERY
def test_a_block_that_switches_is_not_fused_with_the_reason(name):
    assert examine(switching(Block, name)) == reason_of(name)


@EVERY
def test_a_chain_that_switches_is_not_fused_with_the_reason(name):
    blocks, units, reasons = find(nn.Sequential(switching(Chain, name)), lambda _: True)
    assert not blocks and not units
    assert reasons == {"0.conv": f"Chain.forward calls it: {reason_of(name)}"}


@EVERY
def test_a_layer_that_switches_is_no_plain_convolution(name):
    with pytest.raises(Misfit, match=reason_of(name)):
        plain_conv(switching(Layer, name))


def test_without_a_switch_each_is_what_it_looks_like():
    assert not isinstance(examine(make(Block)), str)
    assert len(find(nn.Sequential(make(Chain)), lambda _: True)[1]) == 1
    assert type(plain_conv(make(Layer))) is nn.Conv2d


DECORATORS = {
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("name", DECORATORS)
@pytest.mark.parametrize("kind", [Block, Chain])
def test_a_decorated_forward_is_not_fused(kind, name):
    svf = svf_fast.convert(nn.Sequential(decorated(kind, DECORATORS[name])), None, progress=False)
    assert not any(isinstance(module, Fused) for module in svf.modules())


@pytest.mark.parametrize("kind", [Block, Chain])
@pytest.mark.parametrize("name", ["autocast off", "autocast on", "autocast to half"])
def test_the_result_is_that_of_the_forward_under_autocast_and_without(kind, name):
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    plain = nn.Sequential(switching(kind, name))
    svf = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, y = plain(x), svf(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, atol=3e-2 if enabled else 1e-2, rtol=3e-2)


def test_what_is_finite_in_float32_stays_so_under_autocast_to_half():
    x = torch.full((1, 6, 5, 5), 3e5)
    plain = nn.Sequential(switching(Chain, "autocast off"))
    svf = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(svf(x), plain(x), rtol=1e-4, atol=1)


@pytest.mark.parametrize("kind", [Block, Chain])
@pytest.mark.parametrize("name", ["no_grad", "set_grad_enabled", "gradients set"])
def test_gradients_end_where_the_forward_switches_them_off(kind, name):
    plain = nn.Sequential(switching(kind, name), nn.Conv2d(6, 6, 1))
    svf = svf_fast.convert(plain, None, progress=False)
    svf(torch.randn(2, 6, 5, 5, requires_grad=True)).sum().backward()
    *inside, last = svf_fast.svf_parameters(svf)
    assert [S.grad for S in inside] == [None] * (2 if kind is Block else 1)
    assert last.grad is not None


class ByAutocast(Chain):
    def forward(self, image: Tensor) -> Tensor:
        y = self.bn(self.conv(image))
        return functional.relu(y) if torch.is_autocast_enabled("cpu") else y


class ByGradients(Chain):
    def forward(self, image: Tensor) -> Tensor:
        y = self.bn(self.conv(image))
        return functional.relu(y) if torch.is_grad_enabled() else y


class ByInference(Chain):
    def forward(self, image: Tensor) -> Tensor:
        y = self.bn(self.conv(image))
        return y if torch.is_inference_mode_enabled() else functional.relu(y)


@pytest.mark.parametrize("kind", [ByAutocast, ByGradients, ByInference])
def test_a_forward_that_asks_for_a_switch_is_not_fused(kind):
    _, units, reasons = find(nn.Sequential(make(kind)), lambda _: True)
    assert not units
    assert "depends on autocast or on whether gradients are on" in reasons["0.conv"]


class Leaving(Chain):
    """Leaves everything switched."""

    def forward(self, image: Tensor) -> Tensor:
        torch.set_grad_enabled(not torch.is_grad_enabled())
        torch.set_autocast_enabled("cpu", not torch.is_autocast_enabled("cpu"))
        torch.set_autocast_dtype("cpu", torch.float16)
        return super().forward(image)


def test_reading_a_forward_switches_nothing():
    def state() -> tuple:
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_inference_mode_enabled(),
        )

    for context in (torch.enable_grad, torch.no_grad, functools.partial(torch.autocast, "cpu")):
        with context():
            before = state()
            assert not find(nn.Sequential(make(Leaving)), lambda _: True)[1]
            assert state() == before


class Constants(nn.Module):
    """Batch norm of constants (``FrozenBatchNorm2d``)."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class WithoutGradients(Constants):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Detached(Constants):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Inferred(Constants):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_norm_that_passes_no_gradient_is_no_batch_norm():
    assert Norm.of(Constants()) is not None
    assert [Norm.of(kind()) for kind in (WithoutGradients, Detached, Inferred)] == [None] * 3


class Named(Chain):
    """Its argument bears the name of a variable of the fused forward."""

    def forward(self, step: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(step)))


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())


@pytest.mark.parametrize(
    ("kind", "argument", "fused"),
    [
        (Block, "inp", ResidualUnit),
        (Chain, "image", FusedChain),
        (Named, "step", FusedChain),
        (sequence, "input", FusedSequential),
    ],
)
def test_a_fused_module_is_called_by_the_name_of_its_argument(kind, argument, fused):
    svf = svf_fast.convert(nn.Sequential(make(kind)), None, progress=False)[0]
    assert isinstance(svf, fused) and not svf.unfused_reason()
    x = torch.randn(2, 6, 5, 5)
    by_place = svf(x)
    for module in (svf, copy.deepcopy(svf)):
        assert torch.equal(module(**{argument: x}), by_place)
    assert type(svf(**{argument: x}).grad_fn) is type(by_place.grad_fn)
    for wrong in ({"other": x}, {argument: x, "other": x}, {}):
        with pytest.raises(TypeError):
            svf(**wrong)
    with pytest.raises(TypeError):
        svf(x, **{argument: x})
