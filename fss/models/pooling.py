"""Resizing and masked pooling of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def resize(maps: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Resize maps [B, C, h, w] to [B, C, *size], bilinear, with the corners aligned (PFENet, BAM).

    Maps that have the size already are returned as they are, not copied.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.interpolate(
        maps, size=tuple(size), mode="bilinear", align_corners=align_corners
    )


def nearest(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Resize masks [N, H, W] to [N, *size]: position i of n has the pixel ⌊i·H/n⌋.

    Where a mask shrinks to a side of a feature map, torch's nearest neighbor is that pixel;
    onnxruntime's is the one beside it where i·H/n is whole.
    """
    for dim, side in enumerate(size, 1):
        place = torch.arange(side, device=masks.device) * masks.shape[dim] // side
        masks = masks.index_select(dim, place)
    return masks


def average_bins(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average maps [B, C, h, w] over bins that cover them evenly, to [B, C, *size]."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.adaptive_avg_pool2d(maps, tuple(size))


def masked_average_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Average features under a mask: Σ_p mask_p·feature_p / (Σ_p mask_p + 0.0005).

    features [B, C, h, w], mask [B, 1, h, w] floating -> [B, C, 1, 1]; an empty mask gives 0.
    """
    area = mask.sum(dim=(2, 3), keepdim=True) + 0.0005
    return (features * mask).sum(dim=(2, 3), keepdim=True) / area


def enlarged_average_pool(
    features: Tensor, mask: Tensor, align_corners: bool = False, offset: float = 1e-5
) -> Tensor:
    """Average features under a mask at the mask's size: Σ_p mask_p·F_p / (Σ_p mask_p + offset).

    F are the features, resized to the size of the mask. As this is linear in them, the sum is one
    over the small map, its positions weighted by what of the mask each is spread over; no large map
    is computed.

    features [B, C, h, w], mask [B, H, W] bool -> [B, C]; an empty mask gives 0.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    spread = mask.to(dtype)
    rows, columns = (
        interpolation(small, large, align_corners, like=spread)
        for small, large in zip(features.shape[-2:], mask.shape[-2:], strict=True)
    )
    with torch.autocast(mask.device.type, enabled=False):
        weights = rows @ spread @ columns.mT
    area = spread.sum(dim=(1, 2)).clamp(min=0 if offset else 1) + offset
    return (features * weights[:, None]).sum(dim=(2, 3)) / area[:, None]


def interpolation(small: int, large: int, align_corners: bool, like: Tensor) -> Tensor:
    """Compute the matrix [small, large] of linear resizing: values [small] times it are resized."""
    identity = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    if small == large:
        return identity[0]
    return functional.interpolate(identity, size=large, mode="linear", align_corners=align_corners)[
        0
    ]


def cat_maps(maps: Sequence[Tensor], like: Tensor) -> Tensor:
    """Compute ``cat(maps, dim=1)`` at the size [h, w] and in the memory format of the map `like`.

    A map [B, C, 1, 1] stands for one value per channel. torch.cat leaves channels_last where such a
    map or one of a single channel is among them, and whatever reads the result lays it out anew.
    """
    maps = [each.expand(-1, -1, *like.shape[2:]) for each in maps]
    if like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last):
        return torch.cat(maps, dim=1)
    return torch.cat([each.permute(0, 2, 3, 1) for each in maps], dim=3).permute(0, 3, 1, 2)
