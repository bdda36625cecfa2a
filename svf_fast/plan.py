"""The fastest way to run a converted model within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from svf_fast.budget import Option, choose
from svf_fast.fusion.blocks import ResidualUnit
from svf_fast.report import MemoryReport, memory_report


def fit(
    model: nn.Module, budget: int, input_shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Sets which residual blocks recompute, so that a forward pass keeps at most ``budget`` bytes.

    Of the plans that fit, that with the fewest FLOPs. Bytes and ``dtype`` as in
    :func:`svf_fast.memory_report`. Raises BudgetError when none fits; then nothing is changed.
    """
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, ResidualUnit)}
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
    blocks: dict[str, ResidualUnit],
    recompute: bool,
    input_shape: Sequence[int],
    dtype: torch.dtype | None,
) -> MemoryReport:
    for block in blocks.values():
        block.recompute = recompute
    return memory_report(model, input_shape, dtype)
