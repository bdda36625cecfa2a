"""Gram matrix of two maps on tensor cores: positions split over blocks, one read of each map.

Every program makes one tile of the matrix for one split of the positions. The tiles of a split are
neighbours in launch order: what one of them reads from DRAM the others read from L2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.language import affine_relu, decode, dot
from svf_fast.triton.launch import launch
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


@triton.jit(do_not_specialize=["steps", "split_steps"])
def gram_partial_kernel(
    a,
    b,
    scale,
    shift,
    lattice,
    partial,
    steps,
    split_steps,
    positions,
    grid_size,  # images * channels of the codes
    groups,
    width_a,
    width_b,
    a_image,
    a_position,
    a_channel,
    b_image,
    b_position,
    b_channel,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum one tile [BLOCK_A, BLOCK_B] of one group's matrix over one split of the positions."""
    tiles_b = tl.cdiv(width_b, BLOCK_B)
    tiles = tl.cdiv(width_a, BLOCK_A) * tiles_b
    matrix = tl.program_id(0) // tiles  # of the partial ones: groups of a split
    tile = tl.program_id(0) % tiles
    split = matrix // groups
    group = matrix % groups
    row = tile // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)
    column = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    channels_a = group * width_a + row
    channels_b = group * width_b + column
    if scale is not None:
        factor = tl.load(scale + channels_a, mask=row < width_a, other=0.0)[None, :]
        offset = tl.load(shift + channels_a, mask=row < width_a, other=0.0)[None, :]

    rows = tl.arange(0, BLOCK_P)
    at_a = offsets(rows, channels_a, a_position, a_channel)
    at_b = offsets(rows, channels_b, b_position, b_channel)
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    first = split * split_steps
    for step in range(first, min(first + split_steps, steps)):
        start_a, count = tile_at(step, positions, a_image, a_position, BLOCK_P)
        start_b, count = tile_at(step, positions, b_image, b_position, BLOCK_P)
        inside_a = (rows[:, None] < count) & (row[None, :] < width_a)
        inside_b = (rows[:, None] < count) & (column[None, :] < width_b)
        left = tl.load(a + start_a + at_a, mask=inside_a, other=0)
        right = tl.load(b + start_b + at_b, mask=inside_b, other=0)
        image = image_of(step, positions, BLOCK_P)
        if a.dtype.element_ty == tl.uint8:
            at = image * groups * width_a + channels_a
            codes = left.to(tl.float32)
            left, first_passing = decode(codes, lattice, at, grid_size, row < width_a, right.dtype)
            if scale is not None:
                rebuilt = affine_relu(left, factor, offset)
                left = tl.where(codes >= first_passing, rebuilt, 0.0)
            left = tl.where(inside_a, left, 0.0)
        elif scale is not None:
            left = tl.where(inside_a, affine_relu(left, factor, offset), 0.0)
        if b.dtype.element_ty == tl.uint8:
            at = image * groups * width_b + channels_b
            right, _ = decode(right, lattice, at, grid_size, column < width_b, left.dtype)
            right = tl.where(inside_b, right, 0.0)
        total = dot(tl.trans(left), right, total, PRECISION)

    at = matrix.to(tl.int64) * width_a * width_b + row[:, None] * width_b + column[None, :]
    tl.store(partial + at, total, mask=(row[:, None] < width_a) & (column[None, :] < width_b))


def gram(
    a: Tensor,
    b: Tensor,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    grid: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """Compute ``M = Σ_p a'_p b_pᵀ`` per group, ``a' = relu(a · scale + shift)`` if given, else a.

    a [N, Ca, *spatial] and b [N, Cb, *spatial] of one dtype, scale and shift [Ca] in float32 ->
    [G, Ca/G, Cb/G] in float32. a' is rounded to the dtype of a. A map is read as it lies wherever
    its positions have a common stride, channels_last maps 16 bytes at a time. With a grid one of
    both is codes, decoded as they are read. Bytes of DRAM: a and b once, partial matrices.

    Raises:
        TypeError: another dtype than float32, bfloat16 and float16.
    """
    if a.numel() == 0 or b.numel() == 0:
        widths = a.shape[1] // groups, b.shape[1] // groups
        return a.new_zeros((groups, *widths), dtype=torch.float32)
    return _partial(a, b, groups, scale, shift, grid, config).sum(dim=0)


def scale_gradient(
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    grid: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """Compute ``dS_r = left_rᵀ M right_r / S_r`` of M = :func:`gram`, per group.

    left [G, Ca/G, R], right [G, Cb/G, R] in any strides, S [G·R] -> [G, R] in float32, in two
    launches and a sum.
    """
    if a.numel() == 0 or b.numel() == 0:
        return a.new_zeros((len(left), left.shape[2]), dtype=torch.float32)
    partial = _partial(a, b, len(left), scale, shift, grid, config)
    return read_off(partial, [(left, right, S)])[0]


def _partial(
    a: Tensor,
    b: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    grid: Tensor | None,
    config: Config | None,
) -> Tensor:
    """Sum over each split of the positions -> [splits, G, Ca/G, Cb/G]."""
    dtype = b.dtype if a.dtype == torch.uint8 else a.dtype
    refuse_float64("gram", "a", dtype)
    width_a, width_b = a.shape[1] // groups, b.shape[1] // groups
    maps = sequences(a, b, joined=grid is None)
    images, positions, _ = maps[0].shape
    count, rebuild, vectors = images * positions, scale is not None, loads_vectors(maps)
    problem = Problem(width_a, width_b, groups, count, dtype, rebuild, vectors, grid is not None)
    with torch.cuda.device_of(a):
        splits, tiles, constants = (
            _launch(problem, images)
            if config is None
            else Launch.of(width_a, width_b, images, positions, config)
        )
        partial = a.new_empty((splits.number, groups, width_a, width_b), dtype=torch.float32)
        launch(
            gram_partial_kernel,
            (splits.number * groups * tiles,),
            *maps,
            None if scale is None else scale.contiguous(),
            None if shift is None else shift.contiguous(),
            grid,
            partial,
            splits.all_steps,
            splits.steps,
            positions,
            0 if grid is None else grid[0].numel(),
            groups,
            width_a,
            width_b,
            *maps[0].stride(),
            *maps[1].stride(),
            PRECISION=product_precision(dtype),
            **constants,
        )
        return partial


@per_gpu
def _launch(problem: Problem, images: int) -> Launch:
    config = find("gram", problem)
    return Launch.of(problem.width_a, problem.width_b, images, problem.positions // images, config)


class Problem(NamedTuple):
    """What a configuration depends on.

    Channels of a and of b per group; groups; positions of all images; dtype; whether a is rebuilt;
    whether the maps can be loaded by 16 bytes; whether one of both is codes.
    """

    width_a: int
    width_b: int
    groups: int
    positions: int
    dtype: torch.dtype
    rebuild: bool
    vectors: bool = True
    coded: bool = False

    def key(self) -> str:
        where = f"{self.width_a} x {self.width_b} channels, {bucket(self.positions)} positions"
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        rebuilt = ", rebuilt" if self.rebuild else ""
        loads = "" if self.vectors else ", loads by elements"
        coded = ", 8 bits" if self.coded else ""
        return f"{where}{groups}, {dtype_name(self.dtype)}{rebuilt}{coded}{loads}"

    def candidates(self, arch: int) -> list[Config]:
        shapes = shapes_for(max(self.width_a, self.width_b), self.dtype, self.vectors, arch)
        return configurations(shapes, self.width_a, self.width_b, self.groups, arch)

    def launcher(self, device: torch.device) -> Callable[[Config], object]:
        channels = [self.groups * self.width_a, self.groups * self.width_b]
        a, b = random_maps(self.positions, channels, self.dtype, self.vectors, device)
        scale, shift = torch.randn(2, channels[0], device=device) if self.rebuild else (None, None)
        grid = None
        if self.coded and self.rebuild:
            a, grid = torch.ops.svf_fast.quantize(a, scale, shift)
        elif self.coded:
            b, grid = torch.ops.svf_fast.quantize(b, None, None)
        return lambda config: gram(a, b, self.groups, scale, shift, grid, config=config)


def problems() -> list[Problem]:
    """List the widths in layers 2-4, also rebuilding the inputs of the third convolutions."""
    return [
        Problem(width, width, 1, positions, torch.bfloat16, rebuild, True, coded)
        for width in (128, 256, 512, 1024)
        for positions in positions_of_resnet()
        for rebuild in ((False, True) if width <= 512 else (False,))
        for coded in (False, True)
    ]


TUNABLES = {"gram": problems}
