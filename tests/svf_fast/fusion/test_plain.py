"""Subclasses of nn.Conv2d: converted where they compute a convolution, else named with a reason."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import svf_fast
from svf_fast import SVFBasicBlock, SVFConv2d, SVFLinear
from svf_fast.fusion.graph import Misfit
from svf_fast.fusion.plain import plain_conv, plain_linear
from tests.svf_fast.tolerance import assert_error_within


class Named(nn.Conv2d):
    pass


class Standardized(nn.Conv2d):
    """timm's StdConv2d (BiT's ResNet-V2)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return functional.conv2d(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Scaled(nn.Conv2d):
    """timm's ScaledStdConv2d (NF-ResNets)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = 1.7 * self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class ByHand(nn.Conv2d):
    """The published code of weight standardization."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return functional.conv2d(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Padded(nn.Conv2d):
    """efficientnet_pytorch's Conv2dStaticSamePadding."""

    def __init__(self, *args, pad=(0, 1, 0, 1), **options):
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d(pad) if any(pad) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Wrapped(nn.Conv2d):
    """detectron2's Conv2d."""

    def __init__(self, *args, norm=None, **options):
        super().__init__(*args, **options)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return x if self.norm is None else self.norm(x)


class Round(nn.Conv2d):
    """As images that repeat are made: one axis wraps around."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = functional.pad(x, (1, 1, 0, 0), mode="circular")
        return functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


CONVERTED = {
    "same": lambda: Named(4, 6, 3, padding=1),
    "standardized": lambda: Standardized(4, 6, 3, 2, padding=1),
    "scaled": lambda: Scaled(4, 6, 3, padding="same", groups=2),
    "by hand": lambda: ByHand(4, 6, 3, padding=1, bias=False),
    "padded one side": lambda: Padded(4, 6, 3, 2),
    "padded evenly and twice": lambda: Padded(4, 6, 3, padding=(1, 0), pad=(1, 1, 2, 2)),
    "not padded": lambda: Padded(4, 6, 1, pad=(0, 0, 0, 0)),
    "wrapped": lambda: Wrapped(4, 6, 3),
    "round": lambda: Round(4, 6, (3, 3), padding=1),
    "mirrored": lambda: Named(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
}


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram"))
@pytest.mark.parametrize("case", CONVERTED)
def test_what_computes_a_convolution_is_converted(case, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(CONVERTED[case](), nn.ReLU()).requires_grad_(False)
    x = torch.rand(2, 4, 9, 11)
    reference, truth = model(x), copy.deepcopy(model).double()(x.double())
    converted = svf_fast.convert(copy.deepcopy(model), None, strategy)
    assert type(converted[0]) is SVFConv2d
    within = {"factor": 4, "magnitude": 4 * truth, "channel_dim": 1}
    assert_error_within(converted(x), reference, truth, **within)
    converted(x).sum().backward()
    assert converted[0].S.grad.isfinite().all() and converted[0].S.grad.any()
    merged = svf_fast.merge(converted)
    assert type(merged[0]) is nn.Conv2d and not merged[0].weight.requires_grad
    assert_error_within(merged(x), reference, truth, **within)


MADE = ("standardized", "scaled", "by hand")


@pytest.mark.parametrize("case", CONVERTED)
def test_merge_warns_of_weights_that_their_class_would_make_again(case):
    torch.manual_seed(0)
    plain = nn.Sequential(CONVERTED[case](), nn.ReLU())
    kind = type(plain[0]).__name__
    converted = svf_fast.convert(plain, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svf_fast.merge(copy.deepcopy(converted))
    words = [str(each.message) for each in caught if "svf_fast.merge" in str(each.message)]
    assert len(words) == (case in MADE)
    assert all(f"1 {kind}: merged to plain" in text for text in words)


class Masked(nn.Conv2d):
    """Masks its weight in place at every call, as PixelCNN code does."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class MaskedAside(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class SizeDependent(nn.Conv2d):
    """timm's Conv2dSame: how far it pads depends on the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [max((-(-n // s) - 1) * s + 3 - n, 0) for n, s in zip(x.shape[-2:], self.stride)]
        x = functional.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0], 0])
        return super().forward(x)


class DropsWeights(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, functional.dropout(self.weight, 0.5, self.training), self.bias)


class Dynamic(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * x.mean(), self.bias)


class Quantizing(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.observer = nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.observer(self.weight), self.bias)


def patched(name: str) -> nn.Conv2d:
    conv = nn.Conv2d(4, 6, 3)
    own = getattr(conv, name)
    setattr(conv, name, types.MethodType(lambda self, *args: own(*args) * 2, conv))
    return conv


LEFT = {
    "masked": (lambda: Masked(4, 6, 3), "1 Masked: its forward also uses mul"),
    "masked aside": (
        lambda: MaskedAside(4, 6, 3),
        "1 MaskedAside: its weight depends on 'mask', which is no parameter",
    ),
    "size": (lambda: SizeDependent(4, 6, 3), "1 SizeDependent: its forward cannot be traced ("),
    "dropped": (
        lambda: DropsWeights(4, 6, 3),
        "1 DropsWeights: its forward differs between training and evaluation",
    ),
    "dynamic": (lambda: Dynamic(4, 6, 3), "1 Dynamic: its weight depends on its input"),
    "quantized": (lambda: Quantizing(4, 6, 3), "1 Quantizing: its weight passes 'observer'"),
    "with a norm": (
        lambda: Wrapped(4, 6, 3, norm=nn.BatchNorm2d(6)),
        "1 Wrapped: its forward ends with 'norm' (BatchNorm2d), not with a convolution",
    ),
    "patched": (lambda: patched("forward"), "1 Conv2d: it has a forward of its own"),
    "patched inside": (lambda: patched("_conv_forward"), "1 Conv2d: it has a _conv_forward of"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        "1 ParametrizedConv2d: a hook or parametrization computes its weight",
    ),
    "lazy": (lambda: nn.LazyConv2d(6, 3), "1 LazyConv2d: it has no weight yet, run the model once"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_computes_something_else_is_left_and_named(case):
    torch.manual_seed(0)
    make, reason = LEFT[case]
    model = nn.Sequential(make(), nn.Conv2d(6, 4, 1)).eval()
    kind = type(model[0])
    with pytest.warns(UserWarning) as warned:
        svf_fast.convert(model, None)
    assert f"left as they are: {reason}" in str(warned[0].message)
    assert type(model[0]) is kind and type(model[1]) is SVFConv2d
    if case != "lazy":
        report = svf_fast.memory_report(model, (1, 4, 9, 9))
        assert len(report.left) == 1 and report.left[0].startswith(reason)
        assert f"not converted: {reason}" in str(report)
    with pytest.raises(ValueError, match="found none"):
        svf_fast.convert(nn.Sequential(make()), None)


@pytest.mark.parametrize("case", ["masked", "dynamic", "patched", "patched inside"])
def test_from_conv_refuses_a_forward_of_its_own(case):
    with pytest.raises(TypeError, match=r"conv: expected the \w+ of nn.Conv2d, got a .* its own"):
        SVFConv2d.from_conv(LEFT[case][0]())


def test_the_weight_is_that_of_this_moment_and_the_layer_is_left_as_it_was():
    torch.manual_seed(0)
    conv = Scaled(4, 6, 3)
    state, x = copy.deepcopy(conv.state_dict()), torch.rand(1, 4, 6, 6)
    first = plain_conv(conv)
    assert torch.equal(first(x), conv(x)) and first.weight.requires_grad
    assert all(torch.equal(value, conv.state_dict()[key]) for key, value in state.items())
    with torch.no_grad():
        conv.gain.mul_(2)
    assert torch.equal(plain_conv(conv)(x), conv(x))
    assert not torch.equal(first(x), conv(x))


def test_linear_layers():
    class Named(nn.Linear):
        pass

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert isinstance(plain_linear(Named(3, 4)), Named)
    with pytest.raises(Misfit, match="it has a forward of its own"):
        plain_linear(Doubled(3, 4))
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "named": Named(8, 8)}).eval()
    x = torch.rand(5, 1, 8)
    expected = model["attention"](x, x, x)[0]
    with pytest.warns(UserWarning, match="nn.MultiheadAttention uses its weight itself"):
        svf_fast.convert(model, None)
    assert torch.equal(model["attention"](x, x, x)[0], expected)
    assert isinstance(model["named"], SVFLinear)


def test_a_block_of_standardized_convolutions_fuses():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = Standardized(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = Named(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            return (self.bn2(self.conv2(y)) + x).relu()

    torch.manual_seed(0)
    model = nn.Sequential(Block()).eval().requires_grad_(False)
    x = torch.rand(2, 6, 8, 8)
    expected, alone = model(x), copy.deepcopy(model[0])
    svf_fast.convert(model, None)
    for block in (model[0], SVFBasicBlock.from_block(alone)):
        assert isinstance(block, SVFBasicBlock) and block.unfused_reason() == ""
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_timms_own():
    layers = pytest.importorskip("timm").layers
    torch.manual_seed(0)
    model = nn.Sequential(
        layers.StdConv2d(4, 6, 3),
        layers.ScaledStdConv2d(6, 6, 3, stride=2),
        layers.StdConv2dSame(6, 6, 3, stride=2),
        layers.Conv2dSame(6, 6, 3, stride=2),
    ).requires_grad_(False)
    x = torch.rand(2, 4, 33, 33)
    truth = copy.deepcopy(model).double()(x.double())
    kinds = [type(layer) for layer in model]
    with pytest.warns(UserWarning, match="1 StdConv2dSame: .*1 Conv2dSame: "):
        converted = svf_fast.convert(copy.deepcopy(model), None)
    assert [type(layer) for layer in converted] == [SVFConv2d, SVFConv2d, *kinds[2:]]
    within = {"factor": 4, "magnitude": 4 * truth, "channel_dim": 1}
    assert_error_within(converted(x), model(x), truth, **within)
