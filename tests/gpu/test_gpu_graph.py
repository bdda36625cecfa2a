"""A converted backbone in a CUDA graph computes what it computes eagerly, whatever S is by then."""

from __future__ import annotations

import contextlib

import pytest
import torch

import svf_fast

ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


@pytest.mark.parametrize("together", (True, False))
@pytest.mark.parametrize(
    ("dtype", "trains"),
    [*((dtype, "S") for dtype in ALLOWED), (torch.float32, "log_scale")],
    ids=str,
)
def test_a_replay_is_an_eager_step(trunk, maps, dtype, trains, together):
    """W composed for all layers at once, or by each for itself."""
    model, x = trunk(trains=trains), maps()
    leaves = [x, *svf_fast.svf_parameters(model)]
    with torch.no_grad():
        grad_y = torch.randn_like(model(x))

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype, enabled=dtype.itemsize == 2):
            y = model(x)
        y.backward(grad_y.to(y.dtype))
        return y

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            clear()
            step()
    torch.cuda.current_stream().wait_stream(side)
    clear()
    key = svf_fast.follow(model)
    graph = torch.cuda.CUDAGraph()
    body = svf_fast.composed(model) if together else contextlib.nullcontext()
    with torch.cuda.graph(graph), body:
        y = step()
    captured = [y, *(leaf.grad for leaf in leaves)]

    for factor in (1.0, 1.05, 0.95):
        with torch.no_grad():
            for values in svf_fast.svf_parameters(model):
                values.mul_(factor) if trains == "S" else values.add_(factor - 1)
            x.mul_(0.9)
        assert svf_fast.follow(model) == key
        graph.replay()
        replayed = [tensor.detach().double() for tensor in captured]
        clear()
        expected = [step().detach(), *(leaf.grad for leaf in leaves)]
        for leaf, grad in zip(leaves, captured[1:], strict=True):
            leaf.grad = grad
        for index, (got, want) in enumerate(zip(replayed, expected, strict=True)):
            error = (got - want.double()).norm() / want.double().norm()
            assert error <= ALLOWED[dtype], f"factor {factor}, tensor {index}: {error:.1e}"
