"""Resizing and masked pooling of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, h, w] to [B, C, *size], bilinear with aligned corners as in PFENet and BAM.

    Maps that have the size already are returned themselves: it would only copy them.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def average_bins(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, h, w] to the means [B, C, *size] of as many bins, which cover the maps evenly."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.adaptive_avg_pool2d(maps, tuple(size))


def masked_average_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Mean feature under a mask: Σ_p mask_p·feature_p / (Σ_p mask_p + 0.0005).

    features [B, C, h, w], mask [B, 1, h, w] floating -> [B, C, 1, 1]; an empty mask gives 0.
    """
    area = mask.sum(dim=(2, 3), keepdim=True) + 0.0005
    return (features * mask).sum(dim=(2, 3), keepdim=True) / area
