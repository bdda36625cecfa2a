"""What a fused module reads of its parts: why they are not fused, and the stages of the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from svf_fast.fusion.norm import Norm
from svf_fast.fusion.state import Watch, watch
from svf_fast.fusion.structure import StageNames
from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.layers.values import Plan
from svf_fast.ops.block import Stage
from svf_fast.ops.node import is_tracing
from svf_fast.ops.program import Programs


class Readable(Protocol):
    """What :class:`Reading` needs of a fused module."""

    def unfused_reasons(self) -> list[str]: ...
    def get_submodule(self, target: str) -> nn.Module: ...


class Slot:
    """A stage of a block in one dtype: what of it is the same in each forward pass.

    folds: whether the scale is folded into the convolution. shift: with that of the shortcut, if
    it has one.
    """

    def __init__(
        self, conv: SVFConv2d, scale: Tensor, shift: Tensor, dtype: torch.dtype, folds: bool
    ) -> None:
        self.conv, self.scale, self.shift, self.dtype = conv, scale, shift, dtype
        self._folded = scale if folds else None
        # under a plan: what is the same each time, as S and the weights are not
        self._known: tuple[Plan | None, Any] = None, None

    def read(self) -> Stage:
        """Return the stage for the op; works within a trace or capture too."""
        conv = self.conv.convolution(self.dtype, self._folded)
        assert conv is not None  # the reasons have seen to it
        return Stage(conv, self.scale, self.shift)

    def read_again(self) -> tuple[Plan, Stage]:
        """Return the stage outside of traces and captures, and the plan that it is read under."""
        conv = self.conv
        plan = conv.plan
        assert plan is not None  # the reasons have seen to it
        of, known = self._known
        if of is not plan:
            known = conv.constants(plan, self.dtype, self._folded)
            self._known = plan, known
        kind, constants = known
        pair = conv.weights(kind, self.dtype, self._folded)
        S = conv.S if conv.trains == "S" else conv.S_in_use
        made = conv.made_of(kind, constants, S, pair, conv.values.core)
        return plan, Stage(made, self.scale, self.shift)


class _Chain:
    """The stages of a block in one dtype, and the programs of its passes under their plans."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots
        self._known: tuple[list[Plan], Programs] = [], Programs()

    def read(self) -> list[Stage]:
        """Return the stages as :meth:`Slot.read` does."""
        return [slot.read() for slot in self._slots]

    def read_again(self) -> tuple[list[Stage], Programs]:
        """Return the stages as :meth:`Slot.read_again` does, and the programs of their plans."""
        found = [slot.read_again() for slot in self._slots]
        plans, programs = self._known
        if not plans or any(
            mine is not known for (mine, _), known in zip(found, plans, strict=True)
        ):
            programs = Programs()  # of other constants
            self._known = [plan for plan, _ in found], programs
        return [stage for _, stage in found], programs


class Reading:
    """What a fused module reads of its parts at one moment; no ``watch``: it cannot be kept."""

    def __init__(self, module: Readable, watch: Watch | None) -> None:
        self.watch = watch
        self._owner = id(module)
        self._reasons: dict[bool, list[str]] = {}
        self._chains: dict[tuple[str, torch.dtype, bool], _Chain] = {}

    def holds(self, module: Readable) -> bool:
        """Tell whether it is of this module as it is now, not of one that it was copied with."""
        return (
            self._owner == id(module)
            and self.watch is not None
            and self.watch.holds(cast(nn.Module, module))
        )

    def reasons(self, module: Readable) -> list[str]:
        """Return why each part is not fused, empty where it is; it may depend on the grad mode."""
        grad = torch.is_grad_enabled()
        found = self._reasons.get(grad)
        if found is None:
            found = self._reasons[grad] = module.unfused_reasons()
        return found

    def stages(
        self,
        module: Readable,
        names: Sequence[StageNames],
        dtype: torch.dtype,
        folds: bool,
        shortcut: StageNames | None = None,
    ) -> tuple[list[Stage], Programs | None]:
        """Return the stages of a chain as the op takes them, its shortcut's last, and its programs.

        folds: whether the last one's layer takes the gradient of its batch norm's output.
        """
        at = names[0].conv, dtype, folds
        chain = self._chains.get(at)
        # what is traced or captured is there only when the graph runs; fakes have no values to keep
        traced = self.watch is None or conv_of(module, names[0]).is_captured
        if chain is None:
            chain = _Chain(_slots(module, names, dtype, folds, shortcut))
            if not traced:
                self._chains[at] = chain
        return (chain.read(), None) if traced else chain.read_again()


def _slots(
    module: Readable,
    names: Sequence[StageNames],
    dtype: torch.dtype,
    folds: bool,
    shortcut: StageNames | None,
) -> list[Slot]:
    affine = [_affine(module, stage, dtype) for stage in names]
    every, last = list(names), len(names) - 1
    if shortcut is not None:
        every.append(shortcut)
        affine.append(_affine(module, shortcut, dtype))
        affine[last] = affine[last][0], affine[last][1] + affine[-1][1]
    return [
        Slot(conv_of(module, stage), *own, dtype, folds and index >= last)
        for index, (stage, own) in enumerate(zip(every, affine, strict=True))
    ]


def conv_of(module: Readable, names: StageNames) -> SVFConv2d:
    """Return the convolution of a stage, which the reasons have found to be an SVF layer."""
    return cast(SVFConv2d, module.get_submodule(names.conv))


def _affine(module: Readable, names: StageNames, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Express batch norm with stored statistics as ``y·scale + shift``, a conv's bias included."""
    bias, norm = conv_of(module, names).bias, Norm.of(module.get_submodule(names.bn))
    assert norm is not None and norm.mean is not None and norm.var is not None
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        scale = (norm.var.to(dtype) + norm.eps).sqrt().reciprocal()
        if norm.weight is not None:
            scale = scale * norm.weight.to(dtype)
        mean = norm.mean.to(dtype)
        shift = -(mean if bias is None else mean - bias.to(dtype)) * scale
        return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


def read(module: Readable) -> Reading:
    """Return the reading of the module as it is now, kept until something in it changes."""
    if is_tracing():
        return Reading(module, None)
    known = module.__dict__.get("_reading")
    if known is not None and known.holds(module):
        return known
    reading = Reading(module, watch(cast(nn.Module, module)))
    if reading.watch is not None:
        module.__dict__["_reading"] = reading
    return reading
