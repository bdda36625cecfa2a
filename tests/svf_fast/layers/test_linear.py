from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import SVFLinear
from tests.svf_fast.tolerance import accumulated, assert_error_within


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("strategy", ("fold", "chain", "gram"))
@pytest.mark.parametrize("features", ((12, 5), (5, 12)))
@pytest.mark.parametrize("leading", ((7,), (2, 3), (), (0, 4)))
def test_gradients(features, strategy, dtype, leading, poisoned_memory):
    _check_gradients(features, strategy, dtype, leading)


@pytest.mark.parametrize("features", ((12, 5), (5, 12)))
def test_gradients_of_many_positions_are_not_summed_in_bfloat16(features):
    _check_gradients(features, "fold", torch.bfloat16, (40, 9))


def _check_gradients(features, strategy, dtype, leading):
    torch.manual_seed(0)
    layer = SVFLinear(*features, strategy="reference").to(dtype)
    layer.bias.requires_grad_()
    other = copy.deepcopy(layer)
    other.strategy = strategy
    other.refresh()
    truth = copy.deepcopy(layer).double()
    x = torch.randn(*leading, features[0]).to(dtype)
    grad_y = torch.randn(*leading, features[1]).to(dtype)

    def step(module, x, grad_y):
        x = x.clone().requires_grad_()
        y = module(x)
        assert y.shape == grad_y.shape
        return [y.detach(), *torch.autograd.grad(y, (x, module.S, module.bias), grad_y)]

    exact = step(truth, x.double(), grad_y.double())
    for name, *values in zip(
        ("y", "dx", "dS", "db"), step(other, x, grad_y), step(layer, x, grad_y), exact, strict=False
    ):
        if values[0].numel():
            magnitude = accumulated(values[2], dtype)
            assert_error_within(*values, magnitude=magnitude, name=name)


def test_conversion_and_back():
    linear = nn.Linear(20, 30)
    layer = SVFLinear.from_linear(linear)
    x = torch.randn(4, 20)
    expected = linear(x)
    assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()
    assert (layer.merged()(x) - expected).norm() <= 1e-5 * expected.norm()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["S"]
    assert "in_features=20" in repr(layer)


def test_compile_fullgraph_equals_eager():
    torch._dynamo.reset()
    layer = SVFLinear(6, 9, strategy="gram")
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_module_may_use_the_weight_itself():
    torch.manual_seed(0)
    layer = SVFLinear(20, 30).double()
    x = torch.randn(4, 20, dtype=torch.float64)
    y = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(layer.weight, layer.merged().weight)
    for used, called in zip(
        torch.autograd.grad(y.square().sum(), layer.S),
        torch.autograd.grad(layer(x).square().sum(), layer.S),
    ):
        torch.testing.assert_close(used, called)
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.ones(30, 20))
    assert "weight" not in layer.state_dict()


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[..., 6\], got \[3, 5\]"):
        SVFLinear(6, 9)(torch.randn(3, 5))
    with pytest.raises(TypeError, match="expected an nn.Linear, got Conv2d"):
        SVFLinear.from_linear(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("strategy", ("auto", "gram", "chain", "fold", "reference"))
@pytest.mark.parametrize("sizes", ((8, 8), (8, 16), (16, 8)))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("shape", ((3,), (2, 3)))
def test_an_activation_in_place_may_follow(strategy, sizes, bias, shape):
    """As in the classifiers of VGG and AlexNet."""
    linear = nn.Linear(*sizes, bias=bias)
    x = torch.randn(*shape, sizes[0])
    plain = nn.Sequential(linear, nn.ReLU(inplace=True))
    expected = plain(x)
    model = svf_fast.convert(copy.deepcopy(plain), None, strategy, progress=False)
    y = model(x)
    torch.testing.assert_close(y, expected)
    if strategy == "gram" and sizes == (16, 8) and not bias:  # which keeps what is overwritten
        with pytest.raises(RuntimeError, match="set inplace=False there"):
            y.sum().backward()
        return
    y.sum().backward()
    assert model[0].S.grad.isfinite().all()
