"""Definitions of the Gram matrices of maps, and of the S-gradient read off them."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.affine_act import affine_act_backward


def gram(
    a: Tensor,
    b: Tensor,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``M = Σ_p a'_p b_pᵀ`` per group, ``a' = relu(a · scale + shift)`` if given, else a.

    a [N, Ca, *spatial], b [N, Cb, *spatial], scale and shift [Ca] -> [G, Ca/G, Cb/G], float32 at
    least; a' is rounded to the dtype of a.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    if scale is not None and shift is not None:
        shape = (-1, *[1] * (a.dim() - 2))
        rebuilt = a.to(dtype) * scale.reshape(shape) + shift.reshape(shape)
        a = rebuilt.relu().to(a.dtype)
    images, spatial = a.shape[0], a.shape[2:].numel()
    maps_a, maps_b = (
        x.to(dtype).reshape(images, groups, x.shape[1] // groups, spatial) for x in (a, b)
    )
    return (maps_a @ maps_b.mT).sum(dim=0)


def gram_gradient(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """``dS_r = left_rᵀ M right_r / S_r``; M [G, Ca, Cb], left, right [G, Ca or Cb, R], S [G, R]."""
    return (left.to(M.dtype) * (M @ right.to(M.dtype))).sum(dim=1) / S.to(M.dtype)


def activation_grams(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The way back through ``x = relu(y · scale + shift)``, and the Gram matrices on both sides.

    grad = dL/dx and y [N, C, *spatial], scale and shift [C] -> ``g = dL/dy`` [N, C, *spatial],
    ``before = Σ_p g_p y_pᵀ`` [1, C, C] and ``after = Σ_p x_p grad_pᵀ`` [1, C, C]. x and g are
    rounded to the dtype of the maps.
    """
    g = affine_act_backward(grad, y, None, scale, shift)
    return g, gram(g, y), gram(y, grad, 1, scale, shift)
