"""The counts of the roofline against the network itself and against sums by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.gpu import roofline
from benchmarks.race.levels import LEVELS, Settings

SETTINGS = Settings(size=641, batch=1, dtype="bfloat16", channels_last=True)


@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
def test_convolutions_are_those_of_the_network(stride_on):
    settings = Settings(size=65, batch=2, width=8, stride_on=stride_on)
    (group,) = LEVELS["backbone"].groups
    network = LEVELS["backbone"].network(settings, group)
    seen = []

    def note(conv: nn.Conv2d, arguments, y: torch.Tensor) -> None:
        (x,) = arguments
        positions = (t.shape[0] * t.shape[2:].numel() for t in (x, y))
        seen.append((*conv.weight.shape[:2], conv.weight[0, 0].numel(), *positions))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    network(*LEVELS["backbone"].inputs(settings, group).arguments)
    counted = [
        (conv.outputs, conv.inputs, conv.kernel, conv.lying, conv.target)
        for block in roofline.blocks(settings)
        for conv in block.all
    ]
    assert sorted(seen) == sorted(counted)


def test_flops_are_the_designs():
    """GFLOP an image: the chain 745, the frozen bound 609, ours 677 beside composing W."""
    flops = {row["peer"]: row["flops"] / 1e9 for row in roofline.count(SETTINGS)}
    assert flops["official"] == pytest.approx(745, rel=0.01)
    assert flops["frozen bound"] == pytest.approx(609, rel=0.01)
    products = [p for p in roofline.passes(SETTINGS, "svf_fast") if p.engine == "bfloat16"]
    assert sum(p.flops for p in products) / 1e9 == pytest.approx(677, rel=0.01)
    composed = [p for p in roofline.passes(SETTINGS, "svf_fast") if p.name == "compose W"]
    assert sum(p.flops for p in composed) / 1e9 == pytest.approx(21.7, rel=0.01)


def test_maps_of_a_plain_bottleneck_by_hand():
    """Units of C elements per position: 17.25 forward, 22.5 backward, a quarter each for bits."""
    block = list(roofline.blocks(SETTINGS))[1]
    assert block.shortcut is None
    unit = block.convs[1].outputs * block.convs[1].target * roofline.MAP
    weights = 2 * roofline.MAP * sum(conv.weights for conv in block.convs)
    maps = sum(p.bytes for p in roofline.fused(block) if p.name not in ("compose W", "dS"))
    assert maps - weights == pytest.approx((6 + 2 + 9.25 + 5.25 + 3 + 2 + 3 + 9.25) * unit)


def test_batch_scales_maps_and_leaves_factors():
    one, six = (
        roofline.passes(dataclasses.replace(SETTINGS, batch=batch), "svf_fast") for batch in (1, 6)
    )
    for small, large in zip(one, six, strict=True):
        fixed = small.name in ("compose W", "dS")
        assert large.flops == pytest.approx((1 if fixed else 6) * small.flops)
        assert small.bytes <= large.bytes <= 6 * small.bytes


def test_seconds_by_hand():
    ceilings = {"memory": 100.0, "bfloat16": 1000.0, "float32": 10.0}
    passes = [
        roofline.Pass("by memory", 200.0, 1000.0),
        roofline.Pass("by products", 10.0, 3000.0),
        roofline.Pass("by the slow engine", 10.0, 40.0, "float32"),
    ]
    assert roofline.seconds(passes, ceilings) == pytest.approx(2 + 3 + 4)
