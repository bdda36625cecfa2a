"""Channel-wise inner product of two maps in two passes without atomics, alone or with a scaling.

Serves where ``csrc/cuda/channel_dot.cu`` was not built. Every program leaves a partial sum in
float32 per channel, and a second kernel adds these up in float64 in a fixed order. One read of each
map, and one write of the scaled one.

Predicted, as no GPU has run it: the CUDA kernel's time, which is that of DRAM, for channels_last
maps of 8·n channels and contiguous ones of 8·n positions; longer for others, read by elements.

Definition: :mod:`svf_fast.reference.channel_dot`, which also computes float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.reference import channel_dot as definition
from svf_fast.triton.language import narrow
from svf_fast.triton.launch import launch
from svf_fast.triton.maps import (
    dense,
    divide_up,
    is_dense,
    load_block,
    rows_of,
    store_block,
    unit_of,
    with_strides_of,
)
from svf_fast.triton.tuning import OPTIONS, Config

_TILE = 1024  # elements of a step
_WIDEST = 64  # channels of a tile: a row of it is a line of the cache in 16 bits
_STEPS = 8
_RULE: Config = {"num_warps": 4, **OPTIONS}


@triton.jit
def channel_dot_columns_kernel(
    a,
    b,
    s,
    partial,  # [cdiv(positions, ROWS * STEPS), C]
    positions,
    units,  # C / UNIT
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sum COLUMNS channels of maps [positions, C] over STEPS tiles of ROWS positions."""
    channels = units * UNIT
    tiles = tl.cdiv(channels, COLUMNS)
    block = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = channel < channels
    row = tl.arange(0, ROWS)
    first = block.to(tl.int64) * (ROWS * STEPS)
    left = positions - first
    at = row[:, None] * channels + channel[None, :]
    a += first * channels
    b += first * channels
    if s is not None:
        factor = tl.load(s + channel, mask=inside_c, other=0.0)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.static_range(STEPS):
        inside = (step * ROWS + row < left)[:, None] & inside_c[None, :]
        start = step * ROWS * channels
        value = tl.load(a + start + at, mask=inside, other=0.0)
        wide = value.to(tl.float32)
        total = tl.fma(wide, tl.load(b + start + at, mask=inside, other=0.0).to(tl.float32), total)
        if s is not None:
            tl.store(a + start + at, narrow(wide * factor, a.dtype.element_ty), mask=inside)
    sums = tl.sum(total, axis=0)
    tl.store(partial + block.to(tl.int64) * channels + channel, sums, mask=inside_c)


@triton.jit
def channel_dot_rows_kernel(
    a,
    b,
    s,
    partial,  # [batch * segments, C]
    elements,
    channels,
    positions,
    segments,  # of a row
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sum STEPS tiles of a row of maps [batch, C, positions]: of one image and channel.

    Tiles begin at multiples of eight elements, the first one in the row before if need be: a tile
    that lies in the row is read by 16 bytes.
    """
    row, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    channel = row % channels
    start = row.to(tl.int64) * positions
    end = start + positions
    first = start // 8 * 8 + segment.to(tl.int64) * (TILE * STEPS)
    lane = tl.arange(0, TILE)
    if s is not None:
        factor = tl.load(s + channel)
    total = tl.zeros((TILE,), tl.float32)
    for step in tl.static_range(STEPS):
        tile = first + step * TILE
        whole = (tile >= start) & (tile + TILE <= end)
        inside = (lane >= start - tile) & (lane < end - tile)
        value = load_block(a + tile + lane, inside, whole)
        wide = value.to(tl.float32)
        total = tl.fma(wide, load_block(b + tile + lane, inside, whole).to(tl.float32), total)
        if s is not None:
            scaled = narrow(wide * factor, a.dtype.element_ty)
            store_block(a + tile + lane, scaled, inside, whole)
    at = (row // channels).to(tl.int64) * segments + segment
    tl.store(partial + at * channels + channel, tl.sum(total, axis=0))


@triton.jit
def channel_dot_sum_kernel(
    partial, out, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Compute ``out_c = Σ_i partial_ic`` of partial [count, C]."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, count, ROWS):
        inside = (first + row < count)[:, None] & (channel < channels)[None, :]
        at = (first + row).to(tl.int64)[:, None] * channels + channel[None, :]
        total += tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + channel, tl.sum(total, axis=0).to(tl.float32), mask=channel < channels)


def channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``out_c = Σ_{n,p} a_ncp · b_ncp``: a, b [N, C, *spatial] of one dtype -> [C] float32.

    b is brought to the layout of a, which is copied where it has gaps.
    """
    a = dense(a)
    return _dot(a, with_strides_of(b, a), None)


def channel_dot_scale_(a: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Compute :func:`channel_dot` of a and v, and in the same pass ``a_ncp ← a_ncp · s_c``.

    Raises:
        ValueError: a that is neither contiguous nor channels_last, or shares a part of v's memory.
    """
    if not is_dense(a):
        raise ValueError(
            "channel_dot_scale_: a: expected a contiguous or channels_last tensor, got strides "
            f"{a.stride()} for shape {list(a.shape)}"
        )
    v = with_strides_of(v, a)
    apart = abs(a.data_ptr() - v.data_ptr())
    if 0 < apart < a.numel() * a.element_size():
        raise ValueError("channel_dot_scale_: a, v: expected tensors that share no memory")
    return _dot(a, v, s.contiguous())


def _dot(a: Tensor, b: Tensor, s: Tensor | None) -> Tensor:
    """Sum products of dense maps of the same strides; with s, scale a."""
    if a.dtype == torch.float64:
        with torch.no_grad():
            if s is None:
                return definition.channel_dot(a, b)
            return definition.channel_dot_scale_(a, b, s)
    out = a.new_empty(a.shape[1], dtype=torch.float32)
    if a.numel() == 0:
        return out.zero_()
    batch, channels, positions, last = rows_of(a)
    with torch.cuda.device_of(a):
        if last:
            unit = unit_of(channels)
            columns = min(_WIDEST, triton.next_power_of_2(channels))
            rows = _TILE // columns
            count = divide_up(batch * positions, rows * _STEPS)
            partial = a.new_empty((count, channels), dtype=torch.float32)
            launch(
                channel_dot_columns_kernel,
                (count * divide_up(channels, columns),),
                a,
                b,
                s,
                partial,
                batch * positions,
                channels // unit,
                UNIT=unit,
                ROWS=rows,
                COLUMNS=columns,
                STEPS=_STEPS,
                **_RULE,
            )
        else:
            tile = min(_TILE, triton.next_power_of_2(positions + 7))
            steps = min(_STEPS, divide_up(positions + 7, tile))
            segments = divide_up(positions + 7, tile * steps)
            count = batch * segments
            partial = a.new_empty((count, channels), dtype=torch.float32)
            launch(
                channel_dot_rows_kernel,
                (batch * channels * segments,),
                a,
                b,
                s,
                partial,
                a.numel(),
                channels,
                positions,
                segments,
                TILE=tile,
                STEPS=steps,
                **_RULE,
            )
        launch(
            channel_dot_sum_kernel,
            (divide_up(channels, 32),),
            partial,
            out,
            count,
            channels,
            ROWS=32,
            COLUMNS=32,
            **_RULE,
        )
    return out


class Problem(NamedTuple):
    """A map of so many channels and positions; scales: whether a is scaled too."""

    channels: int
    positions: int
    dtype: torch.dtype
    last: bool
    scales: bool

    def key(self) -> str:
        layout = "channels_last" if self.last else "contiguous"
        scales = " scaled" if self.scales else ""
        return f"{self.channels}x{self.positions} {self.dtype} {layout}{scales}"

    def candidates(self, arch: int) -> list[Config]:
        return [_RULE]

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        a = torch.randn(2, self.positions, self.channels, device=device).to(self.dtype).mT
        a = a if self.last else a.contiguous()
        b, s = torch.ones_like(a), torch.randn(self.channels, device=device)
        if self.scales:
            return lambda config: channel_dot_scale_(a, b, s)
        return lambda config: channel_dot(a, b)


def problems() -> list[Problem]:
    """List channels in eights and not, rows longer than a tile and not."""
    return [
        Problem(channels, positions, dtype, last, scales)
        for dtype in (torch.bfloat16, torch.float32)
        for scales in (False, True)
        for channels, positions, last in (
            (264, 49, True),
            (33, 49, True),
            (33, 1680, False),
            (33, 49, False),
        )
    ]


TUNABLES = {"channel_dot": problems}
