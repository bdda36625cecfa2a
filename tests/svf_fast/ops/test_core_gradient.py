"""dΣ read off small matrices: against the sum over positions that it stands for, in float64."""

from __future__ import annotations

import pytest
import torch

from svf_fast import svd
from svf_fast.ops.core_gradient import core_gradient
from svf_fast.ops.gram import gram
from tests.svf_fast.tolerance import assert_error_within

# Σ that can be inverted, and those that need a lift: one small value, a zero, off-diagonal loss
MATRICES = {
    "plain": lambda x: x + 4 * torch.eye(4, dtype=x.dtype),
    "small": lambda x: x @ torch.diag(torch.tensor([1e-9, 1, 1, 1])).double(),
    "zero": lambda x: x * torch.tensor([0, 1, 1, 1]).double(),
    "all zero": torch.zeros_like,
}


def orthonormal(groups: int, rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(groups, rows, columns, dtype=torch.float64))[0]


def by_groups(factors: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Multiply [G, A, B] with maps [N, G·B, P] position by position."""
    images, positions = maps.shape[0], maps.shape[-1]
    return (factors @ maps.reshape(images, len(factors), -1, positions)).flatten(1, 2)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("of_input", [False, True])
def test_both_gram_matrices_give_the_sum_over_positions(of_input, name, poisoned_memory):
    torch.manual_seed(3)
    groups, rank = 2, 4
    U, V = orthonormal(groups, 6, rank), orthonormal(groups, 5, rank)
    core = torch.stack([MATRICES[name](torch.randn(rank, rank).double()) for _ in range(groups)])
    x, g = torch.randn(3, 10, 50).double(), torch.randn(3, 12, 50).double()
    z, a = by_groups(V.mT, x), by_groups(U.mT, g)
    y, dx = by_groups(U @ core, z), by_groups(V @ core.mT, a)
    expected = gram(a, z, groups)

    inverse, lift = svd.lifted_inverse(core)
    assert (lift is None) == (name == "plain")
    weak = tail = None
    if lift is not None:
        P, Q = lift
        tail = Q if of_input else P
        own = by_groups(P.mT, a) if of_input else by_groups(Q.mT, z)
        weak = gram(x if of_input else g, own, groups)
    M = gram(x, dx, groups) if of_input else gram(g, y, groups)
    left = V if of_input else U
    found = core_gradient(left, M, left, weak, tail, inverse, of_input)
    assert_error_within(found, expected, expected, magnitude=64 * expected, name="dΣ")


def test_of_a_map_and_of_the_gradient_of_the_weight():
    torch.manual_seed(4)
    U, V = orthonormal(2, 6, 4), orthonormal(2, 5, 4)
    x, g = torch.randn(3, 10, 50).double(), torch.randn(3, 12, 50).double()
    expected = gram(by_groups(U.mT, g), by_groups(V.mT, x), 2)
    torch.testing.assert_close(core_gradient(U, gram(g, by_groups(V.mT, x), 2)), expected)
    torch.testing.assert_close(core_gradient(U, gram(g, x, 2), V), expected)


def test_autocast_and_gradients_stay_out():
    left = torch.eye(3)[None].requires_grad_()
    M = torch.full((1, 3, 3), 1 + 2**-12)
    with torch.autocast("cpu", torch.bfloat16):
        found = core_gradient(left, M, left)
    assert torch.equal(found, M) and not found.requires_grad
