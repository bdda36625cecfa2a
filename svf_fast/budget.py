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
from svf_fast.fusion.fused import Fused
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
CODING = 90  # FLOPs that take as long as to spare one byte by 8 bits, coding and decoding it
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


class Way(NamedTuple):
    """How a fused module keeps what it keeps: see the attributes of these names."""

    recompute: bool = False
    keeps_int8: bool = False

    @classmethod
    def of(cls, unit: Fused) -> Way:
        return cls(getattr(unit, "recompute", False), unit.keeps_int8)

    def set(self, unit: Fused) -> None:
        """Let a module compute so, as far as it can."""
        unit.keeps_int8 = self.keeps_int8 and unit.takes_int8
        if isinstance(unit, ResidualUnit | SVFTransformerBlock):
            unit.recompute = self.recompute


def fit(
    model: nn.Module,
    budget: int,
    input_shape: Sequence[int],
    dtype: torch.dtype | None = None,
    keep: str = "exact",
) -> None:
    """Set how fused modules keep what they keep, so that a forward pass keeps ``budget`` bytes.

    Residual and transformer blocks may recompute; with ``keep="auto"`` what can keeps in 8 bits
    instead, otherwise each keeps as it does. Of the plans that fit, that of the least cost: FLOPs,
    and for 8 bits :data:`CODING`; where several keep the same tensor, one that fits, which may be
    missed. Bytes and ``dtype`` as in :func:`svf_fast.memory_report`. Raises BudgetError when none
    fits; then nothing is changed.
    """
    units = {name: m for name, m in model.named_modules() if isinstance(m, Fused)}
    before = {name: Way.of(unit) for name, unit in units.items()}
    ways = [
        {name: way._replace(recompute=again) for name, way in before.items()}
        for again in (False, True)
    ]
    if keep == "auto":
        ways += [{name: Way(again, True) for name in units} for again in (False, True)]

    def report(way: dict[str, Way]) -> MemoryReport:
        for name, unit in units.items():
            way[name].set(unit)
        return memory_report(model, input_shape, dtype)

    try:
        first = report(ways[0])
        if first.saved_bytes <= budget:
            return
        reports = [first, *map(report, ways[1:])]
        names, options = [], []
        for found in zip(*(each.units for each in reports), strict=True):
            if found[0].name in units:
                names.append(found[0].name)
                options.append(_options([(unit.saved_bytes, unit.flops) for unit in found]))
        fixed = first.saved_bytes - sum(unit[0].bytes for unit in options)
        tried = list(zip((each.saved_bytes for each in reports), ways, strict=True))
        room = budget
        while True:  # what several keep is one's: the plan that is made of parts may keep more
            chosen = choose(options, room, fixed)
            plan = {name: ways[way][name] for name, way in zip(names, chosen, strict=True)}
            plan = ways[0] | plan
            size = report(plan).saved_bytes
            if size <= budget:
                return
            tried.append((size, plan))
            parts = sum(unit[way].bytes for unit, way in zip(options, chosen, strict=True))
            room = fixed + parts - (size - budget)
    except BudgetError as error:
        least, plan = min(tried, key=lambda one: one[0])
        if least <= budget:
            report(plan)
            return
        if len(tried) == len(reports):  # nothing was tried yet of what it says suffices
            chosen = choose(options, error.smallest, fixed)
            plan = {name: ways[way][name] for name, way in zip(names, chosen, strict=True)}
            least = min(least, report(ways[0] | plan).saved_bytes)
        _restore(units, before)
        raise BudgetError(least, budget) from None
    except Exception:
        _restore(units, before)
        raise


def _options(ways: Sequence[tuple[int, int]]) -> list[Option]:
    """Return the options of a unit from bytes and FLOPs, as it is and recomputing.

    The third and fourth, if given, are those two in 8 bits.
    """
    options = [Option(*way) for way in ways[:2]]
    for (most, _), (size, flops) in zip(ways, ways[2:], strict=False):
        options.append(Option(size, flops + CODING * max(0, most - size)))
    return options


def _restore(units: dict[str, Fused], before: dict[str, Way]) -> None:
    for name, unit in units.items():
        before[name].set(unit)


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
