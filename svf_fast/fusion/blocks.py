"""Residual blocks and conv-BN-ReLU units as one differentiable unit each.

A fused block is the block it was: the same children under the same names, the same attributes,
hooks and place in the model. Only its class is another, a subclass of its own whose forward runs
:func:`svf_fast.ops.block.block` where that computes the same, and the original forward elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from svf_fast.fusion.changes import (
    changed,
    hooked,
    hooked_module,
    is_read,
    remember,
    replaced,
)
from svf_fast.fusion.fused import Fused, original_class, recast
from svf_fast.fusion.norm import Norm
from svf_fast.fusion.plain import plain_conv
from svf_fast.fusion.reading import conv_of, read
from svf_fast.fusion.structure import Chain, ResidualBlock, StageNames, Unit, examine
from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.ops.block import block


class ResidualUnit(Fused):
    """``relu(stages(x) + shortcut(x))`` with frozen batch norms, as one autograd node.

    The last ReLU is there where the block's own forward has it. A gate before the last convolution
    (squeeze-and-excitation) is called as it is, between two nodes.

    Attributes:
        recompute: run the second convolution again in the backward pass instead of keeping its
            output; less memory, more time.
        keeps_int8: keep in 8 bits what the gradients of S alone are computed from; less memory,
            the same output and the same gradient of x, rounded gradients of S.
    """

    stage_count: int  # beside the shortcut
    recompute: bool
    takes_int8 = True
    _names: ResidualBlock
    # of the inner modules, and their attributes, as they were when the forward was read
    _kinds: dict[str, str]
    _attributes: dict[str, dict[str, Any]] = {}  # noqa: RUF012  of a pickle that has none

    @classmethod
    def from_block(cls, module: nn.Module, strategy: str = "auto") -> nn.Module:
        """Fuse a residual block in place and return it; plain convolutions in it are converted.

        The block is recognized by its forward pass, whatever its class and the names in it.

        Raises:
            TypeError: not a module.
            ValueError: a module that is no such block, with the reason.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        if isinstance(module, Fused):
            raise ValueError(
                f"module: expected a block to fuse, got a fused {type(module).__name__}"
            )
        found = examine(module)
        if isinstance(found, str):
            raise ValueError(f"module: {type(module).__name__} cannot be fused: {found}")
        if len(found.stages) != cls.stage_count:
            raise ValueError(
                f"module: expected {cls.stage_count} convolutions beside the shortcut, got "
                f"{len(found.stages)}"
            )
        for name in found.convs:
            conv = module.get_submodule(name)
            if isinstance(conv, nn.Conv2d):
                module.set_submodule(name, SVFConv2d.from_conv(plain_conv(conv), strategy))
        return cls.adopt(module, found)

    @classmethod
    def adopt(cls, module: nn.Module, found: ResidualBlock) -> Fused:
        """Fuse a block that was found, in place."""
        fused = recast(module, cls)
        fused._names, fused.recompute = found, False
        fused._kinds, fused._attributes = remember(fused, found.called)
        return fused

    def fused_convs(self) -> dict[str, bool]:
        *inner, last = self._names.stages
        folding = last, *filter(None, [self._names.shortcut])
        return {stage.conv: stage in folding for stage in (*inner, *folding)}

    @property
    def recomputed(self) -> str:
        """Name of the convolution that ``recompute`` runs again."""
        return self._names.stages[1].conv

    @property
    def run_again(self) -> tuple[str, ...]:
        """Names of the layers that the backward pass runs again, as it is set now."""
        return (self.recomputed,) if self.recompute else ()

    def fused_stages(self) -> list[StageNames]:
        """Name the stages that run as one, that of the shortcut last."""
        return [*self._names.stages, *filter(None, [self._names.shortcut])]

    def unfused_reasons(self) -> list[str]:
        called = self._names.called
        return [
            replaced(self, self._kinds, called)
            or changed(self)
            or _reason(self, self.fused_stages())
            or hooked(self, called)
        ]

    def forward(self, x: Tensor) -> Tensor:
        names, reading = self._names, read(self)
        if reading.reasons(self)[0]:
            return super().forward(x)
        dtype = _compute_dtype(x, conv_of(self, names.stages[0]), type(self).__name__)
        shortcut_x = None
        if names.pre:
            shortcut_x = x
            for name in names.pre:
                shortcut_x = self.get_submodule(name)(shortcut_x)
            shortcut_x = shortcut_x.to(dtype)
        x, main, way, again = x.to(dtype), names.stages, "identity", self.recompute
        int8 = self.keeps_int8
        if names.gate is not None:
            shortcut_x = x if shortcut_x is None else shortcut_x
            stages, programs = reading.stages(self, main[:-1], dtype, False)
            x = block(x, stages, recompute=again, programs=programs, int8=int8)
            x = self.get_submodule(names.gate)(x).to(dtype)
            main, way, again = main[-1:], "given", False
        stages, programs = reading.stages(self, main, dtype, True, names.shortcut)
        shortcut = way if names.shortcut is None else stages.pop()
        return block(x, stages, shortcut, shortcut_x, names.relu, again, programs, int8)


class SVFBottleneck(ResidualUnit):
    """A bottleneck of three SVF convolutions as one autograd node.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`` with batch norms that
    use their stored statistics; the shortcut is x or a convolution with batch norm. With the
    strategy ``gram`` it keeps the outputs of conv1 and conv2 and one bit per element of its own:
    2.125 maps of conv1's size in float32, where the paper's layers keep 18. A bottleneck that
    returns the sum, without a ReLU after it, needs no bits: 2 maps.

    Where it does not fit, because a batch norm trains, a hook sits on an inner module or a
    convolution computes as ``reference``, the original forward runs; :meth:`unfused_reason` and
    :func:`svf_fast.memory_report` say so.

    Shapes: x [N, C, H, W] -> [N, C', H', W'].
    """

    stage_count = 3


class SVFBasicBlock(ResidualUnit):
    """A basic block of two SVF convolutions as one autograd node: see :class:`SVFBottleneck`.

    With the strategy ``gram`` it keeps the outputs of both and one bit per element of its own,
    which a block that returns the sum needs not.
    """

    stage_count = 2


def _children(unit: Unit) -> tuple[str, ...]:
    names = (unit.stage.conv, unit.stage.bn)
    return (*names, unit.relu) if unit.relu else names


class FusedSequential(Fused):
    """An ``nn.Sequential`` that runs each conv, batch norm and ReLU in it as one autograd node."""

    is_whole = False
    takes_int8 = True
    _names: tuple[Unit, ...]
    # of the norms that are more than torch's: the classes of the modules in each, all attributes
    _kinds: dict[str, dict[str, str]] = {}  # noqa: RUF012  of a pickle that has none
    _attributes: dict[str, dict[str, Any]] = {}  # noqa: RUF012

    @classmethod
    def adopt(cls, module: nn.Module, units: tuple[Unit, ...]) -> Callable[[], object]:
        """Fuse these units of a sequence too, in place; returns what undoes it."""
        if isinstance(module, FusedSequential):
            before = module._names
            module._set(before + tuple(unit for unit in units if unit not in before))
            return partial(module._set, before)
        fused = recast(module, cls)
        fused._set(units)
        return fused.unfuse

    def _set(self, units: tuple[Unit, ...]) -> None:
        self._names = units
        self._kinds, self._attributes = {}, {}
        for bn in (unit.stage.bn for unit in units):
            if is_read(norm := self.get_submodule(bn)):
                self._kinds[bn], read = remember(norm, ())
                self._attributes |= {f"{bn}.{name}".rstrip("."): own for name, own in read.items()}
        self.__dict__.pop("_reading", None)

    def fused_convs(self) -> dict[str, bool]:
        return {unit.stage.conv: not unit.stage.relu for unit in self._names}

    def fused_stages(self) -> list[StageNames]:
        """Name the stages that run as one each."""
        return [unit.stage for unit in self._names]

    def unfused_reasons(self) -> list[str]:
        return [self._unit_reason(unit) for unit in self._names]

    def __getitem__(self, index):
        part = super().__getitem__(index)  # type: ignore[misc]
        if isinstance(part, FusedSequential) and isinstance(index, slice):
            part._set(tuple(u for u in self._names if part._modules.keys() >= set(_children(u))))
            part.keeps_int8 = self.keeps_int8
        return part

    def _unit_reason(self, unit: Unit) -> str:
        for name in _children(unit):
            if name not in self._modules:
                return f"{name} is no longer there"
            if reason := hooked_module(name, self.get_submodule(name)):
                return reason
        if unit.relu and type(self.get_submodule(unit.relu)) is not nn.ReLU:
            return f"{unit.relu} is no longer a ReLU"
        return _reason(self, [unit.stage]) or self._norm_reason(unit.stage.bn)

    def _norm_reason(self, bn: str) -> str:
        """Tell what of a norm is not as it was when its forward was read."""
        norm = self.get_submodule(bn)
        if bn not in self._kinds:
            kind = original_class(norm).__name__
            return f"{bn} is a {kind}, which it was not at conversion" if is_read(norm) else ""
        reason = replaced(norm, self._kinds[bn]) or hooked(norm)
        return f"{bn}: {reason}" if reason else changed(self, bn)

    def forward(self, x: Tensor) -> Tensor:
        skipped: set[str] = set()
        reading = units = None
        for name in self._modules:  # named_children leaves out what comes again
            if name in skipped:
                continue
            if reading is None or units is None:
                reading = read(self)
                reasons = zip(self._names, reading.reasons(self), strict=True)
                units = {unit.stage.conv: unit for unit, reason in reasons if not reason}
            unit = units.get(name)
            if unit is None:
                x = self.get_submodule(name)(x)
                reading = None  # its hooks may have changed what comes after
                continue
            dtype = _compute_dtype(x, conv_of(self, unit.stage), "SVFConvBNAct")
            stages, programs = reading.stages(self, [unit.stage], dtype, not unit.stage.relu)
            x = block(
                x.to(dtype),
                stages,
                relu=unit.stage.relu,
                programs=programs,
                int8=self.keeps_int8,
            )
            skipped = {unit.stage.bn, *([unit.relu] if unit.relu else [])}
        return x


class FusedChain(Fused):
    """A module that calls its parts in turn, each conv, batch norm and ReLU as one autograd node.

    Its parts are called as its own forward did when it was read; that runs where one does not fit.
    """

    is_whole = False
    takes_int8 = True
    _names: Chain
    _kinds: dict[str, str]
    _attributes: dict[str, dict[str, Any]]

    @classmethod
    def adopt(cls, module: nn.Module, found: Chain) -> Fused:
        """Fuse a chain that was found, in place."""
        fused = recast(module, cls)
        fused._names = found
        fused._kinds, fused._attributes = remember(fused, fused._called())
        return fused

    def _called(self) -> tuple[str, ...]:
        return tuple(step for step in self._names.steps if isinstance(step, str))

    def fused_convs(self) -> dict[str, bool]:
        return {stage.conv: not stage.relu for stage in self._names.stages}

    def fused_stages(self) -> list[StageNames]:
        """Name the stages that run as one each."""
        return list(self._names.stages)

    def unfused_reasons(self) -> list[str]:
        called = self._called()
        return [
            replaced(self, self._kinds, called)
            or changed(self)
            or _reason(self, self.fused_stages())
            or hooked(self, called)
        ]

    def forward(self, x: Tensor) -> Tensor:
        reading = read(self)
        if reading.reasons(self)[0]:
            return super().forward(x)
        for step in self._names.steps:
            if isinstance(step, str):
                x = self.get_submodule(step)(x)
                continue
            dtype = _compute_dtype(x, conv_of(self, step), type(self).__name__)
            stages, programs = reading.stages(self, [step], dtype, not step.relu)
            x = x.to(dtype)
            x = block(x, stages, relu=step.relu, programs=programs, int8=self.keeps_int8)
        return x


class SVFConvBNAct(nn.Module):
    """``relu(bn(conv(x)) + residual)`` with a frozen batch norm, as one autograd node.

    Args:
        conv: a convolution; a plain one is converted with ``strategy``.
        bn: the batch norm that follows; it uses its stored statistics (evaluation mode).
        relu: whether a ReLU ends it.

    Attributes:
        keeps_int8: keep y in 8 bits, as a block does: see :class:`ResidualUnit`.

    Shapes: x [N, Ci, H, W], residual [N, Co, Ho, Wo] or None -> [N, Co, Ho, Wo]. With ``gram`` it
    keeps y alone, or y and a bit per element where a residual is added. Where batch norm trains or
    an inner module has a hook it runs module by module: :meth:`unfused_reason`.

    Raises TypeError for other modules, ValueError when their channels differ.
    """

    def __init__(
        self,
        conv: nn.Conv2d | SVFConv2d,
        bn: nn.BatchNorm2d,
        relu: bool = True,
        strategy: str = "auto",
    ):
        super().__init__()
        if not isinstance(conv, nn.Conv2d | SVFConv2d):
            raise TypeError(f"conv: expected an nn.Conv2d or SVFConv2d, got {type(conv).__name__}")
        own = getattr(type(bn), "forward", None)
        if own not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
            raise TypeError(
                f"bn: expected an nn.BatchNorm2d with its own forward, got {type(bn).__name__}"
            )
        if bn.num_features != conv.out_channels:
            raise ValueError(
                f"bn: expected {conv.out_channels} features, the channels of conv, got "
                f"{bn.num_features}"
            )
        self.conv = conv if isinstance(conv, SVFConv2d) else SVFConv2d.from_conv(conv, strategy)
        self.bn = bn
        self.relu = relu
        self.keeps_int8 = False
        self.train(bn.training)

    def unfused_reason(self) -> str:
        """Tell why the next forward pass runs module by module; empty where it is fused."""
        return self.unfused_reasons()[0]

    def unfused_reasons(self) -> list[str]:
        return [_reason(self, [StageNames("conv", "bn", self.relu)]) or hooked(self)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and not isinstance(residual, Tensor):
            raise TypeError(
                f"SVFConvBNAct: residual: expected a tensor or None, got {type(residual).__name__}"
            )
        reading = read(self)
        if reading.reasons(self)[0]:
            out = self.bn(self.conv(x))
            out = out if residual is None else out + residual
            return out.relu() if self.relu else out
        dtype = _compute_dtype(x, self.conv, "SVFConvBNAct")
        names, folds = StageNames("conv", "bn", self.relu), residual is not None or not self.relu
        stages, programs = reading.stages(self, [names], dtype, folds)
        kind, given = ("", None) if residual is None else ("given", residual.to(dtype))
        int8 = self.keeps_int8
        return block(x.to(dtype), stages, kind, given, self.relu, False, programs, int8)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reading"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"keeps_int8": False, **state})  # of an older version


def _compute_dtype(x: Tensor, conv: SVFConv2d, name: str) -> torch.dtype:
    dtype = conv.compute_dtype(x, name)
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"{name}: expected x of shape [N, {conv.in_channels}, H, W], got {list(x.shape)}"
        )
    return dtype


def _reason(module: nn.Module, stages: list[StageNames]) -> str:
    for stage in stages:
        conv, bn = module.get_submodule(stage.conv), module.get_submodule(stage.bn)
        if not isinstance(conv, SVFConv2d):
            return f"{stage.conv} is a {type(conv).__name__}, not an SVF layer"
        if conv.pads_outside:
            return f"{stage.conv} pads x in a pass of its own"
        if conv.strategy_in_use == "reference":
            return f"{stage.conv} computes as 'reference'"
        norm = Norm.of(bn)
        if norm is None:
            return f"{stage.bn} is a {type(bn).__name__}, not a batch norm"
        if norm.mean is None or (bn.training and isinstance(bn, _BatchNorm)):
            return f"{stage.bn} uses the batch's statistics: call eval() on it"
        if not torch.is_grad_enabled():
            continue
        if any(parameter.requires_grad for parameter in bn.parameters()):
            return f"{stage.bn} trains: call requires_grad_(False) on it"
        if conv.bias is not None and conv.bias.requires_grad:
            return f"the bias of {stage.conv} trains: call requires_grad_(False) on it"
    return ""
