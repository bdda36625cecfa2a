"""The SVF convolution ``y = U (S ⊙ (Vᵀ * x)) + b`` with its four exact strategies.

All give the same ``dx`` and ``dS_r = Σ_p v_pr (Uᵀg)_pr``, v = Vᵀ*x and g = dL/dy, up to rounding;
they differ in what they keep for the backward pass and in what they compute there.

============= ======================= ========================================== ==================
strategy      forward                 dS                                         keeps
============= ======================= ========================================== ==================
``reference`` conv V, mul S, conv U   autograd                                   x, v, S⊙v
``fold``      conv W = U diag(S) Vᵀ   rowsum((Uᵀ dW) ⊙ Vᵀ)                       x
``chain``     conv V, conv U diag(S)  Σ_p (Uᵀg) ⊙ v                              v
``gram``      conv W                  colsum(U ⊙ (M U)) / S,  M = Σ_p g yᵀ       y
``gram``, 1×1 conv W                  colsum(V ⊙ (M V)) / S,  M = Σ_p x dxᵀ      x, if narrower
============= ======================= ========================================== ==================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.convolution import (
    Geometry,
    convolution,
    convolution_input_gradient,
    convolution_weight_gradient,
    is_channels_last,
)
from svf_fast.ops.gram import gram, gram_gradient
from svf_fast.reference.svf_conv2d import svf_conv2d as reference_svf_conv2d
from svf_fast.svd import compose

PLAIN = Geometry()
STRATEGIES = ("reference", "fold", "chain", "gram")


@dataclass(frozen=True)
class Frozen:
    """What the strategies take of the frozen side besides U and V.

    weight: ``compose(U, S, V)`` in the dtype of x for the S in use, where the caller has it.
    tail [G, T]: per-group indices of the guarded directions (gram).
    dual_U, dual_V: :func:`svf_fast.svd.dual` of U, and of Vᵀ as [G·Ci/G, R], or None (gram).
    """

    weight: Tensor | None = None
    tail: Tensor | None = None
    dual_U: Tensor | None = None
    dual_V: Tensor | None = None


def reads_input(weight_shape: torch.Size, geometry: Geometry) -> bool:
    """Whether ``gram`` takes its matrix from x and dx (1×1, narrower input), not from y and g."""
    out_channels, in_channels, height, width = weight_shape
    pointwise = height == width == 1 and geometry.padding == (0, 0)
    return pointwise and in_channels * geometry.groups < out_channels


def svf_conv2d(
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    geometry: Geometry = PLAIN,
    strategy: str = "gram",
    frozen: Frozen | None = None,
) -> Tensor:
    """``U (S ⊙ conv(x, V)) + bias``, differentiable in x, S and bias; U and V are constants.

    x [N, Ci, H, W], U [Co, R], S [G·R], V [G·R, Ci/G, kh, kw], bias [Co] -> [N, Co, Ho, Wo] in the
    dtype of x. ``frozen`` spares the composition of W where the caller has it. For ``gram`` its
    ``tail`` must hold the directions of :func:`svf_fast.svd.guarded_directions`.

    Raises:
        ValueError: unknown strategy.
        RuntimeError: differentiated twice, or a tensor it kept was changed in place.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    dtype = x.dtype
    if bias is not None:
        bias = bias.to(dtype)
    if strategy == "reference":
        return reference_svf_conv2d(x, U.to(dtype), S.to(dtype), V.to(dtype), bias, *geometry)
    if frozen is None:
        frozen = Frozen()
    if strategy == "chain" and S.requires_grad:
        return _Chain.apply(x, S, bias, U, V, geometry)
    weight = frozen.weight
    if weight is None:
        weight = compose(U, S.detach(), V, geometry.groups).to(dtype)
    weight = weight.reshape(len(U), *V.shape[1:])
    if not S.requires_grad:
        return _Folded.apply(x, bias, weight, geometry)
    if strategy == "fold":
        return _Fold.apply(x, S, bias, U, V, weight, geometry)
    if reads_input(weight.shape, geometry):
        return _GramOfInput.apply(x, S, bias, U, V, weight, frozen.tail, frozen.dual_V, geometry)
    if bias is not None:  # the matrix needs y without its bias, so the bias is a layer of its own
        y = _GramOfOutput.apply(x, S, U, V, weight, frozen.tail, frozen.dual_U, geometry)
        return y + bias.reshape(1, -1, 1, 1)
    return _GramOfOutput.apply(x, S, U, V, weight, frozen.tail, frozen.dual_U, geometry)


def _transposed(factor: Tensor, groups: int) -> Tensor:
    """[Co, R] -> Uᵀ as the weight [G·R, Co/G, 1, 1] of a grouped 1×1 convolution."""
    per_group = factor.reshape(groups, -1, factor.shape[1])
    return per_group.mT.reshape(-1, per_group.shape[1], 1, 1)


def _saved(ctx, strategy: str) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"strategy {strategy!r}: a tensor kept for the backward pass was changed in place, "
            "most often the layer's output by an activation with inplace=True right after it. "
            "Set inplace=False there, or use strategy='chain' for this layer."
        ) from error


def _arriving(ctx, grad_y: Tensor) -> Tensor:
    """The gradient in the memory format of x, so that dx comes out in it too."""
    return grad_y.contiguous(memory_format=ctx.format)


def _bias_gradient(ctx, index: int, grad_y: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[index]:
        return None
    dtype = torch.promote_types(grad_y.dtype, torch.float32)
    return grad_y.sum(dim=(0, 2, 3), dtype=dtype).to(grad_y.dtype)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


class _Folded(torch.autograd.Function):
    """S frozen: a convolution that keeps nothing."""

    @staticmethod
    def forward(ctx, x, bias, weight, geometry):
        ctx.weight, ctx.geometry, ctx.shape, ctx.format = weight, geometry, x.shape, _format(x)
        return convolution(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grad_y = _arriving(ctx, grad_y)
        with _no_autocast(grad_y):
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = convolution_input_gradient(grad_y, ctx.weight, ctx.shape, ctx.geometry)
            return grad_x, _bias_gradient(ctx, 1, grad_y), None, None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, S, bias, U, V, weight, geometry):
        ctx.save_for_backward(x, S, U, V)
        ctx.weight, ctx.geometry, ctx.format = weight, geometry, _format(x)
        return convolution(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grad_y = _arriving(ctx, grad_y)
        x, S, U, V = _saved(ctx, "fold")
        geometry, groups, rank = ctx.geometry, ctx.geometry.groups, U.shape[1]
        grad_x = grad_S = None
        with _no_autocast(grad_y):
            if ctx.needs_input_grad[0]:
                grad_x = convolution_input_gradient(grad_y, ctx.weight, x.shape, geometry)
            if ctx.needs_input_grad[1]:
                grad_weight = convolution_weight_gradient(grad_y, x, ctx.weight, geometry)
                dtype = torch.promote_types(grad_weight.dtype, torch.float32)
                grad_weight = grad_weight.reshape(groups, U.shape[0] // groups, -1).to(dtype)
                projected = U.reshape(groups, -1, rank).to(dtype).mT @ grad_weight
                grad_S = (projected * V.reshape(groups, rank, -1).to(dtype)).sum(dim=2)
                grad_S = grad_S.reshape(-1).to(S.dtype)
            return grad_x, grad_S, _bias_gradient(ctx, 2, grad_y), None, None, None, None


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, S, bias, U, V, geometry):
        v = convolution(x, V.to(x.dtype), None, geometry)
        ctx.save_for_backward(v, S, U, V)
        ctx.geometry, ctx.shape, ctx.format = geometry, x.shape, _format(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        groups, rank = geometry.groups, U.shape[1]
        scaled = U.reshape(groups, -1, rank).to(dtype) * S.reshape(groups, 1, rank).to(dtype)
        weight = scaled.reshape(*U.shape, 1, 1).to(x.dtype)
        return convolution(v, weight, bias, geometry.pointwise())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grad_y = _arriving(ctx, grad_y)
        v, S, U, V = _saved(ctx, "chain")
        geometry = ctx.geometry
        grad_x = None
        with _no_autocast(grad_y):
            weight = _transposed(U.to(grad_y.dtype), geometry.groups)
            grad_v = convolution(grad_y, weight, None, geometry.pointwise())
            scale = S.to(torch.promote_types(grad_y.dtype, torch.float32))
            grad_S = channel_dot_scale_(grad_v, v, scale).to(S.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = convolution_input_gradient(grad_v, V.to(grad_y.dtype), ctx.shape, geometry)
            return grad_x, grad_S, _bias_gradient(ctx, 2, grad_y), None, None, None


class _Tail:
    """The guarded directions: their factors, and their exact gradient Σ_p v_T ⊙ (U_Tᵀ g)."""

    def __init__(self, U: Tensor, V: Tensor, index: Tensor, groups: int):
        self.index, self.groups = index, groups
        count, rank = index.shape[1], U.shape[1]
        columns = index[:, None, :].expand(-1, U.shape[0] // groups, -1)
        self.U = U.reshape(groups, -1, rank).gather(2, columns).reshape(-1, count)
        rows = index + rank * torch.arange(groups, device=index.device)[:, None]
        self.V = V.index_select(0, rows.reshape(-1))

    def project(self, x: Tensor, geometry: Geometry) -> Tensor:
        """v_T [N, G·T, Ho, Wo]."""
        return convolution(x, self.V.to(x.dtype), None, geometry)

    def gradient(self, v: Tensor, grad_y: Tensor) -> Tensor:
        weight = _transposed(self.U.to(grad_y.dtype), self.groups)
        grad_v = convolution(grad_y, weight, None, Geometry(groups=self.groups))
        return channel_dot(grad_v, v).reshape(self.index.shape)


def _divisor(S: Tensor, groups: int, tail: Tensor | None) -> Tensor:
    """S [G, R] with ones in the place of guarded values, which nothing is divided by."""
    S = S.reshape(groups, -1)
    return S if tail is None else S.scatter(1, tail, 1.0)


class _GramOfOutput(torch.autograd.Function):
    """M = Σ_p g yᵀ. Keeps y, its own output, so the following layer's copy is the same storage."""

    @staticmethod
    def forward(ctx, x, S, U, V, weight, tail, dual_U, geometry):
        y = convolution(x, weight, None, geometry)
        kept = None
        if tail is not None:
            kept = _Tail(U, V, tail, geometry.groups).project(x, geometry)
        ctx.save_for_backward(y, kept, S, U, V)
        ctx.weight, ctx.tail, ctx.dual_U = weight, tail, dual_U
        ctx.geometry, ctx.shape, ctx.format = geometry, x.shape, _format(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grad_y = _arriving(ctx, grad_y)
        y, kept, S, U, V = _saved(ctx, "gram")
        geometry, groups = ctx.geometry, ctx.geometry.groups
        grad_x = None
        with _no_autocast(grad_y):
            if ctx.needs_input_grad[0]:
                grad_x = convolution_input_gradient(grad_y, ctx.weight, ctx.shape, geometry)
            left = U.reshape(groups, -1, U.shape[1])
            right = left if ctx.dual_U is None else ctx.dual_U.reshape(left.shape)
            grad_S = gram_gradient(
                gram(grad_y, y, groups), left, right, _divisor(S, groups, ctx.tail)
            )
            if ctx.tail is not None:
                exact = _Tail(U, V, ctx.tail, groups).gradient(kept, grad_y)
                grad_S = grad_S.scatter(1, ctx.tail, exact.to(grad_S.dtype))
            grad_S = grad_S.reshape(-1).to(S.dtype)
            return grad_x, grad_S, None, None, None, None, None, None


class _GramOfInput(torch.autograd.Function):
    """M = Σ_p x dxᵀ over the sampled positions of a 1×1 convolution. Keeps those of x."""

    @staticmethod
    def forward(ctx, x, S, bias, U, V, weight, tail, dual_V, geometry):
        rows, columns = geometry.stride
        sampled = x
        if rows > 1 or columns > 1:
            sampled = x[:, :, ::rows, ::columns].contiguous(memory_format=_format(x))
        ctx.save_for_backward(sampled, S, U, V)
        ctx.weight, ctx.tail, ctx.dual_V = weight, tail, dual_V
        ctx.geometry, ctx.shape, ctx.format = geometry, x.shape, _format(x)
        return convolution(sampled, weight, bias, geometry.pointwise())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grad_y = _arriving(ctx, grad_y)
        sampled, S, U, V = _saved(ctx, "gram")
        geometry, groups = ctx.geometry.pointwise(), ctx.geometry.groups
        rank = U.shape[1]
        with _no_autocast(grad_y):
            grad_sampled = convolution_input_gradient(grad_y, ctx.weight, sampled.shape, geometry)
            left = V.reshape(groups, rank, -1).mT
            right = left if ctx.dual_V is None else ctx.dual_V.reshape(left.shape)
            grad_S = gram_gradient(
                gram(sampled, grad_sampled, groups), left, right, _divisor(S, groups, ctx.tail)
            )
            if ctx.tail is not None:
                tail = _Tail(U, V, ctx.tail, groups)
                exact = tail.gradient(tail.project(sampled, geometry), grad_y)
                grad_S = grad_S.scatter(1, ctx.tail, exact.to(grad_S.dtype))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = grad_sampled
                if sampled.shape != ctx.shape:
                    rows, columns = ctx.geometry.stride
                    grad_x = grad_y.new_zeros(ctx.shape).contiguous(memory_format=ctx.format)
                    grad_x[:, :, ::rows, ::columns] = grad_sampled
            grad_S = grad_S.reshape(-1).to(S.dtype)
            bias_gradient = _bias_gradient(ctx, 2, grad_y)
            return grad_x, grad_S, bias_gradient, None, None, None, None, None, None
