"""Recorded passes on a GPU: what they compute, what they launch, and where."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import svf_fast
from svf_fast.ops import program

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """An entry for each program that ran."""
    found: list[int] = []
    call = program._Program.__call__

    def called(self, *inputs):
        found.append(len(inputs))
        return call(self, *inputs)

    monkeypatch.setattr(program._Program, "__call__", called)
    return found


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(1.01)


def kernels(run) -> list[str]:
    """Names of the kernels that a function launches, in their order."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu.sort(key=lambda event: event.time_range.start)
    return [event.name for event in on_gpu if not event.name.startswith("Mem")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_compute_what_passes_compute(dtype, trunk, maps, gradients, runs):
    """Up to what cuDNN's own sums in another order change."""
    model, x = trunk(), maps()
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for number in range(5):
        expected = gradients(copy.deepcopy(model), x, dtype)
        runs.clear()
        got = gradients(model, x, dtype)
        assert bool(runs) == (number > 1)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.stride() == theirs.stride()
            assert (mine - theirs).norm() <= limit * theirs.norm()
        move(model)
        torch.cuda.synchronize()  # the guarded directions are those of these values in both


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_launch_what_passes_launch(dtype, trunk, maps, gradients, runs):
    model, x = trunk(), maps()
    passes = kernels(lambda: gradients(copy.deepcopy(model), x, dtype))
    for _ in range(3):
        gradients(model, x, dtype)
    runs.clear()
    programs = kernels(lambda: gradients(model, x, dtype))
    assert runs
    ours = [name for name in passes if name.endswith("_kernel") and "compose" not in name]
    assert ours
    assert [name for name in programs if name.endswith("_kernel")] == ours


def test_on_another_stream_and_from_another_device(trunk, maps, gradients, runs):
    """Kernels go to the stream, and to the GPU of the maps, of the moment."""
    model, x = trunk(), maps()
    for _ in range(3):
        expected = gradients(model, x, torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**7)
        got = gradients(model, x, torch.float32)
    torch.cuda.current_stream().wait_stream(side)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
    if torch.cuda.device_count() > 1:
        with torch.cuda.device(1):
            got = gradients(model, x, torch.float32)
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_program_keeps_no_maps(trunk, maps, gradients):
    """Neither does the pass that is recorded keep more than one that is not."""
    model, x = trunk(), maps()
    peaks = []
    for _ in range(4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(model, x, torch.float32)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert max(peaks[1:]) <= 1.05 * peaks[0]
