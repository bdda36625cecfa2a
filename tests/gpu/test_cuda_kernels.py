"""What only a GPU can show of the CUDA kernels, or of their twins where they were not built.

Their numbers are tested beside the CPU's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svf_fast.ops.affine_act import (
    affine_act,
    affine_act_,
    affine_act_backward,
    affine_act_backward_,
)
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.gram_gradient import gram_gradient
from svf_fast.reference import affine_act as reference
from svf_fast.reference.gram_gradient import gram_gradient as gradient_definition
from tests.svf_fast.tolerance import accumulated, assert_error_within

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def operands(device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.randn(4, 256, 41, 41, device=device, dtype=torch.bfloat16)
    y = y.contiguous(memory_format=torch.channels_last)
    return (y, torch.randn_like(y), *torch.randn(2, 256, device=device))


def every_op(y: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    out, mask = affine_act(y, scale, shift, residual, mask=True)
    in_place = y.clone()
    again = affine_act_(in_place, scale, shift, residual, mask=True)
    grad = affine_act_backward(out, mask=mask, scale=scale)
    by_y = affine_act_backward_(out.clone(), y=y, scale=scale, shift=shift)
    scaled = y.clone()
    dots = channel_dot(y, residual), channel_dot_scale_(scaled, residual, scale)
    M, factor = torch.outer(scale, shift)[None], scale.expand(1, 256, 256)
    return [
        *(out, mask, in_place, again, grad, by_y, scaled, *dots),
        gram_gradient(M, factor, factor, scale.abs()[None] + 1),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1152, 128), (4, 63, 65), (3, 5, 0)])
def test_gram_gradient_matches_definition(shape, dtype) -> None:
    groups, channels, rank = shape
    M = torch.randn(groups, channels, channels, dtype=dtype, device="cuda")
    V, dual = torch.randn(2, groups, rank, channels, dtype=dtype, device="cuda")
    S = torch.rand(groups, rank, dtype=dtype, device="cuda") + 0.1
    exact = [x.double() for x in (M, V.mT, dual.mT, S)]
    assert_error_within(
        gram_gradient(M, V.mT, dual.mT, S),
        gradient_definition(M, V.mT, dual.mT, S),
        gradient_definition(*exact),
        magnitude=accumulated(gradient_definition(*(x.abs() for x in exact)), dtype),
        channel_dim=None,
    )


def test_no_synchronisation() -> None:
    arguments = operands()
    every_op(*arguments)  # cuBLAS makes its workspace
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_same_bits_in_every_run() -> None:
    arguments = operands()
    first = every_op(*arguments)
    for _ in range(5):
        assert all(map(torch.equal, every_op(*arguments), first))


def test_current_stream() -> None:
    """The input is not there before the side stream has slept: another stream would read zeros."""
    y, residual, scale, shift = operands()
    expected = every_op(y, residual, scale, shift)
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    results = []
    for stream in streams:
        late = torch.zeros_like(y)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(y)
            results.append(every_op(late, residual, scale, shift))
    torch.cuda.synchronize()
    for result in results:
        assert all(map(torch.equal, result, expected))


def test_graph_capture() -> None:
    captured = operands()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every_op(*captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_op(*captured)
    fresh = operands()
    for old, new in zip(captured, fresh):
        old.copy_(new)
    graph.replay()
    assert all(map(torch.equal, results, every_op(*fresh)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU here")
def test_second_device() -> None:
    arguments = operands("cuda:1")
    assert torch.cuda.current_device() == 0
    results = every_op(*arguments)
    assert torch.cuda.current_device() == 0
    assert {result.device for result in results} == {torch.device("cuda:1")}
    expected = every_op(*(x.to("cuda:0") for x in arguments))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_to_the_31_elements(layout) -> None:
    shape = (9, 64, 1931, 1933)  # 2^31 + 2.6e6
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("less than 16 GiB of GPU memory are free")
    y = torch.ones(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    last = torch.randn(64, 1931, 1933, device="cuda").bfloat16()
    y[-1] = last
    scale, shift = torch.randn(2, 64, device="cuda")
    expected = reference.affine_act(y[-1:], scale, shift)
    dot = channel_dot(y[-1:], y[-1:]) + 8 * 1931 * 1933
    torch.testing.assert_close(channel_dot(y, y), dot, rtol=1e-5, atol=0)
    mask = affine_act_(y, scale, shift, mask=True)
    torch.testing.assert_close(y[-1:], expected)  # fused, so rounded once less
    last_bits = affine_act(y[-1:], torch.ones_like(scale), shift * 0, mask=True)[1]
    count = last.numel() // 8  # bytes of an image
    assert torch.equal(mask[8 * count : 9 * count], last_bits[:count])


def test_nothing_is_allocated_but_the_results() -> None:
    y, residual, scale, shift = operands()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    results = affine_act(y, scale, shift, residual, mask=True)
    grad = affine_act_backward(y, y=y, scale=scale, shift=shift)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 3
    del results, grad
