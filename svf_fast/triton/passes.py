"""The separate passes that a kernel joins: the search races them against it."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.pointwise import PLAIN_INPUT, PLAIN_OUTPUT, Epilogue, Prologue


def pointwise(
    x: Tensor, weight: Tensor, prologue: Prologue = PLAIN_INPUT, epilogue: Epilogue = PLAIN_OUTPUT
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`svf_fast.triton.pointwise.pointwise` by cuBLAS and the element-wise ops."""
    ops = torch.ops.svf_fast
    scale, shift, residual, residual_scale, residual_mask, relu, keep, mask = epilogue
    if prologue.scale is not None:
        x = ops.affine_act(x, prologue.scale, prologue.shift, None, None, True, False)[0]
    if prologue.mask is not None:
        x = ops.affine_act_backward(x, None, prologue.mask, None, None)
    if residual_mask is not None:
        residual = ops.affine_act_backward(residual, None, residual_mask, None, None)
    images, _, *spatial = x.shape
    rows, D = x.movedim(1, -1).flatten(end_dim=-2), len(weight)
    product = rows.new_empty(len(rows), D)
    out = product.view(images, *spatial, D).movedim(-1, 1)
    none, bits = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    ends = relu or scale is not None or shift is not None
    if residual is not None and not (ends or keep or mask):
        torch.addmm(residual.movedim(1, -1).flatten(end_dim=-2), rows, weight.t(), out=product)
        return out, none, bits
    torch.mm(rows, weight.t(), out=product)
    if residual is None and not (ends or mask):
        return out, out if keep else none, bits
    scale = x.new_ones(D, dtype=torch.float32) if scale is None else scale
    shift = torch.zeros_like(scale) if shift is None else shift
    after = scale, shift, residual, residual_scale, relu, mask
    if keep:
        y = out
        out, bits = ops.affine_act(y, *after)
        return out, y, bits
    return out, none, ops.affine_act_(out, *after)


def pointwise_dot(x: Tensor, weight: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`svf_fast.triton.pointwise.pointwise_dot` likewise."""
    a = pointwise(x, weight)[0]
    return a, torch.ops.svf_fast.channel_dot_scale_(a, v, s)
