"""The gradient of a core Σ, read off the Gram matrix of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.core_gradient import core_gradient as definition


def core_gradient(
    left: Tensor,
    M: Tensor,
    right: Tensor | None = None,
    weak: Tensor | None = None,
    lift: Tensor | None = None,
    inverse: Tensor | None = None,
    of_input: bool = False,
) -> Tensor:
    """Compute ``dΣ = Σ_p a_p z_pᵀ`` [G, R, R], with ``a = Uᵀ dL/dy`` and ``z = Vᵀ*x``.

    M [G, Ca, Cb] is a matrix of two maps, weak [G, Ca, T] that of the first and the guarded
    directions', both as :func:`svf_fast.ops.gram.gram` makes them, in float32 or float64; lift
    [G, R, T] and ``inverse`` K [G, R, R] are of :func:`svf_fast.svd.lifted_inverse`:

    - of dL/dy and y, with U left and right: ``Uᵀ (M U + H Pᵀ) K``;
    - of x and dL/dx (``of_input``), with V left and right: ``K (Vᵀ (M V + H Qᵀ))ᵀ``;
    - of dL/dy and z, or the gradient of W, without ``inverse``: ``Uᵀ M``, ``Uᵀ M V``.

    Not differentiable. Definition: :func:`svf_fast.reference.core_gradient.core_gradient`.
    """
    with torch.no_grad(), torch.autocast(M.device.type, enabled=False):
        return definition(left, M, right, weak, lift, inverse, of_input)
