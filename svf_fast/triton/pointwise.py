"""The 1×1 convolution of maps with what surrounds it in a residual block, in one kernel.

A product [positions, K] × [K, D] whose prologue rebuilds or masks its input as it is loaded and
whose epilogue applies the affine map, the residual sum, the ReLU and its mask to what it just
computed: maps between a convolution and its neighbours are neither written nor read.

Definition: :mod:`svf_fast.reference.pointwise`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.reference.affine_act import mask_bytes
from svf_fast.triton.language import affine_relu, dot, narrow, pack_bits, precision
from svf_fast.triton.tuning import Config, Tunable, bucket, find

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def load_bit_rows(mask, offset, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] booleans of the [ROWS, COLUMNS / 8] bytes at offset."""
    byte = tl.load(mask + offset, mask=inside, other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0


@triton.jit
def columns(z, SLICES: tl.constexpr):
    """[R, C] -> SLICES tiles [R, C / SLICES], from left to right."""
    if SLICES == 1:
        parts = (z,)
    else:
        halves = tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        parts = columns(left, SLICES // 2) + columns(right, SLICES // 2)
    return parts


@triton.jit
def pointwise_kernel(
    x,  # [positions, K]
    weight,  # [D, K], any strides
    in_scale,  # [K], as in_shift
    in_shift,
    in_mask,  # bits of [positions, K]
    scale,  # [D], as shift and residual_scale
    shift,
    residual,  # [positions, D], as v, out and y
    residual_scale,
    residual_mask,  # bits of [positions, D], as mask
    v,
    out,
    y,
    mask,
    dots,  # [cdiv(positions, BLOCK_P), D]
    positions,
    in_eighths,  # K / 8
    out_eighths,  # D / 8
    weight_stride_d,
    weight_stride_k,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # no block reaches beyond K
    EVEN_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_D // SLICES
    K = in_eighths * 8  # so the compiler knows that rows begin at multiples of eight elements
    D = out_eighths * 8

    # GROUP row tiles take turns with one tile of the weight: both stay in L2
    tiles_p, tiles_d = tl.cdiv(positions, BLOCK_P), tl.cdiv(D, BLOCK_D)
    group, within = tl.program_id(0) // (GROUP * tiles_d), tl.program_id(0) % (GROUP * tiles_d)
    rows_of_group = tl.minimum(tiles_p - group * GROUP, GROUP)
    tile_p, tile_d = group * GROUP + within % rows_of_group, within // rows_of_group

    first = tile_p.to(tl.int64) * BLOCK_P
    row = tl.arange(0, BLOCK_P)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_p = row < positions - tile_p * BLOCK_P
    x += first * K

    acc = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside_x = inside_p[:, None] if EVEN_K else inside_p[:, None] & (k < K)[None, :]
        a = tl.load(x + row[:, None] * K + k[None, :], mask=inside_x, other=0.0)
        at = weight + d[None, :] * weight_stride_d + k[:, None] * weight_stride_k
        inside_weight = (d < D)[None, :] & (k < K)[:, None]
        even = EVEN_K and EVEN_D
        b = tl.load(at) if even else tl.load(at, mask=inside_weight, other=0.0)
        if in_scale is not None:
            inside_k = k < K
            s = tl.load(in_scale + k) if EVEN_K else tl.load(in_scale + k, mask=inside_k, other=0.0)
            t = tl.load(in_shift + k) if EVEN_K else tl.load(in_shift + k, mask=inside_k, other=0.0)
            a = affine_relu(a, s[None, :], t[None, :])
        if in_mask is not None:
            byte = k0 // 8 + tl.arange(0, BLOCK_K // 8)
            inside_x = inside_p[:, None] & (byte < in_eighths)[None, :]
            if EVEN_K:
                inside_x = inside_p[:, None]
            at_bits = row[:, None] * in_eighths + byte[None, :]
            passes = load_bit_rows(
                in_mask + first * in_eighths, at_bits, inside_x, BLOCK_P, BLOCK_K
            )
            a = tl.where(passes, a, 0.0)
        acc = dot(a, b, acc, PRECISION)

    dtype = out.dtype.element_ty
    parts = columns(acc, SLICES)
    for part in tl.static_range(SLICES):  # a part at a time: what one needs fits in registers
        z = parts[part]
        d0 = tile_d * BLOCK_D + part * WIDTH
        d = d0 + tl.arange(0, WIDTH)
        inside_d = d < D
        inside = inside_p[:, None] if EVEN_D else inside_p[:, None] & inside_d[None, :]
        at = row[:, None] * D + d[None, :]
        byte = d0 // 8 + tl.arange(0, WIDTH // 8)
        inside_bits = inside_p[:, None]
        if not EVEN_D:
            inside_bits = inside_p[:, None] & (byte < out_eighths)[None, :]
        at_bits = row[:, None] * out_eighths + byte[None, :]

        if y is not None or v is not None:
            rounded = narrow(z, dtype)
            z = rounded.to(tl.float32)
            if y is not None:
                tl.store(y + first * D + at, rounded, mask=inside)
        if v is not None:
            other = tl.load(v + first * D + at, mask=inside, other=0.0).to(tl.float32)
            partial = tl.sum(z * other, axis=0)
            tl.store(dots + tile_p.to(tl.int64) * D + d, partial, mask=inside_d)
        if scale is not None:
            z *= tl.load(scale + d, mask=inside_d, other=0.0)[None, :]
        if shift is not None:
            z += tl.load(shift + d, mask=inside_d, other=0.0)[None, :]
        if residual is not None:
            added = tl.load(residual + first * D + at, mask=inside, other=0.0)
            if residual_mask is not None:
                passes = load_bit_rows(
                    residual_mask + first * out_eighths, at_bits, inside_bits, BLOCK_P, WIDTH
                )
                added = tl.where(passes, added, 0.0)
            added = added.to(tl.float32)
            if residual_scale is not None:
                added *= tl.load(residual_scale + d, mask=inside_d, other=0.0)[None, :]
            z += added
        if RELU:
            z = tl.where(z <= 0, 0.0, z)  # NaN passes
        result = narrow(z, dtype)
        tl.store(out + first * D + at, result, mask=inside)
        if mask is not None:
            bits = pack_bits((result <= 0) == 0, BLOCK_P, WIDTH)
            tl.store(mask + first * out_eighths + at_bits, bits, mask=inside_bits)
    if mask is not None and tl.program_id(0) == 0:  # bytes that hold no element
        end = positions.to(tl.int64) * out_eighths
        pad = end + tl.arange(0, 16)
        tl.store(mask + pad, tl.zeros((16,), tl.uint8), mask=pad < end // 8 * 8 + 16)
