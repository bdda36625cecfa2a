"""Layers with a core where values come later, or somewhere else: traces, captures, meta, shards."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import svf_fast
from svf_fast import SVFConv2d
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.layers.test_core import CORES, moved, step
from tests.svf_fast.ops.test_block import BLOCKS, frozen
from tests.svf_fast.small_model import converted, images

X = images()


def fused(core: str, strategy: str = "gram", weak: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(frozen(BLOCKS["bottleneck downsample"]()))
    moved(svf_fast.convert(model, None, strategy, core=core), 0.1)
    if weak:
        with torch.no_grad():
            for layer in svf_layers(model).values():
                layer.S[-2:] *= 1e-6
                layer.parts[-1].mul_(1e-3)
        assert all(layer.guarded for layer in svf_layers(model).values())
    return model


# every core with the strategy that inverts it, the others with one core: each takes seconds
COMPILED = [(core, "gram", weak) for core in CORES for weak in (False, True)]
COMPILED += [("band:1", strategy, False) for strategy in ("chain", "fold", "reference")]


@pytest.mark.parametrize(("core", "strategy", "weak"), COMPILED)
def test_compiled(core, strategy, weak):
    """One graph, which inverts Σ itself: it serves as long as the guard that it was traced with."""
    model = fused(core, strategy, weak)
    x = torch.randn(2, 6, 9, 9)
    expected = step(model, x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mine, eager in zip(step(compiled, x), expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=2e-4, atol=2e-4)
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.trained.mul_(1.01)
            layer.parts[-1].add_(1e-4)
    mine = step(compiled, x)
    for own, eager in zip(mine, step(model, x), strict=True):
        torch.testing.assert_close(own, eager, rtol=2e-4, atol=2e-4)
    assert not torch.equal(mine[0], expected[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("core", CORES)
def test_a_graph_stops_where_its_guard_serves_no_longer(core):
    model = fused(core)
    x = torch.randn(2, 6, 9, 9)
    step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(compiled, x)
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.S[0] = 0
            layer.parts[-1].zero_()
    with pytest.raises(RuntimeError, match="Σ has moved so far that more directions need"):
        compiled(x)
    for layer in svf_layers(model).values():
        layer.refresh()
    for mine, eager in zip(step(compiled, x), step(model, x), strict=True):
        torch.testing.assert_close(mine, eager, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("core", CORES)
def test_a_capture_is_refused_where_it_would_invert(core, monkeypatch):
    for strategy in ("gram", "chain", "fold"):
        model = fused(core, strategy)
        x = torch.randn(2, 6, 9, 9)
        expected = step(model, x)
        with monkeypatch.context() as patched:
            patched.setattr(SVFConv2d, "is_captured", True)
            if strategy == "gram":
                words = f"core='{core}': expected no capture of a CUDA graph .* strategy='chain'"
                with pytest.raises(RuntimeError, match=words):
                    model(x)
                model.requires_grad_(False)  # nothing to invert for
                torch.testing.assert_close(model(x), expected[0])
                continue
            (layer, *_) = svf_layers(model).values()
            seen = layer.values.made[torch.float32].weight
            captured = layer.convolution(torch.float32).weight  # of the graph's own Σ
            assert captured is not seen and torch.equal(captured, seen)


@pytest.mark.parametrize("core", CORES)
def test_transforms_and_second_derivatives_are_refused(core):
    layer = moved(SVFConv2d(4, 6, 3, core=core, strategy="gram"))
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(RuntimeError, match="strategy='reference'"):
        torch.func.grad(lambda x: layer(x).square().sum())(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).square().sum(), layer.parts, create_graph=True)
    layer.strategy = "reference"
    x.requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x), expected)


@pytest.mark.parametrize("core", CORES)
def test_inference_mode_before_training(core):
    model, other = fused(core), fused(core)
    x = torch.randn(2, 6, 9, 9)
    for each in (model, other):
        with torch.no_grad():
            for layer in svf_layers(each).values():
                layer.S[0] *= -1e-3
    with torch.inference_mode():
        y = model(x)
    expected = step(other, x)
    for mine, own in zip([y.clone(), *step(model, x)], [expected[0], *expected], strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("way", ("meta", "emptied"))
def test_values_come_later(way, core):
    torch.manual_seed(2)
    expected = moved(converted(core=core))
    if way == "meta":
        with torch.device("meta"):
            model = converted(core=core)
        assert model(X.to("meta")).shape == expected(X).shape
    else:
        model = converted(core=core)
    model = model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    for mine, own in zip(step(model, X), step(expected, X), strict=True):
        torch.testing.assert_close(mine, own)


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("core", CORES)
def test_sharded(mesh, core):
    torch.manual_seed(2)
    model = moved(converted(core=core))
    expected, composed = step(model, X), [x.composed_weight() for x in svf_layers(model).values()]
    adapter = svf_fast.Adapter.of(model)
    sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
    found = svf_layers(sharded).values()
    for mine, own in zip([x.composed_weight() for x in found], composed, strict=True):
        torch.testing.assert_close(mine, own)
    y = sharded(X)
    torch.testing.assert_close(y, expected[0])
    again = svf_fast.Adapter.of(sharded)
    for name, own in adapter.cores.items():
        for part, values in own.parts.items():
            assert torch.equal(values, again.cores[name].parts[part])
    fresh = fully_shard(converted(core=core), mesh=mesh)
    adapter.apply(fresh)
    torch.testing.assert_close(fresh(X), expected[0])


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        own = {}
        for core in CORES:
            model = DistributedDataParallel(fused(core))
            x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(rank))
            model(x).square().sum().backward()
            own[core] = [p.grad for p in model.parameters() if p.requires_grad]
        torch.save(own, f"{folder}/{rank}.pt")
        distributed.barrier()  # no connection is closed while the other one still listens
    finally:
        distributed.destroy_process_group()


def test_distributed(tmp_path):
    """Gradients of all that trains are the mean over processes."""
    command = [sys.executable, "-m", "tests.svf_fast.layers.test_core_graphs"]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for core in CORES:
        model = fused(core)
        for rank in range(2):
            x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(rank))
            (model(x).square().sum() / 2).backward()
        expected = [p.grad for p in model.parameters() if p.requires_grad]
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[core]
            for mine, mean in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    _train(int(sys.argv[1]), sys.argv[2])
