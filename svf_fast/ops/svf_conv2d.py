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

from svf_fast.ops import maps
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.compose import compose, scaled_columns
from svf_fast.ops.convolution import (
    Geometry,
    convolution,
    convolution_input_gradient,
    convolution_weight_gradient,
    directions_first,
    is_channels_last,
)
from svf_fast.ops.gram_gradient import gram_gradient
from svf_fast.ops.pointwise import Extras, fuses, pointwise, pointwise_dot
from svf_fast.ops.scale_gradient import scale_gradient
from svf_fast.reference.pointwise import Epilogue, Prologue
from svf_fast.reference.svf_conv2d import svf_conv2d as definition

STRATEGIES = ("reference", "fold", "chain", "gram")


def reads_input(weight_shape: torch.Size, geometry: Geometry) -> bool:
    """Whether ``gram`` takes its matrix from x and dx (1×1, narrower input), not from y and g."""
    out_channels, in_channels, height, width = weight_shape
    pointwise = height == width == 1 and geometry.padding == (0, 0)
    return pointwise and in_channels * geometry.groups < out_channels


class Kind(NamedTuple):
    """What of an SVF convolution is not a tensor.

    strategy: "fold", "chain", "gram", or "frozen" where S takes no gradient.
    keeps: the map that the gradient of S is read off: x (as sampled), v, y, or "" (none of them).
    samples: whether ``gram`` works on the positions of x that a 1×1 convolution's stride picks.
    """

    geometry: Geometry
    strategy: str
    keeps: str
    samples: bool

    @classmethod
    def of(cls, weight_shape: torch.Size, geometry: Geometry, strategy: str) -> Kind:
        """For a weight [Co, Ci/G, kh, kw]."""
        samples = strategy == "gram" and reads_input(weight_shape, geometry)
        keeps = {"fold": "x", "chain": "v", "gram": "x" if samples else "y", "frozen": ""}
        return cls(geometry, strategy, keeps[strategy], samples)

    @property
    def sampling(self) -> Geometry:
        """Of the convolution that reads x as :meth:`Layer.sampled` gives it."""
        return self.geometry.pointwise() if self.samples else self.geometry


class Constants(NamedTuple):
    """What the gradients take of U and V, with a scale of dL/dy folded in; nothing depends on S.

    A tensor that would come twice is None the second time, as autograd's functions want it.

    left [G, Ca, R], right [G, Cb, R] (None: left): read dS off a matrix (``gram``, ``fold``); for
        ``chain`` left is Uᵀ as the weight [G·R, Co/G, 1, 1] of a convolution.
    kernel: V in the compute dtype for ``chain``, None where V is.
    tail [G, T]: per-group indices of the guarded directions (``gram``), None where there are none.
    tail_U [G·T, Co/G, 1, 1], tail_V [G·T, Ci/G, kh, kw]: their rows of Uᵀ and V as weights.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    kernel: Tensor | None = None
    tail: Tensor | None = None
    tail_U: Tensor | None = None
    tail_V: Tensor | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        U: Tensor,
        V: Tensor,
        dtype: torch.dtype,
        tail: Tensor | None = None,
        dual_U: Tensor | None = None,
        dual_V: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Constants:
        """In the compute dtype.

        dual_U, dual_V: :func:`svf_fast.svd.dual` of U, and of Vᵀ as [G·Ci/G, R], or None. The
        gradient of y that the layer gets is to be multiplied by ``scale`` [Co].
        """
        if kind.strategy == "frozen":
            return cls()
        groups, rank = kind.geometry.groups, U.shape[1]
        rows = U if scale is None else U * scale[:, None].to(U.dtype)
        if kind.strategy == "chain":
            kernel = directions_first(V.to(dtype))
            return cls(_transposed(rows.to(dtype), groups), kernel=_unless(V, kernel))
        columns = V.reshape(groups, rank, -1).mT
        if kind.strategy == "fold":
            return cls(rows.reshape(groups, -1, rank), columns)
        if kind.samples:
            found = cls(columns, None if dual_V is None else dual_V.reshape(columns.shape))
        else:
            left = rows.reshape(groups, -1, rank)
            right = U if dual_U is None and scale is not None else dual_U
            found = cls(left, None if right is None else right.reshape(left.shape))
        if tail is None:
            return found
        at = tail[:, None, :].expand(-1, len(U) // groups, -1)
        tail_U = rows.reshape(groups, -1, rank).gather(2, at).reshape(-1, tail.shape[1])
        first = torch.arange(0, groups * rank, rank, device=tail.device)
        tail_V = directions_first(V)[(tail + first[:, None]).reshape(-1)].to(dtype)
        tail_U = _transposed(tail_U.to(dtype), groups)
        return found._replace(tail=tail, tail_U=tail_U, tail_V=tail_V)


class Activation(NamedTuple):
    """The input of a convolution: y itself, or ``relu(y·scale_c + shift_c)``, rebuilt when read."""

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.scale is None or self.shift is None:
            return self.y
        activate = torch.ops.svf_fast.affine_act.default
        return activate(self.y, self.scale, self.shift, None, None, True, False)[0]

    def through(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Its convolution, rebuilt as it is read where that is possible."""
        if self.scale is None or not fuses(self.y, weight, geometry, Extras(in_scale=True)):
            return convolution(self.tensor(), weight, None, geometry)
        return pointwise(self.y, weight.flatten(1), Prologue(self.scale, self.shift)).out


class Gradient:
    """A gradient, or the part of it that a ReLU's mask lets through, made when it is needed."""

    __slots__ = ("mask", "value")

    def __init__(self, value: Tensor, mask: Tensor | None = None):
        self.value, self.mask = value, mask

    def tensor(self) -> Tensor:
        if self.mask is not None:
            masked = torch.ops.svf_fast.affine_act_backward.default
            self.value, self.mask = masked(self.value, None, self.mask, None, None), None
        return self.value

    def through(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Its convolution, masked as it is read where that is possible."""
        if self.mask is None or not fuses(self.value, weight, geometry, Extras(in_mask=True)):
            return convolution(self.tensor(), weight, None, geometry)
        return pointwise(self.value, weight.flatten(1), Prologue(mask=self.mask)).out


class Layer(NamedTuple):
    """One SVF convolution as one call computes it.

    weight: of the last convolution: W, or U diag(S) [Co, R, 1, 1] for ``chain``.
    scaled: scale ⊙ W where the gradient of y comes without its scale, else None.
    The rest as in :class:`Constants`.
    """

    kind: Kind
    S: Tensor
    U: Tensor
    V: Tensor
    weight: Tensor
    scaled: Tensor | None
    left: Tensor | None
    right: Tensor | None
    kernel: Tensor | None
    tail: Tensor | None
    tail_U: Tensor | None
    tail_V: Tensor | None

    @property
    def back(self) -> Tensor:
        """What dL/dx is computed with: W, scale ⊙ W, or V for ``chain``."""
        if self.kind.strategy == "chain":
            return self.V if self.kernel is None else self.kernel
        return self.weight if self.scaled is None else self.scaled

    def sampled(self, x: Tensor) -> Tensor:
        """x as :meth:`forward` takes it."""
        rows, columns = self.kind.geometry.stride
        if not self.kind.samples or rows == columns == 1:
            return x
        return x[:, :, ::rows, ::columns].contiguous(memory_format=memory_format(x))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y, and what of v is kept: all (chain), the guarded directions (gram by y), or None."""
        read, geometry, v = self.last(Activation(x))
        y = convolution(read.y, self.weight, bias, geometry)
        return y, self.guarded(x) if v is None else v

    def last(self, x: Activation) -> tuple[Activation, Geometry, Tensor | None]:
        """What the convolution that makes y reads, its geometry; and v (chain)."""
        if self.kind.strategy == "chain":
            v = convolution(x.tensor(), self.back, None, self.kind.geometry)
            return Activation(v), self.kind.geometry.pointwise(), v
        return x, self.kind.sampling, None

    def guarded(self, x: Tensor) -> Tensor | None:
        """v of the guarded directions, where ``gram`` by y has any."""
        if self.tail_V is None or self.kind.samples:
            return None
        return convolution(x, self.tail_V, None, self.kind.geometry)

    def backward(
        self,
        grad_y: Tensor,
        shape: torch.Size,
        x: Activation | None,
        v: Tensor | None,
        y: Tensor | None,
        needs_x: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dL/dx of ``shape`` and dL/dS, from dL/dy and the map that it keeps."""
        grad_S: Tensor | None = None
        if self.kind.strategy == "chain":
            grad_y, grad_S = self.through_U(grad_y, v)
        grad, grad_x = Gradient(grad_y), None
        if needs_x or self.kind.samples:
            grad_x = self.input_gradient(grad, shape)
        if grad_S is None:
            grad_S = self.scale_gradient(grad, grad_x, x, v, y)
        if grad_x is not None and self.kind.samples:
            grad_x = self.spread(grad_x, shape) if needs_x else None
        return grad_x, grad_S

    def through_U(self, grad_y: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """``S ⊙ (Uᵀ dL/dy)`` and dL/dS of ``chain``."""
        assert v is not None and self.left is not None
        factor = self.S.detach().to(torch.promote_types(grad_y.dtype, torch.float32))
        extras = Extras(scale=True, dot=True)
        if fuses(grad_y, self.left, self.kind.geometry.pointwise(), extras):
            grad_y, grad_S = pointwise_dot(grad_y, self.left.flatten(1), v, factor)
        else:
            grad_y = convolution(grad_y, self.left, None, self.kind.geometry.pointwise())
            grad_S = channel_dot_scale_(grad_y, v, factor)
        return grad_y, grad_S.to(self.S.dtype)

    def input_gradient(
        self, grad_y: Gradient, shape: torch.Size, into: Gradient | None = None
    ) -> Tensor:
        """dL/dx of ``shape``; where it samples, at the sampled positions alone: :meth:`spread`.

        For ``chain`` it takes what :meth:`through_U` gives. ``into``, of the shape of the result,
        is added, in its place or not.
        """
        weight, geometry = self.back, self.kind.sampling
        if self.kind.samples:
            shape = torch.Size((*shape[:2], *grad_y.value.shape[2:]))
        prologue, epilogue = Prologue(mask=grad_y.mask), Epilogue()
        if into is not None:
            epilogue = Epilogue(residual=into.value, residual_mask=into.mask)
        extras = Extras.of(prologue, epilogue)
        if (
            any(extras)
            and maps.on_gpu(grad_y.value)
            and fuses(grad_y.value, weight.transpose(0, 1), geometry, extras)
        ):
            return pointwise(grad_y.value, weight.flatten(1).mT, prologue, epilogue).out
        plain = None if into is None else into.tensor()
        return convolution_input_gradient(grad_y.tensor(), weight, shape, geometry, plain)

    def spread(self, sampled: Tensor, shape: torch.Size, into: Tensor | None = None) -> Tensor:
        """The gradient of the sampled positions among zeros, or added to ``into`` in place."""
        rows, columns = self.kind.geometry.stride
        if into is None and rows == columns == 1:
            return sampled
        if into is None:
            last = memory_format(sampled)
            into = torch.empty(
                shape, dtype=sampled.dtype, device=sampled.device, memory_format=last
            )
            into.zero_()
        into[:, :, ::rows, ::columns].add_(sampled)
        return into

    def scale_gradient(
        self,
        grad_y: Gradient,
        grad_x: Tensor | None,
        x: Activation | None,
        v: Tensor | None,
        y: Tensor | None,
    ) -> Tensor | None:
        """dL/dS of ``gram`` and ``fold`` from dL/dy, dL/dx as it samples, and what is kept."""
        if self.kind.strategy == "frozen":
            return None
        if self.kind.strategy == "fold":
            assert x is not None
            return self._by_weight(grad_y.tensor(), x.tensor())
        if self.kind.samples:
            assert x is not None and grad_x is not None
            grad_S = self.read_off(x, grad_x)
        else:
            assert y is not None
            grad_S = self.read_off(Activation(grad_y.tensor()), y)
        return self.with_exact(grad_S, grad_y, x, v)

    def read_off(self, a: Activation, b: Tensor) -> Tensor:
        """dL/dS [G, R] of ``gram``, guarded directions apart: of dL/dy and y, or of x and dL/dx."""
        return scale_gradient(a.y, b, *self.reading, self.S, a.scale, a.shift)

    @property
    def reading(self) -> tuple[Tensor, Tensor]:
        """left and right, with which dS is read off a matrix."""
        assert self.left is not None
        return self.left, self.left if self.right is None else self.right

    def with_exact(
        self, grad_S: Tensor, grad_y: Gradient, x: Activation | None, v: Tensor | None
    ) -> Tensor:
        """dL/dS [G·R] in the dtype of S, of ``gram``'s [G, R].

        In it the guarded directions, which nothing may be divided for, get ``Σ_p v_T ⊙ (U_Tᵀ g)``.
        """
        if self.tail is not None:
            assert self.tail_U is not None and self.tail_V is not None
            if self.kind.samples:
                assert x is not None
                v = x.through(self.tail_V, self.kind.sampling)
            assert v is not None
            grad_v = grad_y.through(self.tail_U, self.kind.geometry.pointwise())
            exact = channel_dot(grad_v, v).reshape(self.tail.shape)
            grad_S = grad_S.scatter_(1, self.tail, exact.to(grad_S.dtype))
        return grad_S.reshape(-1).to(self.S.dtype)

    def _by_weight(self, grad_y: Tensor, x: Tensor) -> Tensor:
        grad_weight = convolution_weight_gradient(grad_y, x, self.weight, self.kind.geometry)
        left, right = self.reading
        dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        grad_weight = grad_weight.reshape(len(left), left.shape[1], -1).to(dtype)
        ones = grad_weight.new_ones(len(left), left.shape[2])
        return gram_gradient(grad_weight, left, right, ones).reshape(-1).to(self.S.dtype)


def weights(
    kind: Kind,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What follows from S: ``weight`` of :class:`Layer`, and scale ⊙ W where a scale is given."""
    groups = kind.geometry.groups
    if kind.strategy == "chain":
        return scaled_columns(U, S, groups, dtype), None
    return compose(U, S, V, groups, dtype, scale)


def svf_conv2d(x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
    """``U (S ⊙ conv(x, V)) + bias``, differentiable in x, S and bias; U and V are constants.

    x [N, Ci, H, W] in the compute dtype of the layer, bias [Co] -> [N, Co, Ho, Wo].

    Raises RuntimeError when differentiated twice, or when a tensor it kept was changed in place.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if bias is not None and layer.kind.keeps == "y":
        # the matrix needs y without its bias, so the bias is a layer of its own
        return _SVFConv2d.apply(x, None, *layer) + bias.reshape(1, -1, 1, 1)
    return _SVFConv2d.apply(x, bias, *layer)


def paper_layers(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """:func:`svf_conv2d` as three layers, for the strategy ``reference``."""
    U, S, V = (factor.to(x.dtype) for factor in (U, S, V))
    return definition(x, U, S, V, None if bias is None else bias.to(x.dtype), *geometry)


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


def keeps_graph() -> bool:
    """Whether the backward pass that runs may be run again; if not, W need not be kept for it.

    torch frees what a node saved, but not what else it holds, as long as its output lives.
    """
    if torch.compiler.is_compiling():
        return True
    return _KEEPS_GRAPH()


# private, as there is no other way; where it is gone all is kept
_KEEPS_GRAPH = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keeps a backward pass in the dtypes of its forward pass, whoever calls it."""
    if torch.compiler.is_compiling():  # backward is traced without autocast; leaving it off there
        return contextlib.nullcontext()  # leaves it off for the layers that are traced after
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _unless(x: Tensor, y: Tensor) -> Tensor | None:
    """y, None where it is x."""
    return None if y is x else y


def _transposed(factor: Tensor, groups: int) -> Tensor:
    """[Co, R] -> Uᵀ as the weight [G·R, Co/G, 1, 1] of a grouped 1×1 convolution."""
    per_group = factor.reshape(groups, -1, factor.shape[1])
    return per_group.mT.reshape(-1, per_group.shape[1], 1, 1).contiguous()


class _SVFConv2d(torch.autograd.Function):
    """One layer. Of the four maps it keeps the one its strategy reads."""

    @staticmethod
    def forward(ctx, x, bias, kind, S, U, V, *others):
        layer = Layer(kind, S, U, V, *others)
        sampled = layer.sampled(x)
        y, v = layer.forward(sampled, bias)
        ctx.save_for_backward(
            sampled if kind.keeps == "x" else None, v, y if kind.keeps == "y" else None, S, U, V
        )
        ctx.kind, ctx.others = kind, others
        ctx.shape, ctx.format = x.shape, memory_format(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        # in the memory format of x, so that dx comes out in it too
        grad_y = grad_y.contiguous(memory_format=ctx.format)
        x, v, y, *factors = saved(ctx, f"strategy {ctx.kind.strategy!r}")
        layer = Layer(ctx.kind, *factors, *ctx.others)
        with no_autocast(grad_y):
            activation = None if x is None else Activation(x)
            grad_x, grad_S = layer.backward(
                grad_y, ctx.shape, activation, v, y, ctx.needs_input_grad[0]
            )
            grad_bias = None
            if ctx.needs_input_grad[1]:
                dtype = torch.promote_types(grad_y.dtype, torch.float32)
                grad_bias = grad_y.sum(dim=(0, 2, 3), dtype=dtype).to(grad_y.dtype)
            count = len(ctx.others)
            if not keeps_graph():
                ctx.others = ()
            return grad_x, grad_bias, None, grad_S, *[None] * (2 + count)
