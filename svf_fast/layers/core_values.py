"""What a core has besides S, apart from its layer, as an adapter keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svf_fast.layers.values import gathered
from svf_fast.ops.core import Core

if TYPE_CHECKING:
    from svf_fast.layers.factored import Factored

DIRECTIONS = "directions"
_APART = 0.05  # of projections of the same direction; those of 16-bit factors differ by 0.003


@dataclasses.dataclass(frozen=True, eq=False)
class CoreValues:
    """The parameters of a core besides S, and in which directions they are.

    core: its structure. parts: the parameters, by :attr:`svf_fast.ops.core.Core.parts`.
    directions: of :func:`directions`. A decomposition is unique but for the signs of its pairs of
    directions, which differ from one machine to another: S does not depend on them, what stands
    beside it does.
    """

    core: Core
    parts: Mapping[str, Tensor]
    directions: Tensor

    @classmethod
    def of(cls, layer: Factored) -> CoreValues | None:
        """Take the present values of a layer, on the CPU; None where Σ is ``diag(S)``."""
        if layer.core.is_diagonal:
            return None
        values = [gathered(part).detach().cpu().clone() for part in layer.parts]
        parts = dict(zip(layer.core.parts, values, strict=True))
        return cls(layer.core, parts, directions(layer.U, layer.geometry.groups))

    @classmethod
    def read(cls, text: object, tensors: Mapping[str, Tensor]) -> CoreValues:
        """Return the values of what a file has: the core as text, and :attr:`tensors`."""
        if not isinstance(text, str):
            raise TypeError(f"core: expected a text, got {text!r:.50}")
        core = Core.of(text)
        expected = {*core.parts, DIRECTIONS}
        if core.is_diagonal or tensors.keys() != expected:
            raise ValueError(
                f"core {text!r:.50}: expected {', '.join(sorted(expected))}, got "
                f"{', '.join(sorted(tensors)) or 'nothing'}"
            )
        parts = {name: tensors[name] for name in core.parts}
        return cls(core, parts, tensors[DIRECTIONS])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as a file keeps it."""
        return {**self.parts, DIRECTIONS: self.directions}

    def problem(self, rank: int) -> str:
        """Tell what is wrong with it beside S [G·R] of that many values; "" if nothing is."""
        for name, values in self.tensors.items():
            if not isinstance(values, Tensor) or not values.is_floating_point():
                return f"{name}: expected a floating point tensor"
            if not values.isfinite().all():
                return f"{name}: expected finite values, got NaN or Inf: training diverged"
        groups = len(next(iter(self.parts.values()))) or 1
        expected: list[tuple[int, ...]] = [(2, rank)]
        if rank % groups == 0 and rank > groups:
            expected += self.core.shapes(groups, rank // groups)
        got = [tuple(self.directions.shape), *(tuple(x.shape) for x in self.parts.values())]
        if got == expected:
            return ""
        return f"core={str(self.core)!r}: expected shapes {expected} beside S [{rank}], got {got}"

    def turned_for(self, there: Tensor) -> list[Tensor] | None:
        """Return the parts for a layer with other :func:`directions`: the same but for signs.

        None where they differ in more.
        """
        own, there = self.directions.double(), there.double()
        signs = torch.where((own * there).sum(dim=0) < 0, -1.0, 1.0)
        if own.shape != there.shape or bool(((own - signs * there).abs() > _APART).any()):
            return None
        groups = len(next(iter(self.parts.values())))
        signs = signs.reshape(groups, -1)
        parts = [part.double() for part in self.parts.values()]
        if self.core.kind == "lowrank":
            turned = [part * signs[:, :, None] for part in parts]
        else:
            core = self.core.matrix(torch.zeros_like(signs).reshape(-1), parts)
            turned = [*self.core.gradients(signs[:, :, None] * core * signs[:, None], parts)[1:]]
        kept = self.parts.values()
        return [new.to(old.dtype) for new, old in zip(turned, kept, strict=True)]

    def mixed(self, other: CoreValues, t: float) -> CoreValues | None:
        """Return ``(1 - t)·self + t·other``; None for another core, other directions, or A Bᵀ.

        Of two of rank r the mixture has rank 2r, so it is no ``lowrank:r``.
        """
        parts = other.turned_for(self.directions) if self.core == other.core else None
        if parts is None or self.core.kind == "lowrank":
            return None
        mixed = {}
        for (name, own), theirs in zip(self.parts.items(), parts, strict=True):
            dtype = torch.promote_types(own.dtype, theirs.dtype)
            mixed[name] = torch.lerp(own.double(), theirs.double(), t).to(dtype)
        return CoreValues(self.core, mixed, self.directions)


def directions(U: Tensor, groups: int) -> Tensor:
    """Project the columns of U [Co, R] per group on two fixed vectors -> [2, G·R], on the CPU.

    Tells directions apart, and a direction from its opposite.
    """
    columns = U.detach().cpu().double().reshape(groups, -1, U.shape[1])
    at = torch.arange(1, columns.shape[1] + 1, dtype=torch.float64).square()
    fixed = torch.stack([at.cos(), at.sin()])
    return (fixed @ columns).movedim(1, 0).reshape(2, -1).float()
