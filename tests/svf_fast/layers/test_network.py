"""What is kept of layers follows them: other tensors, other values, copies, other modes."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import svf_fast
from svf_fast import SVFConv2d, SVFConvBNAct
from svf_fast.layers.factored import Factored, svf_layers
from svf_fast.ops import factors
from tests.svf_fast.gpu_path import defined, on_gpu
from tests.svf_fast.ops.test_block import Bottleneck, as_reference, frozen


def block(strategy: str = "auto", trains: str = "S") -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(frozen(Bottleneck(12, 4, 12)))
    return svf_fast.convert(block, None, strategy=strategy, trains=trains)


def image() -> torch.Tensor:
    return torch.randn(2, 12, 5, 5)


def singular_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.S": layer.S for name, layer in svf_layers(model).items()}


def close(got, expected) -> None:
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)


def test_the_gradient_goes_to_the_S_that_is_there():
    model, x = block(), image()
    model(x).sum().backward()
    conv = model[0].conv1
    conv.S = nn.Parameter(conv.S.detach() * 1.1)
    model(x).sum().backward()
    reference = as_reference(model)
    reference(x).sum().backward()
    close([conv.S.grad], [reference[0].conv1.S.grad])


def test_steps_on_values_that_are_no_parameters():
    """An inner loop: each step has S of its own, and the last one's gradient reaches all."""
    model, x = block(), image()
    found = []
    for network in (model, as_reference(model)):
        values = {
            k: v.detach().clone().requires_grad_() for k, v in singular_values(network).items()
        }
        for _ in range(3):
            loss = functional_call(network, values, (x,)).square().mean()
            grads = torch.autograd.grad(loss, list(values.values()))
            values = {
                k: (v - 0.1 * g).detach().requires_grad_()
                for (k, v), g in zip(values.items(), grads, strict=True)
            }
        found.append([*values.values()])
    close(*found)


@pytest.mark.parametrize("strategy", ("gram", "chain", "fold"))
def test_factors_at_an_address_that_was_used_before(strategy):
    torch.manual_seed(0)
    layer = SVFConv2d(6, 8, 3, strategy=strategy)
    x, U = torch.randn(1, 6, 5, 5), layer.U.clone()
    expected = layer(x) - layer.bias.reshape(-1, 1, 1)
    for factor in (2.0, 3.0, 4.0):
        for name in ("U", "S"):
            given = {name: getattr(layer, name).detach() * factor}
            y = functional_call(layer, given, (x,)) - layer.bias.reshape(-1, 1, 1)
            if strategy != "gram" or name == "S":
                close([y], [expected * factor])
            del given, y
            gc.collect()
    assert torch.equal(layer.U, U)


def test_another_strategy_is_taken_up():
    model, x = block(), image()
    model(x)
    layer = model[0].conv2
    for strategy in ("chain", "fold", "reference", "gram"):
        layer.strategy = strategy
        assert layer.strategy_in_use == strategy
        model.zero_grad()
        model(x).sum().backward()
        reference = as_reference(model)
        reference.zero_grad()
        reference(x).sum().backward()
        close([layer.S.grad], [reference[0].conv2.S.grad])


@pytest.mark.parametrize("trains", ("S", "log_scale"))
def test_a_replica_has_its_own_values(trains):
    model, x = block(trains=trains), image()
    expected = model(x)
    replica = model._replicate_for_data_parallel()
    inner = model[0]._replicate_for_data_parallel()
    conv = model[0].conv1._replicate_for_data_parallel()
    own = model[0].conv1.trained.detach()
    setattr(conv, trains, own * 2 if trains == "S" else own + math.log(2))  # as torch does it
    conv._parameters["bias"] = None
    inner._modules = {**inner._modules, "conv1": conv}
    replica._modules = {"0": inner}
    changed = copy.deepcopy(model)
    with torch.no_grad():
        values = changed[0].conv1.trained
        values.mul_(2) if trains == "S" else values.add_(math.log(2))
    close([replica(x), model(x)], [changed(x), expected])


def test_conversion_after_a_pass():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4)).eval().requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    svf_fast.convert(model, ["0"])
    close([model(x)], [expected])
    svf_fast.convert(model, ["3"])
    close([model(x)], [expected])


@pytest.mark.parametrize("apart", (False, True))
def test_writes_past_the_version_counter(apart):
    model, x = block(), image()
    norm, conv = model[0].bn1, model[0].conv1
    conv.bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    if apart:
        norm.running_mean = torch.zeros(8)[::2]
    model(x)
    for write in (norm.running_mean, conv.bias):
        write.data.add_(1.0)
        close([model(x)], [as_reference(model)(x)])


def test_W_is_composed_once_whatever_the_mode(monkeypatch):
    composed = []
    compose = factors.compose
    monkeypatch.setattr(factors, "compose", lambda *a: composed.append(1) or compose(*a))
    model, x = block(), image()
    unit = SVFConvBNAct(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), relu=False).eval()
    unit.bn.requires_grad_(False)
    other, added = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    for _ in range(4):
        model(x)
        unit(other, added)
        with torch.no_grad():
            model(x)
            unit(other, added)
    assert len(composed) == len(svf_layers(model)) + 1
    assert torch.equal(copy.deepcopy(unit)(other, added), unit(other, added))


def test_nothing_of_a_step_outlives_its_backward_pass():
    model, x = block(), image()
    loss = model(x).sum()
    node = loss.grad_fn.next_functions[0][0]
    loss.backward(retain_graph=True)
    assert node.stages
    loss.backward()
    assert node.stages is None
    layer = SVFConv2d(6, 8, 3, bias=False, strategy="gram")
    loss = layer(torch.randn(1, 6, 5, 5)).sum()
    node = loss.grad_fn.next_functions[0][0]
    assert node.tensors
    loss.backward()
    assert not node.tensors
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("strategy", ("chain", "reference"))
def test_graphs_of_layers_without_a_composed_weight(strategy, monkeypatch):
    """Mixed too: what was made before a capture is not in the graph."""
    alone, mixed = block(strategy), block()
    mixed[0].conv2.strategy = strategy
    for model in (alone, mixed):
        x = image().contiguous(memory_format=torch.channels_last)
        with on_gpu(defined()):
            model(x).sum().backward()
            key = svf_fast.follow(model)
            assert svf_fast.follow(model) == key
            with monkeypatch.context() as patch:
                patch.setattr(Factored, "is_captured", True)
                before = {k: list(v.values.made.values()) for k, v in svf_layers(model).items()}
                with svf_fast.composed(model):
                    model(x).sum().backward()
                    for name, layer in svf_layers(model).items():
                        for made in layer.values.made.values():
                            assert all(made.weight is not old.weight for old in before[name])
            assert not any(layer.values.made for layer in svf_layers(model).values())
            model(x).sum().backward()


def test_what_else_a_graph_rests_on():
    model = block()
    conv, norm = model[0].conv1, model[0].bn1
    conv.bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    model(image())
    key = svf_fast.follow(model)
    with torch.no_grad():
        model.eval()
        model(image())  # as a validation does
    assert svf_fast.follow(model) == key
    changes = {
        "bias": lambda: conv.bias.add_(1),
        "eps": lambda: setattr(norm, "eps", 1e-3),
        "recompute": lambda: setattr(model[0], "recompute", True),
        "hook": lambda: norm.register_forward_hook(lambda *_: None),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        before, key = key, svf_fast.follow(model)
        assert before != key, name
