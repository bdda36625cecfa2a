"""A user's pictures as arrays, and with a mask laid over them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from fss.colors import ORANGE
from fss.data.scan import DAMAGED, FORMATS, check_pixels

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any]
"""A file, a PIL image, or an array: [H, W], [H, W, 1], [H, W, 3] RGB or [H, W, 4] RGBA."""

_SIXTEEN_BIT = 257  # 65535 / 255


def read_picture(picture: Picture, name: str = "image") -> NDArray[np.uint8]:
    """A picture as RGB uint8 [H, W, 3].

    Files and PIL images are turned upright as their EXIF orientation says. Transparent pixels are
    laid on white, grey ones become RGB, 16 bits become 8 (values / 257), of several frames the
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
        values = levels(open_picture(picture, name))
    elif isinstance(picture, np.ndarray):
        values = picture
    else:
        raise TypeError(
            f"{name}: expected a path, a PIL image or a numpy array, got {type(picture).__name__}"
        )
    pixels = to_bytes(values, name)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    colours, alpha = split_alpha(pixels)
    if alpha is not None and alpha.min() < 255:
        share = alpha[..., None].astype(np.float32) / 255
        colours = np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def overlay(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: str = ORANGE, opacity: float = 0.5
) -> Image.Image:
    """The picture uint8 [H, W, 3] with the mask [H, W] in a colour, and a line around it."""
    red_green_blue = np.array(ImageColor.getrgb(colour), dtype=np.float32)
    result = pixels.astype(np.float32)
    result[mask] += opacity * (red_green_blue - result[mask])
    result[_outline(mask)] = red_green_blue
    return Image.fromarray(np.rint(result).astype(np.uint8))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's pixels near the background: within 1 of 500 of the longer side."""
    inside = mask
    for _ in range(max(1, max(mask.shape) // 500)):
        framed = np.pad(inside, 1, mode="edge")
        inside = inside & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2]
        inside &= framed[1:-1, 2:]
    return mask & ~inside


def open_picture(picture: str | os.PathLike[str] | Image.Image, name: str) -> Image.Image:
    """The first frame of a file or of an image, upright and decoded.

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


def levels(image: Image.Image) -> NDArray[Any]:
    """The values of an image: uint8 [H, W], [H, W, 3] or [H, W, 4], uint16 or floating [H, W]."""
    if image.mode.startswith("I"):
        values = np.array(image)
        return values.astype(np.uint16) if values.min() >= 0 and values.max() < 2**16 else values
    if image.mode == "F":
        return np.array(image)
    if is_transparent(image):
        return np.array(image.convert("RGBA"))
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has a channel, a palette or a colour of transparency."""
    return image.mode.lower().endswith("a") or "transparency" in image.info


def to_bytes(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
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
        check_fractions(values, name)
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    raise TypeError(
        f"{name}: expected uint8, uint16, bool, or floating from 0 to 1, got {values.dtype}"
    )


def check_fractions(values: NDArray[Any], name: str) -> None:
    if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
        raise ValueError(
            f"{name}: expected floating values from 0 to 1, got {values.min():.4g} to "
            f"{values.max():.4g}; divide 8-bit values by 255"
        )


def split_alpha(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    return (pixels[..., :3], pixels[..., 3]) if pixels.shape[-1] == 4 else (pixels, None)
