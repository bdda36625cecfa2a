"""Definitions of the Gram matrices of maps, and of the S-gradient read off them."""

from __future__ import annotations

from collections.abc import Sequence

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


def scale_gradient(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``dS_r = left_rᵀ M right_r / S_r`` of ``M`` = :func:`gram`, per group.

    left [G, Ca/G, R], right [G, Cb/G, R], S [G·R] -> [G, R].
    """
    groups = len(left)
    M = gram(a, b, groups, scale, shift)
    return gram_gradient(M, left, right, S.reshape(groups, -1))


def activation_gradients(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The way back through ``x = relu(y · scale + shift)``, and dS of the layers on both sides.

    grad = dL/dx and y [N, C, *spatial], scale and shift [C]; left, right and S of each side, or
    nothing -> ``g = dL/dy`` [N, C, *spatial], :func:`scale_gradient` of g and y, and of x and grad,
    None for nothing. x and g are rounded to the dtype of the maps.
    """
    g = affine_act_backward(grad, y, None, scale, shift)
    own = other = None
    if before:
        left, right, S = before
        own = scale_gradient(g, y, left, right, S)
    if after:
        left, right, S = after
        other = scale_gradient(y, grad, left, right, S, scale, shift)
    return g, own, other
