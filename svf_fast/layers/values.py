"""What is kept of an SVF layer beside its factors, all of it made from them; never saved."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Hashable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from svf_fast.ops.factors import Constants, Kind


def gathered(x: Tensor) -> Tensor:
    """Return a tensor of which each process holds a part as a whole, a collective; others as is."""
    whole = getattr(x, "full_tensor", None)
    return x if whole is None else whole()


def sharded_as(like: Tensor, x: Tensor) -> Tensor:
    """Return x, sharded over the processes as `like` is."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded = cast(DTensor, like)
    local = x.to(like.device, like.dtype)
    return distribute_tensor(local, sharded.device_mesh, sharded.placements)


def bytes_of(x: Tensor) -> bytes:
    """Copy the values of a tensor on the CPU, to be compared."""
    x = x if x.is_contiguous() else x.contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes)


def is_narrow(x: Tensor) -> bool:
    """Tell whether these are floating point values in 16 bits."""
    return x.is_floating_point() and x.dtype.itemsize < 4


def widened(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.float() if is_narrow(x) else x


class Seen:
    """A snapshot of tensors, which one that is replaced, moved or written to no longer fits.

    It keeps them, so that nothing else takes their addresses.
    """

    __slots__ = ("_seen",)

    def __init__(self, *tensors: Tensor) -> None:
        if any(x.is_inference() for x in tensors):  # no version counter: never the same
            tensors = ()
        self._seen = [(x, x.data_ptr(), x._version) for x in tensors]

    def holds(self, *tensors: Tensor) -> bool:
        """Tell whether these are the same tensors, unchanged."""
        if len(self._seen) != len(tensors):
            return False
        for (x, pointer, version), now in zip(self._seen, tensors, strict=True):
            if now is not x or x.data_ptr() != pointer or x._version != version:
                return False
        return True


@dataclasses.dataclass(eq=False)
class Plan:
    """How a layer computes: what follows from U, V and the guarded directions.

    A new object is created on every change, so callers may cache by identity. factors: what is
    frozen of U, S and V; asked: the strategy that was asked for. host_tail: the tail on the CPU,
    where the directions are chosen; with a core the tail is what lifts them. constants: what
    :meth:`Factored.constants` returned, after the scale it was for.
    """

    factors: Seen
    asked: str
    strategy: str
    tail: Tensor | None
    host_tail: Tensor | None
    dual_U: Tensor | None = None
    dual_V: Tensor | None = None
    constants: dict[Hashable, tuple[Tensor | None, Kind, Constants]] = dataclasses.field(
        default_factory=dict
    )


class Made(NamedTuple):
    """W in one dtype, and scale ⊙ W where that was asked for; of ``chain`` U diag(S)."""

    scale: Tensor | None
    chain: bool
    weight: Tensor
    scaled: Tensor | None


class CoreInUse(NamedTuple):
    """Σ [G, R, R] of a core, and K of :func:`svf_fast.svd.lifted_inverse` for ``gram``."""

    core: Tensor
    inverse: Tensor | None


class Values:
    """The values that a layer computes with, and what was made of them.

    Attributes:
        seen: what trains, S or log_scale, as it was then.
        trained: its bytes, on the CPU only.
        S_in_use: S·exp(s') where s' trains, else None. On a GPU it is written to when s' moves.
        core: Σ and its inverse, None where it is diagonal.
        made: what follows from them, by dtype.
        scales: what was folded in when it was last asked for, by dtype.
    """

    def __init__(
        self,
        seen: Seen | None = None,
        trained: bytes | None = None,
        S_in_use: Tensor | None = None,
        core: CoreInUse | None = None,
    ) -> None:
        self.core = core
        self.seen, self.trained, self.S_in_use = seen or Seen(), trained, S_in_use
        self.made: dict[torch.dtype, Made] = {}
        self.scales: dict[torch.dtype, Tensor | None] = {}
        self._taken: set[torch.dtype] = set()

    def are(self, values: bytes | None, *trained: Tensor) -> bool:
        """Tell whether what trains, and its bytes if it is on the CPU, are these."""
        return self.seen.holds(*trained) and values == self.trained

    def moved(
        self,
        seen: Seen,
        trained: bytes | None,
        S_in_use: Tensor | None,
        core: CoreInUse | None = None,
    ) -> None:
        """Drop what was made of other values, and forget the dtypes that nobody took."""
        self.seen, self.trained, self.S_in_use, self.core = seen, trained, S_in_use, core
        for dtype in self.made.keys() - self._taken:
            del self.scales[dtype]
        self.made.clear()
        self._taken.clear()

    def take(self, dtype: torch.dtype, scale: Tensor | None, chain: bool) -> Made | None:
        """Return what was made, if it is what is asked for."""
        made = self.made.get(dtype)
        if made is None or made.chain != chain or not (scale is None or made.scale is scale):
            return None
        self._taken.add(dtype)
        return made
