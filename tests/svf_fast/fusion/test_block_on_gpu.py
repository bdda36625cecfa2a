"""The GPU's path through the blocks: the same gradients, and no pass that a product could carry."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import _library
from svf_fast.layers.factored import Factored, svf_layers
from tests.svf_fast.gpu_path import defined, interpreted, on_gpu
from tests.svf_fast.ops.test_block import Basic, Bottleneck, as_reference, compare, frozen, step

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


def converted(
    name: str,
    strategy: str = "auto",
    orthogonal: bool = False,
    trains: str = "S",
    core: str = "diag",
) -> nn.Module:
    torch.manual_seed(0)
    block = frozen(BLOCKS[name]())
    if orthogonal:  # no guarded directions
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
    model = nn.Sequential(block)
    return svf_fast.convert(model, None, strategy=strategy, trains=trains, core=core)


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


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("strategy", ("gram", "chain"))
@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("bottleneck downsample", "band:1"),
        ("bottleneck widening", "block:4"),
        ("bottleneck odd", "lowrank:2"),
        ("unit", "band:2"),
    ],
)
def test_cores(name, core, strategy, kernels):
    """With and without guarded directions."""
    model = converted(name, strategy, core=core)
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.parts[-1].normal_(std=0.05)
    with on_gpu(KERNELS[kernels]()):
        for S in (layer.S for layer in svf_layers(model).values()):
            compare(model, image(model), f"{name} {core} {strategy}")
            with torch.no_grad():
                S[-1] = 1e-4
        compare(model, image(model), f"{name} {core} {strategy} guarded")


@pytest.mark.parametrize("name", ("bottleneck", "bottleneck widening", "bottleneck downsample"))
def test_16_bit(name):
    model = converted(name).bfloat16()
    reference, truth = as_reference(model), as_reference(model).double()
    errors = []  # of each image, [ours or theirs, tensor]
    for _ in range(9):  # a ReLU that flips, in either, is most of one image's error
        x = image(model, torch.bfloat16)
        exact, expected = step(truth, x.double()), step(reference, x)
        with on_gpu(interpreted()):
            got = step(model, x)
        errors.append(
            [
                [float((value.double() - true).norm() / true.norm()) for value, true in pairs]
                for pairs in (zip(got, exact, strict=True), zip(expected, exact, strict=True))
            ]
        )
    mine, theirs = torch.tensor(errors).median(dim=0).values
    assert (mine <= 2 * theirs + 0.005).all(), (mine, theirs)


def test_a_bottleneck_takes_three_products_and_two_passes():
    model = converted("bottleneck", orthogonal=True)
    with on_gpu(defined()) as calls:
        step(model, image(model))
    del calls["compose_all"]  # once per change of S
    # forward: conv1 and conv3; backward: dgrad of conv3 and of conv1
    assert calls == {"pointwise": 4, "activation_gradients": 2}


def test_a_downsample_block_never_writes_the_masked_gradient():
    model = converted("bottleneck widening", orthogonal=True)
    with on_gpu(defined() | {"affine_act_backward": never, "affine_act": never}) as calls:
        step(model, image(model))
    del calls["compose_all"]
    assert calls == {"pointwise": 5, "activation_gradients": 2, "scale_gradient": 1}


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
    for name in ("compose", "compose_all", "guards_hold"):  # a graph does both for each layer
        del calls[name], eager[name]
    assert calls == eager and eager
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted)


def change(layer: Factored, factor: float) -> None:
    """Multiply some of the singular values that a layer computes with."""
    with torch.no_grad():
        half = layer.trained[: layer.S.numel() // 2]
        half.mul_(factor) if layer.trains == "S" else half.add_(math.log(factor))


@pytest.mark.parametrize(
    ("kernels", "trains"), [("definition", "S"), ("triton", "S"), ("definition", "log_scale")]
)
def test_a_captured_step_composes_all_weights_and_tests_all_guards_once(
    kernels, trains, monkeypatch
):
    names = "bottleneck downsample", "bottleneck"
    blocks = [converted(name, trains=trains)[0] for name in names]
    last = nn.Conv2d(32, 8, 1)
    model = svf_fast.convert(nn.Sequential(*blocks, last), ["2"], trains=trains)
    layers = svf_layers(model).values()
    x = image(model)
    with on_gpu(KERNELS[kernels]()) as calls:
        step(model, x)
        key = svf_fast.follow(model)
        for layer in layers:
            change(layer, 1.01)
        assert svf_fast.follow(model) == key
        expected = step(model, x)
        calls.clear()
        monkeypatch.setattr(Factored, "is_captured", True)
        for layer in layers:  # what a graph finds there when it runs again
            if layer.values.S_in_use is not None:
                layer.values.S_in_use.fill_(float("nan"))
        with svf_fast.composed(model):
            got = step(model, x)
        assert calls["compose_all"] == 1 and calls["guards_hold"] == 1 and not calls["compose"]
        assert all(map(torch.equal, got, expected))
        calls.clear()
        step(model, x)  # without it each layer composes its own
        assert calls["compose"] == len(layers) == calls["guards_hold"] and not calls["compose_all"]
        monkeypatch.undo()
        change(next(iter(layers)), 1e-6)  # no longer guarded
        assert svf_fast.follow(model) != key


def test_what_a_captured_graph_rests_on():
    model = converted("bottleneck")
    model(image(model))
    key = svf_fast.follow(model)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    layer = next(iter(svf_layers(model).values()))
    changes = {
        "norm": lambda: norm.running_mean.add_(1),
        "factors": lambda: layer.U.mul_(1),
        "frozen": lambda: layer.S.requires_grad_(False),
        "frozen value": lambda: layer.S.mul_(1.01),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        assert (before := key) != (key := svf_fast.follow(model)), name
        assert before != key


@pytest.mark.parametrize("trains", ("S", "log_scale"))
def test_weights_of_a_network_are_composed_together_once_they_were_asked_for(trains):
    model = converted("bottleneck downsample", trains=trains)
    with on_gpu(defined()) as calls:
        for expected in (4, 1, 1):  # alone at first, then all at once
            for layer in svf_layers(model).values():
                change(layer, 1.01)
            calls.clear()
            step(model, image(model))
            assert calls["compose_all"] == expected
        copied = copy.deepcopy(model)
        names = {layer.network for layer in svf_layers(copied).values()}
        assert len(names) == 1 and names.isdisjoint(x.network for x in svf_layers(model).values())
