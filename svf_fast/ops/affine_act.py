"""Affine map, residual sum, ReLU and its 1-bit mask in one pass, and its gradient in another.

The frozen batch norm after a convolution is the affine map ``y·scale_c + shift_c``. Neither its
input nor its output need be kept for the ReLU's gradient: either y is there for another reason
and the ReLU's sign is computed from it again, or one bit per element is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops.maps import check_maps
from svf_fast.reference.affine_act import mask_bytes


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = True,
    mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute ``out = relu(y·scale_c + shift_c + residual·residual_scale_c)``, and its sign bits.

    y, residual [N, C, *spatial] of one dtype; scale, shift, residual_scale [C] in float32 (float64
    for float64) -> out [N, C, *spatial] in the dtype and memory format of y, and the mask: one bit
    per element in memory order (:func:`svf_fast.reference.affine_act.pack_mask`), or no bytes where
    it is not asked for. Reads y and residual once, writes out and the mask once: in 16 bits 4 bytes
    an element, 6 with a residual, and 1/8 for the mask. Computed in float32 at least and rounded
    once. Not differentiable: :func:`affine_act_backward` is its half.
    """
    _check("affine_act", y, scale, shift, residual, residual_scale)
    return torch.ops.svf_fast.affine_act(
        y, scale, shift, residual, residual_scale, relu, mask and relu
    )


def affine_act_(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = True,
    mask: bool = False,
) -> Tensor:
    """Compute :func:`affine_act` in place of y, which is contiguous or channels_last -> mask."""
    _check("affine_act_", y, scale, shift, residual, residual_scale)
    _check_writable("affine_act_", "y", y)
    return torch.ops.svf_fast.affine_act_(
        y, scale, shift, residual, residual_scale, relu, mask and relu
    )


def affine_act_backward(
    grad: Tensor,
    *,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Compute ``dL/dy = scale_c · grad`` where the ReLU passed, else 0, from y or from the mask.

    grad [N, C, *spatial] is dL/dout. With ``y`` (and its scale and shift) the sign is computed
    again. With ``mask`` grad must have the memory format ``out`` had, and without ``scale`` the
    result is the gradient of the sum before the ReLU. -> dL/dy in the layout of y or else of grad.
    In 16 bits 6 bytes an element move with y, 4 1/8 with the mask.
    """
    _check_backward("affine_act_backward", grad, y, mask, scale, shift)
    return torch.ops.svf_fast.affine_act_backward(grad, y, mask, scale, shift)


def affine_act_backward_(
    grad: Tensor,
    *,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Compute :func:`affine_act_backward` in place of grad, contiguous or channels_last."""
    _check_backward("affine_act_backward_", grad, y, mask, scale, shift)
    _check_writable("affine_act_backward_", "grad", grad)
    torch.ops.svf_fast.affine_act_backward_(grad, y, mask, scale, shift)
    return grad


def _check(op, y, scale, shift, residual, residual_scale) -> None:
    check_maps(op, **({"y": y} if residual is None else {"y": y, "residual": residual}))
    _check_channels(op, y, scale=scale, shift=shift, residual_scale=residual_scale)


def _check_backward(op, grad, y, mask, scale, shift) -> None:
    check_maps(op, **({"grad": grad} if y is None else {"grad": grad, "y": y}))
    if (y is None) == (mask is None):
        raise ValueError(f"{op}: expected either y or mask, got both or neither")
    if y is not None and (scale is None or shift is None):
        raise ValueError(f"{op}: y: expected its scale and shift too, got None")
    _check_channels(op, grad, scale=scale, shift=shift)
    if mask is not None and mask.numel() != mask_bytes(grad.numel()):
        raise ValueError(
            f"{op}: mask: expected {mask_bytes(grad.numel())} bytes for grad of shape "
            f"{list(grad.shape)}, got {mask.numel()}"
        )


def _check_writable(op: str, name: str, value: Tensor) -> None:
    if not (value.is_contiguous() or value.movedim(1, -1).is_contiguous()):
        raise ValueError(
            f"{op}: {name}: expected a contiguous or channels_last tensor to overwrite, got "
            f"strides {value.stride()} for shape {list(value.shape)}"
        )


def _check_channels(op: str, maps: Tensor, **vectors: Tensor | None) -> None:
    dtype = torch.promote_types(maps.dtype, torch.float32)
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype != dtype:
            raise TypeError(f"{op}: {name}: expected {dtype}, got {vector.dtype}")
        if vector.shape != maps.shape[1:2]:
            raise ValueError(
                f"{op}: {name}: expected shape [{maps.shape[1]}], one value per channel, got "
                f"{list(vector.shape)}"
            )
        if vector.device != maps.device:
            raise ValueError(f"{op}: {name}: expected device {maps.device}, got {vector.device}")


def _dense_like(x: Tensor) -> Tensor:
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x, memory_format=torch.preserve_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name in ("affine_act", "affine_act_", "affine_act_backward", "affine_act_backward_"):
    _library.register_gpu(_name, _library.triton_kernel("affine_act", _name))


@torch.library.register_fake("svf_fast::affine_act")
def _(y, scale, shift, residual, residual_scale, relu, mask):
    return _dense_like(y), y.new_empty(mask_bytes(y.numel()) if mask else 0, dtype=torch.uint8)


@torch.library.register_fake("svf_fast::affine_act_backward")
def _(grad, y, mask, scale, shift):
    return _dense_like(grad if y is None else y)


@torch.library.register_fake("svf_fast::affine_act_")
def _(y, scale, shift, residual, residual_scale, relu, mask):
    return y.new_empty(mask_bytes(y.numel()) if mask else 0, dtype=torch.uint8)


@torch.library.register_fake("svf_fast::affine_act_backward_")
def _(grad, y, mask, scale, shift):
    return None
