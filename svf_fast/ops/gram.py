"""Gram matrix of two maps over all positions, and the S-gradient read off it."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops import maps
from svf_fast.ops.affine_act import affine_act_backward_
from svf_fast.ops.channel_dot import channel_dot
from svf_fast.ops.maps import DTYPES
from svf_fast.reference import gram as reference


def gram(
    a: Tensor,
    b: Tensor,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``M = Σ_p a'_p b_pᵀ`` over images and positions, one matrix per group.

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


def activation_grams(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, before: int, after: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The way back through ``x = relu(y · scale + shift)``, and the Gram matrices on both sides.

    grad = dL/dx and y [N, C, H, W] of one dense layout, scale and shift [C] -> ``g = dL/dy``, and
    where its number of groups is not 0, ``before = Σ_p g_p y_pᵀ`` of the convolution that made y
    and ``after = Σ_p x_p grad_pᵀ`` of the one that read x. grad may be overwritten by g.
    On a GPU one kernel reads grad and y once and writes g once. Not differentiable.
    """
    if maps.on_gpu(y) and max(before, after) == 1 and y.dtype != torch.float64:
        found = torch.ops.svf_fast.activation_grams(grad, y, scale, shift, before == 1, after == 1)
        return found[0], found[1] if before else None, found[2] if after else None
    behind = gram(y, grad, after, scale, shift) if after else None
    g = affine_act_backward_(grad, y=y, scale=scale, shift=shift)
    return g, gram(g, y, before) if before else None, behind


def gram_gradient(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """``dS_r = left_rᵀ M right_r / S_r``: ``colsum(left ⊙ (M right)) / S``, per group.

    M [G, Ca, Cb] in float32 or float64, left [G, Ca, R], right [G, Cb, R], S [G, R] -> [G, R] in
    the dtype of M. The product is made 512 directions at a time. Not differentiable.
    """
    with torch.no_grad():
        return torch.ops.svf_fast.gram_gradient(M, left, right, S)


def gram_by_images(
    a: Tensor, b: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """The definition an image at a time, for devices without a kernel: one widened copy of one."""
    with torch.autocast(a.device.type, enabled=False):
        total = reference.gram(a[:1], b[:1], groups, scale, shift)
        for image in range(1, a.shape[0]):
            at = slice(image, image + 1)
            total += reference.gram(a[at], b[at], groups, scale, shift)
    return total


def gram_gradient_by_definition(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """For devices without a kernel."""
    with torch.autocast(M.device.type, enabled=False):
        return reference.gram_gradient(M, left, right, S)


_gram_kernel = _library.triton_kernel("gram", "gram")


def _gram_on_gpu(a: Tensor, *others) -> Tensor:
    return (gram_by_images if a.dtype == torch.float64 else _gram_kernel)(a, *others)


def gram_gradient_by_channel_dot(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    """On GPUs: the product by cuBLAS, then one pass over it and left, summed in a fixed order.

    Made as ``rightᵀ Mᵀ`` [G, R, C], the memory order of ``left = Vᵀ``, so V is read as it lies. In
    float32 12·G·R·C bytes move behind the operands of the product (written, read, and left);
    the definition, which writes and reads the element-wise product too, moves 20.
    """
    shape = 1, left.shape[0] * left.shape[2], left.shape[1]
    with torch.autocast(M.device.type, enabled=False):
        product = right.to(M.dtype).mT @ M.mT
        dot = torch.ops.svf_fast.channel_dot(
            product.reshape(shape), left.to(M.dtype).mT.reshape(shape)
        )
        return dot.reshape(S.shape) / S.to(M.dtype)


torch.library.impl("svf_fast::gram", "default", gram_by_images)
_library.register_gpu("gram", _gram_on_gpu)
_library.register_gpu(
    "activation_grams", _library.triton_kernel("activation_grams", "activation_grams")
)
torch.library.impl("svf_fast::gram_gradient", "default", gram_gradient_by_definition)
_library.register_gpu("gram_gradient", gram_gradient_by_channel_dot)


@torch.library.register_fake("svf_fast::gram_gradient")
def _(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    return M.new_empty(S.shape)


@torch.library.register_fake("svf_fast::gram")
def _(a: Tensor, b: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    shape = groups, a.shape[1] // groups, b.shape[1] // groups
    return a.new_empty(shape, dtype=torch.promote_types(a.dtype, torch.float32))


@torch.library.register_fake("svf_fast::activation_grams")
def _(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, before: bool, after: bool):
    channels = y.shape[1]
    sizes = ((1, channels, channels) if wanted else (0,) for wanted in (before, after))
    return torch.empty_like(y), *(scale.new_empty(size) for size in sizes)


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
