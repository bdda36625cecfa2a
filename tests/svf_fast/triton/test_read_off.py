"""dS read off Gram matrices by the Triton kernels, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svf_fast.reference.gram import gram as gram_definition
from svf_fast.reference.gram_gradient import gram_gradient as definition
from tests.svf_fast.tolerance import accumulated, assert_error_within

pytest.importorskip("triton")
from svf_fast.triton.activation_gradients import activation_gradients, activation_grams
from svf_fast.triton.gram import scale_gradient
from svf_fast.triton.read_off import read_off

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: the interpreter
# splits, groups, rows, columns, rank: one of each; odd; more rows than a part; more than a block of
# directions; grouped
CASES = [(1, 1, 1, 1, 1), (3, 1, 7, 5, 5), (2, 1, 200, 40, 33), (1, 1, 20, 20, 70), (4, 3, 5, 9, 4)]
LAYOUTS = ("rows", "columns")  # of left and right: their directions innermost or outermost


def factor(groups: int, channels: int, rank: int, layout: str) -> Tensor:
    x = torch.randn(groups, channels, rank, device=DEVICE)
    return x if layout == "rows" else x.mT.contiguous().mT


def spectrum(count: int) -> Tensor:
    signs = torch.where(torch.arange(count, device=DEVICE) % 3 == 0, -1.0, 1.0)
    return signs * (torch.rand(count, device=DEVICE) + 0.1)


def check(found: Tensor, M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> None:
    S = S.reshape(len(left), -1)
    exact = [x.double().cpu() for x in (M, left, right, S)]
    terms = definition(*(x.abs() for x in exact))
    assert found.dtype == torch.float32 and found.shape == S.shape
    assert_error_within(
        found,
        definition(M, left, right, S),
        definition(*exact),
        magnitude=accumulated(terms, torch.float32),
        channel_dim=None,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_side(case, layout, poisoned_memory):
    splits, groups, rows, columns, rank = case
    partial = torch.randn(splits, groups, rows, columns, device=DEVICE)
    left, right = (factor(groups, n, rank, layout) for n in (rows, columns))
    S = spectrum(groups * rank)
    (found,) = read_off(partial, [(left, right, S)])
    check(found, partial.double().sum(0), left, right, S)
    assert torch.equal(found, read_off(partial, [(left, right, S)])[0])


@pytest.mark.parametrize("ranks", ((5, 5), (33, 7), (3, 40)), ids=str)
def test_two_sides(ranks, poisoned_memory):
    partial = torch.randn(3, 2, 21, 21, device=DEVICE)
    sides = []
    for rank, layout in zip(ranks, LAYOUTS, strict=True):
        left, right = (factor(1, 21, rank, layout) for _ in range(2))
        sides.append((left, right, spectrum(rank)))
    found = read_off(partial, sides)
    for side, (dS, operands) in enumerate(zip(found, sides, strict=True)):
        check(dS, partial.double().sum(0)[side : side + 1], *operands)


def test_a_value_of_zero_spoils_its_own_direction_alone():
    partial, left = torch.randn(1, 1, 8, 8, device=DEVICE), factor(1, 8, 8, "rows")
    S = spectrum(8)
    (expected,) = read_off(partial, [(left, left, S)])
    S[3] = 0
    (found,) = read_off(partial, [(left, left, S)])
    others = torch.arange(8) != 3
    assert torch.equal(found[0, others], expected[0, others])
    assert not found[0, 3].isfinite()


def maps(channels: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, 9, 5, channels, device=DEVICE)
    return x.to(dtype).movedim(-1, 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("rebuilt", (False, True))
def test_of_maps(rebuilt, groups, dtype):
    a, b = maps(12, dtype), maps(10, dtype)
    affine = torch.randn(2, 12, device=DEVICE) if rebuilt else (None, None)
    left, right = (
        factor(groups, 12 // groups, 4, "rows"),
        factor(groups, 10 // groups, 4, "columns"),
    )
    S = spectrum(4 * groups)
    found = scale_gradient(a, b, *affine, left, right, S)
    check(found, gram_definition(a, b, groups, *affine).double(), left, right, S)
    nothing = scale_gradient(a[:0], b[:0], *affine, left, right, S)
    assert torch.equal(nothing, torch.zeros_like(found))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "sides", ((True, True), (True, False), (False, True), (False, False)), ids=str
)
def test_of_both_sides_of_an_activation(sides, dtype):
    grad, y = maps(12, dtype), maps(12, dtype)
    scale, shift = torch.randn(2, 12, device=DEVICE)
    readings = [
        [factor(1, 12, rank, "rows"), factor(1, 12, rank, "columns"), spectrum(rank)]
        for rank in (12, 7)
    ]
    given = [reading if asked else [] for reading, asked in zip(readings, sides, strict=True)]
    g, *found = activation_gradients(grad, y, scale, shift, *given)
    again, *matrices = activation_grams(grad, y, scale, shift, *sides)
    assert torch.equal(g, again)
    for dS, M, reading in zip(found, matrices, given, strict=True):
        if reading:
            check(dS, M.double(), *reading)
        else:
            assert dS.numel() == 0
