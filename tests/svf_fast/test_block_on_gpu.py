"""The GPU's path through the blocks: the same gradients, and no pass that a product could carry."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_path import defined, interpreted, on_gpu
from test_block import Basic, Bottleneck, as_reference, compare, frozen, step
from torch import nn

import svf_fast
from svf_fast import _library
from svf_fast.nn.factored import svf_layers

KERNELS = {"definition": defined, "triton": interpreted}
BLOCKS = {
    "bottleneck": lambda: Bottleneck(32, 8, 32, dilation=2),
    "bottleneck downsample": lambda: Bottleneck(16, 8, 32, stride=2),
    "bottleneck widening": lambda: Bottleneck(16, 8, 32),
    "bottleneck grouped": lambda: Bottleneck(32, 8, 32, groups=2),
    "bottleneck odd": lambda: Bottleneck(20, 5, 20),
    "basic downsample": lambda: Basic(8, 16, stride=2),
    "unit": lambda: nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU()),
}


def converted(name: str, strategy: str = "auto", orthogonal: bool = False) -> nn.Module:
    torch.manual_seed(0)
    block = frozen(BLOCKS[name]())
    if orthogonal:  # no guarded directions
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
    return svf_fast.convert(nn.Sequential(block), None, strategy=strategy)


def image(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    channels = next(iter(svf_layers(model).values())).in_channels
    x = torch.randn(2, channels, 9, 7, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("strategy", ("auto", "gram", "chain"))
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_within_twice_the_error_of_the_reference(name, strategy, kernels):
    model = converted(name, strategy)
    with on_gpu(KERNELS[kernels]()):
        for recompute in (False, True):
            for module in model.modules():
                if hasattr(module, "recompute"):
                    module.recompute = recompute
            compare(model, image(model), f"{name} {strategy}")
        compare(model, image(model).contiguous(), f"{name} {strategy} contiguous")


@pytest.mark.parametrize("name", ("bottleneck", "bottleneck widening", "bottleneck downsample"))
def test_16_bit(name):
    model = converted(name).bfloat16()
    reference, truth = as_reference(model), as_reference(model).double()
    x = image(model, torch.bfloat16)
    exact, expected = step(truth, x.double()), step(reference, x)
    with on_gpu(interpreted()):
        got = step(model, x)
    for mine, theirs, true in zip(got, expected, exact, strict=True):
        errors = [(value.double() - true).norm() / true.norm() for value in (mine, theirs)]
        assert errors[0] <= 3 * errors[1] + 0.01  # ReLUs flip in either; wrong would be near 1


def test_a_bottleneck_takes_three_products_and_two_passes():
    model = converted("bottleneck", orthogonal=True)
    with on_gpu(defined()) as calls:
        step(model, image(model))
    # forward: conv1 and conv3; backward: dgrad of conv3 and of conv1
    assert calls == {"pointwise": 4, "activation_grams": 2}


def test_a_downsample_block_never_writes_the_masked_gradient():
    model = converted("bottleneck widening", orthogonal=True)
    with on_gpu(defined() | {"affine_act_backward": never, "affine_act": never}) as calls:
        step(model, image(model))
    assert calls == {"pointwise": 5, "activation_grams": 2}


def never(*arguments):
    raise AssertionError("a pass over the maps of a block that its products should carry")


def test_only_x_requires_no_gradient():
    model = converted("bottleneck")
    x = image(model)
    with on_gpu(defined()):
        y = model(x)
        grads = torch.autograd.grad(y.sum(), list(svf_fast.svf_parameters(model)))
    plain = copy.deepcopy(model)
    expected = torch.autograd.grad(plain(x).sum(), list(svf_fast.svf_parameters(plain)))
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_without_triton_the_op_says_what_to_install():
    with pytest.raises(RuntimeError, match="compose: on a GPU .* pip install triton"):
        _library.triton_kernel("not_there", "compose")()


@pytest.mark.parametrize("name", ("bottleneck", "bottleneck widening", "basic downsample"))
def test_under_compile_the_kernels_are_called_whole(name):
    model = converted(name, orthogonal=True)
    x = image(model)
    with on_gpu(defined()) as calls:
        expected = step(model, x)
        eager = calls.copy()
        calls.clear()
        got = step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert calls == eager and eager
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
