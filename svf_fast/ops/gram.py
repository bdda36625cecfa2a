"""Gram matrix of two maps over all positions, and the S-gradient read off it."""

from __future__ import annotations

from collections.abc import Sequence

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


def scale_gradient(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``dS_r = left_rᵀ M right_r / S_r`` with ``M = Σ_p a'_p b_pᵀ``, per group.

    a, b, scale and shift as for :func:`gram`; left [G, Ca/G, R], right [G, Cb/G, R], S [G·R] ->
    [G, R] in the dtype that maps are accumulated in, not finite where S is 0. Not differentiable.
    Definition: :func:`svf_fast.reference.gram.scale_gradient`.
    """
    return torch.ops.svf_fast.scale_gradient.default(a, b, scale, shift, left, right, S.detach())


Reading = tuple[Tensor, Tensor, Tensor]  # left, right and S of `scale_gradient`


def activation_gradients(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Reading | None,
    after: Reading | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The way back through ``x = relu(y · scale + shift)``, and dS of the layers on both sides.

    grad = dL/dx and y [N, C, H, W] of one dense layout, scale and shift [C] -> ``g = dL/dy``, and
    as far as they are asked for :func:`scale_gradient` of g and y, for the layer that made y, and
    of x and grad, for the one that read x. grad may be overwritten by g: on a GPU one kernel reads
    grad and y once and writes g once. Not differentiable.
    """
    own: Sequence[Tensor] = before or []
    other: Sequence[Tensor] = after or []
    grouped = (own and len(own[0]) > 1) or (other and len(other[0]) > 1)
    if maps.on_gpu(y) and not grouped and y.dtype != torch.float64:
        op = torch.ops.svf_fast.activation_gradients.default
        g, *found = op(grad, y, scale, shift, own, other)
    else:
        op = torch.ops.svf_fast.activation_gradients_.default
        g, found = grad, op(grad, y, scale, shift, own, other)
    return g, found[0] if own else None, found[1] if other else None


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


def scale_gradient_by_gram(
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    left: Tensor,
    right: Tensor,
    S: Tensor,
) -> Tensor:
    """Two ops, for what has no kernel that does both."""
    M = gram(a, b, len(left), scale, shift)
    return torch.ops.svf_fast.gram_gradient.default(M, left, right, S.reshape(len(left), -1))


def activation_gradients_by_gram(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """:func:`activation_gradients` in the place of grad, one after the other."""
    nothing = scale.new_empty(0)
    behind = nothing
    if after:
        left, right, S = after
        behind = scale_gradient_by_gram(y, grad, scale, shift, left, right, S)
    affine_act_backward_(grad, y=y, scale=scale, shift=shift)
    if not before:
        return nothing.clone(), behind
    left, right, S = before
    return scale_gradient_by_gram(grad, y, None, None, left, right, S), behind


_gram_kernel = _library.triton_kernel("gram", "gram")
_scale_gradient_kernel = _library.triton_kernel("gram", "scale_gradient")


def _gram_on_gpu(a: Tensor, *others) -> Tensor:
    return (gram_by_images if a.dtype == torch.float64 else _gram_kernel)(a, *others)


def _scale_gradient_on_gpu(a: Tensor, b: Tensor, scale, shift, left, right, S) -> Tensor:
    one_by_one = left.shape[1] == right.shape[1] == 1 and scale is None
    by_gram = one_by_one or a.dtype == torch.float64
    return (scale_gradient_by_gram if by_gram else _scale_gradient_kernel)(
        a, b, scale, shift, left, right, S
    )


torch.library.impl("svf_fast::gram", "default", gram_by_images)
_library.register_gpu("gram", _gram_on_gpu)
torch.library.impl("svf_fast::gram_gradient", "default", gram_gradient_by_definition)
torch.library.impl("svf_fast::scale_gradient", "default", scale_gradient_by_gram)
_library.register_gpu("scale_gradient", _scale_gradient_on_gpu)
torch.library.impl("svf_fast::activation_gradients_", "default", activation_gradients_by_gram)
_library.register_gpu(
    "activation_gradients", _library.triton_kernel("activation_gradients", "activation_gradients")
)


@torch.library.register_fake("svf_fast::gram_gradient")
def _(M: Tensor, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    return M.new_empty(S.shape)


@torch.library.register_fake("svf_fast::gram")
def _(a: Tensor, b: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    shape = groups, a.shape[1] // groups, b.shape[1] // groups
    return a.new_empty(shape, dtype=torch.promote_types(a.dtype, torch.float32))


@torch.library.register_fake("svf_fast::scale_gradient")
def _(a: Tensor, b: Tensor, scale, shift, left: Tensor, right: Tensor, S: Tensor) -> Tensor:
    return _gradient_like(left, a)


@torch.library.register_fake("svf_fast::activation_gradients")
def _(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, before, after):
    return torch.empty_like(y), *_gradients_like(y, before, after)


@torch.library.register_fake("svf_fast::activation_gradients_")
def _(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, before, after):
    return _gradients_like(y, before, after)


def _gradients_like(y: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]):
    nothing = torch.promote_types(y.dtype, torch.float32)
    return tuple(
        _gradient_like(side[0], y) if side else y.new_empty(0, dtype=nothing)
        for side in (before, after)
    )


def _gradient_like(left: Tensor, maps: Tensor) -> Tensor:
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return maps.new_empty((left.shape[0], left.shape[2]), dtype=dtype)


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
