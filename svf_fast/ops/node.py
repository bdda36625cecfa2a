"""What the autograd nodes of a layer and of a block share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def unpack_saved(ctx, name: str) -> tuple[Any, ...]:
    """Return the saved tensors, None where None was; explain that one was changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{name}: a tensor kept for the backward pass was changed in place, most often the "
            "layer's output by an activation with inplace=True right after it. Set inplace=False "
            "there, or use strategy='chain' for this layer."
        ) from error


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
