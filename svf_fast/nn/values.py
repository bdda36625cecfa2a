"""What is kept of an SVF layer beside its factors, all of it made from them; never saved."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast.ops.svf_conv2d import Constants, Geometry, Kind


class Reading(NamedTuple):
    """What the gradients take of U and V in one dtype, for one geometry and scale."""

    geometry: Geometry
    trains: bool
    scale: Tensor | None
    kind: Kind
    constants: Constants


@dataclasses.dataclass(eq=False)
class Plan:
    """How a layer computes: what follows from U, V and the guarded directions.

    Another object whenever one of these changes: who has the same plan may keep what follows from
    it. host_tail: the tail on the CPU, where the directions are chosen. readings: by dtype, with a
    scale folded in and without.
    """

    factors_key: tuple
    strategy: str
    tail: Tensor | None
    host_tail: Tensor | None
    dual_U: Tensor | None = None
    dual_V: Tensor | None = None
    readings: dict[tuple[torch.dtype, bool], Reading] = dataclasses.field(default_factory=dict)


class Made(NamedTuple):
    """W in one dtype, and scale ⊙ W where that was asked for; of ``chain`` U diag(S)."""

    scale: Tensor | None
    chain: bool
    weight: Tensor
    scaled: Tensor | None


class Values:
    """The values of S that a layer computes with, and what was made of them.

    Attributes:
        key: of S as it was then.
        S: their bytes, on the CPU only.
        made: what follows from them, by dtype.
        scales: what was folded in when it was last asked for, by dtype.
    """

    def __init__(self, key: tuple = (), S: bytes | None = None) -> None:
        self.key, self.S = key, S
        self.made: dict[torch.dtype, Made] = {}
        self.scales: dict[torch.dtype, Tensor | None] = {}
        self._taken: set[torch.dtype] = set()

    def moved(self, key: tuple, S: bytes | None) -> None:
        """Drops what was made of other values; what nobody took of it is asked for no more."""
        self.key, self.S = key, S
        for dtype in self.made.keys() - self._taken:
            del self.scales[dtype]
        self.made.clear()
        self._taken.clear()

    def take(self, dtype: torch.dtype, scale: Tensor | None, chain: bool) -> Made | None:
        """What was made, where it is what is asked for."""
        made = self.made.get(dtype)
        if made is None or made.chain != chain or not (scale is None or made.scale is scale):
            return None
        self._taken.add(dtype)
        return made
