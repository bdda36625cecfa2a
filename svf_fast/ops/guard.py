"""The test that the guarded directions of ``gram`` are still enough, for graphs that replay."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.reference.guard import guards_hold as definition


def guards_hold(S: Tensor, guarded: Tensor, layers: Tensor, limit: float) -> Tensor:
    """Check :func:`svf_fast.reference.guard.guards_hold`; on a GPU one launch for all layers.

    S [n] of any dtype, guarded bool [n], layers int64 [L + 1, 2], all contiguous and on one device
    -> bool [L]. Not differentiable.
    """
    return torch.ops.svf_fast.guards_hold(S.detach().float(), guarded, layers, limit)


torch.library.impl("svf_fast::guards_hold", "default", definition)
_library.register_gpu("guards_hold", _library.triton_kernel("guard", "guards_hold"))


@torch.library.register_fake("svf_fast::guards_hold")
def _(S: Tensor, guarded: Tensor, layers: Tensor, limit: float) -> Tensor:
    return guarded.new_empty(layers.shape[0] - 1)
