"""The class of a fused module: what runs it as one, mixed into the class that it had.

A module of another class keeps its children and their names, its attributes, hooks and place in the
model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn


class Recast(nn.Module):
    """Base of what is mixed into the class of a module, which is :attr:`original`."""

    original: type[nn.Module]
    _mixin: type[Recast]

    def __reduce_ex__(self, protocol) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, (self._mixin, self.original), *reduced[2:])


class Fused(Recast):
    """Base of what runs several modules as one; its forward falls back to that of `original`."""

    is_whole = True  # whether it runs all that is in it
    # whether it has what serves the gradients of S alone, and so may be rounded
    takes_int8: bool = False
    keeps_int8 = False  # whether it keeps that in 8 bits
    _reading: object  # what the last forward pass read of the module

    def unfused_reason(self) -> str:
        """Tell why the next forward pass runs module by module; empty where it is fused."""
        return "; ".join(reason for reason in self.unfused_reasons() if reason)

    def unfused_reasons(self) -> list[str]:
        """Return, for each part that can be fused, why it is not now ("" where it is)."""
        raise NotImplementedError

    def fused_convs(self) -> dict[str, bool]:
        """Name the convolutions that are fused, with whether a batch norm's scale is folded in."""
        raise NotImplementedError

    def constants_key(self) -> tuple:
        """Identify what a CUDA graph of the fused pass holds as constants, batch norms among them.

        Empty where it is not fused: then a graph reads the batch norms themselves.
        """
        reading = self.__dict__.get("_reading")
        if reading is None or any(self.unfused_reasons()):
            return ()
        trades = getattr(self, "recompute", False), self.keeps_int8
        return reading.watch.key(self), *trades

    def unfuse(self) -> nn.Module:
        """Give the module its original class back, in place; returns it."""
        for name in names_of_fused():
            self.__dict__.pop(name, None)
        return restore(self)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_reading", None)
        return replica

    def __reduce_ex__(self, protocol) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        own = {name: value for name, value in reduced[2].items() if name != "_reading"}
        return (*reduced[:2], own, *reduced[3:])


_R = TypeVar("_R", bound=Recast)


def recast(module: nn.Module, mixin: type[_R]) -> _R:
    """Make the module one of `mixin`, in place."""
    module.__class__ = _subclass((mixin, type(module)))
    return cast(_R, module)


def restore(module: Recast) -> nn.Module:
    """Give the module its original class back, in place; returns it."""
    module.__class__ = module.original  # type: ignore[assignment]
    return module


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the one that it had before it got another here."""
    return module.original if isinstance(module, Recast) else type(module)


def hidden_name(module: nn.Module) -> str:
    """Name an attribute or child of a module that fusing it would hide; "" if there is none."""
    classes = (cls for cls in type(module).__mro__ if not issubclass(nn.Module, cls))
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    own.update(*map(vars, classes))
    return min(own & names_of_fused(), default="")


@functools.cache
def names_of_fused() -> frozenset[str]:
    """Collect the names that fusing adds to a module."""
    mixins: list[type[nn.Module]] = [Fused]
    for cls in mixins:
        mixins += [each for each in cls.__subclasses__() if "_mixin" not in vars(each)]
    mixins.append(Recast)
    names = {name for cls in mixins for name in (*vars(cls), *inspect.get_annotations(cls))}
    return frozenset(name for name in names - {*dir(nn.Module)} if not name.startswith("__"))


@functools.cache
def _subclass(bases: tuple[type[Recast], type[nn.Module]]) -> type[Recast]:
    mixin, original = bases
    members: dict[str, Any] = {"original": original, "_mixin": mixin, "__doc__": mixin.__doc__}
    members["__module__"] = original.__module__  # by which tracers know what they look into
    if issubclass(mixin, Fused):
        members["forward"] = _named_as(original.forward, mixin.forward)
    return type(f"SVF{original.__name__}", bases, members)


def _named_as(original: Callable, forward: Callable) -> Callable:
    """Return a fused forward that takes x under the name that the original forward has for it."""
    name = [*inspect.signature(original).parameters, "", ""][1]
    if name == [*inspect.signature(forward).parameters][1]:
        return forward

    @functools.wraps(original)
    def named(self, *args, **given):
        if not args and name in given:
            args = (given.pop(name),)
        return forward(self, *args, **given)

    return named


def _empty(mixin: type[Recast], original: type[nn.Module]) -> Recast:
    cls = _subclass((mixin, original))
    return cls.__new__(cls)
