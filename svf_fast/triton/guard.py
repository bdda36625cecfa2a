"""Whether the guarded directions of ``gram`` still suffice: one program a layer, all at once.

Serves where ``csrc/cuda/guard.cu`` was not built. Definition: :mod:`svf_fast.reference.guard`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.triton.launch import launch
from svf_fast.triton.tuning import OPTIONS, Config

_RULE: Config = {"BLOCK": 256, "num_warps": 4, **OPTIONS}


@triton.jit
def guards_hold_kernel(S, guarded, layers, holds, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Check one layer; sums are in float64, as in the definition."""
    layers += 2 * tl.program_id(0)
    first, groups, end = tl.load(layers), tl.load(layers + 1), tl.load(layers + 2)
    rank = (end - first) // groups
    lane = tl.arange(0, BLOCK)
    ratio = tl.zeros((BLOCK,), tl.float64)
    others = tl.zeros((BLOCK,), tl.int64)
    for group in range(groups):
        start = first + group * rank
        square = tl.zeros((BLOCK,), tl.float64)
        for r0 in range(0, rank, BLOCK):
            value = tl.load(S + start + r0 + lane, mask=r0 + lane < rank, other=0.0)
            square += value.to(tl.float64) * value.to(tl.float64)
        mean = tl.sum(square, axis=0) / rank.to(tl.float64)
        for r0 in range(0, rank, BLOCK):
            inside = r0 + lane < rank
            value = tl.load(S + start + r0 + lane, mask=inside, other=1.0).to(tl.float64)
            other = tl.load(guarded + start + r0 + lane, mask=inside, other=True) == 0
            ratio += tl.where(other, mean / (value * value), 0.0)
            others += other.to(tl.int64)
    allowed = tl.sum(others, axis=0).to(tl.float64) * (LIMIT * LIMIT)
    tl.store(holds + tl.program_id(0), tl.sum(ratio, axis=0) <= allowed)


def guards_hold(S: Tensor, guarded: Tensor, layers: Tensor, limit: float) -> Tensor:
    """Compute :func:`svf_fast.reference.guard.guards_hold` in one launch, without synchronizing.

    S float32 [n], guarded bool [n], layers int64 [L + 1, 2] -> bool [L].

    Raises:
        ValueError: operands of other dtypes or shapes, or that are not contiguous.
    """
    expected = (("S", S, torch.float32, 1), ("guarded", guarded, torch.bool, 1))
    for name, operand, dtype, dims in (*expected, ("layers", layers, torch.int64, 2)):
        if operand.dtype != dtype or operand.dim() != dims or not operand.is_contiguous():
            raise ValueError(
                f"guards_hold: {name}: expected contiguous {dtype} of {dims} dimensions, got "
                f"{operand.dtype} {list(operand.shape)} with strides {operand.stride()}"
            )
    if guarded.shape != S.shape or layers.shape[1:] != (2,):
        raise ValueError(
            "guards_hold: expected S [n], guarded [n] and layers [L + 1, 2], got "
            f"{list(S.shape)}, {list(guarded.shape)} and {list(layers.shape)}"
        )
    count = layers.shape[0] - 1
    holds = guarded.new_empty(count)
    if count:
        with torch.cuda.device_of(S):
            launch(guards_hold_kernel, (count,), S, guarded, layers, holds, LIMIT=limit, **_RULE)
    return holds


class Problem(NamedTuple):
    """So many layers of so many values of S each."""

    layers: int
    values: int

    def key(self) -> str:
        return f"{self.layers} layers of {self.values}"

    def candidates(self, arch: int) -> list[Config]:
        return [_RULE]

    def launcher(self, device: torch.device) -> Callable[[Config], Tensor]:
        layers, values = self
        S = torch.rand(layers * values, device=device) + 0.5
        first = torch.arange(layers + 1, device=device) * values
        groups = torch.ones_like(first)
        groups[-1] = 0
        table = torch.stack([first, groups], dim=1)
        return lambda config: guards_hold(S, S < 0.6, table, 2.0)


def problems() -> list[Problem]:
    return [Problem(42, 512)]


TUNABLES = {"guard": problems}
