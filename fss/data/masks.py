"""Masks in files and arrays: the conventions in which people keep them, and what each means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.data.images import (
    Picture,
    check_fractions,
    decode,
    is_transparent,
    pixel_values,
    to_bytes,
)
from fss.data.source import IGNORE

MaskValue = int | str | tuple[int, int, int]
"""Which of a mask's values is the object: a class id or gray, or a color, (128, 0, 0)."""

_FEW = 16  # values of a mask that is neither soft nor compressed with losses
_SMALL = 64  # grays below are class ids, no shades of white
_NOISE = 16  # how far compression moves a level, of 255
_TRACE = 3  # the same at the best quality
_BRIGHT = 192  # what shades without a level of their own reach, of 255
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JPEG2000")
_ONE_COLOR = 64  # how far the colors of an object may differ, of 255
VOC_BORDER = 0xE0E0C0
_LUMINANCE = np.array([0.299, 0.587, 0.114])


class ObjectMask(NamedTuple):
    """A mask of one object, and how it was given.

    pixels: bool [H, W], where the object is.
    convention: in which the mask was read, for users.
    ignored: bool [H, W], what is neither object nor background; None if there is nothing such.
    """

    pixels: NDArray[np.bool_]
    convention: str
    ignored: NDArray[np.bool_] | None = None

    @property
    def labels(self) -> NDArray[np.uint8]:
        """Return the mask as uint8 [H, W]: 1 the object, 255 ignored, else 0."""
        labels = self.pixels.astype(np.uint8)
        if self.ignored is not None:
            labels[self.ignored & ~self.pixels] = IGNORE
        return labels


def read_object(mask: Picture, name: str = "mask", value: MaskValue | None = None) -> ObjectMask:
    """Read a picture of one object's mask.

    | given | the object is |
    | --- | --- |
    | bool, or one value or color beside 0 (black) | that |
    | floating from 0 to 1 | from 0.5 on |
    | 0, k < 127 and 255, gray or integers (class ids) | k; 255 is ignored |
    | a palette of colors: 0, k and 255 | k; 255 is ignored, or the object if it is alone |
    | a color, with Pascal VOC's border (224, 224, 192) | the color |
    | a gray or color with soft edges, or changed a little by compression | from its half on |
    | several shades up to white | from half of white on |
    | some pixels transparent, others not | what is opaque |

    Args:
        mask: a file, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] RGB or [H, W, 4] RGBA.
        name: what to call it in an error; a file is called by its path.
        value: which value is the object; needed where there are several. Beside class ids (below
            127, or of a palette) 255 is ignored, beside colors Pascal VOC's border.

    Raises:
        FileNotFoundError: no such file.
        TypeError: an array of another dtype.
        ValueError: a file that cannot be decoded, several objects, an ambiguous mask, a `value`
            that the mask does not have.
    """
    if isinstance(mask, (str, os.PathLike, Image.Image)):
        values, is_palette, form = decode(mask, name, _values_of, is_mask=True)
        if isinstance(mask, Image.Image):
            form = mask.format
        else:
            name = str(mask)
        is_lossy = form in _LOSSY
    else:
        values, is_palette, is_lossy = mask, False, False
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim == 3:
        colors, alpha = to_bytes(values, name), None
        if colors.shape[2] == 4:
            colors, alpha = colors[..., :3], colors[..., 3]
        if alpha is not None and (alpha.min() < alpha.max() or not alpha.any()):
            opaque = alpha >= 128
            if value is None:
                return ObjectMask(opaque, "what is opaque")
            colors = np.where(opaque[..., None], colors, 0).astype(np.uint8)
        if np.ptp(colors, axis=2).any():
            return _of_colors(colors, name, value, is_lossy)
        values = colors[..., 0]
    return _of_gray(values, name, value, is_palette, is_lossy)


def open_classes(path: Path, ignored_alone: bool = False) -> Image.Image:
    """Open and decode a mask of class ids, upright, as an 8-bit picture of one channel.

    Args:
        path: the mask's file: 8 bits, a palette, or 16 bits with ids up to 254.
        ignored_alone: whether a mask may have ignored pixels (255) and no class.

    Raises:
        ValueError: a file that cannot be decoded, or one with other values than class ids.
    """
    file = decode(path, "mask", _loaded, is_mask=True)
    if file.mode.startswith("I"):
        ids = np.array(file)
        if ids.min() < 0 or ids.max() > IGNORE:
            raise ValueError(
                f"{path}: expected class ids up to 254, and 255 ignored, got {ids.min()} to "
                f"{ids.max()}; `fss data import` numbers the classes anew"
            )
        file = Image.fromarray(ids.astype(np.uint8))
    if file.mode not in ("P", "L"):
        colors = ""
        if file.mode != "1":
            codes = np.unique(color_codes(np.array(file.convert("RGB")))).tolist()
            colors = f" and the colors {_listed([_text(_vector(code, 3)) for code in codes])}"
        raise ValueError(
            f"{path}: expected class ids in one channel (mode P, L or I;16), got mode {file.mode}"
            f"{colors}; save the mask with class ids, or let `fss data import` do so"
        )
    if not ignored_alone:
        *classes, ignored = file.histogram()[1 : IGNORE + 1]
        if ignored and not any(classes):
            raise ValueError(
                f"{path} has {ignored} pixels of 255 (ignored) and no class: write the class id in "
                "the place of 255, or let `fss data import` do so"
            )
    return file


def open_object(path: Path) -> Image.Image:
    """Open and decode the mask of the one object of a photo, upright, as a picture of 0 and 1.

    The object is what is not black; of a gray mask that is mostly white where it is not black, as
    FSS-1000 is published, with traces of JPEG, what is above half of white; where some pixels are
    transparent, what is opaque.

    Raises:
        ValueError: a file that cannot be decoded, or one of several pages.
    """
    values, is_lossy = decode(path, "mask", _values_and_loss, is_mask=True)
    is_gray = True
    if values.ndim == 3:
        if values.shape[2] == 4 and np.ptp(values[..., 3]):
            alpha = values[..., 3]
            brightest = int(alpha.max())
            return Image.fromarray((alpha > min(127, brightest / 2)).astype(np.uint8))
        is_gray = np.ptp(values[..., :3], axis=2).max() <= _ONE_COLOR
        values = values[..., :3].max(2)
    white = 1 if values.dtype.kind == "f" else 255 if values.max() < 2**8 else 2**16 - 1
    noise = _NOISE * white / 255
    bright = (values >= white - noise) & (values <= white)
    is_white = is_gray and bright.any() and 2 * bright.sum() >= (values > noise).sum()
    limit = white / 2 if is_white else noise if is_lossy else 0
    return Image.fromarray((values > limit).astype(np.uint8))


def voc_colors() -> NDArray[np.int64]:
    """Return the colors of Pascal VOC's 256 class ids as integers 0xRRGGBB; 255 is its border."""
    ids = np.arange(256)
    colors = np.zeros(256, np.int64)
    for bit in range(8):
        for channel in range(3):
            colors |= ((ids >> (3 * bit + channel)) & 1) << (8 * (2 - channel) + 7 - bit)
    return colors


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def _values_and_loss(image: Image.Image) -> tuple[NDArray[Any], bool]:
    return pixel_values(image), image.format in _LOSSY


def _values_of(image: Image.Image) -> tuple[NDArray[Any], bool, str | None]:
    """Return a mask's values, whether they are indices of a palette of colors, and the format."""
    if image.mode == "P" and not is_transparent(image):
        colors = np.array(image.convert("RGB"))
        if np.ptp(colors, axis=2).any():
            return np.array(image), True, image.format
        return colors[..., 0], False, image.format
    return pixel_values(image), False, image.format


def _of_gray(
    values: NDArray[Any], name: str, value: MaskValue | None, is_palette: bool, is_lossy: bool
) -> ObjectMask:
    kind = values.dtype.kind
    if kind not in "buif":
        raise TypeError(f"{name}: expected bool, integers or floating, got {values.dtype}")
    if value is not None:
        return _chosen(values, name, value, False, _ignored_id(values, is_palette))
    if kind == "b":
        return ObjectMask(values, "true and false")
    if kind == "f":
        check_fractions(values, name)
        return ObjectMask(values >= 0.5, "shares from 0 to 1, from 0.5 on")
    found = np.unique(values)
    others = found[found != 0].tolist()
    white = 2**8 - 1 if found[-1] < 2**8 else max(int(found[-1]), 2**16 - 1)
    if others and others[0] < 0:
        raise _several(others, name)
    if len(others) <= 1:
        return ObjectMask(values != 0, f"0 and {others[0]}" if others else "0")
    levels, half = _levels(values), (white + 1) // 2
    if others[-1] == white and len(others) == 2:
        k = others[0]
        soft = k >= _SMALL * white / 255 and k not in levels
        trace = is_lossy and k <= _TRACE
        if is_palette or (k < half - 1 and not soft and not trace):
            where = " of a palette" if is_palette else ""
            convention = f"class id {k}{where}, {white} ignored"
            return ObjectMask(values == k, convention, values == white)
        if trace or k in (half - 1, half):  # these are a trimap's "unknown"
            raise _several(others, name)
    if is_palette:
        raise _several(others, name)
    return _of_levels(values[..., None], levels, others, white, name, is_lossy)


def _of_colors(
    colors: NDArray[np.uint8], name: str, value: MaskValue | None, is_lossy: bool
) -> ObjectMask:
    codes = color_codes(colors)
    if value is not None:
        return _chosen(codes, name, value, True, VOC_BORDER)
    found = np.unique(codes)
    others = found[found != 0].tolist()
    border = codes == VOC_BORDER
    if len(others) > _FEW:  # compressed with losses, or soft: what is near it belongs to it
        border = np.abs(colors - _vector(VOC_BORDER, 3)).max(2) <= 2 * _NOISE
        # compression pales a color at its edges, as bright as it is: a yellow to the border's color
        bright = (
            np.median(colors[colors.max(2) >= _SMALL] @ _LUMINANCE) if colors.max() >= _SMALL else 0
        )
        if abs(bright - _vector(VOC_BORDER, 3) @ _LUMINANCE) <= 2 * _NOISE:
            border = codes == VOC_BORDER
    if colors[~border].max(initial=0) < _SMALL:  # it is the object itself
        border = np.zeros_like(border)
    if border.any():
        colors = np.where(border[..., None], 0, colors)
        codes = color_codes(colors)
        others = np.unique(codes[codes != 0]).tolist()
    said, ignored = (", VOC's border ignored", border) if border.any() else ("", None)
    if len(others) == 1:
        color = _text(_vector(others[0], 3))
        return ObjectMask(codes == others[0], f"color {color}{said}", ignored)
    levels = _levels(codes)
    found = _of_levels(colors, levels, others, 255, name, is_lossy, border.any())
    return ObjectMask(found.pixels, found.convention + said, ignored)


def _of_levels(
    pixels: NDArray[Any],
    levels: dict[int, int],
    others: list[int],
    white: int,
    name: str,
    is_lossy: bool,
    has_border: bool = False,
) -> ObjectMask:
    """Find the one object of a mask with several shades [H, W, C]: soft edges, compression.

    Args:
        pixels: values of one channel, or of three.
        levels: values or colors of flat areas, and how many pixels these have.
        others: all values or colors but 0.
        white: the largest value of a channel.
        name: see `read_object`.
        is_lossy: whether the file's format may change values a little.
        has_border: whether what has another color than the object is Pascal VOC's border.
    """
    channels, unit = pixels.shape[2], white / 255
    is_soft = len(others) > _FEW
    noise = (_NOISE if is_soft else _TRACE if is_lossy else 0) * unit
    if channels == 1 and others[-1] < _SMALL * unit and not is_soft:
        raise _several(others, name)
    vectors = {code: _vector(code, channels) for code in levels}
    if noise:
        levels = {code: n for code, n in levels.items() if vectors[code].max() > noise}
    if is_soft:  # a flat area of some size: others are there by chance
        least = sum(levels.values()) / 100
        levels = {code: n for code, n in levels.items() if n >= least}
    groups = _linked({code: vectors[code] for code in levels}, noise)
    if len(groups) > 1:
        raise _several(sorted(levels), name, channels == 3)
    spread = np.ptp([vectors[code] for code in groups[0]], axis=0).max() if groups else np.inf
    if spread > 2 * noise:  # shades of white, without a level of their own
        bright = pixels.max(2) > white / 2
        alike = bright.any() and np.ptp(pixels[bright], axis=0).max() <= _ONE_COLOR
        if pixels.max() < _BRIGHT * unit or (channels == 3 and not alike):
            raise _several(others, name, channels == 3)
        return ObjectMask(bright, f"shades up to {white}, from half of it on")
    level = max(groups[0], key=lambda code: levels[code])
    direction = vectors[level].astype(np.float32)  # masks may have many megapixels
    share = (pixels @ direction) / (direction @ direction)
    # of what is no mixture of the background and the object
    rest = np.abs(pixels - np.clip(share, 0, 1)[..., None] * direction).max(2)
    found = share > 0.5
    if is_soft:
        core = found & (rest <= _ONE_COLOR * unit)
        foreign = (rest > _ONE_COLOR * unit) & ~_near(core, 8)
        plain = (pixels.max(2) <= 2 * noise) | (np.abs(pixels - direction).max(2) <= 2 * noise)
        least = core.sum() / 100
        is_foreign = foreign.sum() > least or plain.mean() < 0.5  # as in a photo
        if channels == 1:
            is_foreign |= _common(pixels[..., 0], ~plain, noise) > 5 * least
        found = core if has_border else found & _near(core, 3)
    else:
        foreign = rest > max(noise, _ONE_COLOR / 2 * unit)
        is_foreign = (foreign | ((share > 0.25) & ~_near(found, 3))).any()
    if is_foreign:
        raise _several(others, name, channels == 3)
    what = f"color {_text(direction)}" if channels == 3 else f"gray {level}"
    return ObjectMask(found, f"{what} with soft edges, from its half on")


def _common(shades: NDArray[Any], where: NDArray[np.bool_], noise: float) -> int:
    """Count the pixels of the flat areas somewhere, if most of these have about one shade."""
    shades = shades.astype(np.float32)
    window = np.ones((5, 5), np.uint8)
    flat = where & (cv2.dilate(shades, window) - cv2.erode(shades, window) <= noise)
    counts, _ = np.histogram(shades[flat], np.arange(0, shades.max() + 2 * noise, noise / 2))
    largest = int(np.convolve(counts, np.ones(3, int)).max())
    return largest if 2 * largest > flat.sum() else 0


def _near(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """Find the pixels within a distance of a mask, in rows and columns."""
    side = 2 * distance + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def _linked(points: dict[int, NDArray[np.float64]], distance: float) -> list[list[int]]:
    """Group points of which each is near another of its group."""
    groups: list[list[int]] = []
    for code, point in points.items():
        own = [g for g in groups if any(np.abs(points[c] - point).max() <= distance for c in g)]
        groups = [g for g in groups if g not in own] + [[code, *(c for g in own for c in g)]]
    return groups


def _levels(codes: NDArray[Any]) -> dict[int, int]:
    """Count the pixels of each value but 0 whose eight neighbors all have it too."""
    rows = codes[:, 1:] == codes[:, :-1]
    rows = rows[:, 1:] & rows[:, :-1]
    columns = (codes[1:] == codes[:-1])[:, 1:-1]
    flat = rows[:-2] & rows[1:-1] & rows[2:] & columns[1:] & columns[:-1]
    found, counts = np.unique(codes[1:-1, 1:-1][flat], return_counts=True)
    pairs = zip(found.tolist(), counts.tolist(), strict=True)
    return {code: count for code, count in pairs if code}


def _ignored_id(values: NDArray[Any], is_palette: bool) -> int | None:
    """Return 255 if it is no object beside class ids: these come from a palette, or are small."""
    if is_palette or (values.dtype.kind in "ui" and values[values != IGNORE].max(initial=0) < 127):
        return IGNORE
    return None


def _chosen(
    values: NDArray[Any], name: str, value: MaskValue, is_color: bool, ignored: int | None
) -> ObjectMask:
    """Find the pixels of one value, or of one color among codes 0xRRGGBB.

    Args:
        ignored: code of what is neither object nor background, unless it is asked for.
    """
    wanted = _parsed(value)
    convention = f"the value {value}" if isinstance(wanted, int) else f"the color {_text(wanted)}"
    if is_color and isinstance(wanted, int):
        code = int(voc_colors()[wanted]) if 0 <= wanted <= IGNORE else -1
        convention = f"class id {value} in Pascal VOC's colors"
    elif is_color:
        code = int(color_codes(np.array(wanted)))
    else:
        code = wanted if isinstance(wanted, int) else wanted[0]
        if not isinstance(wanted, int) and len(set(wanted)) > 1:
            code = -1
    found = values == code
    others = np.unique(values)
    left_out = values == ignored if ignored is not None else np.zeros_like(found)
    if len(others) > _FEW and code >= 0:
        channels = 3 if is_color else 1
        known = np.array([_vector(other, channels) for other in others.tolist()])

        def near(code: int) -> NDArray[np.bool_]:
            distance = np.abs(known - _vector(code, channels)).max(1)
            return np.isin(values, others[distance <= _NOISE])

        found = near(code)
        if ignored is not None and is_color:
            left_out = near(ignored)
    if not found.any():
        texts = [_text(_vector(c, 3)) if is_color else str(c) for c in others.tolist() if c]
        raise ValueError(f"mask_value: {name} has no {value}, but {_listed(texts)}")
    if code == ignored or not left_out.any():
        return ObjectMask(found, convention)
    said = "VOC's border ignored" if is_color else f"{ignored} ignored"
    return ObjectMask(found, f"{convention}, {said}", left_out & ~found)


def _parsed(value: MaskValue) -> int | tuple[int, ...]:
    """Return a class id or gray, or the three channels of a color.

    Raises:
        ValueError: neither.
    """
    if isinstance(value, int):
        return value
    try:
        parts = tuple(int(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        parts = ()
    if len(parts) == 1:
        return parts[0]
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise ValueError(
            f"mask_value: expected a class id or gray as in 15, or a color as in 128,0,0 (red, "
            f"green, blue), got {value!r}"
        )
    return parts


def _several(values: Sequence[int], name: str, is_color: bool = False) -> ValueError:
    texts = [_text(_vector(value, 3)) if is_color else str(value) for value in values]
    got = f"the values {_listed(texts)}"
    if len(texts) > 10 * _FEW:
        got = f"{len(texts)} values, as a photo has: {_listed(texts)}"
    return ValueError(
        f"{name}: expected one object on a background of 0, got {got}; of a "
        f"mask of class ids take one class: mask_value={texts[0]!s} (on the command line "
        f"--mask_value {texts[0]}), in an array: array == id"
    )


def _listed(texts: Sequence[str]) -> str:
    between = "; " if any("," in text for text in texts) else ", "
    return between.join(texts[:6]) + (f"{between}…" if len(texts) > 6 else "")


def color_codes(colors: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return colors [..., 3] as integers 0xRRGGBB."""
    red, green, blue = (colors[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def _vector(code: int, channels: int) -> NDArray[np.float64]:
    parts = [code] if channels == 1 else [code >> 16, code >> 8 & 255, code & 255]
    return np.array(parts, np.float64)


def _text(color: Sequence[float] | NDArray[np.float64]) -> str:
    return ",".join(f"{int(part)}" for part in color)
