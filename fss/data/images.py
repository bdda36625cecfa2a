"""Images in files: the formats that can be read, and the one reader of pixels."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    ImageOps,
    Jpeg2KImagePlugin,  # noqa: F401 (registers its format, as the next ones do)
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
    features,
)

with suppress(ImportError):  # Pillow before 11.3
    from PIL import AvifImagePlugin  # noqa: F401
with suppress(ImportError):  # not a requirement
    from pillow_heif import register_heif_opener

    register_heif_opener()

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any]
"""A file, a PIL image, or an array: [H, W], [H, W, 1], [H, W, 3] RGB or [H, W, 4] RGBA."""

Result = TypeVar("Result")

# Decoders of other formats may run programs.
_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
_FEATURES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}

FORMATS = tuple(
    name
    for name in _ENDINGS
    if (name in Image.OPEN or name in ("JPEG", "PNG", "BMP", "GIF"))
    and (name not in _FEATURES or features.check(_FEATURES[name]))
)
"""Accepted, whatever a name ends with: what the installed libraries can read."""

ENDINGS = tuple(ending for name in FORMATS for ending in _ENDINGS[name])
"""Endings of files that can be read, in lower case."""

_RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")

OTHER_ENDINGS = (
    *(ending for name in _ENDINGS if name not in FORMATS for ending in _ENDINGS[name]),
    *_RAW,
    *(".eps", ".exr", ".hdr", ".ico", ".jxl", ".pcx", ".psd", ".svg", ".tga", ".xcf"),
)
"""Endings of pictures that cannot be read here: to be named, not passed over."""

MAX_PIXELS = 80_000_000
"""Of an image: a larger one is refused before it is decoded."""

# What Pillow's readers raise for damaged files; of a few bytes some ask for gigabytes.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError)
DAMAGED += (NotImplementedError, MemoryError, struct.error, Image.DecompressionBombError)

_TIFF_SUBFILE, _TIFF_BITS, _TIFF_CHANNELS, _TIFF_FORMAT = 254, 258, 277, 339
_TIFF_KINDS = {1: "unsigned", 2: "signed", 3: "floating"}
_SIXTEEN_BIT = 257  # 65535 / 255


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
        values = decode(picture, name, _pixels_of)
        if not isinstance(picture, Image.Image):
            name = str(picture)
    elif isinstance(picture, np.ndarray):
        values = picture
    else:
        raise TypeError(
            f"{name}: expected a path, a PIL image or a numpy array, got {type(picture).__name__}"
        )
    pixels = to_bytes(values, name)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 4:
        pixels = _on_white(pixels)
    if pixels.shape[2] == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return np.ascontiguousarray(pixels)


def decode(
    picture: str | os.PathLike[str] | Image.Image,
    name: str,
    read: Callable[[Image.Image], Result],
    is_mask: bool = False,
) -> Result:
    """Decode the first frame of a file or of a PIL image, upright, and return what `read` finds.

    Args:
        picture: a file or an image.
        name: what to call an image in an error; a file is called by its path.
        read: takes what it needs of the opened image.
        is_mask: whether a file of several pages is refused, as each may show an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what cannot be decoded, or has more than `MAX_PIXELS`, or several pages.
    """
    if isinstance(picture, Image.Image):
        try:
            check_pixels(picture)
            return read(ImageOps.exif_transpose(picture))
        except DAMAGED as error:
            raise unreadable(name, error) from error
    path = Path(picture).expanduser()
    try:
        with Image.open(path, formats=FORMATS) as file:
            check_pixels(file)
            if path.suffix.lower() in _RAW:  # a TIFF with a small preview in front
                raise ValueError("a raw photo")
            if is_mask:
                pages = _pages(file)
            if is_mask and len(pages) > 1:
                raise _SeveralPages(
                    f"{path}: expected a mask of one page, got {len(pages)} (pages "
                    f"{', '.join(map(str, pages[:8]))}{', …' if len(pages) > 8 else ''}); save "
                    "them as one mask, or each as a file"
                )
            ImageOps.exif_transpose(file, in_place=True)  # without, it copies
            return read(file)
    except _SeveralPages:
        raise
    except DAMAGED as error:
        if not path.is_file():
            raise FileNotFoundError(f"{name}: expected a file at {path}, found none") from error
        if isinstance(error, UnidentifiedImageError):
            cause = _tiff_cause(path)
            if cause:
                raise ValueError(f"{path} cannot be decoded: {cause}") from error
        raise unreadable(path, error) from error


class _SeveralPages(ValueError):
    """A mask of several pages."""


def _pages(file: Image.Image) -> list[int]:
    """List the pages of a file from 1 that are no smaller copies of another."""
    count = getattr(file, "n_frames", 1)
    if file.format == "MPO" or count == 1:  # a JPEG with its preview
        return [1]
    if file.format != "TIFF":
        return list(range(1, count + 1))
    pages = []
    for k in range(count):
        file.seek(k)
        if k == 0 or not file.tag_v2.get(_TIFF_SUBFILE, 0) & 1:
            pages.append(k + 1)
    file.seek(0)
    return pages


def _tiff_cause(path: Path) -> str | None:
    """Return why a TIFF cannot be read, None of another file."""
    with suppress(*DAMAGED), path.open("rb") as file:
        header = file.read(8)
        if header[:4] not in (b"II*\0", b"MM\0*"):
            return None
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        bits, channels = tags[_TIFF_BITS], tags.get(_TIFF_CHANNELS, 1)
        kind = _TIFF_KINDS.get(tags.get(_TIFF_FORMAT, (1,))[0], "other")
        return (
            f"a TIFF of {channels} channels of {bits[0]}-bit {kind} values; expected 8 or 16 bits, "
            "or floating values from 0 to 1 in one channel; save it with 8 bits"
        )
    return None


def to_bytes(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Convert pixels [H, W] or [H, W, 1, 3 or 4] of any accepted dtype to uint8.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or floating values outside of 0 to 1.
    """
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


def pixel_values(image: Image.Image) -> NDArray[Any]:
    """Return an image's values: uint8 [H, W], [H, W, 3] or [H, W, 4], uint16 or floating [H, W]."""
    if image.mode.startswith("I"):
        values = np.array(image)
        return values.astype(np.uint16) if values.min() >= 0 and values.max() < 2**16 else values
    if image.mode == "F":
        return np.array(image)
    if is_transparent(image):
        return np.array(image.convert("RGBA"))
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def is_transparent(image: Image.Image) -> bool:
    """Tell whether an image has a channel, a palette or a color of transparency."""
    return image.mode.lower().endswith("a") or "transparency" in image.info


def check_fractions(values: NDArray[Any], name: str) -> None:
    """Raise ValueError for floating values that are not from 0 to 1."""
    if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
        raise ValueError(
            f"{name}: expected floating values from 0 to 1, got {values.min():.4g} to "
            f"{values.max():.4g}; divide 8-bit values by 255"
        )


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


def unreadable(name: str | Path, error: Exception) -> ValueError:
    """Return the error of a file that cannot be decoded."""
    ending = Path(name).suffix.lower()
    if isinstance(error, UnidentifiedImageError) or ending in _RAW:
        error = ValueError(f"expected {', '.join(FORMATS)}")
    hint = "replace the file, or leave it out together with its image or mask"
    if ending in _ENDINGS["HEIF"] and "HEIF" not in FORMATS:
        hint = "HEIC needs pip install pillow-heif; or convert the file to JPEG"
    elif ending in OTHER_ENDINGS:
        hint = "convert the file to JPEG or PNG"
    return ValueError(f"{name} cannot be decoded ({error}); {hint}")


def _pixels_of(image: Image.Image) -> NDArray[Any]:
    values = pixel_values(image)
    if values.dtype == np.int32:
        raise ValueError(
            f"expected 8 or 16 bits or floating values from 0 to 1, got {values.min()} to "
            f"{values.max()}"
        )
    return values


def _on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    colors, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colors
    share = alpha.astype(np.float32) / 255
    return np.rint(colors * share + 255 * (1 - share)).astype(np.uint8)
