"""Definition of the largest cosine similarity, the core of the prior mask."""

from __future__ import annotations

from torch import Tensor


def cosine_max(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """Compute the largest cosine of each query position to any masked support position.

    With s'_j = mask_j·s_j:  out_i = max_j (q_i·s'_j) / (|q_i||s'_j| + 1e-7)   (PFENet, section 3.2)

    query [B, C, N], support [B, C, M], mask [B, M] -> [B, N]. Of equal cosines the first j counts.
    Saved for the backward pass: several matrices of N×M.
    """
    masked = support * mask.unsqueeze(1)
    dot = query.mT @ masked
    norms = query.norm(dim=1).unsqueeze(2) * masked.norm(dim=1).unsqueeze(1)
    return (dot / (norms + 1e-7)).max(dim=2).values
