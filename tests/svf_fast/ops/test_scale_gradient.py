"""dS out of maps in one op, on the CPU, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svf_fast.ops.scale_gradient import scale_gradient
from svf_fast.reference.scale_gradient import scale_gradient as definition
from tests.svf_fast.ops.test_gram import CASES, DENSE, DTYPES, affine, maps, rebuilt
from tests.svf_fast.tolerance import accumulated, assert_error_within

RANK = 3


def readings(widths: tuple[int, int], groups: int, dtype: torch.dtype) -> list[Tensor]:
    """left, right and S, in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    left, right = (torch.randn(groups, width, RANK, dtype=wide) for width in widths)
    signs = torch.where(torch.arange(groups * RANK) % 3 == 0, -1.0, 1.0)
    return [left, right, (signs * (torch.rand(groups * RANK) + 0.1)).to(wide)]


def check(found: Tensor, a: Tensor, b: Tensor, reading: list[Tensor], *affine: Tensor) -> None:
    left, right, S = reading
    exact = a.double() if not affine else rebuilt(a, *affine)
    factors = [factor.double() for factor in reading]
    terms = definition(exact.abs(), b.double().abs(), *(f.abs() for f in factors))
    assert found.shape == (len(left), RANK) and found.dtype == S.dtype
    assert_error_within(
        found,
        definition(a, b, left, right, S, *affine),
        definition(exact, b.double(), *factors),
        magnitude=terms if affine and a.dtype.itemsize == 2 else accumulated(terms, found.dtype),
        dtype=a.dtype if affine and a.dtype.itemsize == 2 else None,
        channel_dim=None,
    )


@pytest.mark.parametrize("rebuild", (False, True))
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case[1] and case[2]], ids=str)
def test_matches_definition(case, dtype, layout, rebuild, poisoned_memory) -> None:
    images, width_a, width_b, groups, spatial = case
    a, b = (maps((images, width, *spatial), dtype, layout) for width in (width_a, width_b))
    given = affine(width_a, dtype) if rebuild else ()
    reading = readings((width_a // groups, width_b // groups), groups, dtype)
    check(scale_gradient(a, b, *reading, *given), a, b, reading, *given)


def test_a_value_of_zero_spoils_its_own_direction_alone() -> None:
    a, b = maps((2, 6, 5, 7), torch.float32, "contiguous"), torch.randn(2, 6, 5, 7)
    left, right, S = readings((6, 6), 1, torch.float32)
    expected = scale_gradient(a, b, left, right, S)
    S[1] = 0
    found = scale_gradient(a, b, left, right, S)
    assert torch.equal(found[0, ::2], expected[0, ::2]) and not found[0, 1].isfinite()


def test_opcheck_and_memory_safety() -> None:
    raw = torch.ops.svf_fast
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3)
    reading = readings((4, 6), 1, torch.float32)
    scale, shift = torch.randn(2, 4)
    for given in ((None, None), (scale, shift)):
        torch.library.opcheck(raw.scale_gradient.default, (a, b, *given, *reading))
    left, right, S = reading
    with pytest.raises(RuntimeError, match=r"left must be \[G, Ca, R\] and S"):
        raw.scale_gradient(a, b, None, None, left, right, S[:2])
    with pytest.raises(RuntimeError, match="left must be"):
        raw.scale_gradient(a, b, None, None, left[:, :3], right, S)
