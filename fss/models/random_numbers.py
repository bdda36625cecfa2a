"""Random numbers that depend on a seed and their number alone, equal on every device."""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele et al., OOPSLA 2014), as signed numbers: its increment and two factors.
_STEP, _FIRST, _SECOND = (
    n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def random_numbers(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Compute random int64 numbers [B, count] from seeds [B], equal on every device.

    Number n of a stream is SplitMix64's at place 2^32·stream + n: whatever is drawn besides, in
    whatever order, does not change it.
    """
    place = torch.arange(count, device=seeds.device) + ((stream << 32) + 1)
    bits = seeds[:, None] + place * _STEP
    bits = (bits ^ shifted(bits, 30)) * _FIRST
    bits = (bits ^ shifted(bits, 27)) * _SECOND
    return bits ^ shifted(bits, 31)


def shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right, filling up with zeros; torch fills up with the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)
