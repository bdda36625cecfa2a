"""Definition of the Gram matrix of two maps over all positions."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.quantize import dequantize


def gram(
    a: Tensor,
    b: Tensor,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """Compute ``M = Σ_p a'_p b_pᵀ`` per group, ``a' = relu(a · scale + shift)`` if given, else a.

    a [N, Ca, *spatial], b [N, Cb, *spatial], scale and shift [Ca] -> [G, Ca/G, Cb/G], float32 at
    least; a' is rounded to the dtype of a. With a grid one of both is codes, and stands for what
    :func:`svf_fast.reference.quantize.dequantize` makes of it in the dtype of the other.
    """
    if grid is not None and a.dtype == torch.uint8:
        a, scale, shift = dequantize(a, grid, scale, shift, b.dtype), None, None
    elif grid is not None:
        b = dequantize(b, grid, None, None, a.dtype)
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
