"""Definition of the channel-wise inner product of two maps."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``out_c = Σ_{n,p} a_ncp · b_ncp``; a, b [N, C, *spatial] -> [C], float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    dims = [dim for dim in range(a.dim()) if dim != 1]
    return (a.to(dtype) * b.to(dtype)).sum(dim=dims)


def channel_dot_scale_(a: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Compute ``channel_dot(a, v)``, then ``a_ncp ← a_ncp · s_c``; a, v [N, C, *spatial], s [C]."""
    dot = channel_dot(a, v)
    scale = s.reshape(-1, *[1] * (a.dim() - 2))
    a.copy_(a.to(s.dtype) * scale)
    return dot
