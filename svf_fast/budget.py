"""The fastest way to run a converted model within a memory budget."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from svf_fast.fusion.blocks import ResidualUnit
from svf_fast.fusion.transformer import SVFTransformerBlock
from svf_fast.report import MemoryReport, memory_report

_UNITS = {
    "GiB": 2**30,
    "MiB": 2**20,
    "KiB": 2**10,
    "GB": 10**9,
    "MB": 10**6,
    "KB": 10**3,
    "B": 1,
}
_SIZES = {name.lower(): size for name, size in _UNITS.items()}


class Option(NamedTuple):
    """One way to compute a unit: bytes that it keeps, and its cost in any unit of time or work."""

    bytes: int
    cost: float


class BudgetError(ValueError):
    """No choice fits the budget; ``smallest`` is the least budget, in bytes, that one fits."""

    def __init__(self, smallest: int, budget: int):
        super().__init__(
            f"memory_budget: expected at least {format_bytes(smallest)} ({smallest} bytes), which "
            f"the smallest plan needs, got {format_bytes(budget)} ({budget} bytes)"
        )
        self.smallest = smallest
        self.budget = budget

    def __reduce__(self):
        return type(self), (self.smallest, self.budget)


def fit(
    model: nn.Module, budget: int, input_shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Set which fused blocks recompute, so that a forward pass keeps at most ``budget`` bytes.

    Of the plans that fit, that with the fewest FLOPs. Bytes and ``dtype`` as in
    :func:`svf_fast.memory_report`. Raises BudgetError when none fits; then nothing is changed.
    """
    kinds = ResidualUnit | SVFTransformerBlock
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    before = {name: block.recompute for name, block in blocks.items()}
    try:
        keeping = _report(model, blocks, False, input_shape, dtype)
        if keeping.saved_bytes <= budget:
            return
        recomputing = _report(model, blocks, True, input_shape, dtype)
        names, options, fixed = [], [], 0
        for keep, again in zip(keeping.units, recomputing.units, strict=True):
            if keep.name in blocks:
                names.append(keep.name)
                options.append([Option(unit.saved_bytes, unit.flops) for unit in (keep, again)])
            else:
                fixed += keep.saved_bytes
        chosen = choose(options, budget, fixed)
    except Exception:
        for name, block in blocks.items():
            block.recompute = before[name]
        raise
    for name, choice in zip(names, chosen, strict=True):
        blocks[name].recompute = bool(choice)


def _report(
    model: nn.Module,
    blocks: dict[str, ResidualUnit | SVFTransformerBlock],
    recompute: bool,
    input_shape: Sequence[int],
    dtype: torch.dtype | None,
) -> MemoryReport:
    for block in blocks.values():
        block.recompute = recompute
    return memory_report(model, input_shape, dtype)


def parse_bytes(size: str | int) -> int:
    """Return the bytes of a size like ``"1.5GiB"`` or ``"300 MB"``, rounded down; an int is bytes.

    The units are B, KiB, MiB, GiB (powers of 1024) and KB, MB, GB (powers of 1000), in any case.

    Raises TypeError for what is neither str nor int, ValueError for a text that is no size, and for
    a negative number.
    """
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise TypeError(
            f"memory size: expected a text like '1.5GiB' or an integer of bytes, got {size!r} "
            f"({type(size).__name__})"
        )
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"memory size: expected 0 bytes or more, got {size}")
        return size
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]+)\s*", size, re.IGNORECASE)
    if match is None or match[2].lower() not in _SIZES:
        raise ValueError(
            f"memory size: expected a number and one of {', '.join(_UNITS)}, like '1.5GiB', "
            f"got {size!r}"
        )
    return int(Decimal(match[1]) * _SIZES[match[2].lower()])


def format_bytes(count: int) -> str:
    """Format bytes in the largest fitting of B, KiB, MiB and GiB, rounded up.

    So a budget read from it suffices: ``parse_bytes(format_bytes(n)) >= n``.
    """
    for name in ("GiB", "MiB", "KiB"):
        if count >= _UNITS[name]:
            hundredths = -(-100 * count // _UNITS[name])
            return f"{hundredths // 100}.{hundredths % 100:02d} {name}"
    return f"{count} B"


def choose(options: Sequence[Sequence[Option]], budget: int, fixed: int = 0) -> list[int]:
    """Choose the index of one option per unit: least cost with ``fixed + Σ bytes <= budget``.

    Exact up to the rounding of the sums; of equally cheap choices one that keeps the fewest bytes.
    The partial sums that no other undercuts in both bytes and cost (the Pareto front) are extended
    unit by unit. Units with the same options add few of them, as their order does not matter.

    Args:
        options: what there is to choose from for each unit, bytes >= 0 and a finite cost.
        budget: in bytes.
        fixed: bytes that are kept whatever is chosen.

    Raises ValueError for a unit without options or numbers out of range, BudgetError when nothing
    fits.
    """
    for number, unit in enumerate(options):
        if not unit:
            raise ValueError(f"options: expected at least one per unit, unit {number} has none")
        for option in unit:
            if option.bytes < 0 or not math.isfinite(option.cost):
                raise ValueError(f"options: expected bytes >= 0 and a finite cost, got {option}")
    spare = budget - fixed - sum(min(option.bytes for option in unit) for unit in options)
    if spare < 0:
        raise BudgetError(budget - spare, budget)

    spent, cost = np.zeros(1, np.int64), np.zeros(1)  # the front: bytes above the least, cost
    fronts = []
    for unit in options:
        table = np.array([option.bytes for option in unit], np.int64)
        spent = (spent[:, None] + (table - table.min())).ravel()
        cost = (cost[:, None] + [option.cost for option in unit]).ravel()
        front = _pareto(spent, cost, spare)
        spent, cost = spent[front], cost[front]
        fronts.append(front)

    chosen = []
    position = len(spent) - 1  # along a front the cost falls
    for unit, front in zip(reversed(options), reversed(fronts), strict=True):
        position, index = divmod(int(front[position]), len(unit))
        chosen.append(index)
    return chosen[::-1]


def _pareto(spent: np.ndarray, cost: np.ndarray, spare: int) -> np.ndarray:
    """Return indices of the Pareto front within `spare` bytes, bytes rising and cost falling."""
    order = np.lexsort((cost, spent))
    order = order[: np.searchsorted(spent[order], spare, side="right")]
    falling = np.minimum.accumulate(cost[order])
    return order[np.r_[True, falling[1:] < falling[:-1]]]
