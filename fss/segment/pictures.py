"""What a user hands in: pictures, and masks of an object as pictures, polygons and boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from fss.colors import ORANGE
from fss.data.images import Picture, read_picture
from fss.data.masks import MaskValue, ObjectMask, read_object

__all__ = ["MaskLike", "Picture", "find_object", "overlay", "read_mask", "read_picture"]

MaskLike = Picture | Sequence[float] | Sequence[tuple[float, float]]
"""A mask as a picture of it, a box (x0, y0, x1, y1), or a polygon [(x, y), …]."""


def read_mask(
    mask: MaskLike, size: tuple[int, int], name: str = "mask", value: MaskValue | None = None
) -> NDArray[np.bool_]:
    """Read a mask as bool [H, W], true where the object is.

    A picture of a mask has the size of the upright picture: one that is stored turned, with an EXIF
    orientation, is masked as viewers show it; the orientation of the mask's own file is followed
    too. Black (0) is background and there is one object, in any usual convention: class ids and 255
    ignored, palettes, Pascal VOC's colors, 0 and 255, soft edges, transparency; see `read_object`.
    Where several values could be the object, `value` says which.

    A box holds the pixels whose center lies between (x0, y0) and (x1, y1), a polygon those whose
    center is inside by the even-odd rule. Coordinates are pixels, x to the right and y down, from
    (0, 0), the top left corner of the picture, to (W, H).

    Args:
        mask: see `MaskLike`; an array is bool, integers, or floating from 0 to 1.
        size: height and width of its picture.
        name: what to call it in an error; a file is called by its path.
        value: of a picture: the class id, the gray or the color (128, 0, 0) that is the object.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither picture, box nor polygon, or an array of another dtype.
        ValueError: a file that cannot be decoded, another size, several classes, a box or polygon
            that reaches outside or is not in pixels, nothing masked.
    """
    return find_object(mask, size, name, value).pixels


def find_object(
    mask: MaskLike, size: tuple[int, int], name: str = "mask", value: MaskValue | None = None
) -> ObjectMask:
    """Read a mask, and the convention in which it was given; see `read_mask`."""
    if isinstance(mask, np.ndarray) and _is_picture(mask, size):
        _check_size(mask.shape, size, name)
        found = read_object(mask, name, value)
    elif isinstance(mask, (str, os.PathLike, Image.Image)):
        found = read_object(mask, name, value)
        name = name if isinstance(mask, Image.Image) else str(mask)
        _check_size(found.pixels.shape, size, name)
    else:
        points = _corners(mask, name)
        found = ObjectMask(_draw(points, size, name), "box" if len(points) == 2 else "polygon")
    if not found.pixels.any():
        raise ValueError(f"{name}: expected at least one pixel of the object, got an empty mask")
    return found


def overlay(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_], color: str = ORANGE, opacity: float = 0.5
) -> Image.Image:
    """Draw a mask [H, W] over a picture uint8 [H, W, 3] in a color, with a line around it."""
    red_green_blue = np.array(ImageColor.getrgb(color), dtype=np.float32)
    result = pixels.astype(np.float32)
    result[mask] += opacity * (red_green_blue - result[mask])
    result[_outline(mask)] = red_green_blue
    return Image.fromarray(np.rint(result).astype(np.uint8))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the mask's pixels near the background: within 1 of 500 of the longer side."""
    inside = mask
    for _ in range(max(1, max(mask.shape) // 500)):
        framed = np.pad(inside, 1, mode="edge")
        inside = inside & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2]
        inside &= framed[1:-1, 2:]
    return mask & ~inside


def _is_picture(mask: NDArray[Any], size: tuple[int, int]) -> bool:
    geometry = mask.shape == (4,) or (mask.ndim == 2 and mask.shape[1] == 2)
    return mask.shape[:2] == size or mask.dtype == np.bool_ or not geometry


def _check_size(shape: tuple[int, ...], size: tuple[int, int], name: str) -> None:
    if len(shape) not in (2, 3):
        raise ValueError(f"{name}: expected [H, W] like its picture, got {list(shape)}")
    got = shape[:2]
    if got == size:
        return
    hint = "a mask has the size of its picture"
    if got == size[::-1]:
        hint = "one of them is turned; draw the mask on the upright picture, as viewers show it"
    raise ValueError(
        f"{name}: expected {size[0]}×{size[1]} pixels (height×width) like its picture, got "
        f"{got[0]}×{got[1]}: {hint}"
    )


def _corners(mask: object, name: str) -> NDArray[np.float64]:
    """Return the corners [N, 2] of a polygon or [2, 2] of a box, (x, y) each."""
    try:
        points = np.array(mask, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.shape == (4,):
        return points.reshape(2, 2)
    if points.ndim == 2 and points.shape[1] == 2 and len(points) >= 3:
        return points
    text = repr(mask)
    raise TypeError(
        f"{name}: expected a path, a PIL image, an array [H, W], a box (x0, y0, x1, y1) or a "
        f"polygon of at least three points (x, y), got {text[:57] + '…' * (len(text) > 57)}"
    )


def _draw(points: NDArray[np.float64], size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    height, width = size
    what = "box" if len(points) == 2 else "polygon"
    if ((points >= 0) & (points <= 1)).all() and max(size) > 1:
        raise ValueError(
            f"{name}: all coordinates of the {what} are from 0 to 1: shares of the picture? "
            f"expected pixels: multiply x by its width, {width}, and y by its height, {height}"
            + " (YOLO's x and y are the center of the box)"
            * (what == "box")
        )
    if what == "box":
        (x0, y0), (x1, y1) = points
        text = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if (x0 >= x1 or y0 >= y1) and min(x1, y1) > 0 and x0 + x1 <= width and y0 + y1 <= height:
            raise ValueError(
                f"{name}: expected a box (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {text}; x, "
                f"y, width and height as in COCO? give ({x0:g}, {y0:g}, {x0 + x1:g}, {y0 + y1:g})"
            )
        if x0 >= x1 or y0 >= y1:
            raise ValueError(
                f"{name}: expected a box (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {text}"
            )
    inside = ((points >= 0) & (points <= (width, height))).all(1)  # NaN is outside
    if not inside.all():
        x, y = points[~inside][0]
        hint = ""
        if ((points >= 0) & (points <= (height, width))).all():
            hint = "; are these (y, x)? expected x first"
        raise ValueError(
            f"{name}: the {what} reaches outside of its picture: expected x from 0 to {width} and "
            f"y from 0 to {height} (pixels), got ({x:g}, {y:g}){hint}"
        )
    if what == "box":
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return _fill(points, size)


def _fill(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill the pixels whose center lies inside a polygon, by the even-odd rule."""
    height, width = size
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    mask = np.zeros(size, dtype=bool)
    for row in range(height):
        y = row + 0.5
        crossed = (y0 <= y) != (y1 <= y)
        if crossed.any():
            share = (y - y0[crossed]) / (y1[crossed] - y0[crossed])
            x = x0[crossed] + share * (x1[crossed] - x0[crossed])
            # a center is inside where an odd number of edges lies to its left
            first = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
            mask[row] = np.cumsum(np.bincount(first, minlength=width + 1))[:width] % 2
    return mask
