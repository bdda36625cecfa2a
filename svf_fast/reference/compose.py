"""Definition of the composition of a weight from its factors."""

from __future__ import annotations

import torch
from torch import Tensor


def compose(U: Tensor, S: Tensor, V: Tensor, groups: int = 1) -> Tensor:
    """Compute ``W = U diag(S) V`` per group.

    U [Co, R], S [G·R], V [G·R, Ci/G, *kernel] -> [Co, Ci/G, *kernel], float32 at least.
    """
    dtype = torch.promote_types(U.dtype, torch.float32)
    rank = U.shape[1]
    scaled = U.to(dtype).reshape(groups, -1, rank) * S.to(dtype).reshape(groups, 1, rank)
    weight = scaled @ V.to(dtype).reshape(groups, rank, -1)
    return weight.reshape(U.shape[0], *V.shape[1:])
