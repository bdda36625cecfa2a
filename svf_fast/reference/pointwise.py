"""Definitions of the 1×1 convolution with what surrounds it."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.affine_act import affine_act, unpack_mask
from svf_fast.reference.channel_dot import channel_dot_scale_


def pointwise(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_mask: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y_p = weight x'_p`` and ``out = relu?(y·scale + shift + residual'·residual_scale)``.

    ``x' = relu(x·in_scale + in_shift)``, or x where ``in_mask`` has a bit, or x; residual' is
    residual, or that where ``residual_mask`` has a bit. x [N, C, *spatial], weight [D, C],
    residual [N, D, *spatial] -> out, y [N, D, *spatial] in the dtype of x. Where neither scale nor
    shift is given, out is ``relu?(y + residual')``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if in_scale is not None and in_shift is not None:
        x = affine_act(x, in_scale, in_shift)
    if in_mask is not None:
        x = torch.where(unpack_mask(in_mask, x), x, 0)
    y = torch.einsum("dc,nc...->nd...", weight.to(dtype), x.to(dtype)).to(x.dtype)
    if residual is not None and residual_mask is not None:
        residual = torch.where(unpack_mask(residual_mask, residual), residual, 0)
    ones = torch.ones(len(weight), dtype=dtype, device=x.device)
    scale = ones if scale is None else scale
    shift = 0 * ones if shift is None else shift
    return affine_act(y, scale, shift, residual, residual_scale, relu), y


def pointwise_dot(x: Tensor, weight: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``a_p = weight x_p``; returns ``a·s`` per channel and ``dot_d = Σ_p a_pd v_pd``.

    x [N, C, *spatial], weight [D, C], v [N, D, *spatial], s [D] -> [N, D, *spatial], [D].
    """
    a, _ = pointwise(x, weight)
    dot = channel_dot_scale_(a, v, s)
    return a, dot
