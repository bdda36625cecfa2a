"""W = U diag(S) V on tensor cores: the scaling on the way in, the rounding on the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.language import dot, narrow
from svf_fast.triton.tuning import Config, Tunable, find


@triton.jit
def compose_kernel(
    U,
    S,
    V,
    out,
    rows,
    columns,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of one group's matrix [rows, columns]; W is all of them."""
    group = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    direction = tl.arange(0, BLOCK_R)
    left = U + (group * rows + row[:, None]) * rank
    right = V + group * rank * columns + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + direction
        s = tl.load(S + group * rank + r, mask=r < rank, other=0.0).to(tl.float32)
        inside = (row[:, None] < rows) & (r[None, :] < rank)
        u = tl.load(left + r[None, :], mask=inside, other=0.0).to(tl.float32) * s[None, :]
        inside = (r[:, None] < rank) & (column[None, :] < columns)
        v = tl.load(right + r[:, None] * columns, mask=inside, other=0.0).to(tl.float32)
        total = dot(u, v, total, PRECISION)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = (group * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=inside)


class Problem(NamedTuple):
    """One weight: a [rows, columns] matrix of full rank per group."""

    rows: int
    columns: int
    groups: int = 1

    @property
    def rank(self) -> int:
        return min(self.rows, self.columns)


def compose(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    groups: int,
    dtype: torch.dtype,
    *,
    config: Config | None = None,
) -> Tensor:
    """``U diag(S) V`` per group in ``dtype``, accumulated in float32.

    U [Co, R], S [G·R], V [G·R, Ci/G, kh, kw] of any dtype up to float32 -> [Co, Ci/G, kh, kw].
    Reads U, S and V and writes W once; nothing in between is written.
    """
    out = U.new_empty((U.shape[0], *V.shape[1:]), dtype=dtype)
    problem = Problem(U.shape[0] // groups, V[0].numel(), groups)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(U):
        config = config or find("compose", key(problem), lambda arch: rule(problem, arch))

        def grid(meta: Config) -> tuple[int, int]:
            tiles_m = triton.cdiv(problem.rows, meta["BLOCK_M"])
            return tiles_m * triton.cdiv(problem.columns, meta["BLOCK_N"]), groups

        compose_kernel[grid](
            U.contiguous(),
            S.contiguous(),
            V.contiguous(),
            out,
            problem.rows,
            problem.columns,
            U.shape[1],
            # one TF32 product adds 1 % to the error of rounding W to bfloat16
            PRECISION="tf32" if dtype == torch.bfloat16 else "tf32x3",
            **config,
        )
    return out


def key(problem: Problem) -> str:
    return "x".join(map(str, problem))


def rule(problem: Problem, arch: int) -> Config:
    """Tiles small enough to fill the device: a weight has few."""
    if arch == 0:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
    wide = problem.rows * problem.columns * problem.groups >= 132 * 128 * 64
    return {
        "BLOCK_M": 64,
        "BLOCK_N": 128 if wide else 64,
        "BLOCK_R": 32,
        "num_warps": 8 if wide else 4,
        "num_stages": 3,
    }


def candidates(problem: Problem, arch: int) -> list[Config]:
    """The rule's first."""
    by_rule = rule(problem, arch)
    others = [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}
        for m, n, warps in ((32, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8))
        for r in (32, 64)
        for stages in (2, 3)
    ]
    return [by_rule, *(config for config in others if config != by_rule)]


def launcher(problem: Problem, device: torch.device) -> Callable[[Config], Tensor]:
    rows, columns, groups = problem
    U = torch.randn(rows * groups, problem.rank, device=device)
    V = torch.randn(problem.rank * groups, columns, device=device)
    S = torch.randn(problem.rank * groups, device=device)
    return lambda config: compose(U, S, V, groups, torch.bfloat16, config=config)


def problems() -> list[Problem]:
    """The weights of ResNet-50's layers 2-4."""
    found = []
    for width in (128, 256, 512):
        found += [Problem(width, 4 * width), Problem(width, 9 * width), Problem(4 * width, width)]
        found += [Problem(width, 2 * width), Problem(4 * width, 2 * width)]
    return found


TUNABLES = [Tunable("compose", key, candidates, launcher, problems)]
