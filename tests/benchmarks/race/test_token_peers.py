"""Peers on a vision transformer: the same network and gradients, and what each keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.race.contest import Contest
from benchmarks.race.exactness import gradients, step
from benchmarks.race.levels import LEVELS, Settings, defaults, trained
from benchmarks.race.token_peers import TOKEN_PEERS, LoRA, lora
from fss.training.measure import saved_bytes

LEVEL = LEVELS["vit"]
TINY = Settings(size=64, width=4, batch=2, dtype="float64", backbone="vit_tiny_patch16")


def converted(name: str, settings: Settings = TINY) -> nn.Module:
    return LEVEL.convert(LEVEL.network(settings, "blocks"), name, None)


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_gradients_are_those_of_the_official_layers(name):
    inputs = LEVEL.inputs(TINY, "blocks")
    found, expected = (
        gradients(LEVEL, converted(peer), inputs, peer, TINY) for peer in (name, "official")
    )
    if TOKEN_PEERS[name].trains != "S":
        expected = {"argument 0": expected["argument 0"]}
    for key, gradient in expected.items():
        rounded = "8 bits" in name and key.endswith("fc2.S")
        error = (found[key] - gradient).norm() / gradient.norm()
        assert error < (0.02 if rounded else 1e-10), key
        assert error > 1e-6 or not rounded, key


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_what_trains(name):
    network = converted(name)
    names = {key.rpartition(".")[2] for key in trained(network)}
    what = TOKEN_PEERS[name].trains
    assert names == {"S": {"S"}, "weights": {"weight", "bias"}, "LoRA": {"weight"}}.get(what, set())
    if what == "LoRA":
        assert all(".A." in key or ".B." in key for key in trained(network))
        assert len(trained(network)) == 2 * 4 * 12


@pytest.mark.parametrize("name", TOKEN_PEERS)
def test_runs_under_autocast(name):
    settings = Settings(size=64, width=4, batch=2, dtype="bfloat16", backbone="vit_tiny_patch16")
    network, inputs = converted(name, settings), LEVEL.inputs(settings, "blocks")
    step(LEVEL, network, inputs, name, settings)
    assert inputs.arguments[0].grad.isfinite().all()
    assert all(p.grad is not None for p in trained(network).values())


TOKENS = 4 * 4 + 1  # of 64 px in patches of 16, and the class
GRID = 3 / TOKENS  # of codes: three numbers a channel
# In maps of C channels; the official layers keep of each layer x, v and S·v
MAPS = {
    "full": 16,
    "LoRA, rank 4": 16,
    "frozen bound": 10,
    "svf_fast, unfused": 13,
    "svf_fast": 10,
    "svf_fast, 8 bits": 9.25 + GRID,
    "svf_fast, recompute": 6,
    "svf_fast, recompute, 8 bits": 5.25 + GRID,
    "svf_fast, chain": 10,
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_that_a_block_keeps(name):
    """By the difference of two widths, which leaves out what does not grow with C."""
    sizes = []
    for width in (8, 16):
        settings = Settings(size=64, width=width, batch=1, backbone="vit_tiny_patch16")
        network = LEVEL.network(settings, "blocks")[:1]
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)  # no guarded directions
        network = LEVEL.convert(network, name, None)
        x = LEVEL.inputs(settings, "blocks").arguments[0]
        with saved_bytes(network) as counted:
            y = network(x)
        del y
        sizes.append(counted.total / x.nbytes * width)
    assert (sizes[1] - sizes[0]) / 8 == pytest.approx(MAPS[name], rel=1e-9)


def test_a_race_of_it():
    settings = Settings(size=48, width=4, batch=1, backbone="vit_tiny_patch16")
    names = ["official", "LoRA, rank 4", "svf_fast"]
    group = Contest(LEVEL, "blocks", settings, names).run(rounds=2, peaks=False)
    assert [row["peer"] for row in group["rows"]] == names
    assert all(row["exact"] and row["saved_bytes"] > 0 for row in group["rows"])
    assert defaults("vit").size == 224


def test_lora_is_pefts():
    peft = pytest.importorskip("peft")
    plain = LEVEL.network(Settings(size=64, width=4, backbone="vit_tiny_patch16"), "blocks")[:1]
    mine = lora(4)(copy.deepcopy(plain))
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["qkv", "proj", "fc1", "fc2"])
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    ours = {name: module for name, module in mine.named_modules() if isinstance(module, LoRA)}
    for name, module in ours.items():
        nn.init.normal_(module.B.weight, std=0.1)
        layer = theirs.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(module.A.weight.data)
        layer.lora_B["default"].weight.data.copy_(module.B.weight.data)
    x = torch.randn(2, 17, 12, requires_grad=True)
    results = []
    for model in (mine, theirs):
        with saved_bytes(model) as counted:
            y = model(x)
        wanted = [x, *trained(model).values()]
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted), counted.total))
    *found, kept = results[0]
    *expected, kept_by_theirs = results[1]
    assert kept == kept_by_theirs and len(found) == len(expected) == 2 + 2 * 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
