"""Definition of maps kept in 8 bits: a code an element, and a grid a channel of each image.

The codes of a channel divide its range evenly. Where a batch norm and a ReLU follow, the grid lies
so that the ReLU's edge is a border between two codes: which side a value is on can be told from
its code. A value and its code's differ by half a step of the grid, by one beside the edge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.affine_act import _per_channel

STEPS = 254  # of a range with an edge in it: the edge cuts one step in two, and one code is spare
ALL_STEPS = 255  # of one without


def quantize(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [N, C, *spatial] of y, and the grid [3, N, C]: offset, step, first.

    A code q stands for ``offset + step · q``. With scale and shift [C], those of the affine map
    before a ReLU, codes rise as ``y·scale + shift`` does, and ``q >= first`` just where not
    ``y·scale + shift <= 0``. A channel with a value that is not finite has an offset of NaN.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    values = y.to(dtype).flatten(2) if y.dim() > 2 else y.to(dtype)[:, :, None]
    if values.numel() == 0:
        return torch.zeros_like(y, dtype=torch.uint8), values.new_zeros((3, *y.shape[:2]))
    low, high = values.amin(dim=2), values.amax(dim=2)
    width = high - low
    flat = ~(width >= 1024 * torch.finfo(dtype).tiny)  # NaN too
    width = torch.where(flat, 1, width)
    if scale is None or shift is None:
        step = torch.where(flat, 0, width / ALL_STEPS)
        first, anchor, inverse = torch.zeros_like(low), low, ALL_STEPS / width
        offset, rounding = low, torch.full_like(low, 0.5)
        lowest, highest = values.new_zeros(()), values.new_tensor(255.0)
    else:
        rises, edge = scale > 0, (-shift / scale).expand_as(low)
        ends = torch.where(~(low * scale + shift <= 0) == rises, low, high)
        anchor = torch.where(edge.isfinite(), torch.minimum(torch.maximum(edge, low), high), ends)
        stopped = torch.where(rises, anchor - low, high - anchor)
        first = (stopped / width * STEPS).ceil().clamp(1, 255)
        first = torch.where(flat, 128, first)
        sign = torch.where(rises, 1.0, -1.0).to(dtype)
        step = torch.where(flat, 0, sign * width / STEPS)
        anchor = torch.where(flat, low, anchor)
        offset, inverse, rounding = anchor + (0.5 - first) * step, sign * STEPS / width, first
        z = y.to(dtype) * _per_channel(scale, y) + _per_channel(shift, y)
        stops = (z <= 0).reshape(values.shape)
        lowest = torch.where(stops, 0, first[:, :, None])
        highest = torch.where(stops, first[:, :, None] - 1, 255)
    inverse = torch.where(flat, 0, inverse)
    finite = values.isfinite().all(dim=2)
    offset = torch.where(finite, offset, torch.nan)
    step = torch.where(finite, step, 0)
    q = (values - anchor[:, :, None]) * inverse[:, :, None] + rounding[:, :, None]
    q = torch.minimum(torch.maximum(q.nan_to_num(0.0), lowest), highest)
    codes = torch.empty_like(y, dtype=torch.uint8).copy_(q.floor().reshape(y.shape))
    return codes, torch.stack((offset, step, first))


def dequantize(
    codes: Tensor,
    grid: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return what codes stand for, in a dtype; with scale and shift ``relu(y·scale + shift)``.

    Where the ReLU passes is told by the codes.
    """
    offset, step, first = (_per_image(x, codes) for x in grid)
    y = (offset + step * codes).to(dtype)
    if scale is None or shift is None:
        return y
    z = y.to(grid.dtype) * _per_channel(scale, codes) + _per_channel(shift, codes)
    return torch.where(codes >= first, z.relu(), 0).to(dtype)


def quantized_backward(grad: Tensor, codes: Tensor, grid: Tensor, scale: Tensor) -> Tensor:
    """Compute dL/dy of ``relu(y·scale_c + shift_c)``: grad · scale_c where the codes pass."""
    passes = codes >= _per_image(grid[2], codes)
    return torch.where(passes, grad.to(grid.dtype) * _per_channel(scale, grad), 0).to(grad.dtype)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (like.dim() - 2))
