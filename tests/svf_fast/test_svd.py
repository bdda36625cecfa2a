from __future__ import annotations

import itertools
import math

import pytest
import torch

from svf_fast import compose, decompose
from svf_fast.svd import GUARD_LIMIT, dual, guarded_directions, inverse_with, lifted_inverse


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((8, 16, 3, 3), 1),
        ((64, 4, 3, 3), 1),  # more outputs than inputs·K²
        ((6, 2, 1, 1), 3),
        ((8, 1, 3, 3), 8),  # depthwise: rank 1
        ((1, 1, 1, 1), 1),
        ((12, 5, 1, 3), 4),
        ((10, 20), 1),
    ],
)
def test_decompose_is_full_rank_orthonormal_and_exact(shape, groups):
    weight = torch.randn(shape)
    U, S, V = decompose(weight, groups)
    fan_in = weight[0].numel()
    rank = min(shape[0] // groups, fan_in)
    assert U.shape == (shape[0], rank)
    assert S.shape == (groups * rank,)
    assert V.shape == (groups * rank, *shape[1:])
    columns = U.double().reshape(groups, -1, rank)
    rows = V.double().reshape(groups, rank, -1)
    identity = torch.eye(rank, dtype=torch.float64).expand(groups, -1, -1)
    torch.testing.assert_close(columns.mT @ columns, identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(rows @ rows.mT, identity, rtol=0, atol=1e-6)
    assert (S.reshape(groups, -1).diff(dim=1) <= 0).all()
    again = compose(U, S, V, groups)
    assert (again - weight).norm() <= 1e-6 * weight.norm()


def test_decompose_keeps_rank_deficient_factors_orthonormal():
    weight = torch.zeros(6, 4, 3, 3)
    weight[0, 0, 1, 1] = 3.0
    U, S, V = decompose(weight)
    torch.testing.assert_close(U.mT @ U, torch.eye(6))
    torch.testing.assert_close(S, torch.tensor([3.0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(compose(U, S, V), weight)


def test_compose_multiplies_half_precision_factors_in_float32():
    U, S, V = decompose(torch.randn(16, 32, 1, 1))
    halves = [factor.bfloat16() for factor in (U, S, V)]
    composed = compose(*halves)
    assert composed.dtype == torch.float32
    exact = compose(*(factor.double() for factor in halves))
    assert (composed - exact).norm() <= 1e-6 * exact.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compose(*halves), composed)


@pytest.mark.parametrize(
    ("weight", "groups", "error", "words"),
    [
        ([[1.0]], 1, TypeError, "floating point tensor, got list"),
        (torch.ones(2, 2, dtype=torch.int64), 1, TypeError, "torch.int64"),
        (torch.ones(4), 1, ValueError, r"shape \[4\]"),
        (torch.ones(4, 0, 1, 1), 1, ValueError, "empty"),
        (torch.ones(4, 2, 1, 1), 3, ValueError, "divisor of 4 channels, got 3"),
        (torch.tensor([[1.0, torch.nan]]), 1, ValueError, "NaN or Inf"),
    ],
)
def test_decompose_refuses(weight, groups, error, words):
    with pytest.raises(error, match=words):
        decompose(weight, groups)


def test_guard_leaves_the_unguarded_ratio_within_its_limit_and_not_one_more():
    for condition in (1.0, 1e1, 1e2, 1e6, 1e12):
        S = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 40)
        tail = guarded_directions(S)
        assert tail.shape[0] == 1
        kept = torch.ones(40, dtype=torch.bool).index_fill(0, tail[0], False)
        square = S.double().square().mean() / S.double().square()
        assert square[kept].mean() <= GUARD_LIMIT**2
        if tail.shape[1]:  # the largest of the guarded ones would break the rule
            assert S[tail[0]].max() <= S[kept].min()
            kept[tail[0][S[tail[0]].argmax()]] = True
            assert square[kept].mean() > GUARD_LIMIT**2


def test_guard_of_special_spectra():
    assert guarded_directions(torch.ones(8)).shape == (1, 0)
    assert guarded_directions(torch.zeros(8)).shape == (1, 8)
    assert guarded_directions(torch.tensor([2.0, 0.0, -2.0, 2.0])).tolist() == [[1]]
    # per group, with one count for all: a zero in one group guards one direction of each
    tail = guarded_directions(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]), groups=2)
    assert tail.shape == (2, 1)
    assert tail[1].item() == 2


def by_definition(S: list[float], groups: int, multiple: int) -> list[list[int]]:
    """The rule in plain Python: try ever more directions."""
    rank = len(S) // groups
    ratios = []
    for g in range(groups):
        square = [s * s for s in S[g * rank : (g + 1) * rank]]
        mean = sum(square) / rank
        ratios.append([mean / x if x > 0 and math.isfinite(mean) else math.inf for x in square])
    for count in range(rank + 1):
        kept = [sorted(ratio)[: rank - count] for ratio in ratios]
        left = [x for ratio in kept for x in ratio]
        if sum(left) <= GUARD_LIMIT**2 * len(left):
            break
    count = min(rank, -(-count // multiple) * multiple)
    order = [sorted(range(rank), key=lambda r, own=ratio: (own[r], r)) for ratio in ratios]
    return [sorted(places[rank - count :]) for places in order]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_guard_is_that_of_its_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    for groups, rank, multiple in itertools.product((1, 3), (1, 5, 24), (1, 8)):
        for spread in (0.0, 1.0, 3.0):
            S = torch.randn(groups * rank, generator=generator, dtype=torch.float64)
            S = (S.sign() * (spread * S).exp()).to(dtype)
            for value in (None, 0.0, math.nan, math.inf):
                if value is not None:
                    S[rank // 2] = value
                found = guarded_directions(S, groups, multiple)
                expected = by_definition(S.double().tolist(), groups, multiple)
                assert found.tolist() == expected and found.dtype == torch.int64


def test_dual_is_needed_only_when_the_columns_are_not_orthonormal():
    U, _, _ = decompose(torch.randn(32, 16, 1, 1))
    assert dual(U) is None
    rounded = U.bfloat16()
    P = dual(rounded)
    assert P is not None and P.dtype == torch.float32
    torch.testing.assert_close(P.mT @ rounded.float(), torch.eye(16), rtol=0, atol=1e-5)


def amplification(core: torch.Tensor, K: torch.Tensor) -> float:
    """The root mean square of D_rms / D_r over values and groups, of singular values."""
    D, inverted = (torch.linalg.svdvals(x.double()) for x in (core, K))
    return float((D.square().mean(1, keepdim=True) * inverted.square()).mean().sqrt())


CORES = {
    "well conditioned": lambda x: x + 3 * torch.eye(x.shape[1]),
    "one weak": lambda x: x @ torch.diag(torch.tensor([1e-5] + [1.0] * (x.shape[1] - 1))),
    "half weak": lambda x: x @ torch.diag(torch.logspace(0, -6, x.shape[1])),
    "one zero": lambda x: x * (torch.arange(x.shape[1]) > 0),
    "all zero": torch.zeros_like,
    "one group": lambda x: x * torch.tensor([1e-3] + [1.0] * (len(x) - 1))[:, None, None],
    "large": lambda x: 1e8 * x,
    "small": lambda x: 1e-8 * x,
}


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize(("groups", "rank"), [(1, 6), (3, 4), (1, 40)])
def test_a_lift_lets_every_core_be_inverted(name, groups, rank):
    """K inverts Σ + P Qᵀ, amplifies errors by no more than 2, and P and Q take what they must."""
    torch.manual_seed(1)
    core = CORES[name](torch.randn(groups, rank, rank) / rank**0.5)
    K, lift = lifted_inverse(core)
    lifted = core.double()
    if lift is not None:
        P, Q = lift.double()
        lifted = lifted + P @ Q.mT
        eye = torch.eye(Q.shape[2]).expand(groups, -1, -1)
        torch.testing.assert_close((Q.mT @ Q).float(), eye, rtol=0, atol=1e-5)
    identity = torch.eye(rank, dtype=torch.float64).expand(groups, -1, -1)
    torch.testing.assert_close(K.double().mT @ lifted, identity, rtol=0, atol=1e-5)
    assert amplification(core, K) <= GUARD_LIMIT * (1 + 1e-5)
    D = torch.linalg.svdvals(core)
    expected = guarded_directions(D.flatten(), groups).shape[1]
    assert (0 if lift is None else lift.shape[3]) == expected
    assert (name in ("one weak", "half weak", "one zero", "all zero")) <= (expected > 0)
    again, holds = inverse_with(core, lift)
    assert bool(holds) and torch.equal(again, K)


def test_a_lift_is_kept_while_it_serves_and_dropped_when_none_is_needed():
    torch.manual_seed(1)
    core = torch.randn(1, 8, 8) + 6 * torch.eye(8)
    weak = core @ torch.diag(torch.tensor([1e-4] + [1.0] * 7))
    _, lift = lifted_inverse(weak)
    assert lift is not None
    K, same = lifted_inverse(weak * 0.7 + 0.01 * torch.randn(8, 8), lift)
    assert same is lift and amplification(weak, K) < 10
    assert not inverse_with(weak, None)[1]
    # where what was lifted is no longer weak, another lift may cancel it
    other = weak - lift[0] @ lift[1].mT
    assert not inverse_with(other, lift)[1]
    K, found = lifted_inverse(other, lift)
    assert found is None and amplification(other, K) <= GUARD_LIMIT


def test_a_core_that_is_not_finite_has_no_inverse():
    for value in (math.nan, math.inf):
        core = torch.eye(4)[None].clone()
        core[0, 1, 2] = value
        K, lift = lifted_inverse(core)
        assert lift is None and not K.isfinite().all()
