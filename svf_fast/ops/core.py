"""The structure of Σ in ``W = U Σ Vᵀ``: what of it trains, Σ of that, and its gradients from dΣ."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast.reference.core import entries_core, low_rank_core, off_diagonals
from svf_fast.reference.core import turned as definition_of_turned

_KINDS = ("band", "block", "lowrank")
_EXPECTED = "'diag', 'band:k', 'block:b' or 'lowrank:r' with k, r of at least 1 and b of at least 2"
_OF_FACTORS = ("core_A", "core_B")

PARTS = ("off_diagonal", *_OF_FACTORS)
"""The names of all parameters that a layer may have for its core besides S."""


class Core(NamedTuple):
    """The structure of Σ [R, R], per group: ``diag(S)`` and what may stand beside the diagonal.

    kind: "diag" (nothing), "band" (entries with ``|i - j| <= size``), "block" (entries of the
    blocks of ``size`` along the diagonal, of which the last may be smaller), or "lowrank"
    (``A Bᵀ`` of rank ``size``). What is larger than Σ stands for all of it.
    """

    kind: str = "diag"
    size: int = 0

    @classmethod
    def of(cls, core: str | Core) -> Core:
        """Read a core as the user writes it: "diag", "band:k", "block:b" or "lowrank:r".

        Raises TypeError for what is no text, ValueError for another text.
        """
        if isinstance(core, cls):
            return core
        if not isinstance(core, str):
            raise TypeError(f"core: expected {_EXPECTED}, got {core!r}")
        if core == "diag":
            return cls()
        match = re.fullmatch(rf"({'|'.join(_KINDS)}):([1-9][0-9]{{0,8}})", core)
        if match is None or match[0] == "block:1":
            raise ValueError(f"core: expected {_EXPECTED}, got {core!r}")
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.size else self.kind

    @property
    def is_diagonal(self) -> bool:
        """Whether Σ is ``diag(S)``."""
        return self.kind == "diag"

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the parameters besides S: ``off_diagonal`` [G, n], or ``core_A``, ``core_B``."""
        if self.is_diagonal:
            return ()
        return _OF_FACTORS if self.kind == "lowrank" else PARTS[:1]

    def within(self, rank: int) -> Core:
        """Return the core of a layer of this rank: of a single value there is only the diagonal."""
        return self if rank > 1 else DIAGONAL

    def shapes(self, groups: int, rank: int) -> list[tuple[int, ...]]:
        """List the shapes of :attr:`parts` for Σ [G, R, R] with R > 1."""
        if self.kind == "lowrank":
            return [(groups, rank, min(self.size, rank))] * 2
        if self.is_diagonal:
            return []
        whole = rank if self.kind == "band" else min(self.size, rank)
        width = min(self.size, rank - 1) if self.kind == "band" else whole - 1
        count = 0
        for size, blocks in ((whole, rank // whole), (rank % whole, 1)):
            most = min(width, max(size - 1, 0))
            count += blocks * (2 * most * size - most * (most + 1))
        return [(groups, count)]

    def initial(self, S: Tensor, groups: int) -> list[Tensor]:
        """Return values of :attr:`parts` with which Σ is ``diag(S)``: A is drawn, the rest is 0.

        A as in LoRA (Hu et al. 2022): uniform in ±1/√R, from torch's generator.
        """
        shapes = self.shapes(groups, S.numel() // groups)
        values = [S.new_zeros(shape) for shape in shapes]
        if self.kind == "lowrank":
            bound = values[0].shape[1] ** -0.5
            values[0].uniform_(-bound, bound)
        return values

    def matrix(self, S: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Compute Σ [G, R, R] of S [G·R] and :attr:`parts`; differentiable in all."""
        with _without_autocast(S):
            if self.kind == "lowrank":
                return low_rank_core(S, *parts)
            (entries,) = parts
            return entries_core(S, entries, *self._blocks(S.numel() // len(entries)))

    def gradients(self, grad: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return dL/dS [G·R] and those of :attr:`parts` from dL/dΣ [G, R, R]."""
        grad_S = grad.diagonal(0, 1, 2).reshape(-1)
        if self.kind == "lowrank":
            A, B = parts
            return grad_S, grad @ B, grad.mT @ A
        views = off_diagonals(grad, *self._blocks(grad.shape[-1]))
        found = [view.reshape(len(grad), -1) for view in views]
        return grad_S, torch.cat(found, dim=1)

    def _blocks(self, rank: int) -> tuple[int, int]:
        """Return the size of the blocks that entries lie in, and how far beside the diagonal."""
        return (rank, self.size) if self.kind == "band" else (min(self.size, rank), rank)


DIAGONAL = Core()


def turned(U: Tensor, core: Tensor) -> Tensor:
    """Compute ``U Σ`` [Co, R] of U [Co, R] and Σ [G, R, R], in float32 at least; differentiable.

    Then ``U Σ Vᵀ`` is composed of it as ``U diag(S) Vᵀ`` is, with S of ones.
    """
    with _without_autocast(U):
        return definition_of_turned(U, core)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    if x.is_meta:  # where there is none
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
