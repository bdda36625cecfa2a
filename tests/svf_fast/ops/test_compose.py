"""The CPU's compose against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from svf_fast.ops.compose import compose, compose_by_definition
from svf_fast.reference.compose import compose as definition
from tests.svf_fast.tolerance import accumulated, assert_error_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Co, Ci per group, kernel, groups: odd, one, 1×1, grouped, with small rank, depthwise
CASES = [(5, 3, 3, 1), (1, 1, 1, 1), (40, 17, 1, 1), (36, 6, 3, 3), (12, 2, 3, 4)]
CASES += [(8, 1, 3, 8), (74, 1, 7, 37)]
LAYOUTS = ("contiguous", "channels_last", "rank inside")


def factors(case, dtype, layout):
    rows, width, size, groups = case
    rank = min(rows // groups, width * size * size)
    V = torch.randn(groups * rank, width, size, size, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        V = V.contiguous(memory_format=torch.channels_last)
    if layout == "rank inside":
        V = V.movedim(0, -1).contiguous().movedim(-1, 0)
    U, S = torch.randn(rows, rank), torch.randn(groups * rank)
    return U.to(dtype), S.to(dtype), V


# of the factors, and of W: never wider than they are multiplied
PAIRS = [(torch.float64, torch.float64)]
PAIRS += [(dtype, to) for dtype in (torch.float32, torch.bfloat16) for to in DTYPES[1:]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "to"), PAIRS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case, dtype, to, layout, poisoned_memory) -> None:
    U, S, V = factors(case, dtype, layout)
    groups, wide = case[3], torch.promote_types(torch.promote_types(dtype, to), torch.float32)
    truth = definition(U.double(), S.double(), V.double(), groups)
    expected = definition(*(factor.to(wide) for factor in (U, S, V)), groups)
    scale = torch.randn(len(U), dtype=wide)
    rows = scale.reshape(-1, 1, 1, 1)
    for implementation in (compose, compose_by_definition):
        W, scaled = implementation(U, S, V, groups, to, scale)
        assert W.dtype == scaled.dtype == to
        magnitude = accumulated(truth, to)
        assert_error_within(W, expected.to(to), truth, magnitude=magnitude)
        want, exact = (expected * rows).to(to), truth * rows.double()
        assert_error_within(scaled, want, exact, magnitude=magnitude * rows.double())
    alone, nothing = compose(U, S, V, groups, to)
    assert nothing is None
    assert torch.equal(alone, compose(U, S, V, groups, to, scale)[0])


def test_the_weight_lies_as_V_does() -> None:
    for layout, memory_format in zip(
        LAYOUTS,
        (torch.contiguous_format, torch.channels_last, torch.contiguous_format),
        strict=True,
    ):
        W, _ = compose(*factors((8, 4, 3, 1), torch.float32, layout), 1, torch.float32)
        assert W.is_contiguous(memory_format=memory_format)


def test_opcheck_and_memory_safety() -> None:
    raw = torch.ops.svf_fast.compose.default
    for layout in LAYOUTS:
        U, S, V = factors((8, 4, 3, 2), torch.float32, layout)
        for scale in (None, torch.randn(8)):
            torch.library.opcheck(raw, (U, S, V, 2, torch.bfloat16, scale))
    with pytest.raises(RuntimeError, match=r"scale must be \[Co\]"):
        raw(U, S, V, 2, torch.float32, torch.randn(7))
    for bad in ((U, S[:-1], V, 2), (U, S, V[:-1], 2), (U, S, V, 3), (U[0], S, V, 2)):
        with pytest.raises(RuntimeError, match=r"expected U \[Co, R\]"):
            raw(*bad, torch.float32, None)
