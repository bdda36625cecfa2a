"""A user's masks of one object: pictures of them, polygons and boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.segment.pictures import (
    Picture,
    check_fractions,
    is_transparent,
    levels,
    open_picture,
    split_alpha,
    to_bytes,
)

MaskLike = Picture | Sequence[float] | Sequence[tuple[float, float]]
"""A mask as a picture of it, a box (x0, y0, x1, y1), or a polygon [(x, y), …]."""

_ONE_COLOUR = 64  # how far the colours of an object may differ, of 255


def read_mask(mask: MaskLike, size: tuple[int, int], name: str = "mask") -> NDArray[np.bool_]:
    """A mask as bool [H, W], true where the object is.

    A picture of a mask has the size of the upright picture: one that is stored turned, with an EXIF
    orientation, is masked as viewers show it; the orientation of the mask's own file is followed
    too. If the mask has transparent pixels, the object is what is opaque. Otherwise black (in an
    array, or a palette of colours, 0) is background and there may be one other value; of several
    greys, as soft edges have them, those from half of white on are the object. The index 255 of a
    palette of colours is "ignored" as in Pascal VOC: background, if there is another.

    A box holds the pixels whose centre lies between (x0, y0) and (x1, y1), a polygon those whose
    centre is inside by the even-odd rule. Coordinates are pixels, x to the right and y down, from
    (0, 0), the top left corner of the picture, to (W, H).

    Args:
        mask: see `MaskLike`; an array is bool, integers, or floating from 0 to 1.
        size: height and width of its picture.
        name: what to call it in an error; a file is called by its path.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither picture, box nor polygon, or an array of another dtype.
        ValueError: a file that cannot be decoded, another size, several classes, a box or polygon
            that reaches outside, nothing masked.
    """
    if isinstance(mask, (str, os.PathLike, Image.Image)):
        if not isinstance(mask, Image.Image):
            name = str(mask)
        found = _of_image(open_picture(mask, name), size, name)
    elif isinstance(mask, np.ndarray) and _is_picture(mask, size):
        found = _of_values(mask, size, name)
    else:
        found = _draw(_corners(mask, name), size, name)
    if not found.any():
        raise ValueError(f"{name}: expected at least one pixel of the object, got an empty mask")
    return found


def _is_picture(mask: NDArray[Any], size: tuple[int, int]) -> bool:
    geometry = mask.shape == (4,) or (mask.ndim == 2 and mask.shape[1] == 2)
    return mask.shape[:2] == size or mask.dtype == np.bool_ or not geometry


def _of_image(image: Image.Image, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    if image.mode != "P" or is_transparent(image):
        return _of_values(levels(image), size, name)
    colours, ids = np.array(image.convert("RGB")), np.array(image)
    if (np.ptp(colours, axis=2) == 0).all():
        return _of_values(colours[..., 0], size, name)
    _check_size(ids, size, name)
    classes = [value for value in np.unique(ids).tolist() if value not in (0, 255)]
    if len(classes) > 1:
        raise _several(classes, name)
    return ids == (classes[0] if classes else 255)


def _of_values(values: NDArray[Any], size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    _check_size(values, size, name)
    if values.ndim == 3:
        colours, alpha = split_alpha(to_bytes(values, name))
        if alpha is not None and alpha.min() < 255:
            return alpha >= 128
        values = colours.max(2)
        bright = colours[values >= 128]
        if (np.ptp(colours, axis=2) > 0).any() and np.ptp(bright, axis=0).max() > _ONE_COLOUR:
            raise _several(np.unique(bright, axis=0).tolist(), name)
    if np.issubdtype(values.dtype, np.floating):
        check_fractions(values, name)
        return values >= 0.5
    if values.dtype == np.bool_:
        return values
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"{name}: expected bool, integers or floating, got {values.dtype}")
    found = np.unique(values)
    others = found[found != 0].tolist()
    if len(others) <= 1:
        return values != 0
    half = 2**7 if others[-1] < 2**8 else 2**15
    if others[0] < 0 or others[-1] < half:
        raise _several(others, name)
    return values >= half


def _several(values: list[Any], name: str) -> ValueError:
    listed = ", ".join(str(value) for value in values[:6]) + (", …" if len(values) > 6 else "")
    return ValueError(
        f"{name}: expected one object on a background of 0, got the values {listed}; of a mask of "
        "class ids take one class: array == id"
    )


def _check_size(values: NDArray[Any], size: tuple[int, int], name: str) -> None:
    if values.ndim not in (2, 3):
        raise ValueError(f"{name}: expected [H, W] like its picture, got {list(values.shape)}")
    got = values.shape[:2]
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
    """The corners [N, 2] of a polygon or [2, 2] of a box, (x, y) each."""
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
    inside = ((points >= 0) & (points <= (width, height))).all(1)  # NaN is outside
    if not inside.all():
        x, y = points[~inside][0]
        raise ValueError(
            f"{name}: the {what} reaches outside of its picture: expected x from 0 to {width} and "
            f"y from 0 to {height} (pixels), got ({x:g}, {y:g})"
        )
    if what == "box":
        (x0, y0), (x1, y1) = points
        if x0 >= x1 or y0 >= y1:
            raise ValueError(
                f"{name}: expected a box (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got "
                f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
            )
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return _fill(points, size)


def _fill(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centre lies inside of a polygon, by the even-odd rule."""
    height, width = size
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    mask = np.zeros(size, dtype=bool)
    for row in range(height):
        y = row + 0.5
        crossed = (y0 <= y) != (y1 <= y)
        if crossed.any():
            share = (y - y0[crossed]) / (y1[crossed] - y0[crossed])
            x = x0[crossed] + share * (x1[crossed] - x0[crossed])
            # a centre is inside where an odd number of edges lies to its left
            first = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
            mask[row] = np.cumsum(np.bincount(first, minlength=width + 1))[:width] % 2
    return mask
