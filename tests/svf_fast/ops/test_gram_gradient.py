"""gram_gradient against its definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svf_fast.ops.gram_gradient import gram_gradient, gram_gradient_by_definition
from svf_fast.reference.gram_gradient import gram_gradient as definition
from tests.svf_fast.ops.test_gram import DTYPES
from tests.svf_fast.tolerance import accumulated, assert_error_within

# Groups, rows and columns of M, directions: fewer than a vector, several units, several blocks, of
# a weight's gradient, none; of groups that are so small that no product is called
FACTORS = [
    (3, 9, 9, 7),
    (1, 65, 65, 65),
    (1, 130, 130, 1100),
    (2, 9, 45, 9),
    (1, 70, 17, 17),
    (2, 1, 1, 1),
    (37, 1, 1, 1),
    (5, 3, 4, 4),
    (1, 5, 5, 0),
    (0, 4, 4, 3),
]


@pytest.mark.parametrize("left_layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("right_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FACTORS)
def test_matches_definition(shape, dtype, left_layout, right_layout, poisoned_memory) -> None:
    def factor(channels: int, layout: str) -> Tensor:
        x = torch.randn(groups, channels, rank, dtype=wide).to(dtype)
        if layout == "sliced":
            return x.repeat_interleave(2, dim=2)[:, :, ::2]
        return x.mT.contiguous().mT if layout == "transposed" else x

    groups, rows, columns, rank = shape
    wide = torch.promote_types(dtype, torch.float32)
    M = torch.randn(groups, rows, columns, dtype=wide)
    left, right = factor(rows, left_layout), factor(columns, right_layout)
    S = torch.rand(groups, rank, dtype=wide) + 0.1
    exact = [x.double() for x in (M, left, right, S)]
    terms = definition(*(x.abs() for x in exact))
    assert_error_within(
        gram_gradient(M, left, right, S),
        definition(M, left, right, S),
        definition(*exact),
        magnitude=accumulated(terms, wide),
        channel_dim=None,
    )


def test_is_that_of_its_formula() -> None:
    M, S = torch.randn(2, 5, 5), torch.rand(2, 3) + 0.1
    left, right = torch.randn(2, 2, 5, 3)
    for implementation in (gram_gradient, gram_gradient_by_definition):
        found = implementation(M.mT, left, right, S)
        for g, r in itertools.product(range(2), range(3)):
            expected = left[g, :, r] @ M[g].mT @ right[g, :, r] / S[g, r]
            torch.testing.assert_close(found[g, r], expected)


def test_opcheck_and_memory_safety() -> None:
    raw = torch.ops.svf_fast.gram_gradient
    M, factor, S = torch.randn(2, 5, 5), torch.randn(2, 5, 3), torch.rand(2, 3)
    torch.library.opcheck(raw.default, (M, factor, factor, S))
    with pytest.raises(RuntimeError, match="M must be float32 or float64"):
        raw(M.half(), factor, factor, S)
    with pytest.raises(RuntimeError, match=r"M must be \[G, Ca, Cb\]"):
        raw(M[0], factor, factor, S)
    for operands in ((M[:, :4], factor, factor), (M, factor, factor[:, :, :2])):
        with pytest.raises(RuntimeError, match="left must be"):
            raw(*operands, S)
    with pytest.raises(RuntimeError, match="S must be"):
        raw(M, factor, factor, S[:, :2])
