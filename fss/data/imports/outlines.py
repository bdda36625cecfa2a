"""Objects in annotation files: JSON of COCO, JSON of labelme, text of YOLO's segmentation."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fss.data.discovery import fold_name, same_name
from fss.data.images import ENDINGS
from fss.data.imports.names import NAME_FILES, yolo_names
from fss.data.imports.photos import masks_among, split_of, walk
from fss.data.prepare.annotations import draw_shape, parse_coco
from fss.files import parse_json, read_text

_ENDINGS = (".json", ".txt")
_CIRCLE = np.linspace(0, 2 * np.pi, 64, endpoint=False)


class Outlined(NamedTuple):
    """A photo with its objects, each a class name and a shape in a picture of `size`.

    `size` is the height and width that the file names; None has shapes in shares of the photo.
    """

    path: Path
    below: Path
    split: str | None
    size: tuple[int, int] | None
    objects: list[tuple[str, Any]]


class Outlines(NamedTuple):
    """Photos with their objects, the classes in order, what was read, and what is left out."""

    photos: list[Outlined]
    classes: list[str]
    text: str
    left_out: dict[str, list[Path | str]]


def has_outlines(images: Path, masks: Path) -> bool:
    """Tell whether masks are an annotation file, or a folder of such and not of masks."""
    if not masks.is_dir():
        return True
    pictures, others = walk(masks, ENDINGS)
    files = [path for path in others if path.suffix.lower() in _ENDINGS]
    names = [path for path in files if path.name in NAME_FILES]
    if masks == images:
        return bool(files) and not masks_among(pictures, masks)
    return len(files) - len(names) > len(pictures) or (bool(files) and not pictures)


def read_outlines(images: Path, masks: Path) -> Outlines:
    """Read the objects of the photos in a folder and below it.

    Raises:
        ValueError: no annotation that can be read, or none of a photo.
    """
    photos, others = walk(images, ENDINGS)
    find = _finder(photos, images)
    files = [masks]
    if masks.is_dir():
        files = [path for path in walk(masks, _ENDINGS)[0] if path.name not in NAME_FILES]
        others = [path for path in others if path not in set(files)]
    json_files = [path for path in files if path.suffix.lower() == ".json"]
    if json_files:
        contents = {path: parse_json(read_text(path), path) for path in json_files}
        is_coco = {path: isinstance(c, dict) and "annotations" in c for path, c in contents.items()}
        read = _read_coco if any(is_coco.values()) else _read_labelme
        if read is _read_coco:
            contents = {path: c for path, c in contents.items() if is_coco[path]}
        found = read(contents, images, find)
    elif masks.is_dir():
        found = _read_yolo(files, masks, images, find)
    else:
        raise ValueError(f"{masks}: expected a folder of masks, or a JSON of COCO or labelme")
    used = {photo.path for photo in found.photos}
    if not used:
        raise ValueError(
            f"{masks} names no photo of {images} that shows an object: "
            + "; ".join(
                f"{len(f)} {reason}, {f[0]} first" for reason, f in found.left_out.items() if f
            )
        )
    reasons = {"photos without an object": [path for path in photos if path not in used]}
    reasons |= {"other files": others} | found.left_out
    return found._replace(left_out=reasons)


def draw(photo: Outlined, labels: dict[str, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw the mask [H, W] of a photo of a size; a later object covers an earlier one.

    Raises:
        ValueError: a shape that does not fit the photo.
    """
    height, width = photo.size or size
    mask = np.zeros((height, width), dtype=np.uint8)
    for name, shape in photo.objects:
        if photo.size is None:
            shape = [[x * (width if k % 2 == 0 else height) for k, x in enumerate(shape)]]
        mask[draw_shape(shape, (height, width), f"{photo.path}: {name}")] = labels[name]
    return mask


def _finder(photos: list[Path], images: Path) -> Callable[[str], Path | None]:
    """Return a function that finds a photo by the path that a file has for it, or by its name."""
    known: dict[str, list[Path]] = defaultdict(list)
    for path in photos:
        below = path.relative_to(images)
        for name in {str(PurePosixPath(below)), path.name, below.stem, str(below.with_suffix(""))}:
            known[fold_name(name)].append(path)

    def find(name: str) -> Path | None:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        for k in range(len(parts)):
            found = known.get(fold_name("/".join(parts[k:])), [])
            if len(found) == 1:
                return found[0]
        return None

    return find


def _read_coco(
    contents: dict[Path, Any], images: Path, find: Callable[[str], Path | None]
) -> Outlines:
    photos: dict[Path, Outlined] = {}
    classes: dict[str, None] = {}
    missing: list[Path | str] = []
    boxes: list[Path | str] = []
    lost: list[Path | str] = []
    for file, content in contents.items():
        for entry in content["annotations"] if isinstance(content["annotations"], list) else []:
            if isinstance(entry, dict):
                entry.setdefault("segmentation", [])
        found = parse_coco(content, str(file))
        for image in found.images:
            path = find(image.file)
            objects = [(found.classes[k - 1], shape) for k, shape in image.objects if shape]
            if len(objects) < len(image.objects):
                (lost if path and objects else boxes).append(image.file)
            if path is None:
                missing.append(image.file)
            elif objects:
                known = photos.get(path)
                photos[path] = Outlined(
                    path,
                    path.relative_to(images),
                    split_of(path.relative_to(images).parts[:-1])
                    or split_of(re.split(r"[_\W\d]+", file.stem)),
                    image.size,
                    [*(known.objects if known else []), *objects],
                )
        shown = {name for photo in photos.values() for name, _ in photo.objects}
        classes |= dict.fromkeys(name for name in found.classes if name in shown)
    return Outlines(
        list(photos.values()),
        list(classes),
        "annotations of COCO",
        {
            "annotated photos that are missing": missing,
            "photos with boxes without shape": boxes,
            "objects without a shape, background in these photos": lost,
        },
    )


def _read_labelme(
    contents: dict[Path, Any], images: Path, find: Callable[[str], Path | None]
) -> Outlines:
    photos: list[Outlined] = []
    classes: set[str] = set()
    missing: list[Path | str] = []
    others: list[Path | str] = []
    lost: list[Path | str] = []
    for file, content in contents.items():
        try:
            size = int(content["imageHeight"]), int(content["imageWidth"])
            shapes = [(str(shape["label"]), _points(shape)) for shape in content["shapes"]]
            name = str(content["imagePath"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{file}: expected a JSON of COCO (images, annotations, categories) or labelme "
                f"(shapes, imagePath, imageHeight, imageWidth); {error!r}"
            ) from error
        path = find(name) or find(file.stem)
        objects = [(label, [points]) for label, points in shapes if points]
        if len(objects) < len(shapes):
            (lost if path and objects else others).append(file)
        if path is None:
            missing.append(file)
        elif objects:
            below = path.relative_to(images)
            photos.append(Outlined(path, below, split_of(below.parts[:-1]), size, objects))
            classes |= {label for label, _ in objects}
    return Outlines(
        photos,
        sorted(classes),
        "shapes of labelme",
        {
            "files of missing photos": missing,
            "files with points or lines": others,
            "points or lines, background in the photos of these files": lost,
        },
    )


def _points(shape: dict[str, Any]) -> list[float]:
    """Return the corners x, y, … of a polygon, rectangle or circle of labelme; else none."""
    points = np.array(shape["points"], dtype=np.float64).reshape(-1, 2)
    kind = shape.get("shape_type", "polygon")
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle" and len(points) == 2:
        radius = np.linalg.norm(points[1] - points[0])
        points = points[0] + radius * np.stack([np.cos(_CIRCLE), np.sin(_CIRCLE)], 1)
    elif kind != "polygon" or len(points) < 3:
        return []
    return points.ravel().tolist()


def _read_yolo(
    files: list[Path], masks: Path, images: Path, find: Callable[[str], Path | None]
) -> Outlines:
    names = yolo_names([masks, masks.parent, images, images.parent])
    photos: list[Outlined] = []
    shown: set[int] = set()
    missing: list[Path | str] = []
    boxes: list[Path | str] = []
    lost: list[Path | str] = []
    for file in files:
        below = file.relative_to(masks)
        path = find(same_name(str(below.with_suffix("")))) or find(file.stem)
        objects = []
        has_boxes = False
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            try:
                class_id, *corners = line.split() or ["0"]
                label, shape = int(class_id), [float(word) for word in corners]
            except ValueError as error:
                raise ValueError(
                    f"{file}, line {number}: expected a class and corners x y … in shares of the "
                    f"photo, as YOLO's segmentation, got {line.strip()!r:.80}"
                ) from error
            if len(shape) == 4:
                has_boxes = True
            elif shape:
                if len(shape) < 6 or len(shape) % 2 or not all(-0.01 <= x <= 1.01 for x in shape):
                    raise ValueError(
                        f"{file}, line {number}: expected corners x y … from 0 to 1, got "
                        f"{line.strip()!r:.80}"
                    )
                objects.append((label, shape))
        if has_boxes:
            (lost if path and objects else boxes).append(file)
        if path is None:
            missing.append(file)
        elif objects:
            below = path.relative_to(images)
            texts = [(names.get(label, f"class {label}"), shape) for label, shape in objects]
            photos.append(Outlined(path, below, split_of(below.parts[:-1]), None, texts))
            shown |= {label for label, _ in objects}
    return Outlines(
        photos,
        [names.get(label, f"class {label}") for label in sorted(shown)],
        "polygons of YOLO",
        {
            "files of missing photos": missing,
            "files with boxes": boxes,
            "boxes, background in the photos of these files": lost,
        },
    )
