"""A convolution whose weight never trains, and which therefore keeps no map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def frozen_conv2d(x: Tensor, weight: Tensor, padding: int | tuple[int, int] = 0) -> Tensor:
    """``conv2d(x, weight, padding=padding)`` without a gradient of the weight.

    torch's own keeps x for that gradient even where the weight needs none.

    x [B, Ci, H, W], weight [Co, Ci, kh, kw] -> [B, Co, H', W'].

    Raises:
        ValueError: a weight that needs a gradient.
    """
    if weight.requires_grad:
        raise ValueError("weight: expected one that needs no gradient; use torch's conv2d")
    return _FrozenConvolution.apply(x, weight, padding)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int | tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.padding = x.dtype, padding
        return functional.conv2d(x, weight, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # under autocast the convolution ran in the dtype of its output
        weight = weight.to(grad.dtype)
        # not `torch.nn.grad.conv2d_input`, whose stand-in for x has a GPU lay grad out and back
        grad_x = functional.conv_transpose2d(grad, weight, padding=ctx.padding)
        return grad_x.to(ctx.dtype), None, None
