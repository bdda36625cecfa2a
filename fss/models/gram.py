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


def gram_distance(query: Tensor, supports: Tensor) -> Tensor:
    """ψ_k = |G_query - G_support,k| / C, the Frobenius norm, from 0 on (BAM, section 4.4).

    Gram matrices [B, C, C] of the queries and [B, K, C, C] of their supports -> [B, K].
    """
    return torch.linalg.matrix_norm(query.unsqueeze(1) - supports) / query.shape[1]
