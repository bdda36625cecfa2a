"""A ReLU between fused blocks: one bit a value is kept, where torch keeps the result."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from svf_fast.ops.affine_act import affine_act, affine_act_backward
from svf_fast.ops.convolution import memory_format
from svf_fast.ops.maps import DTYPES
from svf_fast.ops.node import differentiable_once, is_transforming

_INSTEAD = "use torch.relu, which keeps its result"


def relu(x: Tensor) -> Tensor:
    """Compute ``max(x, 0)``, differentiable once; of x and the result nothing is kept but signs.

    torch keeps the result for the backward pass. That costs nothing where what reads it keeps it
    too, as convolutions do whose weights train; a fused block (:class:`svf_fast.Fused`) does not.

    Saved for the backward pass: a bit a value. Without a gradient, for other dtypes and devices,
    and under transforms of torch.func it is ``torch.relu``.

    Args:
        x: maps [N, C, *spatial] in float64, float32, bfloat16 or float16.

    Returns:
        [N, C, *spatial] in the dtype of x, dense in its memory format.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    plain = not (torch.is_grad_enabled() and x.requires_grad) or x.dim() < 2
    plain = plain or x.dtype not in DTYPES or x.device.type not in ("cpu", "cuda", "meta")
    if plain or is_transforming() or forward_ad._current_level >= 0:
        return x.relu()
    return _ReLU.apply(x)


class _ReLU(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        one, zero = x.new_ones(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
        out, mask = affine_act(x, one, zero, mask=True)
        ctx.save_for_backward(mask)
        ctx.format = memory_format(out)
        return out

    @staticmethod
    @differentiable_once("relu", _INSTEAD)
    def backward(ctx, grad: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return affine_act_backward(grad.contiguous(memory_format=ctx.format), mask=mask)
