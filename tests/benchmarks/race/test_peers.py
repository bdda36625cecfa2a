"""Every peer computes the official chain's network, with its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.race.exactness import gradients, step
from benchmarks.race.levels import LEVELS, SUPPORTS_AGAIN, SVF_LAYERS, Settings, trained
from benchmarks.race.peers import LAYER_PEERS, PEERS, compiled, official
from fss.training.measure import saved_bytes

EAGER = [name for name, peer in PEERS.items() if not peer.compiled]
TINY = Settings(size=33, width=8, batch=2, dtype="float64")
# Rounding alone, in float64, through sixteen blocks.
TOLERANCE = 1e-10


def tiny(name: str, level: str = "backbone", **settings) -> tuple[nn.Module, Settings]:
    own = Settings(**{"size": 33, "width": 8, "dtype": "float64", **settings})
    network = LEVELS[level].network(own, LEVELS[level].groups[0])
    return LEVELS[level].convert(network, name, None), own


def assert_same(found: dict, expected: dict, peer: str = "official") -> None:
    """Gradients to rounding; of S, where a peer rounds what it keeps for them, to some percent.

    One that rounds all maps that are kept turns masks over: there any gradient is as far off.
    """
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        rounded = LEVELS["step"].peers[peer].judged_in and name.rpartition(".")[2] == "S"
        limit = 0.5 if peer == "official, 8 bits" else 0.1 if rounded else TOLERANCE
        assert error < limit, name


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("name", EAGER)
def test_output_and_gradients(name, backbone):
    settings = Settings(size=33, width=8, dtype="float64", backbone=backbone)
    level = LEVELS["backbone"]
    plain = level.network(settings, "layers 2-4")
    x = torch.rand(2, 32 if backbone == "resnet50" else 8, 9, 9, dtype=torch.float64)
    found, expected, outputs = {}, {}, []
    for peer, grads in ((name, found), ("official", expected)):
        network = level.convert(copy.deepcopy(plain), peer, None)
        argument = x.clone().requires_grad_()
        y = network(argument)
        y.square().sum().backward()
        outputs.append(y.detach())
        grads["x"] = argument.grad
        grads |= {key: p.grad for key, p in trained(network).items()}
    assert (outputs[0] - outputs[1]).norm() < TOLERANCE * outputs[1].norm()
    if PEERS[name].trains != "S":
        expected = {"x": expected["x"]}
    assert_same(found, expected, name)


@pytest.mark.parametrize("name", EAGER)
def test_what_trains(name):
    network, _ = tiny(name)
    kinds = {key.rpartition(".")[2] for key in trained(network)}
    assert kinds == {"S": {"S"}, "weights": {"weight"}, "nothing": set()}[PEERS[name].trains]
    if PEERS[name].trains == "weights":
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert len(trained(network)) == len(convolutions)


@pytest.mark.parametrize("name", [*EAGER, SUPPORTS_AGAIN])
def test_a_training_step(name):
    level = LEVELS["step"]
    settings = Settings(size=33, width=8, batch=1, shots=2, dtype="float64")
    inputs = level.inputs(settings, "step")
    found, expected = (
        gradients(level, tiny(peer, "step")[0], inputs, peer, settings)
        for peer in (name, "official")
    )
    if level.peers[name].trains != "S":
        expected = {key: value for key, value in expected.items() if "backbone" not in key}
    assert expected
    assert_same(found, expected, name)


@pytest.mark.parametrize("name", [name for name in LAYER_PEERS if not LAYER_PEERS[name].compiled])
@pytest.mark.parametrize("group", ["layer2 conv2 128→128 3×3", "layer2 downsample 256→512 1×1 /2"])
def test_one_layer(name, group):
    level, settings = LEVELS["layer"], Settings(size=17, batch=1, dtype="float64")
    inputs, plain = level.inputs(settings, group), level.network(settings, group)
    found, expected = (
        gradients(level, level.convert(copy.deepcopy(plain), peer, None), inputs, peer, settings)
        for peer in (name, "official")
    )
    if LAYER_PEERS[name].trains != "S":
        expected = {"argument 0": expected["argument 0"]}
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EAGER)
def test_runs_under_autocast_and_in_channels_last(name, dtype):
    level = LEVELS["backbone"]
    network, settings = tiny(name, dtype=dtype, channels_last=True)
    inputs = level.inputs(settings, "layers 2-4")
    step(level, network, inputs, name, settings)
    assert inputs.arguments[0].grad.isfinite().all()
    assert all(p.grad is not None for p in trained(network).values())


def saved(name: str, side: int) -> int:
    """Return the bytes that a bottleneck of width 8 without downsample keeps for one image."""
    level, settings = LEVELS["block"], Settings(size=8 * side - 7, width=4, batch=1)
    network = level.convert(level.network(settings, "layer2"), name, None)
    x = level.inputs(settings, "layer2").arguments[0]
    with saved_bytes(network) as counted:
        y = network(x)
    del y
    return counted.total


# In maps of C channels, float32, of a bottleneck 4C→C→C→4C.
MAPS = {
    # x 4C; v, S·v and y: 3C, 3C, 6C; the ReLUs C, C, 4C: 18C, and x again as the output
    "official": 22,
    "official, checkpoint per block": 4,  # x
    "save what is needed": 3 + 6 / 4,  # v: 3C; a byte of each ReLU: 6C/4
    "frozen bound": 4 + 2 + 4,  # what convolutions and ReLUs share: x and the ReLUs
}


@pytest.mark.parametrize("name", MAPS)
def test_saved_by_hand(name):
    side, width = 9, 8
    assert saved(name, side) == MAPS[name] * 4 * width * side**2


def test_compiled_is_compiled():
    network = compiled(official)(LEVELS["backbone"].network(TINY, "layers 2-4"), SVF_LAYERS)
    assert all(network.get_submodule(name)._compiled_call_impl for name in SVF_LAYERS)
