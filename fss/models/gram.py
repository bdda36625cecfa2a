"""How differently two images are composed: the distance of their features' Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_matrix(features: Tensor) -> Tensor:
    """Cosines between the channels of a map: G_ij = f_i·f_j / (|f_i||f_j| + 1e-7).

    features [B, C, h, w] -> [B, C, C] in float32 at least; f_i is channel i at all positions.
    """
    rows = features.flatten(2)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True, dtype=dtype)
    return (rows @ rows.mT).to(dtype) / (norms * norms.mT + 1e-7)


def gram_distance(query: Tensor, support: Tensor) -> Tensor:
    """ψ_k = |G_query - G_support,k| / C, the Frobenius norm, from 0 on (BAM, section 4.4).

    Args:
        query: low-level features [B, C, h, w].
        support: low-level features [B·K, C, h', w'], episode by episode.

    Returns:
        [B, K].
    """
    gram = gram_matrix(query).unsqueeze(1)
    difference = gram - gram_matrix(support).unflatten(0, (query.shape[0], -1))
    return torch.linalg.matrix_norm(difference) / query.shape[1]
