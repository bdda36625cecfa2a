"""The 1×1 convolution of a GPU with what surrounds it: activation before, sum and ReLU after.

Written out as separate passes, a residual block reads and writes each of its maps several times
over; here the activation is rebuilt and the masked gradient is made as the product reads it, and
the affine map, the residual sum, the ReLU and its mask are made before the product is written.
The CPU runs the passes: its matrix products read from caches that the passes leave warm.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops import maps
from svf_fast.ops.convolution import Geometry, is_channels_last
from svf_fast.reference.affine_act import mask_bytes

_wanted = _library.triton_kernel("pointwise", "wanted")


class Pointwise(NamedTuple):
    """out, and as far as they were asked for y and the mask of out (else without elements)."""

    out: Tensor
    y: Tensor
    mask: Tensor


def fuses(x: Tensor, weight: Tensor, geometry: Geometry, *ends: str) -> bool:
    """Whether one kernel does a 1×1 convolution of x [N, C, H, W] with [D, C, 1, 1] and its ends.

    On a GPU: channels_last maps of float32 or 16 bits, C and D multiples of eight (16-byte reads,
    whole bytes of a mask), no stride, padding or groups; and unless the configurations of this GPU
    say that separate passes are faster. ``ends`` names the arguments that :func:`pointwise` will
    get, "scale" for the affine map or the ReLU after it, or "dot" for :func:`pointwise_dot`.
    """
    return (
        maps.on_gpu(x)
        and x.dtype in maps.TRITON_DTYPES
        and _is_product(weight.shape, geometry)
        and (is_channels_last(x) or x.shape[2:] == (1, 1))
        and _wins(x, weight, ends)
    )


@functools.lru_cache(4096)  # asked at each launch
def _is_product(weight: torch.Size, geometry: Geometry) -> bool:
    return weight[2:] == (1, 1) and geometry.is_plain and weight[0] % 8 == weight[1] % 8 == 0


def _wins(x: Tensor, weight: Tensor, ends: tuple[str, ...]) -> bool:
    if torch.compiler.is_compiling():  # tables are not read while a graph is traced
        return True
    return _wanted(x, weight, ends)


def pointwise(
    x: Tensor,
    weight: Tensor,
    *,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_mask: Tensor | None = None,
    relu: bool = False,
    keep: bool = False,
    mask: bool = False,
) -> Pointwise:
    """``y_p = weight x'_p`` and ``out = relu?(y·scale + shift + residual'·residual_scale)``.

    Definition: :func:`svf_fast.reference.pointwise.pointwise`; ``x' = relu(x·in_scale + in_shift)``
    rounded to the dtype of x, or x where ``in_mask`` has a bit, or x; residual' alike with
    ``residual_mask``. Reads x, residual and their masks once, writes out once, and y with ``keep``,
    the mask of out with ``mask``. With ``keep`` out is computed from y as it is kept.

    x [N, C, H, W], weight [D, C] of one dtype in any strides, residual [N, D, H, W], channels_last;
    in_scale, in_shift [C], scale, shift, residual_scale [D] in float32; masks as
    :func:`svf_fast.ops.affine_act.affine_act` makes them. For what :func:`fuses` says yes to.
    """
    return Pointwise(
        *torch.ops.svf_fast.pointwise(
            x,
            weight,
            in_scale,
            in_shift,
            in_mask,
            scale,
            shift,
            residual,
            residual_scale,
            residual_mask,
            relu,
            keep,
            mask,
        )
    )


def pointwise_dot(x: Tensor, weight: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``a_p = weight x_p``; returns ``a_pd·s_d`` and ``Σ_p a_pd v_pd``, a never written.

    Definition: :func:`svf_fast.reference.pointwise.pointwise_dot`. x [N, C, H, W], weight [D, C],
    v [N, D, H, W] of one dtype, channels_last; s [D] in float32 -> [N, D, H, W], [D].
    """
    return torch.ops.svf_fast.pointwise_dot(x, weight, v, s)


for _name in ("pointwise", "pointwise_dot"):
    _library.register_gpu(_name, _library.triton_kernel("pointwise", _name))


def _empty_result(x: Tensor, weight: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("svf_fast::pointwise")
def _(
    x,
    weight,
    in_scale,
    in_shift,
    in_mask,
    scale,
    shift,
    residual,
    residual_scale,
    residual_mask,
    relu,
    keep,
    mask,
):
    out = _empty_result(x, weight)
    y = _empty_result(x, weight) if keep else x.new_empty(0)
    return out, y, x.new_empty(mask_bytes(out.numel()) if mask else 0, dtype=torch.uint8)


@torch.library.register_fake("svf_fast::pointwise_dot")
def _(x, weight, v, s):
    return _empty_result(x, weight), s.new_empty(s.shape)
