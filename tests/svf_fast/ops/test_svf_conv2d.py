"""The gradients of every strategy: at most twice the error of the paper's layers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from svf_fast import SVFConv2d
from tests.svf_fast.tolerance import accumulated, assert_error_within

STRATEGIES = ("fold", "chain", "gram")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Every argument of nn.Conv2d, odd sizes, both kinds of gram matrix (1×1 with fewer inputs: from x).
CASES = {
    "3x3": (5, 7, 3, {"padding": 1}),
    "1x1 narrowing": (12, 5, 1, {"bias": False}),
    "1x1 widening": (5, 12, 1, {}),
    "1x1 widening stride 2": (4, 9, 1, {"stride": 2}),
    "1x1 stride 2x1": (4, 9, 1, {"stride": (2, 1)}),
    "1x1 padded": (3, 8, 1, {"padding": 1}),
    "stride 2 dilation 2": (4, 6, 3, {"stride": 2, "padding": 2, "dilation": 2}),
    "same": (4, 6, 3, {"padding": "same", "dilation": 2}),
    "same even kernel": (4, 6, (2, 4), {"padding": "same"}),
    "asymmetric 1x3": (4, 6, (1, 3), {"padding": (0, 1)}),
    "valid": (4, 6, 3, {"padding": "valid", "bias": False}),
    "groups": (6, 9, 3, {"groups": 3, "padding": 1}),
    "groups 1x1": (4, 8, 1, {"groups": 2, "stride": 2}),
    "depthwise": (6, 6, 3, {"groups": 6, "padding": 1}),
    "depthwise multiplied": (3, 6, 1, {"groups": 3}),
    "reflect": (4, 5, 3, {"padding": (1, 2), "padding_mode": "reflect"}),
    "circular": (4, 5, 3, {"padding": 1, "padding_mode": "circular"}),
    "replicate": (4, 5, 3, {"padding": "same", "padding_mode": "replicate"}),
    "rank 1": (7, 1, 1, {}),
    "outputs > inputs·K²": (2, 40, 3, {"padding": 1}),
    "single": (1, 1, 1, {}),
}


def make(case: str, **options) -> SVFConv2d:
    *channels, kernel_size, arguments = CASES[case]
    return SVFConv2d(*channels, kernel_size, **arguments, **options)


def with_strategy(layer: SVFConv2d, strategy: str) -> SVFConv2d:
    layer = copy.deepcopy(layer)
    layer.strategy = strategy
    layer.refresh()
    return layer


def step(layer, x, grad_y):
    """y, dx, dS and, where it trains, db."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    wanted = [x, layer.S] + ([layer.bias] if layer.bias is not None else [])
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_y.to(y.dtype))]


def compare(layer: SVFConv2d, x: torch.Tensor, strategy: str) -> None:
    """The 2× rule: the error of y and of every gradient to float64 against the reference's."""
    if layer.bias is not None:
        layer.bias.requires_grad_()
    reference = with_strategy(layer, "reference")
    truth = copy.deepcopy(reference).double()
    grad_y = torch.randn(truth(x.double()).shape, dtype=torch.float64).to(x.dtype)
    exact = step(truth, x.double(), grad_y.double())
    expected = step(reference, x, grad_y)
    got = step(with_strategy(layer, strategy), x, grad_y)
    for name, *values in zip(("y", "dx", "dS", "db"), got, expected, exact, strict=False):
        magnitude = accumulated(values[2], x.dtype)
        # dS is float32, but of maps in the dtype of x
        name = f"{strategy} {name}"
        assert_error_within(*values, magnitude=magnitude, dtype=x.dtype, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_within_twice_the_error_of_the_reference(case, strategy, dtype, poisoned_memory):
    torch.manual_seed(1)
    layer = make(case).to(dtype)
    x = torch.randn(3, layer.in_channels, 9, 11).to(dtype)
    compare(layer, x, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ("3x3", "1x1 narrowing", "1x1 widening stride 2", "groups"))
def test_channels_last_and_strided_inputs(case, strategy, poisoned_memory):
    torch.manual_seed(2)
    layer = make(case)
    x = torch.randn(3, layer.in_channels, 9, 22)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    compare(layer, channels_last, strategy)
    y = with_strategy(layer, strategy)(channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad_x,) = torch.autograd.grad(
        with_strategy(layer, strategy)(channels_last.requires_grad_()).sum(), channels_last
    )
    assert grad_x.is_contiguous(memory_format=torch.channels_last)
    sliced = x[..., ::2]
    compare(layer, sliced, strategy)


# Condition numbers, exact zeros, repeated values, values that training made negative or zero.
SPECTRA = {
    **{
        f"condition 1e{power}": lambda rank, power=power: torch.logspace(0, -power, rank)
        for power in (1, 2, 3, 6, 9, 12)
    },
    "flat": torch.ones,
    "half zero": lambda rank: torch.linspace(2, 1, rank) * (torch.arange(rank) < rank // 2),
    "one zero": lambda rank: (torch.arange(rank) > 0).float(),
    "all zero": torch.zeros,
    "through zero": lambda rank: torch.linspace(1.2, -1.2, rank),
    "negative": lambda rank: -torch.linspace(1, 2, rank),
    "trained": lambda rank: torch.logspace(0, -1.5, rank) * (torch.rand(rank) * 1.4 - 0.2),
    "one large": lambda rank: torch.cat([torch.full((1,), 1e4), torch.ones(rank - 1)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_hard_spectra(spectrum, strategy, dtype):
    # 3×3, the two kinds of 1×1, and groups whose guards differ
    shapes = (
        {"in_channels": 8, "out_channels": 24, "kernel_size": 3, "padding": 1, "bias": False},
        {"in_channels": 48, "out_channels": 24, "kernel_size": 1, "bias": False},
        {"in_channels": 24, "out_channels": 48, "kernel_size": 1},
        {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "groups": 2},
    )
    for seed, shape in enumerate(shapes):
        torch.manual_seed(seed)
        layer = SVFConv2d(**shape)
        values = torch.cat([SPECTRA[spectrum](layer.rank) for _ in range(layer.groups)])
        if layer.groups == 2:
            values[: layer.rank] = torch.linspace(1.5, 1, layer.rank)
        with torch.no_grad():
            layer.S.copy_(values)
        x = torch.randn(2, layer.in_channels, 13, 15).relu().to(dtype)  # as after a ReLU
        compare(layer.to(dtype), x, strategy)


@pytest.mark.parametrize("strategy", (*STRATEGIES, "reference"))
@pytest.mark.parametrize("case", ("3x3", "1x1 widening stride 2", "1x1 narrowing", "depthwise"))
def test_gradcheck(case, strategy):
    torch.manual_seed(3)
    layer = make(case, dtype=torch.float64, strategy=strategy)
    x = torch.randn(1, layer.in_channels, 3, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, S):
        return torch.func.functional_call(layer, {"S": S}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.S), check_batched_grad=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivative_raises(strategy):
    layer = SVFConv2d(4, 5, 3, strategy=strategy)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="SVF layer: expected .* without create_graph=True"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("strategy", (*STRATEGIES, "reference"))
def test_empty_batch(strategy):
    for case in ("3x3", "1x1 widening stride 2", "depthwise"):
        layer = make(case, strategy=strategy)
        x = torch.randn(0, layer.in_channels, 9, 11, requires_grad=True)
        y = layer(x)
        assert y.shape[0] == 0 and y.shape[1] == layer.out_channels
        y.sum().backward()
        assert torch.equal(layer.S.grad, torch.zeros_like(layer.S))
        assert x.grad.shape == x.shape


def kept_shapes(layer, x):
    """Shapes autograd keeps of what is neither parameter nor buffer."""
    resident = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    shapes = []

    def pack(tensor):
        if tensor.data_ptr() not in resident:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sorted(shapes)


def test_what_each_strategy_keeps():
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False)
    expected = {"fold": [(2, 6, 9, 9)], "chain": [(2, 4, 5, 5)], "gram": [(2, 4, 5, 5)]}
    for strategy, shapes in expected.items():
        assert kept_shapes(SVFConv2d.from_conv(conv, strategy), x) == shapes
    widening = nn.Conv2d(6, 9, 1, stride=2, bias=False)
    assert kept_shapes(SVFConv2d.from_conv(widening, "gram"), x) == [(2, 6, 5, 5)]
    # a guarded direction costs one map of y-Gram, nothing of x-Gram
    guarded = SVFConv2d.from_conv(conv, "gram")
    with torch.no_grad():
        guarded.S[-1] = 0
    assert kept_shapes(guarded, x) == [(2, 1, 5, 5), (2, 4, 5, 5)]
    # S frozen, or no gradient at all: nothing
    frozen = SVFConv2d.from_conv(conv, "gram").requires_grad_(False)
    assert kept_shapes(frozen, x) == []


def test_gram_shares_the_output_it_keeps():
    layer = SVFConv2d(6, 4, 3, bias=False, strategy="gram")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(1, 6, 5, 5))
    assert y.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in kept}


def test_in_place_change_of_a_kept_output_is_explained():
    layer = SVFConv2d(6, 4, 3, bias=False, strategy="gram")
    y = layer(torch.randn(1, 6, 5, 5))
    y.relu_()
    with pytest.raises(RuntimeError, match="inplace=False there, or use strategy='chain'"):
        y.sum().backward()


def test_frozen_scale_still_passes_the_gradient_through():
    for strategy in (*STRATEGIES, "reference"):
        layer = SVFConv2d(4, 6, 3, padding=1, strategy=strategy).requires_grad_(False)
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        (grad_x,) = torch.autograd.grad(layer(x).square().sum(), x)
        conv = layer.merged().requires_grad_(False)
        (expected,) = torch.autograd.grad(conv(x).square().sum(), x)
        torch.testing.assert_close(grad_x, expected, rtol=1e-4, atol=1e-5)


def test_strategies_agree_on_a_gradient_larger_than_rounding():
    """The tolerance above is relative to truth; this one would see a common missing factor."""
    torch.manual_seed(5)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(2, 6, 7, 7)
    layer = SVFConv2d.from_conv(conv, "gram")
    layer(x).square().sum().backward()
    for r in (0, 3, 7):  # a central difference of the loss itself
        step_size = 1e-3 * layer.S[r].item()
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(layer).double()
            with torch.no_grad():
                moved.S[r] += sign * step_size
            losses.append(moved(x.double()).square().sum())
        slope = (losses[0] - losses[1]) / (2 * step_size)
        assert math.isclose(layer.S.grad[r].item(), slope.item(), rel_tol=1e-3)
