"""W = U diag(S) V on tensor cores: the scaling on the way in, the rounding on the way out.

One layer's weight, or those of all layers of a network in one launch: a weight alone has too few
tiles to fill a GPU, and a launch for each is what a small step waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.language import dot, narrow
from svf_fast.triton.launch import launch
from svf_fast.triton.maps import divide_up
from svf_fast.triton.tuning import OPTIONS, Config, find, gpu

_ALIGNMENT = 64  # elements between the beginnings of two weights


@triton.jit
def compose_tile(
    U,  # [rows, rank], as S, V and what is written of one group
    S,  # [rank]
    V,  # [rank, columns]
    scale,  # [rows]
    out,  # [rows, columns]
    scaled,
    scaled_rows,  # of the second weight: all or none
    tile,
    rows,
    columns,
    rank,
    v_rank,  # strides of V
    v_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(columns, BLOCK_N)
    row = tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    direction = tl.arange(0, BLOCK_R)
    left = U + row[:, None] * rank
    right = V + column[None, :] * v_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + direction
        s = tl.load(S + r, mask=r < rank, other=0.0).to(tl.float32)
        inside = (row[:, None] < rows) & (r[None, :] < rank)
        u = tl.load(left + r[None, :], mask=inside, other=0.0).to(tl.float32) * s[None, :]
        inside = (r[:, None] < rank) & (column[None, :] < columns)
        v = tl.load(right + r[:, None] * v_rank, mask=inside, other=0.0).to(tl.float32)
        total = dot(u, v, total, PRECISION)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None] * columns + column[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=inside)
    total *= tl.load(scale + row, mask=row < scaled_rows, other=0.0)[:, None]
    inside = (row[:, None] < scaled_rows) & (column[None, :] < columns)
    tl.store(scaled + at, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def compose_kernel(
    U,
    S,
    V,
    scale,
    out,
    scaled,
    rows,
    columns,
    rank,
    v_rank,
    v_column,
    scaled_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of one group's matrix [rows, columns]; W is all of them."""
    group = tl.program_id(1).to(tl.int64)
    start = group * rows * columns
    compose_tile(
        U + group * rows * rank,
        S + group * rank,
        V + group * rank * v_rank,
        scale + group * rows,
        out + start,
        scaled + start,
        scaled_rows,
        tl.program_id(0),
        rows,
        columns,
        rank,
        v_rank,
        v_column,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        PRECISION,
    )


@triton.jit
def compose_all_kernel(
    table,  # of `table`: a row of numbers a weight, then (weight, group, tile) of each program
    out,
    first_program,
    NUMBERS: tl.constexpr,
    RANK_INSIDE: tl.constexpr,  # V has its directions innermost
    VECTORS: tl.constexpr,  # ranks are multiples of 8, operands begin at multiples of 16 bytes
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of one group's matrix of one of many weights."""
    program = table + first_program + tl.program_id(0) * 3
    entry = table + tl.load(program) * NUMBERS
    group = tl.load(program + 1)
    tile = tl.load(program + 2).to(tl.int32)
    U = tl.load(entry).to(tl.pointer_type(tl.float32))
    S = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    V = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    scale = tl.load(entry + 3)
    start = tl.load(entry + 4)
    rows = tl.load(entry + 6).to(tl.int32)
    columns = tl.load(entry + 7).to(tl.int32)
    rank = tl.load(entry + 8).to(tl.int32)
    ranks = tl.load(entry + 9).to(tl.int32)  # of all groups
    if VECTORS:
        U = tl.multiple_of(U, 16)
        V = tl.multiple_of(V, 16)
        rank = tl.multiple_of(rank, 8)
        ranks = tl.multiple_of(ranks, 8)
    if RANK_INSIDE:
        v_rank, v_column = 1, ranks
    else:
        v_rank, v_column = columns, 1
    start += group * rows * columns
    compose_tile(
        U + group * rows * rank,
        S + group * rank,
        V + group * rank * v_rank,
        scale.to(tl.pointer_type(tl.float32)) + group * rows,
        out + start,
        out + start + tl.load(entry + 5),
        tl.where(scale != 0, rows, 0),
        tile,
        rows,
        columns,
        rank,
        v_rank,
        v_column,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        PRECISION,
    )


def compose(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    groups: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute W = ``U diag(S) V`` per group in ``dtype``, and scale ⊙ W; accumulate in float32.

    U [Co, R], S [G·R], V [G·R, Ci/G, kh, kw] of any dtype up to float32, scale [Co] in float32 ->
    [Co, Ci/G, kh, kw] in the order of V's memory, the second empty where no scale is given. Reads
    U, S and V and writes both once; nothing in between is written.
    """
    V, order = _ordered(V)
    out = _weight(U, V, dtype, order)
    scaled = out.new_empty(0) if scale is None else torch.empty_like(out)
    problem = Problem(U.shape[0] // groups, V[0].numel(), groups)
    if out.numel() == 0:
        return out, scaled
    with torch.cuda.device_of(U):
        config = config or find("compose", problem)
        tiles_m = divide_up(problem.rows, config["BLOCK_M"])
        tiles = tiles_m * divide_up(problem.columns, config["BLOCK_N"])
        launch(
            compose_kernel,
            (tiles, groups),
            U.contiguous(),
            S.contiguous(),
            V,
            S if scale is None else scale.contiguous(),  # what is there but not read
            out,
            out if scale is None else scaled,
            problem.rows,
            problem.columns,
            U.shape[1],
            *order.strides(V),
            0 if scale is None else problem.rows,
            PRECISION=_precision(dtype),
            **config,
        )
    return out, scaled


class Order(NamedTuple):
    """How V [G·R, Ci/G, kh, kw] lies in memory.

    Directions are innermost or outermost; of the rest, channels or positions are innermost.
    """

    rank_inside: bool
    channels_last: bool

    def strides(self, V: Tensor) -> tuple[int, int]:
        """Return the strides from direction to direction and from column to column."""
        return (1, len(V)) if self.rank_inside else (V[0].numel(), 1)


def _ordered(V: Tensor) -> tuple[Tensor, Order]:
    """Return V, copied if its memory is in none of the orders, and the order."""
    inner = V.movedim(0, -1)
    if V.is_contiguous():
        return V, Order(False, False)
    if inner.is_contiguous():
        return V, Order(True, False)
    if V.dim() == 4 and V.is_contiguous(memory_format=torch.channels_last):
        return V, Order(False, True)
    if V.dim() == 4 and inner.movedim(0, 2).is_contiguous():
        return V, Order(True, True)
    return V.contiguous(), Order(False, False)


def _weight(U: Tensor, V: Tensor, dtype: torch.dtype, order: Order) -> Tensor:
    """Allocate a weight whose columns are in the order of V's."""
    shape = U.shape[0], *V.shape[1:]
    memory_format = torch.channels_last if order.channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=U.device, memory_format=memory_format)


def _precision(dtype: torch.dtype) -> str:
    """Say how to multiply: one TF32 product adds 1 % to the error of rounding W to bfloat16."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


_NUMBERS = 10  # of a weight in the table


def compose_all(
    U: Sequence[Tensor],
    S: Sequence[Tensor],
    V: Sequence[Tensor],
    groups: Sequence[int],
    scale: Sequence[Tensor | None],
    dtype: torch.dtype,
    table: Tensor,
    *,
    config: Config | None = None,
) -> list[Tensor]:
    """Compute :func:`compose` of several weights in one launch -> W, scale ⊙ W of each, in turns.

    The factors are in float32, where ``table`` (:func:`table`) says. All weights are views of one
    allocation.
    """
    starts, total = _starts(U, V, scale)
    out = torch.empty(total, dtype=dtype, device=U[0].device)
    orders = [_ordered(v)[1] for v in V]
    config = config or _shared(gpu().arch)
    first = len(U) * _NUMBERS
    with torch.cuda.device_of(out):
        launch(
            compose_all_kernel,
            ((table.numel() - first) // 3,),
            table,
            out,
            first,
            NUMBERS=_NUMBERS,
            RANK_INSIDE=any(order.rank_inside for order in orders),
            VECTORS=_loads_vectors(U, V),
            PRECISION=_precision(dtype),
            **config,
        )
    made = []
    for u, v, order, (start, further) in zip(U, V, orders, starts, strict=True):
        shape, strides = (len(u), *v.shape[1:]), _strides(v, order)
        made.append(out.as_strided(shape, strides, start))
        made.append(out.as_strided(shape, strides, start + further) if further else out[:0])
    return made


def table(entries: Sequence, dtype: torch.dtype) -> Tensor:
    """Collect what :func:`compose_all` reads of its operands: addresses, sizes, tiles; on the CPU.

    Raises:
        ValueError: operands that one launch cannot take: of another dtype than float32, or with V
            in several orders of memory.
    """
    orders = [_ordered(V)[1] for _, _, V, _, _ in entries]
    U, _, V, _, scales = zip(*entries, strict=True)
    starts, _ = _starts(U, V, scales)
    config, inside = _shared(gpu().arch), any(order.rank_inside for order in orders)
    numbers, programs = [], []
    for index, (entry, order, start) in enumerate(zip(entries, orders, starts, strict=True)):
        U, S, V, groups, scale = entry
        tensors = [x for x in entry if isinstance(x, Tensor)]
        lies = U.is_contiguous() and S.is_contiguous() and _ordered(V)[0] is V
        if any(x.dtype != torch.float32 for x in tensors) or not lies:
            raise ValueError(
                "compose_all: expected factors in float32, each dense in memory, got "
                f"{[(x.dtype, x.shape, x.stride()) for x in tensors]}"
            )
        if not order.rank_inside and inside and min(len(V), V[0].numel()) > 1:
            raise ValueError("compose_all: expected all V in one order of memory, got several")
        rows, columns = len(U) // groups, V[0].numel()
        pointers = [0 if x is None else x.data_ptr() for x in (U, S, V, scale)]
        numbers += [*pointers, *start, rows, columns, U.shape[1], len(V)]
        tiles = divide_up(rows, config["BLOCK_M"]) * divide_up(columns, config["BLOCK_N"])
        programs += [(index, group, tile) for group in range(groups) for tile in range(tiles)]
    return torch.tensor(numbers + [n for program in programs for n in program], dtype=torch.int64)


def _starts(
    U: Sequence[Tensor], V: Sequence[Tensor], scale: Sequence[Tensor | None]
) -> tuple[list[tuple[int, int]], int]:
    """Lay out an allocation: where each weight begins, and the length of all.

    With each start, how much further the second weight begins, 0 if there is none.
    """
    found, end = [], 0
    for u, v, s in zip(U, V, scale, strict=True):
        size = divide_up(len(u) * math.prod(v.shape[1:]), _ALIGNMENT) * _ALIGNMENT
        found.append((end, 0 if s is None else size))
        end += size if s is None else 2 * size
    return found, end


def _strides(V: Tensor, order: Order) -> tuple[int, ...]:
    """Return the strides of a weight [Co, *V.shape[1:]] whose columns are in V's order."""
    if not order.channels_last:
        return (V[0].numel(), *torch.empty(V.shape[1:], device="meta").stride())
    channels, height, width = V.shape[1:]
    return channels * height * width, 1, width * channels, channels


def _loads_vectors(U: Sequence[Tensor], V: Sequence[Tensor]) -> bool:
    return all(u.shape[1] % 8 == 0 and u.data_ptr() % 16 == 0 for u in U) and all(
        len(v) % 8 == 0 and v.data_ptr() % 16 == 0 for v in V
    )


def _shared(arch: int) -> Config:
    """Return the tiles of all weights of one launch."""
    return {**Problem(4096, 4096).rule(arch), **OPTIONS}


class Problem(NamedTuple):
    """One weight: a [rows, columns] matrix of full rank per group."""

    rows: int
    columns: int
    groups: int = 1

    @property
    def rank(self) -> int:
        return min(self.rows, self.columns)

    def key(self) -> str:
        return "x".join(map(str, self))

    def rule(self, arch: int) -> Config:
        """Return tiles small enough to fill the device: a weight has few."""
        if arch == 0:
            return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
        wide = self.rows * self.columns * self.groups >= 132 * 128 * 64
        return {
            "BLOCK_M": 64,
            "BLOCK_N": 128 if wide else 64,
            "BLOCK_R": 32,
            "num_warps": 8 if wide else 4,
            "num_stages": 3,
        }

    def candidates(self, arch: int) -> list[Config]:
        by_rule = self.rule(arch)
        others = [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}
            for m, n, warps in ((32, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8))
            for r in (32, 64)
            for stages in (2, 3)
        ]
        return [by_rule, *(config for config in others if config != by_rule)]

    def launcher(self, device: torch.device) -> Callable[[Config], Tensor]:
        rows, columns, groups = self
        U = torch.randn(rows * groups, self.rank, device=device)
        V = torch.randn(self.rank * groups, columns, device=device)
        S = torch.randn(self.rank * groups, device=device)
        V = V if device.type == "cpu" else V.t().contiguous().t()  # as layers keep it on a GPU
        return lambda config: compose(U, S, V, groups, torch.bfloat16, config=config)[0]


def problems() -> list[Problem]:
    """List the weights of ResNet-50's layers 2-4."""
    found = []
    for width in (128, 256, 512):
        found += [Problem(width, 4 * width), Problem(width, 9 * width), Problem(4 * width, width)]
        found += [Problem(width, 2 * width), Problem(4 * width, 2 * width)]
    return found


class Network(NamedTuple):
    """All weights of ResNet-50's layers 2-4 at once; dtype: of W."""

    dtype: torch.dtype

    def key(self) -> str:
        return f"W in {self.dtype}"

    def candidates(self, arch: int) -> list[Config]:
        return [Problem(4096, 4096).rule(arch)]

    def launcher(self, device: torch.device) -> Callable[[Config], list[Tensor]]:
        entries = []
        for rows, columns, groups in problems():
            rank = min(rows, columns)
            shapes = (rows, rank), (rank,), (columns, rank)
            U, S, V = (torch.randn(shape, device=device) for shape in shapes)
            entries.append((U, S, V.t()[:, :, None, None], groups, torch.ones(rows, device=device)))
        where = table(entries, self.dtype).to(device)
        operands = list(zip(*entries, strict=True))
        run: Any = compose_all
        return lambda config: run(*operands, self.dtype, where, config=config)


def networks() -> list[Network]:
    return [Network(torch.bfloat16), Network(torch.float32)]


TUNABLES = {"compose": problems, "compose_all": networks}
