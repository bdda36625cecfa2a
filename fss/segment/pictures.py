"""What a user hands in: pictures, and masks of an object as pictures, polygons and boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from fss.colors import ORANGE
from fss.data.images import DAMAGED, FORMATS, check_pixels

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any]
"""A file, a PIL image, or an array: [H, W], [H, W, 1], [H, W, 3] RGB or [H, W, 4] RGBA."""

MaskLike = Picture | Sequence[float] | Sequence[tuple[float, float]]
"""A mask as a picture of it, a box (x0, y0, x1, y1), or a polygon [(x, y), …]."""

_SIXTEEN_BIT = 257  # 65535 / 255
_ONE_COLOR = 64  # how far the colors of an object may differ, of 255


def read_picture(picture: Picture, name: str = "image") -> NDArray[np.uint8]:
    """Read a picture as RGB uint8 [H, W, 3].

    Files and PIL images are turned upright as their EXIF orientation says. Transparent pixels are
    laid on white, gray ones become RGB, 16 bits become 8 (values / 257), of several frames the
    first is taken. Arrays are uint8, uint16 (0 to 65535), bool, or floating from 0 to 1.

    Args:
        picture: see `Picture`.
        name: what to call it in an error; a file is called by its path.

    Raises:
        FileNotFoundError: no such file.
        TypeError: no picture, or an array of another dtype.
        ValueError: a file that cannot be decoded, more than 80 million pixels, an array of another
            shape or with values out of range.
    """
    if isinstance(picture, (str, os.PathLike, Image.Image)):
        values = _pixel_values(_open(picture, name))
    elif isinstance(picture, np.ndarray):
        values = picture
    else:
        raise TypeError(
            f"{name}: expected a path, a PIL image or a numpy array, got {type(picture).__name__}"
        )
    pixels = _to_bytes(values, name)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    colors, alpha = _split_alpha(pixels)
    if alpha is not None and alpha.min() < 255:
        share = alpha[..., None].astype(np.float32) / 255
        colors = np.rint(colors * share + 255 * (1 - share)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colors, (*colors.shape[:2], 3)))


def read_mask(mask: MaskLike, size: tuple[int, int], name: str = "mask") -> NDArray[np.bool_]:
    """Read a mask as bool [H, W], true where the object is.

    A picture of a mask has the size of the upright picture: one that is stored turned, with an EXIF
    orientation, is masked as viewers show it; the orientation of the mask's own file is followed
    too. If the mask has transparent pixels, the object is what is opaque. Otherwise black (in an
    array, or a palette of colors, 0) is background and there may be one other value; of several
    grays, as soft edges have them, those from half of white on are the object. The index 255 of a
    palette of colors is "ignored" as in Pascal VOC: background, if there is another.

    A box holds the pixels whose center lies between (x0, y0) and (x1, y1), a polygon those whose
    center is inside by the even-odd rule. Coordinates are pixels, x to the right and y down, from
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
        found = _of_image(_open(mask, name), size, name)
    elif isinstance(mask, np.ndarray) and _is_picture(mask, size):
        found = _of_values(mask, size, name)
    else:
        found = _draw(_corners(mask, name), size, name)
    if not found.any():
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


def _open(picture: str | os.PathLike[str] | Image.Image, name: str) -> Image.Image:
    """Decode the first frame of a file or of an image, upright.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what cannot be decoded, or has more than `MAX_PIXELS`.
    """
    if not isinstance(picture, Image.Image):
        path = Path(picture).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{name}: expected a file at {path}, found none")
        name = str(path)
    try:
        if isinstance(picture, Image.Image):
            return _upright(picture)
        with Image.open(path, formats=FORMATS) as image:
            return _upright(image)
    except DAMAGED as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    check_pixels(image)
    return ImageOps.exif_transpose(image)


def _pixel_values(image: Image.Image) -> NDArray[Any]:
    """Return an image's values: uint8 [H, W], [H, W, 3] or [H, W, 4], uint16 or floating [H, W]."""
    if image.mode.startswith("I"):
        values = np.array(image)
        return values.astype(np.uint16) if values.min() >= 0 and values.max() < 2**16 else values
    if image.mode == "F":
        return np.array(image)
    if _is_transparent(image):
        return np.array(image.convert("RGBA"))
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _is_transparent(image: Image.Image) -> bool:
    """Tell whether an image has a channel, a palette or a color of transparency."""
    return image.mode.lower().endswith("a") or "transparency" in image.info


def _to_bytes(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    channels = values.shape[2:] or (1,)
    if values.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or 0 in values.shape:
        raise ValueError(
            f"{name}: expected [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA), got "
            f"{list(values.shape)}"
        )
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return np.rint(values / _SIXTEEN_BIT).astype(np.uint8)
    if np.issubdtype(values.dtype, np.floating):
        _check_fractions(values, name)
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    raise TypeError(
        f"{name}: expected uint8, uint16, bool, or floating from 0 to 1, got {values.dtype}"
    )


def _check_fractions(values: NDArray[Any], name: str) -> None:
    if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
        raise ValueError(
            f"{name}: expected floating values from 0 to 1, got {values.min():.4g} to "
            f"{values.max():.4g}; divide 8-bit values by 255"
        )


def _split_alpha(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    return (pixels[..., :3], pixels[..., 3]) if pixels.shape[-1] == 4 else (pixels, None)


def _is_picture(mask: NDArray[Any], size: tuple[int, int]) -> bool:
    geometry = mask.shape == (4,) or (mask.ndim == 2 and mask.shape[1] == 2)
    return mask.shape[:2] == size or mask.dtype == np.bool_ or not geometry


def _of_image(image: Image.Image, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    if image.mode != "P" or _is_transparent(image):
        return _of_values(_pixel_values(image), size, name)
    colors, ids = np.array(image.convert("RGB")), np.array(image)
    if (np.ptp(colors, axis=2) == 0).all():
        return _of_values(colors[..., 0], size, name)
    _check_size(ids, size, name)
    classes = [value for value in np.unique(ids).tolist() if value not in (0, 255)]
    if len(classes) > 1:
        raise _several(classes, name)
    return ids == (classes[0] if classes else 255)


def _of_values(values: NDArray[Any], size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    _check_size(values, size, name)
    if values.ndim == 3:
        colors, alpha = _split_alpha(_to_bytes(values, name))
        if alpha is not None and alpha.min() < 255:
            return alpha >= 128
        values = colors.max(2)
        bright = colors[values >= 128]
        if (np.ptp(colors, axis=2) > 0).any() and np.ptp(bright, axis=0).max() > _ONE_COLOR:
            raise _several(np.unique(bright, axis=0).tolist(), name)
    if np.issubdtype(values.dtype, np.floating):
        _check_fractions(values, name)
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
