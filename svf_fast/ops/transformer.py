"""A pre-norm transformer block of SVF layers as two nodes, with its attention between them.

The first computes the queries, keys and values of the normalized input, the second all that follows
the attention. Of tokens with C channels they keep the input (C), what the attention returned (C,
which it keeps too), the input of GELU (4C) and the output of the last layer (C, or a byte each);
none of the normalized inputs, nor the sum in the middle, which one product makes again. The
attention between them is torch's own, and keeps the queries, keys and values (3C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast.ops import maps
from svf_fast.ops.factors import (
    Activation,
    Flow,
    Gradient,
    Kept,
    Kind,
    SVFConvolution,
    parted,
)
from svf_fast.ops.node import (
    AS_REFERENCE,
    INPUT_CHANGED,
    differentiable_once,
    keeps_graph,
    no_autocast,
    unpack_saved,
)
from svf_fast.ops.quantize import coded

_aten = torch.ops.aten


class Linear(NamedTuple):
    """An SVF layer of tokens and its frozen bias [Co]."""

    conv: SVFConvolution
    bias: Tensor | None

    @classmethod
    def of(cls, kind: Kind, tensors: Sequence[Any]) -> Linear:
        """Return the layer that has these :attr:`tensors`."""
        return cls(SVFConvolution.of(kind, tensors[:-1]), tensors[-1])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of it that is a tensor, or None."""
        return *self.conv.tensors, self.bias

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.conv.weight.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute tokens [..., Co] of x [..., Ci], then v and y as far as they are to be kept."""
        positions = maps.of_tokens(x.to(self.dtype))
        if self.conv.kind.keeps != "y":
            y, v = self.conv.forward(positions, _cast(self.bias, self.dtype))
            return maps.to_tokens(y, x.shape), v, None
        y, v = self.conv.forward(positions)
        out = maps.to_tokens(y, x.shape)
        return (out if self.bias is None else out + self.bias.to(self.dtype)), v, y

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        v: Tensor | None,
        y: Tensor | None,
        channels: int,
        grid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute dL/dx [..., Ci = channels], and the gradient of what trains.

        x: the tokens it read, where :attr:`reads` says so. v: that of ``chain`` is computed again
        from x where it was not kept. grid: where y is codes.
        """
        positions = maps.of_tokens(grad.to(self.dtype))
        read = None if x is None else Activation(maps.of_tokens(x.to(self.dtype)))
        if v is None and read is not None:
            v = self.conv.last(read)[2]
        shape = torch.Size((positions.shape[0], channels, *positions.shape[2:]))
        kept = Kept(read, v, Activation.of(y, grid, self.dtype))
        flow = Flow(Gradient(positions))
        grad_x, grad_S = self.conv.backward(flow, shape, kept)
        assert grad_x is not None
        return maps.to_tokens(grad_x, grad.shape), self.conv.trained_gradient(grad_S)

    @property
    def reads(self) -> bool:
        """Whether dS is computed from its input, with ``chain`` by v, which is made of that."""
        return self.conv.kind.keeps in ("x", "v")

    def kept(self, v: Tensor | None) -> Tensor | None:
        """Return v as far as it is kept where the input is at hand in the backward pass."""
        return None if self.reads else v


class Norm(NamedTuple):
    """A frozen layer norm over the channels; weight, bias [C] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize x [..., C]; then the means and reciprocal deviations [..., 1]."""
        return torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def backward(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Compute dL/dx [..., C]."""
        affine, wanted = (self.weight, self.bias), [True, False, False]
        grad, shape = grad.to(x.dtype).contiguous(), x.shape[-1:]
        back = _aten.native_layer_norm_backward
        return back(grad, x, shape, mean, rstd, *affine, wanted)[0]


class Rest(NamedTuple):
    """What follows the attention of a block: ``m = x + scale1 ⊙ proj(attended)``, and of m
    ``m + scale2 ⊙ fc2(gelu(fc1(norm(m))))``.

    scale1, scale2 [C]: frozen, or None. gelu: "none", or "tanh" for the approximation.
    """

    proj: Linear
    fc1: Linear
    fc2: Linear
    norm: Norm
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    gelu: str = "none"


def normalized_linear(x: Tensor, norm: Norm, linear: Linear) -> Tensor:
    """Compute ``linear(norm(x))`` of x [..., C]; differentiable in x and what trains of S.

    x in a dtype that torch's layer norm takes with the norm's; the result in that of the layer's
    weight. Keeps x alone with the strategy ``gram`` of a layer that is not narrower at its end.
    Definition: :func:`svf_fast.reference.transformer.normalized_linear`.

    Raises ValueError where the norm or the bias is to train.
    """
    frozen = {"norm.weight": norm.weight, "norm.bias": norm.bias, "bias": linear.bias}
    _check_frozen("normalized_linear", frozen)
    own = norm.weight, norm.bias
    return _NormalizedLinear.apply(x, linear.conv.kind, norm.eps, *own, *linear.tensors)


def after_attention(
    x: Tensor, attended: Tensor, rest: Rest, recompute: bool = False, int8: bool = False
) -> Tensor:
    """Compute what follows the attention; differentiable in x, attended and what trains of S.

    x, attended [..., C] -> [..., C]. With ``recompute`` the input of GELU is not kept but computed
    again, which takes the product of fc1. With ``int8`` what is kept for the gradient of fc2's S
    alone, its output with ``gram``, is kept in 8 bits. Definition:
    :func:`svf_fast.reference.transformer.after_attention`.

    Raises ValueError where the norm, a scale or a bias is to train.
    """
    norm = rest.norm
    frozen = {"norm.weight": norm.weight, "norm.bias": norm.bias}
    frozen |= {"scale1": rest.scale1, "scale2": rest.scale2}
    layers = rest.proj, rest.fc1, rest.fc2
    names = "proj", "fc1", "fc2"
    frozen |= {f"{name}.bias": each.bias for name, each in zip(names, layers, strict=True)}
    _check_frozen("after_attention", frozen)
    form = _Form(tuple(each.conv.kind for each in layers), norm.eps, rest.gelu, recompute, int8)
    own = norm.weight, norm.bias, rest.scale1, rest.scale2
    tensors = (t for each in layers for t in each.tensors)
    return _AfterAttention.apply(x, attended, form, *own, *tensors)


def _check_frozen(op: str, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name}: expected a frozen tensor, got one that trains, of which there is "
                "no gradient here; call requires_grad_(False) on it, or run the block unfused"
            )


class _NormalizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, eps, weight, bias, *tensors):
        norm, linear = Norm(weight, bias, eps), Linear.of(kind, tensors)
        out, v, y = linear.forward(norm.forward(x)[0])
        # the frozen tensors too: a change of theirs in place is noticed
        ctx.save_for_backward(x, linear.kept(v), y, weight, bias, linear.bias, *linear.conv.factors)
        ctx.kind, ctx.eps, ctx.tensors = kind, eps, tensors
        return out

    @staticmethod
    @differentiable_once("fused transformer block", AS_REFERENCE)
    def backward(ctx, grad):
        x, v, y, weight, bias, *_ = unpack_saved(ctx, "fused transformer block", INPUT_CHANGED)
        norm, linear = Norm(weight, bias, ctx.eps), Linear.of(ctx.kind, ctx.tensors)
        with no_autocast(grad):
            normalized, mean, rstd = norm.forward(x)
            read = normalized if linear.reads else None
            grad, grad_S = linear.backward(grad, read, v, y, x.shape[-1])
            grad_x = norm.backward(grad, x, mean, rstd) if ctx.needs_input_grad[0] else None
        grads = linear.conv.gradients(grad_S)
        none = [None] * (len(ctx.tensors) - len(grads))
        if not keeps_graph():
            ctx.tensors = ()
        return grad_x, None, None, None, None, *grads, *none


class _Form(NamedTuple):
    """How what follows the attention computes: everything but its tensors; kinds of its layers."""

    kinds: tuple[Kind, ...]
    eps: float
    gelu: str
    recompute: bool
    int8: bool

    def rest(self, own: Sequence[Any], tensors: Sequence[Any]) -> Rest:
        """Put it together with its tensors: the norm's, the scales, the layers'."""
        weight, bias, scale1, scale2 = own
        proj, fc1, fc2 = map(Linear.of, self.kinds, parted(self.kinds, tensors))
        return Rest(proj, fc1, fc2, Norm(weight, bias, self.eps), scale1, scale2, self.gelu)


class _AfterAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, attended, form, weight, bias, scale1, scale2, *tensors):
        own = weight, bias, scale1, scale2
        rest = form.rest(own, tensors)
        proj, fc1, fc2 = rest.proj, rest.fc1, rest.fc2
        projected, proj_v, proj_y = proj.forward(attended)
        middle = _added(x, projected, scale1)
        hidden, fc1_v, fc1_y = fc1.forward(rest.norm.forward(middle)[0])
        out, fc2_v, fc2_y = fc2.forward(_aten.gelu(hidden, approximate=form.gelu))
        out = _added(middle, out, scale2)
        of_fc1 = (None, None, None) if form.recompute else (hidden, fc1.kept(fc1_v), fc1_y)
        fc2_grid = None
        if fc2_y is not None and form.int8:
            fc2_y, fc2_grid = coded(fc2_y)
        kept = x, attended, *of_fc1, proj.kept(proj_v), proj_y, fc2_v, fc2_y, fc2_grid
        frozen = [t for one in (proj, fc1, fc2) for t in (one.bias, *one.conv.factors)]
        ctx.save_for_backward(*kept, *own, *frozen)
        ctx.form, ctx.tensors = form, tensors
        return out

    @staticmethod
    @differentiable_once("fused transformer block", AS_REFERENCE)
    def backward(ctx, grad):
        saved = unpack_saved(ctx, "fused transformer block", INPUT_CHANGED)
        x, attended, hidden, fc1_v, fc1_y, proj_v, proj_y, fc2_v, fc2_y, fc2_grid, *own = saved
        rest = ctx.form.rest(own[:4], ctx.tensors)
        proj, fc1, fc2, norm, scale1, scale2, gelu = rest
        with no_autocast(grad):
            projected, again = _projected(proj, attended, proj_y)
            middle = _added(x, projected, scale1)
            del projected
            normalized, mean, rstd = norm.forward(middle)
            if ctx.form.recompute:
                hidden, fc1_v, fc1_y = fc1.forward(normalized)

            # not for `chain`, whose v is kept here: to make it again takes four times the products
            folds = fc2.conv.kind.keeps == "x"
            activated = _aten.gelu(hidden, approximate=gelu) if folds else None
            scaled = _scaled(grad, scale2)
            grad_hidden, fc2_S = fc2.backward(
                scaled, activated, fc2_v, fc2_y, hidden.shape[-1], fc2_grid
            )
            del activated, scaled
            grad_hidden = _aten.gelu_backward(grad_hidden, hidden, approximate=gelu)
            read = normalized if fc1.reads else None
            grad_norm, fc1_S = fc1.backward(grad_hidden, read, fc1_v, fc1_y, middle.shape[-1])
            del grad_hidden, hidden, normalized, read
            grad_x = norm.backward(grad_norm, middle, mean, rstd).add_(grad)
            read = attended if proj.reads else None
            scaled = _scaled(grad_x, scale1)
            grad_attended, proj_S = proj.backward(
                scaled, read, proj_v if again is None else again, proj_y, attended.shape[-1]
            )
        grads: list[Tensor | None] = []
        for layer, grad_S in ((proj, proj_S), (fc1, fc1_S), (fc2, fc2_S)):
            found = layer.conv.gradients(grad_S)
            grads += [*found, *[None] * (len(layer.tensors) - len(found))]
        if not keeps_graph():
            ctx.tensors = ()
        grad_attended = grad_attended.to(attended.dtype)
        return grad_x.to(x.dtype), grad_attended, None, None, None, None, None, *grads


def _added(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    """Compute ``x + scale ⊙ y`` as eager does, in the dtype that the three promote to."""
    return x + (y if scale is None else y * scale)


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad * scale


def _projected(proj: Linear, attended: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return what the layer made of the attention's result, from y where that is kept; and v."""
    if y is None:
        return proj.forward(attended)[:2]
    out = maps.to_tokens(y, attended.shape)
    return (out if proj.bias is None else out + proj.bias.to(proj.dtype)), None


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
