"""What a fused block's forward depends on besides its input, watched for changes.

Reading a block (may it be fused, with which constants?) takes several times as long as launching
its kernels, and what it depends on hardly ever changes. So it is looked at in each forward pass,
and read again when something is not as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from svf_fast._library import _C
from svf_fast.fusion.attributes import attributes, snapshot
from svf_fast.fusion.fused import original_class
from svf_fast.fusion.norm import FORWARDS, is_norm
from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.layers.factored import Factored
from svf_fast.ops.node import is_tracing

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OF_CONV = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a hook listens to the module's calls."""
    own = module.__dict__
    return bool(own[_HOOKS[0]] or own[_HOOKS[1]] or own[_HOOKS[2]] or own[_HOOKS[3]])


class _Unseen(Exception):
    """A change could not be seen: of fake and inference tensors."""


class Watch:
    """All modules inside a module and their tensors, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._children: list[tuple] = []
        self._counts: list[tuple[dict, int]] = []
        self._values: list[tuple[dict[str, Any], str, Any]] = []
        self._snapshots: list[tuple[dict[str, Any], str, Any]] = []
        self._layers: list[tuple[Factored, str, bool]] = []
        self._tensors: list[tuple] = []
        # writes through `tensor.data` pass the version counter by; on the CPU the bytes decide, on
        # a GPU looking would mean waiting
        self._bytes: list[tuple[int, int, int]] = []
        self._copies: list[Tensor] = []
        self._apart: list[tuple[Tensor, Tensor]] = []  # whose elements do not lie side by side
        # of the module itself, by name: its dictionary holds this watch, which must not hold it
        self._own = [*attributes(module).items()]
        self._size = len({*module.__dict__, "_reading"})  # a new one may hide a method
        self._look(module)

    def _look(self, module: nn.Module) -> None:
        self._counts.append((module._modules, len(module._modules)))
        for name, child in module._modules.items():
            if child is None:
                continue
            own = child.__dict__
            state = own["training"], is_hooked(child), "forward" in own
            self._children.append((module._modules, name, child, type(child), own, *state))
            if isinstance(child, Factored):
                if not child.has_values:
                    raise _Unseen
                for attribute in _OF_CONV if isinstance(child, SVFConv2d) else ():
                    value = own[attribute]  # a list may be written to
                    kept = tuple(value) if isinstance(value, list) else value
                    self._values.append((own, attribute, kept))
                self._layers.append((child, child.strategy_in_use, child.learns))
                self._tensor(own["_parameters"], "bias", copied=True)
            elif is_norm(child):
                self._values.append((own, "eps", own.get("eps")))
                for name_ in ("weight", "bias", "running_mean", "running_var"):
                    parameters, buffers = own["_parameters"], own["_buffers"]
                    self._tensor(parameters if name_ in parameters else buffers, name_, copied=True)
                if original_class(child).forward not in FORWARDS:
                    self._note(child)
                if child._modules:
                    self._look(child)
            else:
                self._note(child)
                self._look(child)

    def _note(self, module: nn.Module) -> None:
        """Remember the attributes of a module, and how many there are."""
        own = module.__dict__
        self._counts.append((own, len(own)))
        for name, value in attributes(module).items():
            if isinstance(value, tuple):
                self._snapshots.append((own, name, value))
            else:
                self._values.append((own, name, value))

    def _tensor(self, of: dict[str, Tensor | None], name: str, copied: bool = False) -> None:
        tensor = of.get(name)
        if tensor is None:
            self._values.append((of, name, None))
            return
        if isinstance(tensor, FakeTensor) or tensor.is_inference():
            raise _Unseen
        version = tensor._version
        self._tensors.append((of, name, tensor, tensor.data_ptr(), version, tensor.requires_grad))
        if not copied or tensor.device.type != "cpu":
            return
        copy = tensor.detach().clone()
        if tensor.is_contiguous():
            self._copies.append(copy)
            self._bytes.append((tensor.data_ptr(), copy.data_ptr(), copy.nbytes))
        else:
            self._apart.append((tensor, copy))

    def key(self, module: nn.Module) -> tuple:
        """Return a key of all this but the layers: equal as long as nothing of it changes."""
        tensors = (
            (t := of.get(name)) is not None and (t.data_ptr(), t._version)
            for of, name, *_ in self._tensors
        )
        values = (of.get(name) for of, name, _ in self._values)
        snapshots = (snapshot(of.get(name)) for of, name, _ in self._snapshots)
        children = (
            (id(modules.get(name)), own["training"], "forward" in own, is_hooked(child))
            for modules, name, child, _, own, *_ in self._children
        )
        own = (snapshot(module.__dict__.get(name)) for name, _ in self._own)
        return *tensors, *values, *snapshots, *own, *children

    def holds(self, module: nn.Module) -> bool:
        """Tell whether all is as it was in the module that is watched."""
        own_now = module.__dict__
        if len(own_now) != self._size:
            return False
        for name, value in self._own:
            now = own_now.get(name)
            if now is not value and snapshot(now) != value:
                return False
        for modules, count in self._counts:
            if len(modules) != count:
                return False
        for modules, name, child, cls, own, training, hooked, own_forward in self._children:
            if (
                modules.get(name) is not child
                or child.__class__ is not cls
                or own["training"] is not training
                or ("forward" in own) is not own_forward
                or hooked
                is not bool(
                    own["_forward_hooks"]
                    or own["_forward_pre_hooks"]
                    or own["_backward_hooks"]
                    or own["_backward_pre_hooks"]
                )
            ):
                return False
        for of, name, tensor, pointer, version, requires_grad in self._tensors:
            if (
                of.get(name) is not tensor
                or tensor._version != version
                or tensor.data_ptr() != pointer
                or tensor.requires_grad is not requires_grad
            ):
                return False
        for of, name, value in self._values:
            if of.get(name) != value:
                return False
        for of, name, value in self._snapshots:
            if snapshot(of.get(name)) != value:
                return False
        for layer, strategy, requires_grad in self._layers:
            plan = layer.current_plan()
            assert plan is not None
            if plan.strategy != strategy or layer.learns is not requires_grad:
                return False
        apart = all(torch.equal(tensor, copy) for tensor, copy in self._apart)
        return apart and _C.same_bytes(self._bytes)


def watch(module: nn.Module) -> Watch | None:
    """Collect what the forward pass depends on; None where changes of it could not be seen.

    That is while torch.compile traces, under transforms of torch.func, and for tensors without
    values or version.
    """
    if is_tracing():
        return None
    try:
        return Watch(module)
    except _Unseen:
        return None
