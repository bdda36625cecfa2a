"""Gram matrix of two maps over all positions."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops.channel_dot import channel_dot
from svf_fast.ops.maps import DTYPES
from svf_fast.reference.gram import gram as definition


def gram(
    a: Tensor,
    b: Tensor,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Compute ``M = Σ_p a'_p b_pᵀ`` over images and positions, one matrix per group.

    With scale and shift, ``a' = relu(a · scale + shift)`` per channel, rounded to the dtype of a:
    an activation rebuilt as it is read. Without, a' = a.

    a [N, Ca, *spatial] and b [N, Cb, *spatial] of one dtype; scale, shift [Ca] in float32 (float64
    for float64) -> [G, Ca/G, Cb/G] in the dtype of scale, accumulated in it. Contiguous and
    channels_last maps are read as they lie; what must be widened or rebuilt is so by tiles of 2048
    positions. Not differentiable.

    Raises:
        TypeError: no tensor, or another dtype than the above.
        ValueError: shapes or devices that do not fit, groups that do not divide the channels, or
            only one of scale and shift.
    """
    _check(a, b, groups, scale, shift)
    if scale is None and a.shape[1] == b.shape[1] == groups:
        return channel_dot(a, b).reshape(groups, 1, 1)
    with torch.no_grad():
        return torch.ops.svf_fast.gram(a, b, groups, scale, shift)


def gram_by_images(
    a: Tensor, b: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Compute the definition by images, for devices without a kernel: one widened copy of one."""
    with torch.autocast(a.device.type, enabled=False):
        total = definition(a[:1], b[:1], groups, scale, shift)
        for image in range(1, a.shape[0]):
            at = slice(image, image + 1)
            total += definition(a[at], b[at], groups, scale, shift)
    return total


_kernel = _library.triton_kernel("gram", "gram")


def _on_gpu(a: Tensor, *others) -> Tensor:
    return (gram_by_images if a.dtype == torch.float64 else _kernel)(a, *others)


torch.library.impl("svf_fast::gram", "default", gram_by_images)
_library.register_gpu("gram", _on_gpu)


@torch.library.register_fake("svf_fast::gram")
def _(a: Tensor, b: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    shape = groups, a.shape[1] // groups, b.shape[1] // groups
    return a.new_empty(shape, dtype=torch.promote_types(a.dtype, torch.float32))


def _check(a: Tensor, b: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None) -> None:
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"gram: {name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(
                f"gram: {name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
            )
    if a.dim() < 2:
        raise ValueError(f"gram: a: expected [N, C, *spatial], got shape {list(a.shape)}")
    if b.dtype != a.dtype:
        raise TypeError(f"gram: b: expected {a.dtype} as a, got {b.dtype}")
    if b.dim() != a.dim() or b.shape[:1] + b.shape[2:] != a.shape[:1] + a.shape[2:]:
        raise ValueError(
            f"gram: b: expected the images and positions of a, {list(a.shape)}, got {list(b.shape)}"
        )
    if groups < 1 or a.shape[1] % groups or b.shape[1] % groups:
        raise ValueError(
            f"gram: groups: expected a divisor of {a.shape[1]} and {b.shape[1]} channels, got "
            f"{groups}"
        )
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"gram: {missing}: expected a tensor, because scale and shift go together")
    dtype = torch.promote_types(a.dtype, torch.float32)
    for name, tensor in (("b", b), ("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"gram: {name}: expected device {a.device}, got {tensor.device}")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"gram: {name}: expected {dtype} for a of {a.dtype}, got {tensor.dtype}"
            )
        if tensor is not None and tensor.shape != a.shape[1:2]:
            raise ValueError(
                f"gram: {name}: expected shape [{a.shape[1]}], one value per channel of a, got "
                f"{list(tensor.shape)}"
            )
