"""What the Triton kernels share: products, the 1-bit masks, the precision of float32 products."""

from __future__ import annotations

import triton
import triton.language as tl

from svf_fast.ops.maps import float32_products
from svf_fast.triton import tuning

INTERPRETED = tl.constexpr(tuning.INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Compute ``acc + a @ b`` on tensor cores, accumulated in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round x in float32 to the nearest value of a dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # it would cut the last 16 bits off
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def affine_relu(y, scale, shift):
    """Compute ``relu(y · scale + shift)`` in float32, rounded to the dtype of y; NaN passes."""
    z = y.to(tl.float32) * scale + shift
    return narrow(tl.where(z <= 0, 0.0, z), y.dtype)


@triton.jit
def decode(codes, grid, at, size, inside, dtype: tl.constexpr):
    """Return what a tile of codes stands for in a dtype, and the first code that the ReLU passes.

    grid [3, N, C]: offset, step, first, ``size`` apart; at: of the channels of the tile's image.
    """
    offset = tl.load(grid + at, mask=inside, other=0.0)[None, :]
    step = tl.load(grid + size + at, mask=inside, other=0.0)[None, :]
    first = tl.load(grid + 2 * size + at, mask=inside, other=0.0)[None, :]
    return narrow(tl.fma(step, codes.to(tl.float32), offset), dtype), first


@triton.jit
def pack_bits(passes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pack booleans [ROWS, COLUMNS] into bytes [ROWS, COLUMNS / 8], element i at bit i % 8."""
    eights = tl.reshape(passes.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


def precision(convolves: bool) -> str:
    """Say how float32 products are made, by torch's switches for convolutions and for matmul.

    Without TF32 three TF32 products stand for one (``tf32x3``): the error of float32, on tensor
    cores.
    """
    return "tf32" if float32_products()[0 if convolves else 1] == "tf32" else "tf32x3"
