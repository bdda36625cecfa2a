"""Images and masks in files: read, with limits, and damaged ones named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    ImageOps,
    TiffImagePlugin,  # noqa: F401 (registers its format, as the next one does)
    WebPImagePlugin,  # noqa: F401
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Accepted, whatever a name ends with: decoders of other formats may run programs."""

MAX_PIXELS = 80_000_000
"""Of an image: a larger one is refused before it is decoded."""

# What Pillow's readers raise for damaged files; of a few bytes some ask for gigabytes.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError)
DAMAGED += (NotImplementedError, MemoryError, struct.error, Image.DecompressionBombError)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an RGB image [H, W, 3], turned as its EXIF orientation says.

    Raises:
        ValueError: a file that cannot be decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            check_pixels(file)
            ImageOps.exif_transpose(file, in_place=True)  # without, it copies
            return np.array(file if file.mode == "RGB" else file.convert("RGB"))
    except DAMAGED as error:
        raise unreadable(path, error) from error


def open_classes(path: Path) -> Image.Image:
    """Open and decode a mask of class ids.

    Raises:
        ValueError: a file that cannot be decoded, or one with colors instead of ids.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            check_pixels(file)
            file.load()
    except DAMAGED as error:
        raise unreadable(path, error) from error
    if file.mode not in ("P", "L"):
        raise ValueError(
            f"{path}: expected class ids in one 8-bit channel (mode P or L), got mode "
            f"{file.mode}; save the mask with class ids, not colors"
        )
    return file


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError for an image of more than `MAX_PIXELS`."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"expected at most {MAX_PIXELS // 10**6} million pixels, got "
            f"{image.width}×{image.height}; make it smaller"
        )


def check_sizes(
    image_path: Path, image: tuple[int, ...], mask_path: Path, mask: tuple[int, ...]
) -> None:
    """Raise ValueError if an image and its mask differ in height or width."""
    if image != mask:
        raise ValueError(
            f"{mask_path} is {mask[0]}×{mask[1]} pixels (height×width), its image {image_path} "
            f"{image[0]}×{image[1]}; a mask has the size of its image"
        )


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error of a file that cannot be decoded."""
    return ValueError(
        f"{path} cannot be decoded ({error}); replace the file, or remove it together with its "
        "image or mask"
    )
