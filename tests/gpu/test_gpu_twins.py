"""The Triton twins beside the CUDA kernels: the same bits, in a graph too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from svf_fast import _library

pytest.importorskip("triton")
from svf_fast.reference.pointwise import Prologue
from svf_fast.triton import affine_act, channel_dot, guard, pointwise

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Rows of whole vectors and not; longer than a block and not; one channel; one position; none.
SHAPES = (
    (2, 64, 41, 41),
    (3, 33, 9, 7),
    (1, 1, 70, 51),
    (70, 24, 1, 1),
    (2, 12, 50, 37),
    (0, 8, 3, 3),
)


def maps(shape, dtype, last: bool, count: int) -> list[Tensor]:
    made = [torch.randn(shape, device="cuda").to(dtype) for _ in range(count)]
    return [x.contiguous(memory_format=torch.channels_last) if last else x for x in made]


def every_op(ops, y: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    """ops: where each op is found by its name."""
    out, mask = ops.affine_act(y, scale, shift, residual, scale, True, True)
    plain, none = ops.affine_act(y, scale, shift, residual, None, False, False)
    in_place = y.clone(memory_format=torch.preserve_format)
    again = ops.affine_act_(in_place, scale, shift, residual, scale, True, True)
    grads = [ops.affine_act_backward(residual, None, mask, by, None) for by in (None, scale)]
    grads.append(ops.affine_act_backward(residual, y, None, scale, shift))
    mine = residual.clone(memory_format=torch.preserve_format)
    ops.affine_act_backward_(mine, y, None, scale, shift)
    return [out, mask, plain, none, in_place, again, *grads, mine]


OPS = ("affine_act", "affine_act_", "affine_act_backward", "affine_act_backward_")
TWINS = SimpleNamespace(**{name: getattr(affine_act, name) for name in OPS})
compiled = pytest.mark.skipif(bool(_library.cuda_missing), reason=_library.cuda_missing)


@compiled
def test_the_guard_says_what_the_cuda_kernel_says():
    ranks = torch.tensor([1, 7, 2048, 600, 64])
    first = torch.cat([torch.zeros(1, dtype=torch.int64), ranks.cumsum(0)])
    layers = torch.stack([first, torch.tensor([1, 7, 1, 3, 2, 0])], dim=1).cuda()
    for spread in (0.1, 1.0, 3.0):
        S = (torch.randn(int(ranks.sum()), device="cuda") * spread).exp()
        guarded = S < 0.1
        kernel = torch.ops.svf_fast.guards_hold(S, guarded, layers, 2.0)
        assert torch.equal(guard.guards_hold(S, guarded, layers, 2.0), kernel)


def captured(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("last", [False, True])
def test_twins_in_a_graph_and_without_a_wait(last):
    y, residual = maps((2, 64, 41, 41), torch.bfloat16, last, 2)
    scale, shift = torch.randn(2, 64, device="cuda")

    def call() -> list[Tensor]:
        scaled = y.clone(memory_format=torch.preserve_format)
        dots = [channel_dot.channel_dot(y, residual)]
        dots.append(channel_dot.channel_dot_scale_(scaled, residual, scale))
        return [*every_op(TWINS, y, residual, scale, shift), *dots, scaled]

    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, captured(call), expected))


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GiB of GPU memory are free")
    for last in (False, True):
        y = torch.ones((9, 64, 1931, 1933), device="cuda", dtype=torch.bfloat16)  # 2^31 + 2.6e6
        y = y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        y[-1] = torch.randn(64, 1931, 1933, device="cuda").bfloat16()
        scale, shift = torch.randn(2, 64, device="cuda")
        part, _ = affine_act.affine_act(y[-1:], scale, shift, None, None, True, False)
        dot = channel_dot.channel_dot(y[-1:], y[-1:]) + 8 * 1931 * 1933
        torch.testing.assert_close(channel_dot.channel_dot(y, y), dot, rtol=1e-5, atol=0)
        affine_act.affine_act_(y, scale, shift, None, None, True, True)
        assert torch.equal(y[-1:], part)
        del y, part


def test_a_capture_without_warm_up_leaves_eager_calls_right():
    """What a call keeps for the next one is not made in the graph's memory."""
    x = torch.randn(1, 48, 33, 29, device="cuda").bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 48, device="cuda").bfloat16()
    mask = torch.randint(256, (x.numel() // 64 * 8 + 16,), device="cuda").to(torch.uint8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out, *_) = pointwise.pointwise(x, weight, Prologue(mask=mask))
    eager, *_ = pointwise.pointwise(x, weight, Prologue(mask=mask))  # before the first replay
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, out)
    masked = affine_act.affine_act_backward(x, None, mask, None, None)
    truth = torch.einsum("dc,nchw->ndhw", weight.double(), masked.double())
    assert (eager.double() - truth).norm() <= 1e-2 * truth.norm()


# the many small ones last: each shape and dtype is compiled anew
@compiled
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_act_is_the_cuda_kernel_bit_by_bit(shape, dtype, last):
    y, residual = maps(shape, dtype, last, 2)
    wide = torch.promote_types(dtype, torch.float32)
    vectors = torch.randn(2, shape[1], device="cuda", dtype=wide)
    twins = every_op(TWINS, y, residual, *vectors)
    kernels = every_op(torch.ops.svf_fast, y, residual, *vectors)
    for twin, kernel in zip(twins, kernels, strict=True):
        assert twin.stride() == kernel.stride()
        if dtype != torch.float64:  # the definition rounds each product
            assert torch.equal(twin, kernel)
        elif twin.is_floating_point():
            torch.testing.assert_close(twin, kernel)


@compiled
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_dot_is_the_cuda_kernel_to_rounding(shape, dtype, last):
    a, b = maps(shape, dtype, last, 2)
    wide = torch.promote_types(dtype, torch.float32)
    s = torch.randn(shape[1], device="cuda", dtype=wide)
    size = torch.ops.svf_fast.channel_dot(a.abs(), b.abs())
    allowed = 8 * torch.finfo(wide).eps * size  # sums in another order
    kernel, twin = torch.ops.svf_fast.channel_dot(a, b), channel_dot.channel_dot(a, b)
    assert ((kernel - twin).abs() <= allowed).all()
    scaled = [x.clone(memory_format=torch.preserve_format) for x in (a, a)]
    kernel = torch.ops.svf_fast.channel_dot_scale_(scaled[0], b, s)
    twin = channel_dot.channel_dot_scale_(scaled[1], b, s)
    assert ((kernel - twin).abs() <= allowed).all()
    assert torch.equal(*scaled)
