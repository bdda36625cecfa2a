"""Definition of the test that the guarded directions of ``gram`` are still enough."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def guards_hold(S: Tensor, guarded: Tensor, layers: Tensor, limit: float) -> Tensor:
    """Tell whether ``S_rms / |S_r|`` beside the guarded has a root mean square within ``limit``.

    S [n], the values of L layers one after another; guarded bool [n]; layers int64 [L + 1, 2]: row
    l says where the values of layer l begin and how many groups they are of, the last row is (n, 0)
    -> bool [L]. The mean is over the other directions of all groups of a layer, S_rms that of each
    group; False where one is 0 or NaN.
    """
    holds = []
    rows = layers.tolist()
    for (first, groups), (end, _) in itertools.pairwise(rows):
        square = S[first:end].double().reshape(groups, -1).square()
        others = ~guarded[first:end].reshape(groups, -1)
        ratio = torch.where(others, square.mean(dim=1, keepdim=True) / square, 0)
        holds.append(ratio.sum() <= others.sum() * limit**2)
    return torch.stack(holds) if holds else guarded.new_empty(0)
