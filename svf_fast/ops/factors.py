"""The strategies of an SVF convolution: what each keeps, its forward pass, its two gradients.

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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast.ops import maps
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.compose import compose, scaled_columns
from svf_fast.ops.convolution import (
    Geometry,
    convolution,
    convolution_input_gradient,
    convolution_weight_gradient,
    directions_first,
    memory_format,
)
from svf_fast.ops.gram_gradient import gram_gradient
from svf_fast.ops.pointwise import Extras, fuses, pointwise, pointwise_dot
from svf_fast.ops.quantize import dequantize
from svf_fast.ops.scale_gradient import Reader, scale_gradient
from svf_fast.reference.pointwise import Epilogue, Prologue

STRATEGIES = ("reference", "fold", "chain", "gram")


def reads_input(weight_shape: torch.Size, geometry: Geometry) -> bool:
    """Tell whether ``gram`` takes its matrix of x and dx (1×1, narrower input), not of y and g."""
    out_channels, in_channels, height, width = weight_shape
    pointwise = height == width == 1 and geometry.padding == (0, 0)
    return pointwise and in_channels * geometry.groups < out_channels


class Kind(NamedTuple):
    """How an SVF convolution computes: everything but its tensors.

    strategy: "fold", "chain", "gram", or "frozen" where S takes no gradient.
    keeps: the map that the gradient of S is read off: x (as sampled), v, y, or "" (none of them).
    samples: whether ``gram`` reads x and dx, where the stride of a 1×1 convolution picks them.
    """

    geometry: Geometry
    strategy: str
    keeps: str
    samples: bool

    @classmethod
    def of(cls, weight_shape: torch.Size, geometry: Geometry, strategy: str) -> Kind:
        """Return the kind for a weight [Co, Ci/G, kh, kw]."""
        samples = strategy == "gram" and reads_input(weight_shape, geometry)
        keeps = {"fold": "x", "chain": "v", "gram": "x" if samples else "y", "frozen": ""}
        return cls(geometry, strategy, keeps[strategy], samples)

    @property
    def sampling(self) -> Geometry:
        """The geometry of the convolution that reads x as `SVFConvolution.sample` returns it."""
        return self.geometry.pointwise() if self.samples else self.geometry

    @property
    def strides(self) -> bool:
        """Whether it samples fewer positions than x has."""
        return self.samples and self.geometry.stride != (1, 1)


class Constants(NamedTuple):
    """U, V and what the gradients read instead of them; nothing depends on S.

    A scale of dL/dy is folded in where one was given. A tensor that would come twice is None the
    second time, as autograd's functions want it.

    left [G, Ca, R], right [G, Cb, R] (None: left): read dS off a matrix (``gram``, ``fold``); for
        ``chain`` left is Uᵀ as the weight [G·R, Co/G, 1, 1] of a convolution.
    kernel: V in the compute dtype for ``chain``, None where V is.
    tail [G, T]: per-group indices of the guarded directions (``gram``), None where there are none.
    tail_U [G·T, Co/G, 1, 1], tail_V [G·T, Ci/G, kh, kw]: their rows of Uᵀ and V as weights.
    """

    U: Tensor
    V: Tensor
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
        """Make them in the compute dtype.

        dual_U, dual_V: :func:`svf_fast.svd.dual` of U, and of Vᵀ as [G·Ci/G, R], or None. The
        gradient of y that the layer gets is to be multiplied by ``scale`` [Co].
        """
        if kind.strategy == "frozen":
            return cls(U, V)
        groups, rank = kind.geometry.groups, U.shape[1]
        rows = U if scale is None else U * scale[:, None].to(U.dtype)
        if kind.strategy == "chain":
            kernel = directions_first(V.to(dtype))
            left = _transposed(rows.to(dtype), groups)
            return cls(U, V, left, kernel=None if kernel is V else kernel)
        columns = V.reshape(groups, rank, -1).mT
        if kind.strategy == "fold":
            return cls(U, V, rows.reshape(groups, -1, rank), columns)
        if kind.samples:
            left, dual = columns, dual_V
        else:
            left = rows.reshape(groups, -1, rank)
            dual = U if dual_U is None and scale is not None else dual_U
        found = cls(U, V, left, None if dual is None else dual.reshape(left.shape))
        if tail is None:
            return found
        at = tail[:, None, :].expand(-1, len(U) // groups, -1)
        tail_U = rows.reshape(groups, -1, rank).gather(2, at).reshape(-1, tail.shape[1])
        first = torch.arange(0, groups * rank, rank, device=tail.device)
        tail_V = directions_first(V)[(tail + first[:, None]).reshape(-1)].to(dtype)
        tail_U = _transposed(tail_U.to(dtype), groups)
        return found._replace(tail=tail, tail_U=tail_U, tail_V=tail_V)


class Activation(NamedTuple):
    """A map that is read: y itself, or ``relu(y·scale_c + shift_c)``, rebuilt when it is.

    grid: where y is codes of :func:`svf_fast.ops.quantize.quantize`, which stand for a map in
    ``dtype``; else None.
    """

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    grid: Tensor | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, y: Tensor | None, grid: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Activation | None:
        """Return y itself as a map that is read; None for none."""
        return None if y is None else cls(y, grid=grid, dtype=dtype)

    def tensor(self) -> Tensor:
        """Return the map itself."""
        if self.grid is not None:
            assert self.dtype is not None
            return dequantize(self.y, self.grid, self.dtype, self.scale, self.shift)
        if self.scale is None or self.shift is None:
            return self.y
        activate = torch.ops.svf_fast.affine_act.default
        return activate(self.y, self.scale, self.shift, None, None, True, False)[0]

    def convolved(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return its convolution; a kernel that can rebuilds it as it reads it."""
        plain = self.scale is None or self.grid is not None
        if plain or not fuses(self.y, weight, geometry, Extras(in_scale=True)):
            return convolution(self.tensor(), weight, None, geometry)
        return pointwise(self.y, weight.flatten(1), Prologue(self.scale, self.shift)).out


class Gradient:
    """A gradient, or the part of it that a ReLU's mask lets through, made when it is needed."""

    __slots__ = ("mask", "value")

    def __init__(self, value: Tensor, mask: Tensor | None = None):
        self.value, self.mask = value, mask

    def tensor(self) -> Tensor:
        """Return the gradient itself, which replaces value and mask from now on."""
        if self.mask is not None:
            masked = torch.ops.svf_fast.affine_act_backward.default
            self.value, self.mask = masked(self.value, None, self.mask, None, None), None
        return self.value

    def convolved(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return its convolution; a kernel that can masks it as it reads it."""
        if self.mask is None or not fuses(self.value, weight, geometry, Extras(in_mask=True)):
            return convolution(self.tensor(), weight, None, geometry)
        return pointwise(self.value, weight.flatten(1), Prologue(mask=self.mask)).out


class Kept(NamedTuple):
    """The maps that the gradients of a convolution read: x, v and y, as far as its kind keeps them.

    v: all of it (``chain``), that of the guarded directions (``gram``; by x and dx only where x is
    kept in 8 bits), or None.
    """

    x: Activation | None
    v: Tensor | None
    y: Activation | None


class Flow(NamedTuple):
    """What arrives at a convolution in the backward pass: dL/dy, and dL/dS where it is known.

    grad_S: [G·R] of ``chain``, which :meth:`SVFConvolution.through_U` computes; or [G, R] of
    ``gram`` as it was read off a matrix, guarded directions apart.
    """

    grad_y: Gradient
    grad_S: Tensor | None = None


class SVFConvolution(NamedTuple):
    """One SVF convolution as one call computes it.

    S: the values in use. weight: of the last convolution: W, or U diag(S) [Co, R, 1, 1] for
    ``chain``. scaled: scale ⊙ W where the gradient of y comes without its scale, else None.
    log_scale: s' where it trains and S is a constant times exp(s'); None where S itself trains.
    """

    kind: Kind
    S: Tensor
    weight: Tensor
    scaled: Tensor | None
    constants: Constants
    log_scale: Tensor | None = None

    @classmethod
    def of(cls, kind: Kind, tensors: Sequence[Any]) -> SVFConvolution:
        """Return the convolution of these `tensors`."""
        trained, S, weight, scaled, *constants = tensors
        values, log_scale = (trained, None) if S is None else (S, trained)
        return cls(kind, values, weight, scaled, Constants(*constants), log_scale)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of it that is a tensor or None: what trains, S and what follows, the constants."""
        S = None if self.log_scale is None else self.S  # none of them twice
        return (self.trained, S, self.weight, self.scaled, *self.constants)

    @property
    def trained(self) -> Tensor:
        """What the gradient is of: S, or log_scale."""
        return self.S if self.log_scale is None else self.log_scale

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """S and what follows from it."""
        return self.S, self.weight, self.scaled

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What trains, U and V."""
        return self.trained, self.constants.U, self.constants.V

    @property
    def back(self) -> Tensor:
        """What dL/dx is computed with: W, scale ⊙ W, or V for ``chain``."""
        if self.kind.strategy == "chain":
            kernel = self.constants.kernel
            return self.constants.V if kernel is None else kernel
        return self.weight if self.scaled is None else self.scaled

    @property
    def reader(self) -> Reader:
        """left, right and S, with which dS is read off a matrix."""
        left, right = self.constants.left, self.constants.right
        assert left is not None
        return left, left if right is None else right, self.S

    def sample(self, x: Tensor) -> Tensor:
        """Return x at the positions that :meth:`forward` reads."""
        if not self.kind.strides:
            return x
        rows, columns = self.kind.geometry.stride
        return x[:, :, ::rows, ::columns].contiguous(memory_format=memory_format(x))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute y, and v as far as :class:`Kept` has it; x as :meth:`sample` returns it."""
        read, geometry, v = self.last(Activation(x))
        y = convolution(read.y, self.weight, bias, geometry)
        if v is None and not self.kind.samples:
            v = self.guarded(x)
        return y, v

    def last(self, x: Activation) -> tuple[Activation, Geometry, Tensor | None]:
        """Return what the convolution that makes y reads, its geometry; and v (``chain``)."""
        if self.kind.strategy == "chain":
            v = convolution(x.tensor(), self.back, None, self.kind.geometry)
            return Activation(v), self.kind.geometry.pointwise(), v
        return x, self.kind.sampling, None

    def guarded(self, x: Tensor) -> Tensor | None:
        """Compute v of the guarded directions if ``gram`` has any; x as :meth:`sample` has it."""
        if self.constants.tail_V is None:
            return None
        return convolution(x, self.constants.tail_V, None, self.kind.sampling)

    def backward(
        self,
        flow: Flow,
        shape: torch.Size,
        kept: Kept,
        needs_x: bool = True,
        into: Gradient | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute dL/dx of ``shape``, added to ``into``, and dL/dS."""
        flow = self.through_U(flow, kept.v)
        if self.kind.samples:  # its matrix wants its own gradient alone
            sampled = self.input_gradient(flow.grad_y, shape)
            flow = Flow(flow.grad_y, self.read_off(kept.x, Activation(sampled)))
            grad_S = self.scale_gradient(flow, kept)
            into_x = None if into is None else into.tensor()
            return self.spread(sampled, shape, into_x) if needs_x else None, grad_S
        grad_x = self.input_gradient(flow.grad_y, shape, into) if needs_x else None
        return grad_x, self.scale_gradient(flow, kept)

    def through_U(self, flow: Flow, v: Tensor | None) -> Flow:
        """Compute ``S ⊙ (Uᵀ dL/dy)`` and dL/dS for ``chain``; else return the flow as it is."""
        if self.kind.strategy != "chain":
            return flow
        left, grad = self.constants.left, flow.grad_y.tensor()
        assert v is not None and left is not None
        factor = self.S.to(torch.promote_types(grad.dtype, torch.float32))
        geometry = self.kind.geometry.pointwise()
        if fuses(grad, left, geometry, Extras(scale=True, dot=True)):
            grad, grad_S = pointwise_dot(grad, left.flatten(1), v, factor)
        else:
            grad = convolution(grad, left, None, geometry)
            grad_S = channel_dot_scale_(grad, v, factor)
        return Flow(Gradient(grad), grad_S.to(self.S.dtype))

    def input_gradient(
        self, grad_y: Gradient, shape: torch.Size, into: Gradient | None = None
    ) -> Tensor:
        """Compute dL/dx of ``shape``; where it samples, at the sampled positions: :meth:`spread`.

        grad_y: as :meth:`through_U` returns it. ``into``, of the shape of the result, is added, in
        its place or not.
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
        """Put the gradient of the sampled positions among zeros, or add it to ``into`` in place."""
        rows, columns = self.kind.geometry.stride
        if into is None:
            if rows == columns == 1:
                return sampled
            into = torch.empty(
                shape,
                dtype=sampled.dtype,
                device=sampled.device,
                memory_format=memory_format(sampled),
            ).zero_()
        into[:, :, ::rows, ::columns].add_(sampled)
        return into

    def scale_gradient(self, flow: Flow, kept: Kept) -> Tensor | None:
        """Compute dL/dS [G·R] in the dtype of S, of the flow that :meth:`through_U` returned.

        Where it samples dL/dS has been read off already. In what was read off the guarded
        directions, for which nothing may be divided, get ``Σ_p v_T ⊙ (U_Tᵀ g)``.
        """
        grad_y, grad_S = flow
        if self.kind.strategy in ("chain", "frozen"):
            return grad_S
        if self.kind.strategy == "fold":
            assert kept.x is not None
            return self._by_weight(grad_y.tensor(), kept.x.tensor())
        if grad_S is None:
            grad_S = self.read_off(Activation(grad_y.tensor()), kept.y)
        _, _, _, _, _, tail, tail_U, tail_V = self.constants
        if tail is not None:
            assert tail_U is not None and tail_V is not None
            v = kept.v
            if v is None:
                assert kept.x is not None
                v = kept.x.convolved(tail_V, self.kind.sampling)
            assert v is not None
            grad_v = grad_y.convolved(tail_U, self.kind.geometry.pointwise())
            exact = channel_dot(grad_v, v).reshape(tail.shape)
            grad_S = grad_S.scatter_(1, tail, exact.to(grad_S.dtype))
        return grad_S.reshape(-1).to(self.S.dtype)

    def trained_gradient(self, grad_S: Tensor | None) -> Tensor | None:
        """Return the gradient of what trains: dL/dS, or ``dL/ds' = dL/dS ⊙ S exp(s')``."""
        if self.log_scale is None or grad_S is None:
            return grad_S
        return grad_S * self.S

    def read_off(self, a: Activation | None, b: Activation | None) -> Tensor:
        """Read dL/dS [G, R] of ``gram`` off the matrix of dL/dy and y, or of x and dL/dx."""
        assert a is not None and b is not None
        grid = b.grid if a.grid is None else a.grid
        return scale_gradient(a.y, b.y, *self.reader, a.scale, a.shift, grid)

    def _by_weight(self, grad_y: Tensor, x: Tensor) -> Tensor:
        grad_weight = convolution_weight_gradient(grad_y, x, self.weight, self.kind.geometry)
        left, right, _ = self.reader
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
    """Compute what follows from S: ``weight`` and ``scaled`` of :class:`SVFConvolution`."""
    groups = kind.geometry.groups
    if kind.strategy == "chain":
        return scaled_columns(U, S, groups, dtype), None
    return compose(U, S, V, groups, dtype, scale)


def _transposed(factor: Tensor, groups: int) -> Tensor:
    """Return Uᵀ of U [Co, R] as the weight [G·R, Co/G, 1, 1] of a grouped 1×1 convolution."""
    per_group = factor.reshape(groups, -1, factor.shape[1])
    return per_group.mT.reshape(-1, per_group.shape[1], 1, 1).contiguous()
