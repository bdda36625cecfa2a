"""Definition of the gradient of a core Σ, read off small matrices."""

from __future__ import annotations

from torch import Tensor


def core_gradient(
    left: Tensor,
    M: Tensor,
    right: Tensor | None = None,
    weak: Tensor | None = None,
    lift: Tensor | None = None,
    inverse: Tensor | None = None,
    of_input: bool = False,
) -> Tensor:
    """Compute ``dΣ = Lᵀ (M R + H Pᵀ) K``, or with ``of_input`` ``K (Lᵀ (M R + H Pᵀ))ᵀ``.

    left L [G, Ca, R], M [G, Ca, Cb], right R [G, Cb, R] (None: I), weak H [G, Ca, T] and lift P
    [G, R, T] (None: nothing is added), inverse K [G, R, R] (None: I) -> [G, R, R].
    """
    read = M if right is None else M @ right.to(M.dtype)
    if weak is not None and lift is not None:
        read = read + weak @ lift.to(M.dtype).mT
    read = left.to(M.dtype).mT @ read
    if inverse is None:
        return read
    return inverse.to(M.dtype) @ read.mT if of_input else read @ inverse.to(M.dtype)
