"""Definition of the S-gradient out of two maps."""

from __future__ import annotations

from torch import Tensor

from svf_fast.reference.gram import gram
from svf_fast.reference.gram_gradient import gram_gradient


def scale_gradient(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """Compute ``dS_r = left_rᵀ M right_r / S_r`` of ``M = gram(a, b)``, per group.

    left [G, Ca/G, R], right [G, Cb/G, R], S [G·R] -> [G, R]. scale, shift and grid as for gram.
    """
    groups = len(left)
    M = gram(a, b, groups, scale, shift, grid)
    return gram_gradient(M, left, right, S.reshape(groups, -1))
