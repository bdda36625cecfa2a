"""The way back through an affine map and its ReLU with the Gram matrices of both sides.

One read of the gradient and of y, one write of g. Every program makes one tile of one of the two
matrices for one split of the positions, and they take turns in writing g. The programs of a split
are neighbours in launch order: what one of them reads from DRAM the others read from L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.language import decode, dot, narrow
from svf_fast.triton.launch import launch
from svf_fast.triton.maps import dense
from svf_fast.triton.read_off import read_off
from svf_fast.triton.splits import (
    Launch,
    configurations,
    dtype_name,
    image_of,
    loads_vectors,
    offsets,
    positions_of_resnet,
    product_precision,
    random_maps,
    refuse_float64,
    sequences,
    shapes_for,
    tile_at,
)
from svf_fast.triton.tuning import Config, bucket, find, per_gpu


# side is 1 where only the second matrix is made: with it as a constant, the rebuilt activation
# would be computed in the layout of the product's fragments, which reads shared memory by scalars
@triton.jit(do_not_specialize=["side", "steps", "split_steps"])
def activation_grams_partial_kernel(
    grad,
    y,
    scale,
    shift,
    lattice,
    g,
    partial,
    side,
    sides,
    steps,
    split_steps,
    positions,
    channels,
    grid_size,  # images * channels of the codes
    image_stride,
    position_stride,
    channel_stride,
    ONE_TILE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum one tile of ``Σ_p g_p y_pᵀ`` or ``Σ_p x_p grad_pᵀ`` over one split of the positions."""
    tiles_b = tl.cdiv(channels, BLOCK_B)
    tiles = tl.cdiv(channels, BLOCK_A) * tiles_b
    matrix = tl.program_id(0) // tiles  # of the partial ones: sides of a split
    tile = tl.program_id(0) % tiles
    split = matrix // sides
    after = matrix % sides + side == 1
    turn = matrix % sides * tiles_b + tile % tiles_b  # among all that have these rows of g
    row = tile // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)
    column = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    factor = tl.load(scale + row, mask=row < channels, other=0.0)[None, :]
    offset = tl.load(shift + row, mask=row < channels, other=0.0)[None, :]

    rows = tl.arange(0, BLOCK_P)
    at_a = offsets(rows, row, position_stride, channel_stride)
    at_b = offsets(rows, column, position_stride, channel_stride)
    inside_a = row[None, :] < channels
    inside_b = column[None, :] < channels
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    first = split * split_steps
    for step in range(first, min(first + split_steps, steps)):
        start, count = tile_at(step, positions, image_stride, position_stride, BLOCK_P)
        exists = rows[:, None] < count
        written = rows[:, None] < tl.where(step % (sides * tiles_b) == turn, count, 0)
        # x takes no gradient: the second side loads these rows of it where it writes g
        used = exists if ONE_TILE else tl.where(after, written, exists)
        grad_a = tl.load(grad + start + at_a, mask=used & inside_a, other=0.0)
        y_a = tl.load(y + start + at_a, mask=exists & inside_a, other=0)
        if lattice is not None:
            image = image_of(step, positions, BLOCK_P) * channels
            codes = y_a.to(tl.float32)
            y_a, passing = decode(
                codes, lattice, image + row, grid_size, row < channels, grad_a.dtype
            )
            z = y_a.to(tl.float32) * factor + offset
            stopped = codes < passing
            z = tl.where(z < 0, 0.0, z)
            y_a = tl.where(exists & inside_a, y_a, 0.0)
        else:
            z = y_a.to(tl.float32) * factor + offset
            stopped = z <= 0
        g_a = narrow(tl.where(stopped, 0.0, grad_a.to(tl.float32) * factor), grad_a.dtype)
        x_a = narrow(tl.where(stopped, 0.0, z), grad_a.dtype)
        if lattice is not None:
            x_a = tl.where(exists & inside_a, x_a, 0.0)
        tl.store(g + start + at_a, g_a, mask=written & inside_a)
        left = tl.where(after, x_a, g_a)
        if ONE_TILE:
            right = tl.where(after, grad_a, y_a)
        elif lattice is not None:
            # of both sides' operands the one that this program multiplies
            coded = (rows[:, None] < tl.where(after, 0, count)) & inside_b
            plain = (rows[:, None] < tl.where(after, count, 0)) & inside_b
            codes_b = tl.load(y + start + at_b, mask=coded, other=0)
            decoded, _ = decode(
                codes_b, lattice, image + column, grid_size, column < channels, grad_a.dtype
            )
            grad_b = tl.load(grad + start + at_b, mask=plain, other=0.0)
            right = tl.where(coded, decoded, grad_b)
        else:
            source = tl.where(after, grad, y)
            right = tl.load(source + start + at_b, mask=exists & inside_b, other=0.0)
        total = dot(tl.trans(left), right, total, PRECISION)

    at = matrix.to(tl.int64) * channels * channels + row[:, None] * channels + column[None, :]
    tl.store(partial + at, total, mask=(row[:, None] < channels) & (column[None, :] < channels))


def activation_gradients(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    grid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``g = dL/dy`` of ``x = relu(y · scale + shift)``, and dS of the layers on both sides.

    grad, y, scale, shift, grid as for :func:`activation_grams`. before: left, right [1, C, R] and
    S [R] of the layer that made y, whose matrix is ``Σ_p g_p y_pᵀ``; after: of the one that reads
    x, whose matrix is ``Σ_p x_p grad_pᵀ``; empty for none -> g, dS [1, R] of each, read off its
    matrix, empty for none.
    """
    g, partial = _partial(grad, y, scale, shift, bool(before), bool(after), grid, None)
    sides = [(side[0], side[1], side[2]) for side in (before, after) if side]
    found = read_off(partial, sides) if sides else []
    own = found.pop(0) if before else partial.new_empty(0)
    return g, own, found[0] if after else partial.new_empty(0)


def activation_grams(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: bool,
    after: bool,
    grid: Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``g = dL/dy`` of ``x = relu(y · scale + shift)`` and the matrices of both sides.

    They are ``Σ_p g_p y_pᵀ`` and ``Σ_p x_p grad_pᵀ``.

    grad = dL/dx and y [N, C, *spatial] of one dtype, scale and shift [C] in float32 -> g
    [N, C, *spatial] in the layout of y, the matrices [1, C, C] in float32; one that is not wanted
    has no elements; for neither, g is affine_act_backward's. x and g are rounded to the dtype
    of the maps. Maps that are contiguous or channels_last (which loads 16 bytes at a time) are read
    as they lie; grad is brought to the layout of y. With a grid y is codes. Bytes of DRAM: grad and
    y read once, g written once, partial matrices.

    Raises:
        TypeError: another dtype than float32, bfloat16 and float16.
    """
    g, partial = _partial(grad, y, scale, shift, before, after, grid, config)
    none = partial.new_empty(0)
    first = partial[:, 0].sum(dim=0, keepdim=True) if before else none
    return g, first, partial[:, -1].sum(dim=0, keepdim=True) if after else none


def _partial(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    before: bool,
    after: bool,
    grid: Tensor | None,
    config: Config | None,
) -> tuple[Tensor, Tensor]:
    """Compute g, and the matrices that are wanted over each split [splits, sides, C, C]."""
    refuse_float64("activation_gradients", "y", grad.dtype)
    scale, shift = scale.contiguous(), shift.contiguous()
    sides = before + after
    if not sides:
        if grid is None:
            g = torch.ops.svf_fast.affine_act_backward(grad, y, None, scale, shift)
        else:
            g = torch.ops.svf_fast.quantized_backward(grad, y, grid, scale)
        return g, y.new_empty(0, dtype=torch.float32)
    channels = y.shape[1]
    y = dense(y)
    if grad.stride() != y.stride():
        grad = torch.empty_like(y, dtype=grad.dtype).copy_(grad)
    g = torch.empty_like(y, dtype=grad.dtype)
    if y.numel() == 0:
        partial = y.new_zeros((1, sides, channels, channels), dtype=torch.float32)
        return g, partial
    maps = sequences(grad, y, g, joined=grid is None)
    images, positions, _ = maps[0].shape
    vectors, coded = loads_vectors(maps), grid is not None
    problem = Problem(channels, images * positions, sides, grad.dtype, vectors, coded)
    with torch.cuda.device_of(y):
        splits, tiles, constants = (
            _launch(problem, images)
            if config is None
            else Launch.of(channels, channels, images, positions, config)
        )
        partial = y.new_empty((splits.number, sides, channels, channels), dtype=torch.float32)
        launch(
            activation_grams_partial_kernel,
            (splits.number * sides * tiles,),
            *maps[:2],
            scale,
            shift,
            grid,
            maps[2],
            partial,
            0 if before else 1,
            sides,
            splits.all_steps,
            splits.steps,
            positions,
            channels,
            0 if grid is None else grid[0].numel(),
            *maps[0].stride(),
            ONE_TILE=tiles == 1,
            PRECISION=product_precision(grad.dtype),
            **constants,
        )
        return g, partial


@per_gpu
def _launch(problem: Problem, images: int) -> Launch:
    config = find("activation_gradients", problem)
    positions = problem.positions // images
    return Launch.of(problem.channels, problem.channels, images, positions, config)


class Problem(NamedTuple):
    """What a configuration depends on.

    Channels; positions of all images; matrices that are asked for; dtype; whether the maps can be
    loaded by 16 bytes; whether y is codes.
    """

    channels: int
    positions: int
    sides: int
    dtype: torch.dtype
    vectors: bool = True
    coded: bool = False

    def key(self) -> str:
        sides = ("", "one side", "both sides")[self.sides]
        where = f"{self.channels} channels, {bucket(self.positions)} positions"
        loads = "" if self.vectors else ", loads by elements"
        coded = ", 8 bits" if self.coded else ""
        return f"{where}, {sides}, {dtype_name(self.dtype)}{coded}{loads}"

    def candidates(self, arch: int) -> list[Config]:
        width = self.channels
        # decoding takes registers that the widest tiles have not
        widest = min(width, 128) if self.coded else width
        shapes = shapes_for(widest, self.dtype, self.vectors, arch)
        return configurations(shapes, width, width, self.sides, arch)

    def launcher(self, device: torch.device) -> Callable[[Config], object]:
        grad, y = random_maps(self.positions, [self.channels] * 2, self.dtype, self.vectors, device)
        scale, shift = torch.randn(2, self.channels, device=device)
        both, grid = self.sides == 2, None
        if self.coded:
            y, grid = torch.ops.svf_fast.quantize(y, scale, shift)
        sides = True, both, grid
        return lambda config: activation_grams(grad, y, scale, shift, *sides, config=config)


def problems() -> list[Problem]:
    """List y1 (its own matrix) and y2 (both sides) of the bottlenecks of layers 2-4."""
    return [
        Problem(channels, positions, sides, torch.bfloat16, True, coded)
        for channels in (128, 256, 512)
        for positions in positions_of_resnet()
        for sides in (1, 2)
        for coded in (False, True)
    ]


TUNABLES = {"activation_gradients": problems}
