"""dS read off the partial sums of one or two Gram matrices: ``colsum(left ⊙ (M right)) / S``.

Every program adds the splits of one tile of a matrix, once, and multiplies it from both sides by
the factors of all directions. What it leaves for each direction is added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.language import dot
from svf_fast.triton.launch import launch
from svf_fast.triton.tuning import OPTIONS, Config


@triton.jit(do_not_specialize=["splits", "matrices", "groups", "rank", "rank_after"])
def read_off_kernel(
    partial,  # [splits, matrices, rows, columns]
    left,  # [rows, rank] of each group, of the first of two matrices
    right,  # [columns, rank]
    S,  # [groups * rank]
    left_after,  # of the second
    right_after,
    S_after,
    out,  # [tiles, groups * rank, then rank_after]
    splits,
    matrices,
    groups,
    rows,
    columns,
    rank,
    rank_after,
    left_group,  # strides
    left_row,
    left_rank,
    right_group,
    right_row,
    right_rank,
    left_after_row,
    left_after_rank,
    right_after_row,
    right_after_rank,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Read off one tile [BLOCK_A, BLOCK_B] of one matrix, for all its directions."""
    tiles_b = tl.cdiv(columns, BLOCK_B)
    tiles = tl.cdiv(rows, BLOCK_A) * tiles_b
    tile, matrix = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    after = matrix >= groups
    group = tl.where(after, 0, matrix)
    row = tile // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)
    column = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    inside_row, inside_column = row < rows, column < columns

    size = tl.cast(rows, tl.int64) * columns
    at = partial + matrix * size + row[:, None] * columns + column[None, :]
    inside = inside_row[:, None] & inside_column[None, :]
    M = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for split in tl.range(0, splits, loop_unroll_factor=8):  # as many loads in flight
        M += tl.load(at + split * matrices * size, mask=inside, other=0.0)

    left = tl.where(after, left_after, left + group * left_group)
    right = tl.where(after, right_after, right + group * right_group)
    l_row = tl.where(after, left_after_row, left_row)
    l_rank = tl.where(after, left_after_rank, left_rank)
    r_row = tl.where(after, right_after_row, right_row)
    r_rank = tl.where(after, right_after_rank, right_rank)
    values = tl.where(after, S_after, S + group * rank)
    directions = tl.where(after, rank_after, rank)
    place = out + tile * (groups * rank + rank_after)
    place += tl.where(after, groups * rank, group * rank)
    for first in range(0, directions, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside_r = r < directions
        ahead = right + column[:, None] * r_row + r[None, :] * r_rank
        there = inside_column[:, None] & inside_r[None, :]
        factor = tl.load(ahead, mask=there, other=0.0).to(tl.float32)
        product = dot(M, factor, tl.zeros((BLOCK_A, BLOCK_R), tl.float32), "tf32x3")
        behind = left + row[:, None] * l_row + r[None, :] * l_rank
        there = inside_row[:, None] & inside_r[None, :]
        product *= tl.load(behind, mask=there, other=0.0).to(tl.float32)
        total = tl.sum(product, axis=0)
        total /= tl.load(values + r, mask=inside_r, other=1.0).to(tl.float32)
        tl.store(place + r, total, mask=inside_r)


def read_off(
    partial: Tensor, sides: Sequence[tuple[Tensor, Tensor, Tensor]], *, config: Config | None = None
) -> list[Tensor]:
    """Read dS [G, R] of each side off ``partial`` [splits, matrices, Ca, Cb] in float32.

    A side: left [G, Ca, R], right [G, Cb, R] in any strides, S [G·R]. One side has a matrix a
    group; of two each has one. The operands of one side are of the dtypes of the other's.
    """
    splits, matrices, rows, columns = partial.shape
    (left, right, S), *more = sides
    groups, _, rank = left.shape
    left_after, right_after, S_after = more[0] if more else sides[0]
    rank_after = left_after.shape[2] if more else 0
    config = {**rule(rows, columns), **OPTIONS} if config is None else config
    tiles = -(-rows // config["BLOCK_A"]) * -(-columns // config["BLOCK_B"])
    out = partial.new_empty((tiles, groups * rank + rank_after))
    with torch.cuda.device_of(partial):
        launch(
            read_off_kernel,
            (tiles * matrices,),
            partial,
            left,
            right,
            S,
            left_after,
            right_after,
            S_after,
            out,
            splits,
            matrices,
            groups,
            rows,
            columns,
            rank,
            rank_after,
            *left.stride(),
            *right.stride(),
            *left_after.stride()[1:],
            *right_after.stride()[1:],
            **config,
        )
    total = out.sum(dim=0)
    if not more:
        return [total.view(groups, rank)]
    own, after = total.split([groups * rank, rank_after])
    return [own.view(groups, rank), after.view(1, rank_after)]


def rule(rows: int, columns: int) -> Config:
    """Return tiles that fill a good part of a GPU: 16 of 128 channels, 64 of 512."""
    block = 64 if min(rows, columns) > 256 else 32 if min(rows, columns) > 16 else 16
    return {"BLOCK_A": block, "BLOCK_B": block, "BLOCK_R": 32, "num_warps": 4}


class Problem(NamedTuple):
    """Matrices [channels, channels] with as many directions, of one side or two."""

    channels: int
    sides: int

    def key(self) -> str:
        return f"{self.channels} channels, {self.sides} sides"

    def candidates(self, arch: int) -> list[Config]:
        return [rule(self.channels, self.channels)]

    def launcher(self, device: torch.device) -> Callable[[Config], list[Tensor]]:
        C, sides = self
        partial = torch.randn(4, sides, C, C, device=device)
        factors = torch.randn(1, C, C, device=device)
        S = torch.ones(C, device=device)
        return lambda config: read_off(partial, [(factors, factors, S)] * sides, config=config)


def problems() -> list[Problem]:
    return [Problem(C, sides) for C in (128, 256, 512, 1024) for sides in (1, 2)]


TUNABLES = {"read_off": problems}
