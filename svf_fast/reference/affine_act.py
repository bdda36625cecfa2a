"""Definition of the affine map, residual sum and ReLU that follow a frozen convolution."""

from __future__ import annotations

import torch
from torch import Tensor


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """Compute ``relu(y·scale_c + shift_c + residual·residual_scale_c)`` in the dtype of y.

    y, residual [N, C, *spatial]; scale, shift, residual_scale [C] -> [N, C, *spatial].
    """
    out = y.to(scale.dtype) * _per_channel(scale, y) + _per_channel(shift, y)
    if residual is not None:
        residual = residual.to(scale.dtype)
        if residual_scale is not None:
            residual = residual * _per_channel(residual_scale, y)
        out = out + residual
    return (out.relu() if relu else out).to(y.dtype)


def pack_mask(out: Tensor) -> Tensor:
    """Pack a dense map's mask: bit i % 8 of byte i / 8 is ``not out_i <= 0``, i in memory order.

    out [N, C, *spatial] -> uint8 [numel // 64 · 8 + 16], zeros behind the last element.
    """
    passes = ~(_in_memory_order(out) <= 0)
    bits = passes.new_zeros(8 * mask_bytes(out.numel()))
    bits[: passes.numel()] = passes
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=out.device)
    return (bits.reshape(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return the mask as a bool tensor of the shape and memory format of the map it was made of."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask[:, None] >> shifts) & 1).bool().flatten()[: like.numel()]
    if _is_channels_last(like):
        return bits.reshape(like.movedim(1, -1).shape).movedim(-1, 1)
    return bits.reshape(like.shape)


def mask_bytes(elements: int) -> int:
    """Count the bytes of a mask: a bit an element, and eight bytes at least that hold none."""
    return elements // 64 * 8 + 16


def affine_act_backward(
    grad: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Compute dL/dy of ``relu(y·scale_c + shift_c)``: grad where the ReLU passes, times scale_c."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if mask is not None:
        passes = unpack_mask(mask, grad)
    elif y is not None and scale is not None and shift is not None:
        z = y.to(dtype) * _per_channel(scale, grad) + _per_channel(shift, grad)
        passes = ~(z <= 0)
    else:
        raise ValueError("affine_act_backward: expected mask, or y with its scale and shift")
    factor = 1 if scale is None else _per_channel(scale, grad)
    return torch.where(passes, grad.to(dtype) * factor, 0).to(grad.dtype)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.dim() - 2))


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _in_memory_order(x: Tensor) -> Tensor:
    return (x.movedim(1, -1) if _is_channels_last(x) else x).reshape(-1)
