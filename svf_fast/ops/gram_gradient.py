"""The gradient of S read off a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.gram_gradient import gram_gradient as definition


def gram_gradient(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """Compute ``dS_r = left_rᵀ M right_r / S_r``: ``colsum(left ⊙ (M right)) / S``, per group.

    M [G, Ca, Cb] in float32 or float64, left [G, Ca, R], right [G, Cb, R], S [G, R] -> [G, R] in
    the dtype of M. The product is made 512 directions at a time. Not differentiable.
    """
    with torch.no_grad():
        return torch.ops.svf_fast.gram_gradient(M, left, right, S)


def gram_gradient_by_definition(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """Compute the definition, for devices without a kernel."""
    with torch.autocast(M.device.type, enabled=False):
        return definition(M, left, right, S)


torch.library.impl("svf_fast::gram_gradient", "default", gram_gradient_by_definition)


@torch.library.register_fake("svf_fast::gram_gradient")
def _(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    return M.new_empty(S.shape)
