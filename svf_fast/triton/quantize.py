"""Maps kept in 8 bits: ranges of channels, their grids and codes, and what is made of codes again.

Serves every GPU. Maps are read as they lie wherever their positions have a common stride. Ranges
are partial ones over splits of the positions, joined in the launch that makes the grids of them.
Bytes: y twice, codes once; predicted, as no GPU has timed it, 2.3 times what a pass over y takes in
float32.

Definition: :mod:`svf_fast.reference.quantize`, which also computes float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.reference import quantize as definition
from svf_fast.triton.language import affine_relu, decode, narrow
from svf_fast.triton.launch import launch
from svf_fast.triton.maps import dense, divide_up
from svf_fast.triton.splits import image_of, offsets, sequences, tile_at
from svf_fast.triton.tuning import INTERPRETED, OPTIONS, Config

_ROWS = 16  # of what the kernels hand on: low, high and whether all is finite of each split


@triton.jit
def ranges_kernel(
    y,
    partial,  # [splits, 3, N, C]: low, high, and 0 or NaN
    splits,
    images,
    positions,
    channels,
    image_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find the range of BLOCK_C channels of an image over one split of its positions."""
    blocks = tl.cdiv(channels, BLOCK_C)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, split = rest % images, rest // images
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    rows = tl.arange(0, BLOCK_P)
    at = offsets(rows, column, position_stride, channel_stride)
    low = tl.full((BLOCK_C,), float("inf"), tl.float32)
    high = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    nothing = tl.zeros((BLOCK_C,), tl.float32)
    tiles = tl.cdiv(positions, BLOCK_P)
    for tile in range(split, tiles, splits):
        first = tl.cast(tile, tl.int64) * BLOCK_P
        start = image.to(tl.int64) * image_stride + first * position_stride
        there = (rows[:, None] < positions - first) & inside[None, :]
        value = tl.load(y + start + at, mask=there, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(there, value, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(there, value, float("-inf")), axis=0))
        nothing += tl.sum(value - value, axis=0)
    place = partial + (split * 3 * images + image).to(tl.int64) * channels + column
    size = images * channels
    tl.store(place, low, mask=inside)
    tl.store(place + size, high, mask=inside)
    tl.store(place + 2 * size, nothing, mask=inside)


@triton.jit
def grid_kernel(
    partial,
    scale,
    shift,
    lattice,  # [3, N, C]: offset, step, first
    plan,  # [2, N, C]: anchor, inverse
    splits,
    size,  # N * C
    channels,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the grids of BLOCK channels of their ranges, as the definition does."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    nothing = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        place = partial + tl.cast(split, tl.int64) * 3 * size + at
        low = tl.minimum(low, tl.load(place, mask=inside, other=0.0))
        high = tl.maximum(high, tl.load(place + size, mask=inside, other=0.0))
        nothing += tl.load(place + 2 * size, mask=inside, other=0.0)
    width = high - low
    finite = (nothing == 0) & (width < float("inf"))
    flat = (width >= TINY) == 0
    width = tl.where(flat | (finite == 0), 1.0, width)
    if scale is not None:
        factor = tl.load(scale + at % channels, mask=inside, other=0.0)
        term = tl.load(shift + at % channels, mask=inside, other=0.0)
        rises = factor > 0
        edge = -term / tl.where(factor == 0, 1.0, factor)
        ends = tl.where(((tl.fma(low, factor, term) <= 0) == 0) == rises, low, high)
        known = (factor != 0) & (tl.abs(edge) < float("inf"))
        anchor = tl.where(known, tl.minimum(tl.maximum(edge, low), high), ends)
        stopped = tl.where(rises, anchor - low, high - anchor)
        first = tl.minimum(tl.maximum(tl.ceil(stopped / width * 254.0), 1.0), 255.0)
        first = tl.where(flat | (finite == 0), 128.0, first)
        anchor = tl.where(flat, low, anchor)
        sign = tl.where(rises, 1.0, -1.0)
        step = tl.where(flat, 0.0, sign * width / 254.0)
        inverse = sign * 254.0 / width
        offset = anchor + (0.5 - first) * step
    else:
        first = tl.zeros((BLOCK,), tl.float32)
        anchor, offset = low, low
        step, inverse = tl.where(flat, 0.0, width / 255.0), 255.0 / width
    tl.store(lattice + at, tl.where(finite, offset, float("nan")), mask=inside)
    tl.store(lattice + size + at, tl.where(finite, step, 0.0), mask=inside)
    tl.store(lattice + 2 * size + at, first, mask=inside)
    tl.store(plan + at, tl.where(finite, anchor, 0.0), mask=inside)
    tl.store(plan + size + at, tl.where(flat | (finite == 0), 0.0, inverse), mask=inside)


@triton.jit
def encode_kernel(
    y,
    scale,
    shift,
    lattice,
    plan,
    codes,
    size,
    positions,
    channels,
    image_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Code a tile [BLOCK_P, BLOCK_C] of an image."""
    at, there, column, inside, own = _tile(
        positions, channels, image_stride, position_stride, channel_stride, BLOCK_P, BLOCK_C
    )
    value = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    anchor = tl.load(plan + own, mask=inside, other=0.0)[None, :]
    inverse = tl.load(plan + size + own, mask=inside, other=0.0)[None, :]
    if scale is not None:
        first = tl.load(lattice + 2 * size + own, mask=inside, other=0.0)[None, :]
        factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
        term = tl.load(shift + column, mask=inside, other=0.0)[None, :]
        stops = tl.fma(value, factor, term) <= 0
        lowest, highest = tl.where(stops, 0.0, first), tl.where(stops, first - 1, 255.0)
    else:
        first = tl.full((1, BLOCK_C), 0.5, tl.float32)
        lowest, highest = 0.0, 255.0
    code = tl.fma(value - anchor, inverse, first)
    code = tl.where(code >= lowest, code, lowest)  # NaN too
    code = tl.where(code <= highest, code, highest)
    tl.store(codes + at, code.to(tl.int32).to(tl.uint8), mask=there)


@triton.jit
def decode_kernel(
    codes,
    lattice,
    grad,  # None: the values themselves
    scale,
    shift,
    out,
    size,
    positions,
    channels,
    image_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Decode a tile: its values, their activation, or the gradient that their mask lets through."""
    at, there, column, inside, own = _tile(
        positions, channels, image_stride, position_stride, channel_stride, BLOCK_P, BLOCK_C
    )
    dtype = out.dtype.element_ty
    coded = tl.load(codes + at, mask=there, other=0).to(tl.float32)
    value, first = decode(coded, lattice, own, size, inside, dtype)
    if scale is not None:
        factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
        if grad is not None:
            value = tl.load(grad + at, mask=there, other=0.0).to(tl.float32) * factor
        else:
            value = affine_relu(value, factor, tl.load(shift + column, mask=inside)[None, :])
        value = narrow(tl.where(coded >= first, value.to(tl.float32), 0.0), dtype)
    tl.store(out + at, value, mask=there)


@triton.jit
def _tile(
    positions,
    channels,
    image_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return where this program's tile lies and what of it is there, its channels, and which are.

    Last where these are among the channels of all images.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    step = tl.program_id(0) // blocks
    start, count = tile_at(step, positions, image_stride, position_stride, BLOCK_P)
    rows = tl.arange(0, BLOCK_P)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    at = start + offsets(rows, column, position_stride, channel_stride)
    there = (rows[:, None] < count) & inside[None, :]
    return at, there, column, inside, image_of(step, positions, BLOCK_P) * channels + column


def rule(last: bool) -> Config:
    """Return tiles whose longer side is what lies together; larger ones for the interpreter."""
    if INTERPRETED:
        return {"BLOCK_P": 64, "BLOCK_C": 64, "num_warps": 4, **OPTIONS}
    across, along = (64, 32) if last else (8, 256)
    return {"BLOCK_P": along, "BLOCK_C": across, "num_warps": 4, **OPTIONS}


def quantize(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes of y in its layout, and the grid [3, N, C] in float32.

    y [N, C, *spatial], contiguous where it has gaps; scale, shift [C] in float32 or None.
    """
    y = dense(y)
    if y.dtype == torch.float64 or y.numel() == 0:
        return definition.quantize(y, scale, shift)
    codes = torch.empty_like(y, dtype=torch.uint8)
    images, channels = y.shape[:2]
    source, target = sequences(y, codes, joined=False)
    positions = source.shape[1]
    config = rule(source.stride(2) == 1) if config is None else config
    blocks = divide_up(channels, config["BLOCK_C"])
    tiles = divide_up(positions, config["BLOCK_P"])
    splits = min(tiles, _ROWS)
    partial = y.new_empty((splits, 3, images, channels), dtype=torch.float32)
    grid = y.new_empty((3, images, channels), dtype=torch.float32)
    plan = torch.empty_like(grid[:2])
    affine = [None if x is None else x.contiguous() for x in (scale, shift)]
    sizes = positions, channels, *source.stride()
    size = images * channels
    with torch.cuda.device_of(y):
        launch(ranges_kernel, (splits * images * blocks,), source, partial, splits, images, *sizes,
               **config)  # fmt: skip
        options = {"BLOCK": 256, "num_warps": 4, **OPTIONS}
        tiny = 1024 * torch.finfo(torch.float32).tiny
        launch(grid_kernel, (divide_up(size, 256),), partial, *affine, grid, plan, splits, size,
               channels, TINY=tiny, **options)  # fmt: skip
        launch(encode_kernel, (images * tiles * blocks,), source, *affine, grid, plan, target,
               size, *sizes, **config)  # fmt: skip
    return codes, grid


def dequantize(
    codes: Tensor, grid: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return what codes stand for in a dtype, in their layout; with scale and shift activated."""
    codes = dense(codes)
    if dtype == torch.float64:
        return definition.dequantize(codes, grid, scale, shift, dtype)
    out = torch.empty_like(codes, dtype=dtype)
    _decode(codes, grid, None, scale, shift, out)
    return out


def quantized_backward(grad: Tensor, codes: Tensor, grid: Tensor, scale: Tensor) -> Tensor:
    """Compute ``scale_c · grad`` where the ReLU passed, by the codes, in the layout of grad."""
    grad = dense(grad)
    out = torch.empty_like(grad)
    _backward(grad, codes, grid, scale, out)
    return out


def quantized_backward_(grad: Tensor, codes: Tensor, grid: Tensor, scale: Tensor) -> None:
    """Compute :func:`quantized_backward` in place of grad."""
    _backward(grad, codes, grid, scale, grad)


def _backward(grad: Tensor, codes: Tensor, grid: Tensor, scale: Tensor, out: Tensor) -> None:
    if grad.dtype == torch.float64:
        out.copy_(definition.quantized_backward(grad, codes, grid, scale))
        return
    if codes.stride() != grad.stride():
        codes = torch.empty_like(grad, dtype=torch.uint8).copy_(codes)
    _decode(codes, grid, grad, scale, None, out)


def _decode(codes, grid, grad, scale, shift, out) -> None:
    if codes.numel() == 0:
        return
    images, channels = codes.shape[:2]
    maps = [codes, out] if grad is None else [codes, out, grad]
    source, target, *given = sequences(*maps, joined=False)
    positions = source.shape[1]
    config = rule(source.stride(2) == 1)
    programs = images * divide_up(positions, config["BLOCK_P"])
    affine = [None if x is None else x.contiguous() for x in (scale, shift)]
    with torch.cuda.device_of(codes):
        launch(
            decode_kernel,
            (programs * divide_up(channels, config["BLOCK_C"]),),
            source,
            grid,
            given[0] if given else None,
            *affine,
            target,
            images * channels,
            positions,
            channels,
            *source.stride(),
            **config,
        )


class Problem(NamedTuple):
    """A map of so many channels and positions, and whether an edge is in its grid."""

    channels: int
    positions: int
    dtype: torch.dtype
    last: bool
    edge: bool

    def key(self) -> str:
        layout = "channels_last" if self.last else "contiguous"
        edge = ", an edge" if self.edge else ""
        return f"{self.channels}x{self.positions} {self.dtype} {layout}{edge}"

    def candidates(self, arch: int) -> list[Config]:
        return [rule(self.last)]

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        y = torch.randn(2, self.positions, self.channels, device=device).to(self.dtype).mT
        y = y if self.last else y.contiguous()
        scale = torch.randn(self.channels, device=device) if self.edge else None
        shift = None if scale is None else torch.randn_like(scale)

        def there_and_back(config: Config) -> Tensor:
            codes, grid = quantize(y, scale, shift, config=config)
            if scale is not None:
                quantized_backward(y, codes, grid, scale)
            return dequantize(codes, grid, scale, shift, self.dtype)

        return there_and_back


def problems() -> list[Problem]:
    """List what a bottleneck keeps: y before a ReLU, x of a shortcut."""
    return [
        Problem(channels, 1681, dtype, last, edge)
        for dtype in (torch.bfloat16, torch.float32)
        for channels, edge in ((256, True), (1024, False))
        for last in (True, False)
    ]


TUNABLES = {"quantize": problems}
