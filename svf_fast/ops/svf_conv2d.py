"""The SVF convolution ``y = U (S ⊙ (Vᵀ * x)) + b`` as one autograd node."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.ops.convolution import Geometry, memory_format
from svf_fast.ops.factors import Activation, Flow, Gradient, Kept, SVFConvolution
from svf_fast.ops.node import (
    AS_REFERENCE,
    INPUT_CHANGED,
    differentiable_once,
    keeps_graph,
    no_autocast,
    unpack_saved,
)
from svf_fast.reference.svf_conv2d import svf_conv2d as definition

_CHANGED = {  # by what the layer keeps
    "x": INPUT_CHANGED,
    "y": "its output, by an activation with inplace=True right after it: set inplace=False there, "
    "or use strategy='chain' for this layer",
    "v": "one of its factors",
    "": "one of its factors",
}


def svf_conv2d(x: Tensor, conv: SVFConvolution, bias: Tensor | None = None) -> Tensor:
    """Compute ``U (S ⊙ conv(x, V)) + bias``; differentiable in x, bias and what trains of S.

    x [N, Ci, H, W] in the compute dtype of the layer, bias [Co] -> [N, Co, Ho, Wo]. With a core
    ``U Σ conv(x, V) + bias``.

    Raises RuntimeError when differentiated twice, or when a tensor it kept was changed in place.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if bias is not None and conv.kind.keeps == "y":
        # the matrix needs y without its bias, so the bias is a layer of its own
        return _SVFConv2d.apply(x, None, conv.kind, *conv.tensors) + bias.reshape(1, -1, 1, 1)
    return _SVFConv2d.apply(x, bias, conv.kind, *conv.tensors)


def paper_layers(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Compute :func:`svf_conv2d` as three layers, for the strategy ``reference``.

    S: or a core Σ [G, R, R].
    """
    U, S, V = (factor.to(x.dtype) for factor in (U, S, V))
    return definition(x, U, S, V, None if bias is None else bias.to(x.dtype), *geometry)


class _SVFConv2d(torch.autograd.Function):
    """One layer. Of the four maps it keeps the one its strategy reads."""

    @staticmethod
    def forward(ctx, x, bias, kind, *tensors):
        conv = SVFConvolution.of(kind, tensors)
        sampled = conv.sample(x)
        y, v = conv.forward(sampled, bias)
        kept = sampled if kind.keeps == "x" else None, v, y if kind.keeps == "y" else None
        ctx.save_for_backward(*kept, *conv.factors)  # the factors too: to notice their change
        ctx.kind, ctx.tensors = kind, tensors
        ctx.shape, ctx.format = x.shape, memory_format(x)
        return y

    @staticmethod
    @differentiable_once("SVF layer", AS_REFERENCE)
    def backward(ctx, grad_y):
        # in the memory format of x, so that dx comes out in it too
        grad_y = grad_y.contiguous(memory_format=ctx.format)
        x, v, y, *_ = unpack_saved(ctx, f"strategy {ctx.kind.strategy!r}", _CHANGED[ctx.kind.keeps])
        conv = SVFConvolution.of(ctx.kind, ctx.tensors)
        with no_autocast(grad_y):
            kept = Kept(Activation.of(x), v, Activation.of(y))
            needs_x, needs_bias, *_ = ctx.needs_input_grad
            grad_x, grad_S = conv.backward(Flow(Gradient(grad_y)), ctx.shape, kept, needs_x)
            grad_bias = None
            if needs_bias:
                dtype = torch.promote_types(grad_y.dtype, torch.float32)
                grad_bias = grad_y.sum(dim=(0, 2, 3), dtype=dtype).to(grad_y.dtype)
            grads = conv.gradients(conv.trained_gradient(grad_S))
            none = [None] * (len(ctx.tensors) - len(grads))
            if not keeps_graph():
                ctx.tensors = ()
            return grad_x, grad_bias, None, *grads, *none
