"""Annotations as masks: COCO's JSON of polygons and run lengths, SBD's MATLAB files."""

from __future__ import annotations

import importlib
import io
from collections import defaultdict
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fss.data import coco
from fss.files import parse_json

_SIDE = 2**16  # most pixels of an image's side
_PIXELS = 80_000_000


class Annotated(NamedTuple):
    """An image of COCO: its file, height and width, and class and shape of each object in order."""

    file: str
    size: tuple[int, int]
    objects: list[tuple[int, Any]]


class Annotations(NamedTuple):
    """A JSON of COCO: names of the classes from 1 on, and the images that have an annotation."""

    classes: tuple[str, ...]
    images: list[Annotated]


def read_coco(text: bytes, name: str) -> list[Annotated]:
    """Read the images of a COCO JSON that have an annotation, with contiguous class ids 1 to 80.

    Raises:
        ValueError: no JSON of COCO, or other classes than its 80; `name` is the file's.
    """
    found = parse_coco(parse_json(text, name), name)
    if found.classes != coco.CLASSES:
        raise ValueError(
            f"{name}: expected the 80 object classes of COCO in their order, got "
            f"{len(found.classes)}: {', '.join(found.classes[:5])}, …"
        )
    for image in found.images:
        if not PurePosixPath(image.file).stem or set("/\\\0") & set(image.file):
            raise ValueError(
                f"{name}: file_name: expected a name without a folder, got {image.file!r}"
            )
    return found.images


def parse_coco(content: Any, name: str) -> Annotations:
    """Take the classes and the annotated images out of the content of a COCO JSON.

    Raises:
        ValueError: other content; `name` is the file's.
    """
    try:
        categories = sorted((int(e["id"]), str(e["name"])) for e in content["categories"])
        labels = {category: label for label, (category, _) in enumerate(categories, start=1)}
        objects: dict[int, list[tuple[int, Any]]] = defaultdict(list)
        for entry in content["annotations"]:
            objects[entry["image_id"]].append((labels[entry["category_id"]], entry["segmentation"]))
        images = [
            Annotated(str(e["file_name"]), (e["height"], e["width"]), objects[e["id"]])
            for e in content["images"]
            if e["id"] in objects
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: expected categories, images and annotations as in COCO; {error!r}"
        ) from error
    for image in images:
        _check_size(image, name)
    return Annotations(tuple(word for _, word in categories), images)


def draw_coco(image: Annotated) -> NDArray[np.uint8]:
    """Draw the mask [H, W] of an image; a later object covers an earlier one.

    Raises:
        ValueError: a polygon or run lengths that do not fit the image.
    """
    mask = np.zeros(image.size, dtype=np.uint8)
    for label, shape in image.objects:
        mask[draw_shape(shape, image.size, image.file)] = label
    return mask


def read_sbd(content: bytes, name: str) -> NDArray[np.uint8]:
    """Read the class ids [H, W] in a MATLAB file of SBD.

    Raises:
        ValueError: a damaged file, or one with other content; `name` is the file's.
    """
    loadmat = require("scipy.io", "scipy").loadmat
    try:
        mask = loadmat(io.BytesIO(content))["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # of damaged files loadmat raises whatever its readers do
        raise ValueError(
            f"{name}: expected GTcls.Segmentation of SBD in a MATLAB file ({error!r})"
        ) from error
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{name}: expected 8-bit class ids [H, W], got {np.shape(mask)}")
    return mask


def require(module: str, package: str) -> ModuleType:
    """Import a module that only the conversion needs.

    Raises:
        ImportError: it is not installed; says how.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the conversion needs {package}, which is not installed ({error}): pip install "
            f"'svf-fast[data]', or pip install {package}"
        ) from error


def _check_size(image: Annotated, name: str) -> None:
    sides = [type(side) is int and 0 < side < _SIDE for side in image.size]
    if not all(sides) or image.size[0] * image.size[1] > _PIXELS:
        raise ValueError(
            f"{name}: {image.file}: expected a height and a width in pixels, at most "
            f"{_PIXELS // 10**6} million together, got {image.size[0]!r} and {image.size[1]!r}"
        )


def draw_shape(shape: Any, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    """Draw the pixels [H, W] of an object: polygons x, y, …, or run lengths by columns.

    Raises:
        ValueError: neither, or what does not fit the size; `name` says whose object it is.
    """
    try:
        return _draw_shape(shape, size)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected polygons or run lengths in its {size[0]}×{size[1]} pixels "
            f"(height×width); {error}"
        ) from error


def _draw_shape(shape: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    height, width = size
    if isinstance(shape, list):
        polygons = [np.array(polygon, dtype=np.float64) for polygon in shape]
        for polygon in polygons:
            if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"a polygon of {polygon.size} numbers")
            if not (np.abs(polygon) <= 2 * max(size)).all():
                raise ValueError("a polygon that reaches far outside")
        rle = require("pycocotools.mask", "pycocotools")
        return rle.decode(rle.merge(rle.frPyObjects([p.tolist() for p in polygons], *size))) > 0
    if list(shape["size"]) != [height, width]:
        raise ValueError(f"run lengths for {shape['size']}")
    counts = shape["counts"]
    runs = np.array(_unpacked(counts) if isinstance(counts, str) else counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("run lengths that are no numbers from 0 on")
    if int(runs.max(initial=0)) > height * width or int(runs.sum()) != height * width:
        raise ValueError(f"run lengths of another number of pixels than {height * width}")
    return np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(width, height).T


def _unpacked(counts: str) -> list[int]:
    """Decode COCO's text of run lengths: 5 bits a character, from the third on differences.

    Decoded here, so that a truncated or other text is an error.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("run lengths that cannot be decoded")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("run lengths are truncated")
    return runs
