"""The attributes of a module on which its forward may depend besides tensors and inner modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from svf_fast.fusion.fused import names_of_fused

_OF_ALL = {*vars(nn.Module()), "call_super_init", "dump_patches"}
_PLAIN = (bool, int, float, str, bytes, complex, type(None))
_DEPTH = 3  # of lists in lists, objects in objects


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return the values of a module's own attributes, private ones too, as `snapshot` has them."""
    if type(module) in (nn.ReLU, nn.Sequential):
        return {}
    beyond = _OF_ALL | names_of_fused()
    own = module.__dict__.items()
    return {name: snapshot(value) for name, value in own if name not in beyond}


def snapshot(value: Any, depth: int = _DEPTH) -> Any:
    """Return what equals another snapshot as long as nothing that is reached from it changes.

    Numbers, words, containers and the attributes of objects are compared by value, functions by
    their code, tensors and modules by their type alone: so that a copy's equals the original's.
    """
    if isinstance(value, _PLAIN) and value == value:
        return value
    kind = type(value).__qualname__
    if depth and isinstance(value, (list, tuple)):
        return kind, *(snapshot(each, depth - 1) for each in value)
    if depth and isinstance(value, dict):
        return kind, *((repr(key), snapshot(each, depth - 1)) for key, each in value.items())
    if depth and isinstance(value, (set, frozenset)):
        return kind, *sorted(map(repr, value))
    if isinstance(value, (nn.Module, Tensor, type)) or not depth:
        return kind, getattr(value, "__qualname__", None)
    inner = dict(getattr(value, "__dict__", {}))
    return kind, getattr(value, "__code__", None), snapshot(inner, depth - 1)
