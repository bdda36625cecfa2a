"""How the element-wise kernels see maps [N, C, *spatial]: dense, channels apart, by rows.

The same rules as ``csrc/maps.h``, so that a layout means the same to both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A dense map in memory: [batch, channels, positions], or [batch · positions, channels] last.

    A map that is dense both ways is the one with the longer rows.
    """

    batch: int
    channels: int
    positions: int
    last: bool


def divide_up(a: int, b: int) -> int:
    """Compute ``⌈a / b⌉``; triton.cdiv, which kernels may call too, takes microseconds."""
    return -(-a // b)


def is_dense(x: Tensor) -> bool:
    """Tell whether a map is contiguous or channels_last."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy."""
    return x if is_dense(x) else x.contiguous()


def like(x: Tensor) -> Tensor:
    """Allocate a map with the strides of the dense map x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def with_strides_of(x: Tensor, other: Tensor) -> Tensor:
    """Return x, or a copy with the strides of the dense map ``other`` of the same shape."""
    if x.stride() == other.stride():
        return x
    pairs = zip(x.shape, x.stride(), other.stride(), strict=True)
    if all(size == 1 or mine == its for size, mine, its in pairs):
        return x
    return like(other).copy_(x)


def rows_of(x: Tensor) -> Rows:
    """Return how a dense map lies in memory."""
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    if channels == 1:
        return Rows(1, 1, batch * positions, False)
    return Rows(batch, channels, positions, positions == 1 or not x.is_contiguous())


def unit_of(channels: int) -> int:
    """Return the unit in which channels are counted: kernels then see where eight divides them."""
    return 8 if channels % 8 == 0 else 1


@triton.jit
def load_block(at, inside, whole):
    """Load a block of elements; where all of them exist (``whole``), by 16 bytes.

    Of a mask that it knows nothing about, the compiler assumes that it changes at each element.
    """
    return tl.load(at) if whole else tl.load(at, mask=inside, other=0)


@triton.jit
def store_block(at, values, inside, whole):
    """Store a block as :func:`load_block` loads it."""
    if whole:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=inside)
