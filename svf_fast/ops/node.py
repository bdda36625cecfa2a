"""What the autograd nodes of a layer and of a block share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(name: str, instead: str) -> Callable[[Callable], Callable]:
    """Return what makes the ``backward`` of a node refuse a second derivative, in plain words.

    torch's own ``once_differentiable`` puts its error on an edge that leads to no parameter:
    ``torch.autograd.grad`` and ``backward(inputs=…)`` do not walk it, and leave the second
    derivative out. In ``backward`` gradients are on exactly where ``create_graph=True``.

    Args:
        name: of what the user called.
        instead: what to do for a second derivative.
    """

    def refusing(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: expected a backward pass without create_graph=True, because it has "
                    f"no second derivative; {instead}"
                )
            refuse_transforms(name, instead, *grads)
            return backward(ctx, *grads)

        return checked

    return refusing


def refuse_transforms(name: str, instead: str, *grads: Tensor | None) -> None:
    """Stop under one of torch.func's transforms, and for batched gradients, in plain words."""
    batched = not torch.compiler.is_compiling() and any(map(_is_batched, grads))
    if batched or is_transforming():
        raise RuntimeError(
            f"{name}: expected no transform of torch.func (grad, vmap, jacrev, jvp, …) and no "
            f"batched gradients, which it does not support; {instead}"
        )


def _is_batched(x: Tensor | None) -> bool:
    """Tell whether a gradient is several at once, those of ``is_grads_batched=True``."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def is_transforming() -> bool:
    """Tell whether one of torch.func's transforms runs: its tensors have no memory to look at."""
    return torch._C._are_functorch_transforms_active()


def is_tracing() -> bool:
    """Tell whether what runs now is traced or transformed, so that nothing of it can be kept."""
    return torch.compiler.is_compiling() or is_transforming()


def unpack_saved(ctx, name: str, others: str) -> tuple[Any, ...]:
    """Return the saved tensors, None where None was; explain that one was changed in place.

    others: what it may be beside S, and what to do then.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{name}: a tensor kept for the backward pass was changed in place, most often S, by "
            f"an optimizer's step, which must come after backward, or {others}"
        ) from error


INPUT_CHANGED = "its input, by an operation after it: write that one out of place"
AS_REFERENCE = (
    "use strategy='reference', whose layers are ordinary torch operations: in svf_fast.convert, or "
    "as the attribute `strategy` of the converted layers"
)


def keeps_graph() -> bool:
    """Tell whether the running backward pass may run again; if not, W need not be kept.

    torch frees what a node saved, but not what else it holds, as long as its output lives.
    """
    if torch.compiler.is_compiling():
        return True
    return _KEEPS_GRAPH()


# private, as there is no other way; where it is gone all is kept
_KEEPS_GRAPH = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keep a backward pass in the dtypes of its forward pass, whoever calls it."""
    if torch.compiler.is_compiling():  # backward is traced without autocast; leaving it off there
        return contextlib.nullcontext()  # leaves it off for the layers that are traced after
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
