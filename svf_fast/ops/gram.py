"""Gram matrix of two maps over all positions, and the S-gradient read off it."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.ops.channel_dot import channel_dot


def gram(a: Tensor, b: Tensor, groups: int = 1) -> Tensor:
    """``M = Σ_p a_p b_pᵀ`` over images and positions, one matrix per group.

    a [N, Ca, *spatial], b [N, Cb, *spatial] -> [G, Ca/G, Cb/G], accumulated and returned in
    float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.shape[1] == b.shape[1] == groups:
        return channel_dot(a, b).reshape(groups, 1, 1)
    if a.numel() == 0 or b.numel() == 0:
        return a.new_zeros((groups, a.shape[1] // groups, b.shape[1] // groups), dtype=dtype)
    if _is_row_major(a) and _is_row_major(b):
        rows_a, rows_b = _rows(a, groups), _rows(b, groups)  # [G, N·P, C/G]
        return rows_a.mT.to(dtype) @ rows_b.to(dtype)
    images, channels = a.shape[:2]
    maps_a = a.reshape(images, groups, channels // groups, -1)
    maps_b = b.reshape(images, groups, b.shape[1] // groups, -1)
    if a.dtype == dtype:
        return (maps_a @ maps_b.mT).sum(dim=0)
    # 16-bit: widened an image at a time, so that no float32 copy of the whole maps exists
    total = maps_a[0].to(dtype) @ maps_b[0].mT.to(dtype)
    for map_a, map_b in zip(maps_a[1:], maps_b[1:], strict=True):
        total += map_a.to(dtype) @ map_b.mT.to(dtype)
    return total


def gram_gradient(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """``dS_r = left_rᵀ M right_r / S_r``: ``colsum(left ⊙ (M right)) / S``, per group.

    M [G, C, C], left and right [G, C, R], S [G, R] -> [G, R], in the dtype of M.
    """
    product = M @ right.to(M.dtype)
    return (left.to(M.dtype) * product).sum(dim=1) / S.to(M.dtype)


def _is_row_major(x: Tensor) -> bool:
    """Positions outermost, channels innermost: channels_last, or no spatial extent."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor, groups: int) -> Tensor:
    rows = x.permute(0, 2, 3, 1).reshape(-1, groups, x.shape[1] // groups)
    return rows.transpose(0, 1)
