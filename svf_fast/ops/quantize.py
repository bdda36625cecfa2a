"""Maps kept in 8 bits for the backward pass, with the exact mask of the ReLU that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops.maps import check_maps, shrinks


def quantize(
    y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes of y, and the grid that says what they stand for.

    y [N, C, *spatial]; scale, shift [C] of the affine map between y and a ReLU, in float32 (float64
    for float64), or None -> codes uint8 in the shape and memory format of y, grid [3, N, C] in the
    dtype of scale. Each channel of each image has a range of its own, of which a code is a 254th,
    a 255th without scale; values are rounded to the nearest, by half of that at most, beside the
    ReLU's edge by all of it. So the mask of ``relu(y·scale + shift)`` can be read off the codes,
    as exact as off y. Reads y twice, the second time from the cache where a channel of it fits.
    Not differentiable. Definition: :func:`svf_fast.reference.quantize.quantize`.
    """
    check_maps("quantize", y=y)
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(
            f"quantize: {missing}: expected a tensor, because scale and shift go together"
        )
    dtype = torch.promote_types(y.dtype, torch.float32)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (vector.dtype != dtype or vector.shape != y.shape[1:2]):
            raise ValueError(
                f"quantize: {name}: expected {dtype} of shape [{y.shape[1]}], one value per "
                f"channel, got {vector.dtype} of shape {list(vector.shape)}"
            )
    return torch.ops.svf_fast.quantize(y, scale, shift)


def coded(
    y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return codes and grid as :func:`quantize` does; where they are no smaller, y and None."""
    if not shrinks(y):
        return y, None
    return torch.ops.svf_fast.quantize.default(y, scale, shift)


def dequantize(
    codes: Tensor,
    grid: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Return the map that codes and grid of :func:`quantize` stand for, in a dtype.

    With scale and shift it is ``relu(y·scale + shift)``, whose mask the codes tell. One read of the
    codes, one write. Definition: :func:`svf_fast.reference.quantize.dequantize`.
    """
    return torch.ops.svf_fast.dequantize(codes, grid, scale, shift, dtype)


def quantized_backward(grad: Tensor, codes: Tensor, grid: Tensor, scale: Tensor) -> Tensor:
    """Compute ``dL/dy = scale_c · grad`` where the ReLU passed, else 0, from the codes of y.

    grad [N, C, *spatial] is dL/d relu(y·scale + shift), y the map that :func:`quantize` got with
    the same scale and shift. The same bits as ``affine_act_backward`` of y itself.
    """
    return torch.ops.svf_fast.quantized_backward(grad, codes, grid, scale)


for _name in ("quantize", "dequantize", "quantized_backward", "quantized_backward_"):
    _library.register_gpu(_name, _library.triton_kernel("quantize", _name))


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.register_fake("svf_fast::quantize")
def _(y, scale, shift):
    dtype = torch.promote_types(y.dtype, torch.float32)
    return _dense(y, torch.uint8), y.new_empty((3, y.shape[0], y.shape[1]), dtype=dtype)


@torch.library.register_fake("svf_fast::dequantize")
def _(codes, grid, scale, shift, dtype):
    return _dense(codes, dtype)


@torch.library.register_fake("svf_fast::quantized_backward")
def _(grad, codes, grid, scale):
    return _dense(grad, grad.dtype)


@torch.library.register_fake("svf_fast::quantized_backward_")
def _(grad, codes, grid, scale):
    return None
