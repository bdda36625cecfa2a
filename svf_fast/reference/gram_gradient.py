"""Definition of the S-gradient read off a Gram matrix."""

from __future__ import annotations

from torch import Tensor


def gram_gradient(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """Compute ``dS_r = left_rᵀ M right_r / S_r``.

    M [G, Ca, Cb], left, right [G, Ca or Cb, R], S [G, R] -> [G, R].
    """
    return (left.to(M.dtype) * (M @ right.to(M.dtype))).sum(dim=1) / S.to(M.dtype)
