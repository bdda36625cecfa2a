"""The composed weight of an SVF layer as others read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_WRITES = {"__setitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class _Comparable(type(Tensor)):  # type: ignore[misc]
    """Lets every tensor pass for one: torch.testing compares only where one class has the other."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class ReadOnly(Tensor, metaclass=_Comparable):
    """A tensor that was computed to be read: what is written to it, or a view, reaches nothing."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(type(x) is cls for x in _written(func, args, kwargs)):
            raise RuntimeError(
                "weight of an SVF layer: expected it to be read, got a write to it. It is composed "
                "from U, S and V whenever it is read, so the layer would not notice: write to S, "
                "or to the weight of the plain network before svf_fast.convert"
            )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            # a view, or the same memory under another name (.data, .detach())
            if isinstance(out, Tensor) and type(out) is not cls:
                memory = _memory(out)
                if any(type(x) is cls and _memory(x) == memory for x in args[:1]):
                    return out.as_subclass(cls)
        return out

    def __reduce_ex__(self, protocol) -> Any:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


def read_only(x: Tensor) -> Tensor:
    """Return x, differentiable, to which writing is an error wherever that can be seen."""
    unseen = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if unseen or x.is_meta or isinstance(x, FakeTensor):
        return x
    return x.as_subclass(ReadOnly)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _written(func, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Return the arguments that a function writes to."""
    name = getattr(func, "__name__", "")
    out = kwargs.get("out")
    written = out if isinstance(out, (tuple, list)) else (out,)
    sets_data = name == "__set__" and getattr(func.__self__, "__name__", "") == "data"
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if in_place or sets_data or name in _WRITES:
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        return (*written, *(first if isinstance(first, (tuple, list)) else (first,)))
    return tuple(written)
