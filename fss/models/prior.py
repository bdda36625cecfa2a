"""The training-free prior mask of PFENet and BAM."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import cosine_max


def prior_masks(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """Compute where the query resembles the foreground of each support, from 0 to 1.

    With c_i the largest cosine of query position i to any masked support position,

        prior_i = (c_i - min c) / (max c - min c + 1e-7)          (PFENet, section 3.2)

    Args:
        query: high-level features [B, C, h, w].
        support: high-level features [B, K, C, h', w'] of the masked supports.
        mask: foreground [B, K, 1, h', w'], floating, 0 to 1.

    Returns:
        [K, B, 1, h, w] in float32 at least, differentiable in query and support.
    """
    batch, _, height, width = query.shape
    positions = query.flatten(2)
    priors = []
    for shot in range(support.shape[1]):
        cosine = cosine_max(positions, support[:, shot].flatten(2), mask[:, shot].flatten(1))
        low = cosine.amin(dim=1, keepdim=True)
        high = cosine.amax(dim=1, keepdim=True)
        priors.append((cosine - low) / (high - low + 1e-7))
    return torch.stack(priors).reshape(-1, batch, 1, height, width)
