"""Masks that follow the edges of their picture: the guided filter."""

from __future__ import annotations

import torch
from torch import Tensor

from fss.models.pooling import resize

_FINE_RADIUS, _FINE_SMOOTHNESS = 4, 1e-4


def guided_filter(
    maps: Tensor, guide: Tensor, radius: int, smoothness: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Fit each map, in every window, by an affine function of the guide's color.

    With a and b the means of the coefficients of all windows that hold a pixel, the filtered map is
    ``(a * guide).sum(1, keepdim=True) + b``: it has edges where the guide has them. Coefficients of
    a small picture, resized, sharpen the map at the picture's full size. Differentiable in `maps`.

    Sources: He, Sun and Tang, "Guided Image Filtering", 2013, section 3.5 (guides of three colors);
    He and Sun, "Fast Guided Filter", 2015 (coefficients at a smaller size).

    Args:
        maps: [B, 1, H, W].
        guide: colors from 0 to 1 [B, 3, H, W].
        radius: of the square windows, pixels; they end at the picture's border.
        smoothness: variance of a color from which on it counts as an edge.

    Returns a [B, 3, H, W] and b [B, 1, H, W].
    """
    mean, center = box_mean(guide, radius), box_mean(maps, radius)
    covariance = box_mean(guide * maps, radius) - mean * center
    rows = [
        box_mean(guide[:, i : i + 1] * guide, radius) - mean[:, i : i + 1] * mean for i in range(3)
    ]
    rows = [row + smoothness * unit for row, unit in zip(rows, _units(guide), strict=True)]
    # the columns of the inverse of a 3×3 matrix are cross products of its rows
    columns = [torch.linalg.cross(rows[i - 2], rows[i - 1], dim=1) for i in range(3)]
    determinant = (rows[0] * columns[0]).sum(1, keepdim=True)
    a = sum(covariance[:, i : i + 1] * columns[i] for i in range(3)) / determinant
    b = center - (a * mean).sum(1, keepdim=True)
    return box_mean(a, radius), box_mean(b, radius)


def sharpen(maps: Tensor, small: Tensor, picture: Tensor) -> Tensor:
    """Enlarge a map to its picture's size, with the edges of the picture.

    Args:
        maps: [1, 1, h, w], which follows the edges of the small picture already.
        small: the picture at the map's size, colors from 0 to 1 [1, 3, h, w].
        picture: colors from 0 to 255, uint8 [H, W, 3].

    Returns [1, 1, H, W].
    """
    size = picture.shape[:2]
    a, b = guided_filter(maps, small, _FINE_RADIUS, _FINE_SMOOTHNESS)
    result = resize(b, size)
    for channel in range(3):  # one after the other: a photo of 25 million pixels is large
        result += resize(a[:, channel : channel + 1], size) * (picture[..., channel] / 255)
    return result


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Average maps [..., H, W] over the square around each position, cut off at the border."""
    for dim in (-1, -2):
        size = x.shape[dim]
        place = torch.arange(size, device=x.device)
        first, last = (place - radius).clamp(min=0), (place + radius + 1).clamp(max=size)
        zero = torch.zeros_like(x.narrow(dim, 0, 1))
        sums = torch.cat([zero, x.cumsum(dim)], dim)
        count = (last - first).to(x.dtype)
        total = sums.index_select(dim, last) - sums.index_select(dim, first)
        x = total / (count if dim == -1 else count[:, None])
    return x


def _units(guide: Tensor) -> list[Tensor]:
    return list(torch.eye(3, dtype=guide.dtype, device=guide.device)[:, None, :, None, None])
