"""The one place where the bytes that autograd keeps are measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_by(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of the unique storages that autograd keeps of a forward pass, under autocast if given.

    Parameters and buffers are left out.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
        return tensor

    hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", dtype, enabled=dtype is not None), hooks:
        y = model(x)
    del y
    return sum(size for size, _ in kept.values())
