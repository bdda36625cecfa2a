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

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svf_fast.ops.affine_act import affine_act, affine_act_backward
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.compose import compose
from svf_fast.ops.convolution import (
    Geometry,
    convolution,
    convolution_input_gradient,
    convolution_weight_gradient,
    is_channels_last,
)
from svf_fast.ops.gram import gram, gram_gradient
from svf_fast.ops.pointwise import fuses, pointwise, pointwise_dot
from svf_fast.reference.svf_conv2d import svf_conv2d as reference_svf_conv2d

PLAIN = Geometry()
STRATEGIES = ("reference", "fold", "chain", "gram")


class Frozen(NamedTuple):
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
    factors = Factors.of(U, S, V, geometry, strategy, frozen or Frozen(), dtype)
    if bias is not None and factors.keeps == "y":
        # the matrix needs y without its bias, so the bias is a layer of its own
        return _SVFConv2d.apply(x, S, None, *factors[1:]) + bias.reshape(1, -1, 1, 1)
    return _SVFConv2d.apply(x, S, bias, *factors[1:])


class Activation(NamedTuple):
    """The input of a convolution: y itself, or ``relu(y·scale_c + shift_c)``, rebuilt when read."""

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.scale is None or self.shift is None:
            return self.y
        return affine_act(self.y, self.scale, self.shift)[0]

    def gram(self, other: Tensor, groups: int) -> Tensor:
        """``Σ_p x_p other_pᵀ``, x rebuilt as it is read."""
        return gram(self.y, other, groups, self.scale, self.shift)


class Gradient:
    """A gradient, or the part of it that a ReLU's mask lets through, made when it is needed."""

    def __init__(self, value: Tensor, mask: Tensor | None = None):
        self.value, self.mask = value, mask

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def tensor(self) -> Tensor:
        if self.mask is not None:
            self.value, self.mask = affine_act_backward(self.value, mask=self.mask), None
        return self.value


class Factors(NamedTuple):
    """One SVF convolution as one call computes it; ``weight`` is None for ``chain``.

    ``dual`` belongs to the side the strategy reads: U for y, V for x.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    weight: Tensor | None
    tail: Tensor | None
    dual: Tensor | None
    geometry: Geometry
    strategy: str

    @classmethod
    def of(
        cls,
        U: Tensor,
        S: Tensor,
        V: Tensor,
        geometry: Geometry,
        strategy: str,
        frozen: Frozen,
        dtype: torch.dtype,
    ) -> Factors:
        """What is needed of the strategy's constants, with W composed where the caller did not."""
        if not S.requires_grad:
            strategy = "frozen"
        weight = frozen.weight
        if strategy == "chain":
            return cls(S, U, V, None, None, None, geometry, strategy)
        if weight is None:
            weight = compose(U, S, V, geometry.groups, dtype)
        weight = weight.reshape(len(U), *V.shape[1:])
        if strategy != "gram":
            return cls(S, U, V, weight, None, None, geometry, strategy)
        dual = frozen.dual_V if reads_input(weight.shape, geometry) else frozen.dual_U
        return cls(S, U, V, weight, frozen.tail, dual, geometry, strategy)

    @property
    def keeps(self) -> str:
        """The map that the gradient of S is read off: x (as sampled), v, y, or none of them."""
        if self.strategy == "gram":
            return "x" if self.samples else "y"
        return {"fold": "x", "chain": "v", "frozen": ""}[self.strategy]

    @property
    def kernel(self) -> Tensor:
        """The weight of the convolution that reads x: W, or V for ``chain``."""
        return self.V if self.weight is None else self.weight

    @property
    def samples(self) -> bool:
        """Whether ``gram`` works on the positions of x that a 1×1 convolution's stride picks."""
        return self.strategy == "gram" and reads_input(self.kernel.shape, self.geometry)

    def sampled(self, x: Tensor) -> Tensor:
        """x as :meth:`forward` takes it."""
        rows, columns = self.geometry.stride
        if not self.samples or rows == columns == 1:
            return x
        return x[:, :, ::rows, ::columns].contiguous(memory_format=memory_format(x))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y, and what of v is kept: all (chain), the guarded directions (gram by y), or None."""
        read, weight, geometry, v = self.last(Activation(x))
        return convolution(read.y, weight, bias, geometry), self.guarded(x) if v is None else v

    def last(self, x: Activation) -> tuple[Activation, Tensor, Geometry, Tensor | None]:
        """The convolution that makes y: what it reads, its weight, its geometry; and v (chain)."""
        if self.weight is None:
            v = convolution(x.tensor(), self.V.to(x.y.dtype), None, self.geometry)
            return Activation(v), self.U_scaled(v.dtype), self.geometry.pointwise(), v
        return x, self.weight, self.geometry.pointwise() if self.samples else self.geometry, None

    def guarded(self, x: Tensor) -> Tensor | None:
        """v of the guarded directions, where ``gram`` by y has any."""
        if self.tail is None or self.samples:
            return None
        return _Tail(self.U, self.V, self.tail, self.geometry.groups).project(x, self.geometry)

    def U_scaled(self, dtype: torch.dtype) -> Tensor:
        """U diag(S) as the weight [Co, R, 1, 1] of a grouped 1×1 convolution."""
        wide = torch.promote_types(dtype, torch.float32)
        groups, rank = self.geometry.groups, self.U.shape[1]
        columns = self.U.reshape(groups, -1, rank).to(wide)
        scaled = columns * self.S.detach().reshape(groups, 1, rank).to(wide)
        return scaled.reshape(*self.U.shape, 1, 1).to(dtype)

    def backward(
        self,
        grad_y: Tensor,
        shape: torch.Size,
        x: Activation | None,
        v: Tensor | None,
        y: Tensor | None,
        needs_x: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dL/dx of ``shape`` and dL/dS, from dL/dy and the map that it ``keeps``."""
        grad_S: Tensor | None = None
        if self.strategy == "chain":
            grad_y, grad_S = self.through_U(grad_y, v)
        grad_x = None
        if needs_x or self.samples:
            grad_x = self.input_gradient(Gradient(grad_y), shape)
        if self.keeps in ("x", "y"):
            M = None
            if self.samples:
                assert x is not None and grad_x is not None
                M = x.gram(grad_x, self.geometry.groups)
            grad_S = self.scale_gradient(M, Gradient(grad_y), x, v, y)
        if grad_x is not None and self.samples:
            grad_x = self.spread(grad_x, shape) if needs_x else None
        return grad_x, grad_S

    def through_U(self, grad_y: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """``S ⊙ (Uᵀ dL/dy)`` and dL/dS of ``chain``."""
        assert v is not None
        factor = self.S.detach().to(torch.promote_types(grad_y.dtype, torch.float32))
        weight = _transposed(self.U.to(grad_y.dtype), self.geometry.groups)
        if fuses(grad_y, weight, self.geometry.pointwise(), "scale", "dot"):
            grad_y, grad_S = pointwise_dot(grad_y, weight.flatten(1), v, factor)
        else:
            grad_y = convolution(grad_y, weight, None, self.geometry.pointwise())
            grad_S = channel_dot_scale_(grad_y, v, factor)
        return grad_y, grad_S.to(self.S.dtype)

    def input_gradient(
        self,
        grad_y: Gradient,
        shape: torch.Size,
        scale: Tensor | None = None,
        into: Gradient | None = None,
    ) -> Tensor:
        """dL/dx of ``shape``; for ``samples`` at the sampled positions alone: :meth:`spread`.

        For ``chain`` it takes what :meth:`through_U` gives. With ``scale`` [Co], dL/dy is
        ``scale_c · grad_y``. ``into``, of the shape of the result, is added, in its place or not.
        """
        weight, geometry = self.kernel.to(grad_y.dtype), self.geometry
        if scale is not None:
            weight = (weight * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)
        if self.samples:
            geometry = geometry.pointwise()
            shape = torch.Size((*shape[:2], *grad_y.shape[2:]))
        ends = [] if grad_y.mask is None else ["in_mask"]
        if into is not None:
            ends += ["residual"] if into.mask is None else ["residual", "residual_mask"]
        if ends and fuses(grad_y.value, weight.transpose(0, 1), geometry, *ends):
            return pointwise(
                grad_y.value,
                weight.flatten(1).mT,
                in_mask=grad_y.mask,
                residual=None if into is None else into.value,
                residual_mask=None if into is None else into.mask,
            ).out
        plain = None if into is None else into.tensor()
        return convolution_input_gradient(grad_y.tensor(), weight, shape, geometry, plain)

    def spread(self, sampled: Tensor, shape: torch.Size, into: Tensor | None = None) -> Tensor:
        """The gradient of the sampled positions among zeros, or added to ``into`` in place."""
        rows, columns = self.geometry.stride
        if into is None and rows == columns == 1:
            return sampled
        if into is None:
            into = sampled.new_zeros(shape).contiguous(memory_format=memory_format(sampled))
        into[:, :, ::rows, ::columns] += sampled
        return into

    def scale_gradient(
        self,
        M: Tensor | None,
        grad_y: Gradient,
        x: Activation | None,
        v: Tensor | None,
        y: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor | None:
        """dL/dS of ``gram`` and ``fold`` from dL/dy, or ``scale_c · grad_y``, and what is kept.

        ``M`` is the Gram matrix of x and dL/dx, or that of dL/dy and y where the caller has it.
        """
        groups = self.geometry.groups
        if self.strategy == "fold":
            assert x is not None
            grad_S = self._scale_gradient_by_weight(grad_y.tensor(), x.tensor())
            return grad_S.reshape(-1).to(self.S.dtype)
        if self.strategy != "gram":
            return None
        if M is None:
            assert y is not None
            M = gram(grad_y.tensor(), y, groups)
        side = self.V.reshape(groups, self.U.shape[1], -1).mT if self.samples else self.U
        grad_S = self._scale_gradient(M, side.reshape(groups, -1, self.U.shape[1]))
        if self.tail is not None:
            U = self.U if scale is None else self.U * scale[:, None]
            tail = _Tail(U, self.V, self.tail, groups)
            if self.samples:
                assert x is not None
                v = tail.project(x.tensor(), self.geometry.pointwise())
            assert v is not None
            exact = tail.gradient(v, grad_y.tensor())
            grad_S = grad_S.scatter(1, self.tail, exact.to(grad_S.dtype))
        return grad_S.reshape(-1).to(self.S.dtype)

    def _scale_gradient(self, M: Tensor, columns: Tensor) -> Tensor:
        right = columns if self.dual is None else self.dual.reshape(columns.shape)
        S = self.S.detach().reshape(self.geometry.groups, -1)
        if self.tail is not None:  # nothing is divided by the guarded values
            S = S.scatter(1, self.tail, 1.0)
        return gram_gradient(M, columns, right, S)

    def _scale_gradient_by_weight(self, grad_y: Tensor, x: Tensor) -> Tensor:
        grad_weight = convolution_weight_gradient(grad_y, x, self.kernel, self.geometry)
        groups, rank = self.geometry.groups, self.U.shape[1]
        dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        grad_weight = grad_weight.reshape(groups, self.U.shape[0] // groups, -1).to(dtype)
        rows = self.V.reshape(groups, rank, -1)
        ones = grad_weight.new_ones(groups, rank)
        return gram_gradient(grad_weight, self.U.reshape(groups, -1, rank), rows.mT, ones)


def saved(ctx, name: str) -> tuple[Any, ...]:
    """The saved tensors, None where None was; a change in place of one of them is explained."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{name}: a tensor kept for the backward pass was changed in place, most often the "
            "layer's output by an activation with inplace=True right after it. Set inplace=False "
            "there, or use strategy='chain' for this layer."
        ) from error


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keeps a backward pass in the dtypes of its forward pass, whoever calls it."""
    if torch.compiler.is_compiling():  # backward is traced without autocast; leaving it off there
        return contextlib.nullcontext()  # leaves it off for the layers that are traced after
    return torch.autocast(x.device.type, enabled=False)


def _transposed(factor: Tensor, groups: int) -> Tensor:
    """[Co, R] -> Uᵀ as the weight [G·R, Co/G, 1, 1] of a grouped 1×1 convolution."""
    per_group = factor.reshape(groups, -1, factor.shape[1])
    return per_group.mT.reshape(-1, per_group.shape[1], 1, 1)


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


class _SVFConv2d(torch.autograd.Function):
    """One layer. Of the four maps it keeps the one its strategy reads."""

    @staticmethod
    def forward(ctx, x, S, bias, U, V, weight, tail, dual, geometry, strategy):
        factors = Factors(S, U, V, weight, tail, dual, geometry, strategy)
        sampled = factors.sampled(x)
        y, v = factors.forward(sampled, bias)
        keeps = factors.keeps
        ctx.save_for_backward(
            sampled if keeps == "x" else None, v, y if keeps == "y" else None, S, U, V
        )
        ctx.weight, ctx.tail, ctx.dual = weight, tail, dual
        ctx.geometry, ctx.strategy = geometry, strategy
        ctx.shape, ctx.format = x.shape, memory_format(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        # in the memory format of x, so that dx comes out in it too
        grad_y = grad_y.contiguous(memory_format=ctx.format)
        x, v, y, S, U, V = saved(ctx, f"strategy {ctx.strategy!r}")
        factors = Factors(S, U, V, ctx.weight, ctx.tail, ctx.dual, ctx.geometry, ctx.strategy)
        with no_autocast(grad_y):
            activation = None if x is None else Activation(x)
            grads = factors.backward(grad_y, ctx.shape, activation, v, y, ctx.needs_input_grad[0])
            grad_bias = None
            if ctx.needs_input_grad[2]:
                dtype = torch.promote_types(grad_y.dtype, torch.float32)
                grad_bias = grad_y.sum(dim=(0, 2, 3), dtype=dtype).to(grad_y.dtype)
            return *grads, grad_bias, None, None, None, None, None, None, None
