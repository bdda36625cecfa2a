"""The Triton kernel of compose against its definition; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from tolerance import accumulated, assert_error_within

pytest.importorskip("triton")

from svf_fast.reference.compose import compose as definition
from svf_fast.triton.compose import compose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Co, Ci per group, kernel, groups: odd, one, larger than a tile, grouped, depthwise
CASES = [(5, 3, 3, 1), (1, 1, 1, 1), (40, 17, 1, 1), (36, 6, 3, 3), (8, 1, 3, 8), (16, 70, 1, 2)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case, dtype, poisoned_memory):
    rows, width, size, groups = case
    columns = width * size * size
    rank = min(rows // groups, columns)
    U = torch.randn(rows, rank, device=DEVICE)
    S = torch.randn(groups * rank, device=DEVICE)
    V = torch.randn(groups * rank, width, size, size, device=DEVICE)
    truth = definition(U.double(), S.double(), V.double(), groups).cpu()
    W = compose(U, S, V, groups, dtype)
    assert W.dtype == dtype and W.shape == (rows, width, size, size)
    expected = definition(U, S, V, groups).to(dtype)
    assert_error_within(W, expected, truth, magnitude=accumulated(truth, dtype))
    assert torch.equal(W, compose(U, S, V, groups, dtype))


def test_16_bit_factors_are_multiplied_in_float32():
    U, V = torch.randn(24, 24, device=DEVICE), torch.randn(24, 40, 1, 1, device=DEVICE)
    S = torch.rand(24, device=DEVICE)
    factors = [factor.bfloat16() for factor in (U, S, V)]
    truth = definition(*(factor.double() for factor in factors)).cpu()
    W = compose(*factors, 1, torch.float32)
    expected = definition(*(factor.float() for factor in factors))
    assert_error_within(W, expected, truth, magnitude=accumulated(truth, torch.float32))
