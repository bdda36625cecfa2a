"""Definition of the gradient through an activation, and dS of the layers on both sides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from svf_fast.reference.affine_act import affine_act_backward
from svf_fast.reference.quantize import quantized_backward
from svf_fast.reference.scale_gradient import scale_gradient


def activation_gradients(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    grid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Differentiate ``x = relu(y · scale + shift)``, and compute dS of the layers on both sides.

    grad = dL/dx and y [N, C, *spatial], scale and shift [C]; left, right and S of each side, or
    nothing -> ``g = dL/dy`` [N, C, *spatial], ``scale_gradient`` of g and y, and of x and grad,
    None for nothing. x and g are rounded to the dtype of the maps. With a grid y is codes.
    """
    if grid is None:
        g = affine_act_backward(grad, y, None, scale, shift)
    else:
        g = quantized_backward(grad, y, grid, scale)
    own = other = None
    if before:
        left, right, S = before
        own = scale_gradient(g, y, left, right, S, grid=grid)
    if after:
        left, right, S = after
        other = scale_gradient(y, grad, left, right, S, scale, shift, grid)
    return g, own, other
