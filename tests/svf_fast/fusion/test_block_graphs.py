"""Fused blocks under torch.compile, and what a CUDA graph would hold of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import Fused, SVFConv2d
from tests.svf_fast.ops.test_block import Bottleneck, first, frozen, fused, step


@pytest.mark.parametrize("name", ("bottleneck downsample", "basic", "unit"))
def test_compile(name):
    model = fused(name)
    x = torch.randn(2, first(model).in_channels, 9, 9)
    expected = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mine, eager in zip(step_of(compiled, model, x), expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("strategy", ("auto", "fold"))
@pytest.mark.parametrize("fuse", (True, False))
def test_compile_under_autocast_is_eager_to_the_bit(fuse, strategy):
    """Two layers after each other: what one leaves of autocast's state the next would meet."""
    torch.manual_seed(0)
    blocks = [frozen(Bottleneck(8, 4, 8)) for _ in range(2)]
    model = svf_fast.convert(nn.Sequential(*blocks), None, strategy=strategy, fuse=fuse)
    x = torch.randn(2, 8, 9, 9)

    def under_autocast(call):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pairs = zip(
        step_of(under_autocast(compiled), model, x),
        step_of(under_autocast(model), model, x),
        strict=True,
    )
    assert all(torch.equal(mine, eager) for mine, eager in pairs)


def step_of(call, model, x):
    x = x.detach().clone().requires_grad_()
    y = call(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], torch.ones_like(y))]


def test_what_a_cuda_graph_would_hold(monkeypatch):
    """It composes W from the S of the replay, takes batch norm's constants, and keeps nothing."""
    model = fused("bottleneck downsample")
    x = torch.randn(2, first(model).in_channels, 9, 9)
    step(model, x)
    (block,) = (module for module in model.modules() if isinstance(module, Fused))
    reading = block._reading
    chains = dict(reading._chains)
    convs = {names.conv: block.get_submodule(names.conv) for names in block._names.stages}
    weights = {name: conv.values.made[torch.float32].weight for name, conv in convs.items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    monkeypatch.setattr(SVFConv2d, "is_captured", True)
    every = block._names.stages, torch.float32, True, block._names.shortcut
    stages, programs = reading.stages(block, *every)
    (kept,) = (chain._slots for chain in chains.values())
    assert programs is None
    assert len(stages) == len(kept) == len(convs) + 1  # the shortcut's too
    for names, stage, slot in zip(block._names.stages, stages, kept, strict=False):
        assert stage.scale is slot.scale and stage.shift is slot.shift
        assert stage.conv.weight is not weights[names.conv]
        assert convs[names.conv].values.made[torch.float32].weight is weights[names.conv]
        assert torch.equal(weights[names.conv], before[names.conv])
    assert chains == reading._chains
    with torch.no_grad():
        first(model).S[-1] = 1e-9  # no longer guarded enough
    with pytest.raises(RuntimeError, match="capture the graph again"):
        reading.stages(block, *every)
