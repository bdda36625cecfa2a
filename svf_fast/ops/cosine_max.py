"""Largest cosine of each query position to any support position: the core of the prior mask."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.reference.cosine_max import cosine_max as reference_cosine_max


def cosine_max(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """Largest cosine of each query position to any masked support position.

    With s'_j = mask_j·s_j:  out_i = max_j (q_i·s'_j) / (|q_i||s'_j| + 1e-7)   (PFENet, section 3.2)

    Differentiable in query and support, not in the mask. A support position with mask 0 has
    similarity exactly 0. Of equal similarities the first j gets the gradient. Half precision is
    computed in float32, under autocast too, because what follows subtracts nearly equal cosines.

    Args:
        query: features [B, C, N].
        support: features [B, C, M] with M ≥ 1, of the query's dtype.
        mask: weights [B, M], floating or bool, without a gradient.

    Returns:
        [B, N] in float64 if the query is, else in float32.

    Raises:
        TypeError: an argument that is no tensor, or has another dtype than the above.
        ValueError: another shape or device, no support position, or a mask that requires gradient.
    """
    _check(query, support, mask)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return reference_cosine_max(query.to(dtype), support.to(dtype), mask.to(dtype))


def _check(query: Tensor, support: Tensor, mask: Tensor) -> None:
    for name, tensor in (("query", query), ("support", support), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not query.is_floating_point():
        raise TypeError(f"query: expected a floating-point tensor, got {query.dtype}")
    if support.dtype != query.dtype:
        raise TypeError(f"support: expected the query's dtype {query.dtype}, got {support.dtype}")
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(
            f"mask: expected a floating-point or bool tensor, got {mask.dtype}; "
            "compare class ids first, e.g. mask == 1"
        )
    if query.ndim != 3:
        raise ValueError(f"query: expected [B, C, N], got shape {list(query.shape)}")
    batch, channels, _ = query.shape
    if support.ndim != 3 or support.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"support: expected [{batch}, {channels}, M], the query's batch and channels, "
            f"got shape {list(support.shape)}"
        )
    positions = support.shape[2]
    if positions == 0:
        raise ValueError("support: expected at least one position, got M = 0")
    if mask.shape != (batch, positions):
        raise ValueError(
            f"mask: expected [{batch}, {positions}], one weight per support position, "
            f"got shape {list(mask.shape)}"
        )
    for name, tensor in (("support", support), ("mask", mask)):
        if tensor.device != query.device:
            raise ValueError(
                f"{name}: expected the query's device {query.device}, got {tensor.device}"
            )
    if mask.requires_grad:
        raise ValueError(
            "mask: expected a tensor that requires no gradient, because the mask is not "
            "differentiated; pass mask.detach()"
        )
