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
    grid: Tensor | None = None,
) -> Tensor:
    """Compute ``M = Σ_p a'_p b_pᵀ`` over images and positions, one matrix per group.

    With scale and shift, ``a' = relu(a · scale + shift)`` per channel, rounded to the dtype of a:
    an activation rebuilt as it is read. Without, a' = a. With a grid a or b is codes of
    :func:`svf_fast.ops.quantize.quantize`, and stands for what they make in the dtype of the other.

    a [N, Ca, *spatial] and b [N, Cb, *spatial] of one dtype; scale, shift [Ca] in float32 (float64
    for float64) -> [G, Ca/G, Cb/G] in the dtype of scale, accumulated in it. Contiguous and
    channels_last maps are read as they lie; what must be widened, rebuilt or decoded is so by tiles
    of 2048 positions. Not differentiable.

    Raises:
        TypeError: no tensor, or another dtype than the above.
        ValueError: shapes or devices that do not fit, groups that do not divide the channels, or
            only one of scale and shift.
    """
    _check(a, b, groups, scale, shift, grid)
    if scale is None and grid is None and a.shape[1] == b.shape[1] == groups:
        return channel_dot(a, b).reshape(groups, 1, 1)
    with torch.no_grad():
        return torch.ops.svf_fast.gram(a, b, groups, scale, shift, grid)


def gram_by_images(
    a: Tensor,
    b: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    grid: Tensor | None = None,
) -> Tensor:
    """Compute the definition by images, for devices without a kernel: one widened copy of one."""
    with torch.autocast(a.device.type, enabled=False):
        total = None
        for image in range(max(1, a.shape[0])):
            at = slice(image, image + 1)
            of_image = None if grid is None else grid[:, at]
            M = definition(a[at], b[at], groups, scale, shift, of_image)
            total = M if total is None else total.add_(M)
    assert total is not None
    return total


_kernel = _library.triton_kernel("gram", "gram")


def _on_gpu(a: Tensor, b: Tensor, *others) -> Tensor:
    return (gram_by_images if torch.float64 in (a.dtype, b.dtype) else _kernel)(a, b, *others)


torch.library.impl("svf_fast::gram", "default", gram_by_images)
_library.register_gpu("gram", _on_gpu)


@torch.library.register_fake("svf_fast::gram")
def _(a: Tensor, b: Tensor, groups: int, scale, shift, grid=None) -> Tensor:
    shape = groups, a.shape[1] // groups, b.shape[1] // groups
    return a.new_empty(shape, dtype=accumulated_in(a, b))


def accumulated_in(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype of sums over maps of which one may be codes."""
    return torch.promote_types(b.dtype if a.dtype == torch.uint8 else a.dtype, torch.float32)


def _check(
    a: Tensor,
    b: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    grid: Tensor | None,
) -> None:
    codes = None
    if grid is not None:
        codes = next((x for x in (a, b) if getattr(x, "dtype", None) == torch.uint8), None)
        if codes is None:
            raise TypeError("gram: grid: expected codes in uint8 as a or b, got none of them")
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"gram: {name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES and value is not codes:
            raise TypeError(
                f"gram: {name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
            )
    if a.dim() < 2:
        raise ValueError(f"gram: a: expected [N, C, *spatial], got shape {list(a.shape)}")
    if codes is None and b.dtype != a.dtype:
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
    dtype = accumulated_in(a, b)
    if grid is not None and codes is not None:
        shape = 3, *codes.shape[:2]
        if (grid.dtype, grid.shape) != (dtype, shape):
            raise ValueError(
                f"gram: grid: expected {dtype} of shape {list(shape)}, as quantize made it with "
                f"the codes, got {grid.dtype} of shape {list(grid.shape)}"
            )
    for name, tensor in (("b", b), ("scale", scale), ("shift", shift), ("grid", grid)):
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
