"""A 16-bit row is judged by a gate that can fail, also where a whole network says nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from benchmarks.race.exactness import LIMIT, Judge
from benchmarks.race.levels import LEVELS, Settings
from benchmarks.race.peers import PEERS, official

LEVEL = LEVELS["backbone"]
BF16 = Settings(size=33, width=8, batch=1, dtype="bfloat16")
FAULTY = "layer3.2.conv2.S"  # one of 42
EAGER = [name for name, peer in PEERS.items() if not peer.compiled]


def plain() -> nn.Module:
    return LEVEL.network(BF16, "layers 2-4")


def with_gradient(change) -> nn.Module:
    """Return the official chain with gradients changed by name."""
    network = official(plain())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: change(name, grad))
    return network


def flipped(name, grad):
    return -grad if name == FAULTY else grad


def one_zero(name, grad):
    return torch.zeros_like(grad) if name == FAULTY else grad


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(LEVEL, "layers 2-4", official(plain()))


def judged(judge: Judge, network: nn.Module, name: str = "official", settings=BF16):
    rows: dict = {name: {}}
    nothing = lambda _: contextlib.nullcontext()  # noqa: E731
    passed = judge.judge({name: network}, settings, range(2), nothing, rows)
    return name in passed, rows[name]


def test_the_official_chain_passes_by_its_blocks(judge):
    """Here the whole network's error is so large that twice of it allowed anything."""
    passed, row = judged(judge, official(plain()))
    assert passed and row["block_error"] < 0.2 and row["error"] > LIMIT / 2


@pytest.mark.parametrize("name", EAGER)
def test_every_peer_passes(judge, name):
    passed, row = judged(judge, LEVEL.convert(plain(), name, None), name)
    assert passed and row["block_error"] < 0.2


@pytest.mark.parametrize(
    "change",
    [one_zero, flipped, lambda _, grad: torch.zeros_like(grad)],
    ids=["one zero", "flipped", "zeros"],
)
def test_a_wrong_gradient_fails(judge, change):
    passed, row = judged(judge, with_gradient(change))
    assert not passed and row["block_error"] > 0.4


def test_a_gradient_of_the_input_that_is_zero_fails(judge):
    network = plain().requires_grad_(False)
    network.layer4[1].register_full_backward_hook(lambda _, grads, __: (0 * grads[0],))
    passed, row = judged(judge, network, "frozen bound")
    assert not passed and row["block_error"] == 1


def test_a_missing_gradient_is_an_error(judge):
    network = official(plain())
    network.get_parameter(FAULTY).requires_grad_(False)
    with pytest.raises(RuntimeError, match=FAULTY):
        judged(judge, network)


def test_what_is_allowed_stays_below_a_gradient_of_zeros():
    """A level without blocks, at inputs of which the official gradient itself is far off."""
    level = LEVELS["layer"]
    group = level.groups[0]
    settings = Settings(size=9, width=8, batch=1, dtype="bfloat16")
    chain = level.convert(level.network(settings, group), "official", None)

    class Far(Judge):
        def _errors(self, network, name, truth, units, settings):
            found = super()._errors(network, name, truth, units, settings)
            return dict.fromkeys(found, 0.9) if network is chain else found

    rows: dict = {"svf_fast": {}}
    network = level.convert(level.network(settings, group), "svf_fast", None)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    judge = Far(level, group, chain)
    nothing = lambda _: contextlib.nullcontext()  # noqa: E731
    assert not judge.judge({"svf_fast": network}, settings, [0], nothing, rows)
    assert rows["svf_fast"]["error"] > LIMIT


def test_units_of_a_step_are_the_blocks_that_train():
    level = LEVELS["step"]
    network = level.convert(level.network(BF16, "step"), "official", None)
    units = level.units(network, False)
    assert len(units) == 13 and all(name.startswith("backbone.layer") for name in units)
    assert not any("layer1" in name for name in units)
    assert level.units(network, True) == ["backbone.layer2", "backbone.layer3", "backbone.layer4"]
