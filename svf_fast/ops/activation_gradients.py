"""The gradient through an activation, and dS of the layers on both sides of it, as one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops import maps
from svf_fast.ops.affine_act import affine_act_backward_
from svf_fast.ops.scale_gradient import Reader, empty_scale_gradient, scale_gradient_by_gram


def activation_gradients(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Reader | None,
    after: Reader | None,
    grid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Differentiate ``x = relu(y · scale + shift)``, and compute dS of the layers on both sides.

    grad = dL/dx and y [N, C, H, W] of one dense layout, scale and shift [C] -> ``g = dL/dy``, and
    as far as they are asked for ``scale_gradient`` of g and y, for the layer that made y, and of x
    and grad, for the one that read x. grad may be overwritten by g: on a GPU one kernel reads grad
    and y once and writes g once. With a grid y is codes of :func:`svf_fast.ops.quantize.quantize`,
    made with this scale and shift. Not differentiable.
    """
    own: Sequence[Tensor] = before or []
    other: Sequence[Tensor] = after or []
    grouped = (own and len(own[0]) > 1) or (other and len(other[0]) > 1)
    if maps.on_gpu(y) and not grouped and grad.dtype != torch.float64:
        op = torch.ops.svf_fast.activation_gradients.default
        g, *found = op(grad, y, scale, shift, own, other, grid)
    else:
        op = torch.ops.svf_fast.activation_gradients_.default
        g, found = grad, op(grad, y, scale, shift, own, other, grid)
    return g, found[0] if own else None, found[1] if other else None


def activation_gradients_by_gram(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    grid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`activation_gradients` in place of grad, one after the other."""
    nothing = scale.new_empty(0)
    behind = nothing
    if after:
        left, right, S = after
        behind = scale_gradient_by_gram(y, grad, scale, shift, left, right, S, grid)
    if grid is None:
        affine_act_backward_(grad, y=y, scale=scale, shift=shift)
    else:
        torch.ops.svf_fast.quantized_backward_(grad, y, grid, scale)
    if not before:
        return nothing.clone(), behind
    left, right, S = before
    return scale_gradient_by_gram(grad, y, None, None, left, right, S, grid), behind


torch.library.impl("svf_fast::activation_gradients_", "default", activation_gradients_by_gram)
_library.register_gpu(
    "activation_gradients", _library.triton_kernel("activation_gradients", "activation_gradients")
)


@torch.library.register_fake("svf_fast::activation_gradients")
def _(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, before, after, grid=None):
    return torch.empty_like(y, dtype=grad.dtype), *_empty_gradients(grad, before, after)


@torch.library.register_fake("svf_fast::activation_gradients_")
def _(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, before, after, grid=None):
    return _empty_gradients(grad, before, after)


def _empty_gradients(grad: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]):
    nothing = torch.promote_types(grad.dtype, torch.float32)
    return tuple(
        empty_scale_gradient(side[0], grad) if side else grad.new_empty(0, dtype=nothing)
        for side in (before, after)
    )
