"""The 1×1 convolution of a GPU with what surrounds it: activation before, sum and ReLU after.

Written out as separate passes, a residual block reads and writes each of its maps several times
over; here the activation is rebuilt and the masked gradient is made as the product reads it, and
the affine map, the residual sum, the ReLU and its mask are made before the product is written.
The CPU runs the passes: its matrix products read from caches that the passes leave warm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops import maps
from svf_fast.ops.convolution import Geometry, is_channels_last
from svf_fast.reference.affine_act import mask_bytes
from svf_fast.reference.pointwise import PLAIN_INPUT, PLAIN_OUTPUT, Epilogue, Prologue

_wanted = _library.triton_kernel("pointwise", "wanted")
Result = TypeVar("Result")


class Pointwise(NamedTuple):
    """out, and y and the mask of out, without elements where they were not asked for."""

    out: Tensor
    y: Tensor
    mask: Tensor


class Extras(NamedTuple):
    """What a product comes with, by which its kernel is chosen and tuned.

    scale: an affine map or a ReLU after it. dot: the inner products of :func:`pointwise_dot`.
    """

    in_scale: bool = False
    in_mask: bool = False
    scale: bool = False
    residual: bool = False
    residual_mask: bool = False
    keep: bool = False
    mask: bool = False
    dot: bool = False

    @classmethod
    def of(cls, prologue: Prologue, epilogue: Epilogue, dot: bool = False) -> Extras:
        return cls(
            prologue.scale is not None,
            prologue.mask is not None,
            epilogue.relu or epilogue.scale is not None or epilogue.shift is not None,
            epilogue.residual is not None,
            epilogue.residual_mask is not None,
            epilogue.keep,
            epilogue.mask,
            dot,
        )


def fuses(x: Tensor, weight: Tensor, geometry: Geometry, extras: Extras) -> bool:
    """Tell whether one kernel does a 1×1 convolution of x [N, C, H, W] with [D, C, 1, 1] and more.

    On a GPU: channels_last maps of float32 or 16 bits, C and D multiples of eight (16-byte reads,
    whole bytes of a mask), no stride, padding or groups; and unless the configurations of this GPU
    say that separate passes are faster.
    """
    return (
        maps.on_gpu(x)
        and x.dtype in maps.TRITON_DTYPES
        and _is_product(weight.shape, geometry)
        and (is_channels_last(x) or x.shape[2:] == (1, 1))
        and _wins(x, weight, extras)
    )


@functools.lru_cache(4096)  # asked at each launch
def _is_product(weight: torch.Size, geometry: Geometry) -> bool:
    return weight[2:] == (1, 1) and geometry.is_plain and weight[0] % 8 == weight[1] % 8 == 0


def _wins(x: Tensor, weight: Tensor, extras: Extras) -> bool:
    if torch.compiler.is_compiling():  # tables are not read while a graph is traced
        return True
    return _wanted(x, weight, extras)


def pointwise(
    x: Tensor, weight: Tensor, prologue: Prologue = PLAIN_INPUT, epilogue: Epilogue = PLAIN_OUTPUT
) -> Pointwise:
    """Compute ``y_p = weight x'_p``, with x' what the prologue makes of x, and the epilogue of y.

    Definition: :func:`svf_fast.reference.pointwise.pointwise`. x' is rounded to the dtype of x.
    Reads x, the residual and their masks once, writes out once, and y with ``keep``, the mask of
    out with ``mask``. With ``keep`` out is computed from y as it is kept.

    x [N, C, H, W], weight [D, C] of one dtype in any strides, residual [N, D, H, W], channels_last;
    scales and shifts in float32; masks as :func:`svf_fast.ops.affine_act.affine_act` makes them.
    Only for operands that :func:`fuses` accepts.
    """
    return Pointwise(*torch.ops.svf_fast.pointwise(x, weight, *prologue, *epilogue))


def pointwise_dot(x: Tensor, weight: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``a_p = weight x_p`` -> ``a_pd·s_d`` and ``Σ_p a_pd v_pd``; a is never written.

    Definition: :func:`svf_fast.reference.pointwise.pointwise_dot`. x [N, C, H, W], weight [D, C],
    v [N, D, H, W] of one dtype, channels_last; s [D] in float32 -> [N, D, H, W], [D].
    """
    return torch.ops.svf_fast.pointwise_dot(x, weight, v, s)


def with_ends(function: Callable[..., Result]) -> Callable[..., Result]:
    """Adapt a function of the two tuples to the registered op, whose arguments are flat."""

    def call(x: Tensor, weight: Tensor, *flat: Any) -> Result:
        return function(x, weight, Prologue(*flat[:3]), Epilogue(*flat[3:]))

    return call


_library.register_gpu("pointwise", with_ends(_library.triton_kernel("pointwise", "pointwise")))
_library.register_gpu("pointwise_dot", _library.triton_kernel("pointwise", "pointwise_dot"))


def _empty_result(x: Tensor, weight: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("svf_fast::pointwise")
@with_ends
def _(x, weight, prologue, epilogue):
    out = _empty_result(x, weight)
    y = _empty_result(x, weight) if epilogue.keep else x.new_empty(0)
    bits = mask_bytes(out.numel()) if epilogue.mask else 0
    return out, y, x.new_empty(bits, dtype=torch.uint8)


@torch.library.register_fake("svf_fast::pointwise_dot")
def _(x, weight, v, s):
    return _empty_result(x, weight), s.new_empty(s.shape)
