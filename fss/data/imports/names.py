"""Names of classes, as a user types them and as tools keep them beside the masks."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import ImageColor

from fss.files import parse_json, read_text, read_yaml

NAME_FILES = ("classes.txt", "labels.txt", "obj.names", "labelmap.txt", "classes.json")
"""Files of names of classes, beside masks or annotations."""

_IN_ORDER = ("classes.txt", "labels.txt", "obj.names")
_BACKGROUND = ("background", "_background_", "__background__", "unlabeled", "bg")
_IGNORED = ("__ignore__", "_ignore_", "ignore", "void")


class ClassKey(NamedTuple):
    """What stands for a class in masks: an id, a color 0xRRGGBB, or its place among the names."""

    value: int
    is_color: bool = False
    is_place: bool = False


def parse_classes(texts: Sequence[str]) -> dict[ClassKey, str]:
    """Read classes as they are typed: NAME in order, ID=NAME, or COLOR=NAME.

    Raises:
        ValueError: a text of another form, or a key or a name given twice.
    """
    found: dict[ClassKey, str] = {}
    for place, text in enumerate(texts, start=1):
        key_text, equals, name = text.rpartition("=")
        key = parse_value(key_text, "--classes") if equals else ClassKey(place, is_place=True)
        if not name.strip() or key in found or name.strip() in found.values():
            raise ValueError(
                f"--classes: expected different NAME, ID=NAME or COLOR=NAME, got {text!r}"
            )
        found[key] = name.strip()
    if len({key.is_place for key in found}) > 1:
        raise ValueError("--classes: expected an id or a color before every name, or before none")
    return found


def parse_value(text: str, option: str) -> ClassKey:
    """Read a class id, or a color: #ff0000, 255,0,0 or red.

    Raises:
        ValueError: neither.
    """
    text = text.strip()
    if text.isdecimal():
        return ClassKey(int(text))
    if re.fullmatch(r"\d{1,3}( *[, ] *\d{1,3}){2}", text):
        text = f"rgb({','.join(re.findall('[0-9]+', text))})"
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise ValueError(
            f"{option}: expected a class id, or a color such as #ff0000 or 255,0,0; got {text!r}"
        ) from error
    return ClassKey(red << 16 | green << 8 | blue, is_color=True)


def color_text(code: int) -> str:
    """Return a color as a user types it."""
    return f"#{code:06x}"


class NameFile(NamedTuple):
    """Classes from a file, the keys that it calls ignored, and its path."""

    classes: dict[ClassKey, str]
    ignored: list[ClassKey]
    path: Path


def find_names(folders: Sequence[Path]) -> NameFile | None:
    """Find a file with the names of classes in one of the folders.

    labelmap.txt (CVAT: `name:r,g,b::`), *class_dict*.csv (name, r, g, b), classes.json, or names in
    order in classes.txt, labels.txt or obj.names.

    Raises:
        ValueError: such a file with other content.
    """
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.iterdir()):
            name = path.name.lower()
            if not path.is_file():
                continue
            if name == "labelmap.txt":
                return _of_rows(path, _labelmap(path))
            if re.fullmatch(r".*class_dict.*\.csv", name):
                return _of_rows(path, _class_dict(path))
            if name == "classes.json":
                return _of_json(path)
            if name in _IN_ORDER:
                lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
                kept = [line for line in lines if line.lower() not in (*_BACKGROUND, *_IGNORED)]
                places = enumerate(kept, start=1)
                return NameFile({ClassKey(k, is_place=True): n for k, n in places}, [], path)
    return None


def yolo_names(folders: Sequence[Path]) -> dict[int, str]:
    """Return the names of YOLO's classes from 0, of its data.yaml or a list beside the labels."""
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob("*.y*ml")):
            content = read_yaml(path)
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, (list, dict)):
                items = names.items() if isinstance(names, dict) else enumerate(names)
                return {int(key): str(name) for key, name in items}
        for name in _IN_ORDER:
            if (folder / name).is_file():
                return dict(enumerate(read_text(folder / name).splitlines()))
    return {}


def _labelmap(path: Path) -> Iterator[tuple[str, str]]:
    for line in read_text(path).splitlines():
        if line.strip() and not line.startswith("#"):
            name, color, *_ = [*line.split(":"), ""]
            yield name.strip(), color


def _class_dict(path: Path) -> Iterator[tuple[str, str]]:
    for row in csv.reader(io.StringIO(read_text(path))):
        if len(row) >= 4 and row[1].strip().isdecimal():
            yield row[0].strip(), ",".join(cell.strip() for cell in row[1:4])


def _of_rows(path: Path, rows: Iterator[tuple[str, str]]) -> NameFile:
    classes: dict[ClassKey, str] = {}
    ignored = []
    for name, color in rows:
        key = parse_value(color, str(path))
        if name.lower() in _IGNORED:
            ignored.append(key)
        elif name.lower() not in _BACKGROUND and key.value:
            classes[key] = name
    if not classes:
        raise ValueError(f"{path}: expected a name and a color of each class, found none")
    return NameFile(classes, ignored, path)


def _of_json(path: Path) -> NameFile:
    content = parse_json(read_text(path), path)
    names = content.get("classes", content) if isinstance(content, dict) else content
    if isinstance(names, list):
        return NameFile(
            {ClassKey(k, is_place=True): str(n) for k, n in enumerate(names, start=1)}, [], path
        )
    if not isinstance(names, dict) or not all(key.isdecimal() for key in names):
        raise ValueError(f'{path}: expected {{"classes": {{"1": "first name", ...}}}}')
    return NameFile({ClassKey(int(key)): str(name) for key, name in names.items()}, [], path)
