"""dS read off the partial sums of one or two Gram matrices: ``colsum(left ⊙ (M right)) / S``.

One launch adds the splits of a matrix as it reads them, multiplies by ``right``, and takes the
products with ``left`` over a part of the rows; the parts are added in a fixed order by a second,
tiny one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.language import dot
from svf_fast.triton.tuning import OPTIONS, Config

PARTS = 8  # of the rows of a matrix


@triton.jit(do_not_specialize=["splits"])
def read_off_kernel(
    partial,  # [splits, matrices, rows, columns]
    left,  # [rows, rank] of each group, of the first of two matrices
    right,  # [columns, rank]
    S,  # [groups * rank]
    left_after,  # of the second
    right_after,
    S_after,
    out,  # [PARTS, groups * rank, then groups * rank_after]
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
    PARTS: tl.constexpr,
):
    """One part of the rows, for BLOCK_R directions of one group."""
    part = tl.program_id(0) % PARTS
    block = tl.program_id(0) // PARTS
    blocks = tl.cdiv(rank, BLOCK_R)  # of a group
    after = block >= blocks * groups  # then groups are 1
    group = tl.where(after, 0, block // blocks)
    first = tl.where(after, block - blocks * groups, block % blocks) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    inside_r = r < tl.where(after, rank_after, rank)
    matrix = tl.where(after, matrices - 1, group)
    source = partial + matrix.to(tl.int64) * rows * columns
    split_stride = matrices.to(tl.int64) * rows * columns

    l_base = tl.where(after, left_after, left + group.to(tl.int64) * left_group)
    r_base = tl.where(after, right_after, right + group.to(tl.int64) * right_group)
    l_row = tl.where(after, left_after_row, left_row)
    l_rank = tl.where(after, left_after_rank, left_rank)
    r_row = tl.where(after, right_after_row, right_row)
    r_rank = tl.where(after, right_after_rank, right_rank)

    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(part * BLOCK_A, rows, PARTS * BLOCK_A):
        row = start + tl.arange(0, BLOCK_A)
        product = tl.zeros((BLOCK_A, BLOCK_R), tl.float32)
        for k0 in range(0, columns, BLOCK_B):
            column = k0 + tl.arange(0, BLOCK_B)
            at = row[:, None].to(tl.int64) * columns + column[None, :]
            inside = (row[:, None] < rows) & (column[None, :] < columns)
            M = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
            for split in range(splits):
                M += tl.load(source + split * split_stride + at, mask=inside, other=0.0)
            at = column[:, None].to(tl.int64) * r_row + r[None, :].to(tl.int64) * r_rank
            inside = (column[:, None] < columns) & inside_r[None, :]
            factor = tl.load(r_base + at, mask=inside, other=0.0).to(tl.float32)
            product = dot(M, factor, product, "tf32x3")
        at = row[:, None].to(tl.int64) * l_row + r[None, :].to(tl.int64) * l_rank
        inside = (row[:, None] < rows) & inside_r[None, :]
        total += tl.sum(
            product * tl.load(l_base + at, mask=inside, other=0.0).to(tl.float32), axis=0
        )

    values = tl.where(after, S_after, S + group * rank)
    total = total / tl.load(values + r, mask=inside_r, other=1.0).to(tl.float32)
    width = groups * rank + rank_after
    place = part * width + tl.where(after, groups * rank, group * rank) + r
    tl.store(out + place, total, mask=inside_r)


def read_off(
    partial: Tensor, sides: Sequence[tuple[Tensor, Tensor, Tensor]], *, config: Config | None = None
) -> list[Tensor]:
    """dS [G, R] of each side from ``partial`` [splits, matrices, Ca, Cb] in float32.

    A side: left [G, Ca, R], right [G, Cb, R] in any strides, S [G·R]. One side has a matrix a
    group; of two each has one. A side's left and right are of one dtype with the other's.
    """
    splits, matrices, rows, columns = partial.shape
    (left, right, S), *more = sides
    groups, _, rank = left.shape
    left_after, right_after, S_after = more[0] if more else sides[0]
    rank_after = left_after.shape[2] if more else 0
    width = groups * rank + rank_after
    out = partial.new_empty((PARTS, width))
    config = config or rule(rows)
    blocks = groups * triton.cdiv(rank, config["BLOCK_R"])
    blocks += triton.cdiv(rank_after, config["BLOCK_R"])
    with torch.cuda.device_of(partial):
        read_off_kernel[(PARTS * blocks,)](
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
            PARTS=PARTS,
            **config,
        )
    total = out.sum(dim=0)
    found = [total[: groups * rank].view(groups, rank)]
    return [*found, total[groups * rank :].view(1, rank_after)] if more else found


def rule(rows: int) -> Config:
    """All parts at work, of at most 64 rows at once."""
    block_a = min(64, max(16, triton.next_power_of_2(triton.cdiv(rows, PARTS))))
    return {"BLOCK_A": block_a, "BLOCK_B": 32, "BLOCK_R": 32, "num_warps": 4, **OPTIONS}
