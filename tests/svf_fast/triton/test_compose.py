"""The Triton kernel of compose against its definition; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.svf_fast.tolerance import accumulated, assert_error_within

pytest.importorskip("triton")

from svf_fast.ops.compose import Entry
from svf_fast.reference.compose import compose as definition
from svf_fast.triton.compose import compose, compose_all, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Co, Ci per group, kernel, groups: odd, one, larger than a tile, grouped, depthwise
CASES = [(5, 3, 3, 1), (1, 1, 1, 1), (40, 17, 1, 1), (36, 6, 3, 3), (8, 1, 3, 8), (16, 70, 1, 2)]


# of V [G·R, Ci/G, kh, kw] in memory: what is outermost to what is innermost
ORDERS = {
    "contiguous": (0, 1, 2, 3),
    "channels last": (0, 2, 3, 1),
    "rank inside": (1, 2, 3, 0),
    "channels last, rank inside": (2, 3, 1, 0),
}


def factors(case, order="contiguous", dtype=torch.float32):
    rows, width, size, groups = case
    rank = min(rows // groups, width * size * size)
    V = torch.randn(groups * rank, width, size, size)
    axes = ORDERS[order]
    V = V.permute(axes).contiguous().permute([axes.index(axis) for axis in range(4)])
    U, S = torch.randn(rows, rank), torch.randn(groups * rank)
    return [factor.to(DEVICE, dtype) for factor in (U, S, V)]


def check(W, scaled, U, S, V, groups, scale, dtype):
    truth = definition(U.double(), S.double(), V.double(), groups).cpu()
    expected = definition(U, S, V, groups)
    assert W.dtype == dtype and W.shape == (len(U), *V.shape[1:])
    assert_error_within(W, expected.to(dtype), truth, magnitude=accumulated(truth, dtype))
    if scale is None:
        assert scaled is None or scaled.numel() == 0
        return
    rows = scale.reshape(-1, 1, 1, 1)
    truth, expected = truth * rows.double().cpu(), (expected * rows).to(dtype)
    assert_error_within(scaled, expected, truth, magnitude=accumulated(truth, dtype))


# every case and dtype as V is written, every order in one dtype
VARIANTS = [("contiguous", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
VARIANTS += [(order, torch.bfloat16) for order in list(ORDERS)[1:]]


@pytest.mark.parametrize(("order", "dtype"), VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case, order, dtype, poisoned_memory):
    groups = case[3]
    U, S, V = factors(case, order)
    scale = torch.randn(len(U), device=DEVICE)
    for given in (None, scale):
        made = compose(U, S, V, groups, dtype, given)
        check(*made, U, S, V, groups, given, dtype)
    assert all(map(torch.equal, made, compose(U, S, V, groups, dtype, given)))
    if V[0].numel() > 9 and "last" in order:
        assert made[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_all_in_one_launch(order, dtype, poisoned_memory):
    entries = []
    for number, case in enumerate(CASES):
        U, S, V = factors(case, order)
        scale = torch.randn(len(U), device=DEVICE) if number % 2 else None
        entries.append(Entry(U, S, V, case[3], scale))
    where = table(entries, dtype)
    for _ in range(2):
        columns = list(zip(*entries, strict=True))
        made = compose_all(*columns, dtype, where)
        assert len(made) == 2 * len(entries)
        for entry, W, scaled in zip(entries, made[::2], made[1::2], strict=True):
            U, S, V, groups, scale = entry
            check(W, scaled, U, S, V, groups, scale, dtype)
            alone = compose(U, S, V, groups, dtype, scale)
            assert W.stride() == alone[0].stride()
            S.mul_(-1.5)  # the table has addresses, not values


def test_one_launch_takes_float32_alone():
    U, S, V = factors(CASES[2], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected factors in float32"):
        table([Entry(U, S, V, 1, None)], torch.bfloat16)


def test_16_bit_factors_are_multiplied_in_float32():
    U, V = torch.randn(24, 24, device=DEVICE), torch.randn(24, 40, 1, 1, device=DEVICE)
    S = torch.rand(24, device=DEVICE)
    factors = [factor.bfloat16() for factor in (U, S, V)]
    truth = definition(*(factor.double() for factor in factors)).cpu()
    W, _ = compose(*factors, 1, torch.float32)
    expected = definition(*(factor.float() for factor in factors))
    assert_error_within(W, expected, truth, magnitude=accumulated(truth, torch.float32))
