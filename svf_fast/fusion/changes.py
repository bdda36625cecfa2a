"""What of a fused module is not as it was when its forward pass was read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from svf_fast.fusion.attributes import attributes, snapshot
from svf_fast.fusion.fused import original_class
from svf_fast.fusion.graph import is_conv
from svf_fast.fusion.norm import FORWARDS, is_norm
from svf_fast.fusion.state import is_hooked
from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.layers.factored import Factored


class Remembering(Protocol):
    """A fused module with the attributes of its parts, as they were."""

    _attributes: dict[str, dict[str, Any]]

    def get_submodule(self, target: str) -> nn.Module: ...


def _kind(module: nn.Module) -> str:
    """Name the role of a module in a fused block."""
    if isinstance(module, nn.Conv2d | SVFConv2d):
        return "convolution"
    if isinstance(module, nn.SyncBatchNorm):
        return nn.BatchNorm2d.__name__  # the same with stored statistics
    return original_class(module).__name__


def remember(
    module: nn.Module, called: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return what a forward pass that was read depends on, but for the parts that it calls."""
    inner = [("", module), *_inner(module, called)]
    read = {name: attributes(part) for name, part in inner if is_read(part) and name not in called}
    return {name: _kind(part) for name, part in inner if name}, read


def is_read(part: nn.Module) -> bool:
    """Tell whether its own attributes decide what a part computes, and no other reason knows."""
    if is_norm(part):
        return isinstance(part, _BatchNorm) and original_class(part).forward not in FORWARDS
    return not is_conv(part) and not isinstance(part, Factored)


def replaced(module: nn.Module, kinds: dict[str, str], called: tuple[str, ...] = ()) -> str:
    """Name the first inner module that was replaced, added or removed."""
    now = {name: _kind(inner) for name, inner in _inner(module, called)}
    if now == kinds:
        return ""
    name = next(name for name in (*kinds, *now) if now.get(name) != kinds.get(name))
    was, is_now = kinds.get(name, "missing"), now.get(name, "missing")
    return f"{name} was {was} at conversion and is {is_now} now"


def changed(module: Remembering, within: str = "") -> str:
    """Name the first attribute that is not as it was when the forward was read.

    ``within``: the part that is looked at, by default all.
    """
    for name, before in module._attributes.items():
        if within and not f"{name}.".startswith(f"{within}."):
            continue
        part = module.get_submodule(name)
        now = part.__dict__
        if hidden := _hidden_method(part, before):
            return f"{name}.{hidden} is not what it was at conversion".lstrip(".")
        for key, value in before.items():
            what, own = f"{name}.{key}".lstrip("."), now.get(key)
            if isinstance(value, tuple):
                if _differs(module, name, key):
                    return f"{what} is not what it was at conversion"
            elif own != value and key not in ("eps", "momentum"):
                return f"{what} was {value!r} at conversion and is {own!r} now"
    return ""


def _hidden_method(part: nn.Module, before: dict[str, Any]) -> str:
    """Name a method of a module's class that a later attribute of its own stands before."""
    kind = original_class(part)
    new = (key for key in part.__dict__ if key not in before and key != "forward")
    return next((key for key in new if inspect.isroutine(getattr(kind, key, None))), "")


def _differs(module: Remembering, name: str, key: str) -> bool:
    """Tell whether an attribute of several values is not as it was."""
    now = module.get_submodule(name).__dict__.get(key)
    return snapshot(now) != module._attributes[name][key]


# Dynamo does not look into all objects: it is told to run this while it traces. So does
# `torch.compiler.assume_constant_result`, which imports Dynamo, for 2 s, whether it is used or not.
vars(_differs)["_dynamo_marked_constant"] = True


def hooked(module: nn.Module, besides: tuple[str, ...] = ()) -> str:
    """Name the first inner module that the fused pass would skip although a hook listens to it."""
    for name, inner in _inner(module, besides):
        if name not in besides and (reason := hooked_module(name, inner)):
            return reason
    return ""


def _inner(module: nn.Module, called: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside of a module by name, but those inside of the parts it calls."""
    beyond = tuple(f"{name}." for name in called)
    found = module.named_modules()
    return ((name, inner) for name, inner in found if name and not name.startswith(beyond))


def hooked_module(name: str, module: nn.Module) -> str:
    if is_hooked(module):
        return f"{name} has a hook"
    return f"{name} has a forward of its own" if "forward" in vars(module) else ""
