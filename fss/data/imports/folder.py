"""`fss data import`: photos and masks of other layouts, written as `FolderSource` reads them."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from fss.data.discovery import name_some
from fss.data.folder import CLASSES, IMAGES, LISTS, MASKS
from fss.data.images import FORMATS, decode
from fss.data.imports.names import NameFile, find_names, parse_classes, parse_value
from fss.data.imports.outlines import draw, has_outlines, read_outlines
from fss.data.imports.photos import TEST, TRAIN, Photo, match_masks, split_of
from fss.data.imports.values import Kind, Meaning, apply, find_meaning
from fss.data.source import IGNORE
from fss.files import write_json

_ASPECT = 0.05  # how far the shape of a mask may be from its photo's without a word
_MIN_AREA = 2048  # the default of data.min_area


class Imported(NamedTuple):
    """What an import did, in lines to print."""

    lines: list[str]


class _Item(NamedTuple):
    """A photo to write: its file, its path below the photos, its split, and what draws its mask."""

    photo: Path
    below: Path
    split: str | None
    draw: Callable[[tuple[int, int]], NDArray[np.uint8]]


class _Plan(NamedTuple):
    """All photos to write, the names of the classes, what was read, and what is left out."""

    items: list[_Item]
    names: dict[int, str]
    text: str
    left_out: dict[str, Sequence[Path | str]]


def import_folder(
    images: str,
    masks: str,
    out: str,
    classes: Sequence[str] = (),
    values: Kind | None = None,
    ignored: Sequence[str] = (),
    background: str | None = None,
) -> Imported:
    """Write photos and masks of another layout as a folder for data.source: folder.

    Masks are pictures of class ids, of colors or of one object, in the same folders as the photos
    or in others, also in a folder per class; or annotations: a JSON of COCO, files of labelme or of
    YOLO's segmentation. What their values mean is found out and said; where it may be several
    things, the error names the option that decides. Photos are copied as they are; masks of another
    size are scaled. A folder train and one called val, valid or test become lists. `out` appears
    complete or not at all.

    Args:
        images: folder of the photos, with those below it.
        masks: folder of the masks, with those below it, or a file of annotations; may be `images`.
        out: new folder.
        classes: names of the classes: NAME in the order of the ids, ID=NAME, or COLOR=NAME, for
            example 1=cat or #ff0000=cat. By default those of a file beside the masks (labelmap.txt,
            class_dict.csv, classes.txt, classes.json), of the annotations, or of the folders.
        values: what the masks' values are: "ids" of classes, "colors" of classes, or "binary", one
            object per mask; by default it is found out.
        ignored: ids or colors that are neither background nor a class, for example 255 or #ffffff.
        background: id or color that is background, for example 2 or #ffffff; by default 0 or black.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: `images` or `masks` does not.
        ValueError: no photo with a mask, a file that cannot be read, or ambiguous values.
    """
    folder, source = Path(images).expanduser(), Path(masks).expanduser()
    target = Path(out).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"images: expected a folder, {folder} is none")
    if not source.exists():
        raise FileNotFoundError(f"masks: expected a folder or a file, {source} does not exist")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"out: expected a new folder, {target} exists; give another name")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out: expected a folder outside of {folder}, got {target}")
    if has_outlines(folder, source):
        for option, value in (
            ("--values", values),
            ("--ignored", ignored),
            ("--background", background),
        ):
            if value:
                raise ValueError(
                    f"{option}: {source} has shapes, not masks with values; leave the option out"
                )
        plan = _plan_outlines(folder, source, classes)
    else:
        plan = _plan_pictures(folder, source, classes, values, ignored, background)
    with _new_folder(target) as made:
        return _write(plan, made, target, folder, source)


def _plan_outlines(images: Path, masks: Path, classes: Sequence[str]) -> _Plan:
    found = read_outlines(images, masks)
    if len(found.classes) >= IGNORE:
        raise ValueError(f"{masks}: expected at most 254 classes, got {len(found.classes)}")
    labels = {name: k for k, name in enumerate(found.classes, start=1)}
    names = dict(enumerate(found.classes, start=1))
    given = parse_classes(classes)
    if any(not key.is_place for key in given):
        raise ValueError(
            f"--classes: expected names alone, in the order of {', '.join(found.classes)}, got "
            f"{', '.join(classes)}"
        )
    if given and len(given) != len(names):
        raise ValueError(
            f"--classes: expected {len(names)} names for {', '.join(found.classes)}, got "
            f"{list(given.values())}"
        )
    items = [
        _Item(photo.path, photo.below, photo.split, lambda size, p=photo: draw(p, labels, size))
        for photo in found.photos
    ]
    return _Plan(
        items, dict(enumerate(given.values(), start=1)) or names, found.text, found.left_out
    )


def _plan_pictures(
    images: Path,
    masks: Path,
    classes: Sequence[str],
    values: Kind | None,
    ignored: Sequence[str],
    background: str | None,
) -> _Plan:
    found = match_masks(images, masks)
    given, void = parse_classes(classes), [parse_value(text, "--ignored") for text in ignored]
    beside: NameFile | None = None
    if not given:
        beside = find_names([masks, masks.parent, images, images.parent])
        given = beside.classes if beside else {}
        void += beside.ignored if beside and beside.ignored else []
    files = [path for photo in found.photos for path, _ in photo.masks]
    base = None if background is None else parse_value(background, "--background")
    meaning = find_meaning(files, values, given, void, masks, base, bool(classes))
    folders = sorted({name for photo in found.photos for _, name in photo.masks})
    names, text = meaning.names, meaning.text
    labels: dict[str, int] | None = None
    is_one = meaning.labels is None or len(set(meaning.labels.values()) - {0, IGNORE}) == 1
    if is_one and not classes and _name_classes(folders):
        labels = {name: k for k, name in enumerate(folders, start=1)}
        names = dict(enumerate(folders, start=1))
        text = f"one object per mask ({meaning.text}), the class is the name of its folder"
    elif meaning.kind == "binary" and len(classes) > 1:
        raise ValueError(
            f"--classes: expected one name, as a mask shows one object ({text}), got "
            f"{', '.join(classes)}"
        )
    elif beside is not None and set(names.values()) & set(beside.classes.values()):
        text += f"; names of {beside.path}"
    items = [
        _Item(
            photo.path,
            photo.below,
            split_of(photo.below.parts[:-1]),
            lambda size, p=photo: _merge(p, meaning, labels),
        )
        for photo in found.photos
    ]
    return _Plan(items, names, text, dict(found.left_out))


def _name_classes(folders: list[str]) -> bool:
    """Tell whether folders of masks of one object are named by classes, not by dates or parts."""
    return len(folders) > 1 and all(
        any(c.isalpha() for c in name) and name.lower() not in (*TRAIN, *TEST) for name in folders
    )


def _merge(photo: Photo, meaning: Meaning, labels: dict[str, int] | None) -> NDArray[np.uint8]:
    """Draw the masks of a photo into one; a later one covers an earlier one."""
    result: NDArray[np.uint8] | None = None
    for path, folder in photo.masks:
        mask = apply(meaning, path)
        if labels is not None:
            mask = np.where((mask > 0) & (mask < IGNORE), labels[folder], mask).astype(np.uint8)
        if result is None:
            result = mask
        elif result.shape != mask.shape:
            raise ValueError(
                f"{path} is {mask.shape[0]}×{mask.shape[1]} pixels (height×width), "
                f"{photo.masks[0][0]} {result.shape[0]}×{result.shape[1]}; masks of one photo have "
                "one size"
            )
        else:
            result[mask > 0] = mask[mask > 0]
    assert result is not None
    return result


def _write(plan: _Plan, made: Path, out: Path, images: Path, masks: Path) -> Imported:
    """Write the photos, their masks, the class list and the lists into a folder."""
    for part in (IMAGES, MASKS):
        (made / part).mkdir()
    splits = {item.split for item in plan.items}
    is_split = {"train", "val"} <= splits
    names = _names([item.below for item in plan.items])
    shown: Counter[int] = Counter()
    lists: dict[str, list[str]] = {"train": [], "val": []}
    scaled: list[Path | str] = []
    bent: list[Path | str] = []
    turned: list[Path | str] = []
    empty: list[Path | str] = []
    damaged: list[Path | str] = []
    errors: list[str] = []
    small = taken = 0
    for item, name in zip(tqdm(plan.items, "importing", unit="photo", delay=2), names, strict=True):
        try:
            size = decode(item.photo, "photo", _size)
        except ValueError:
            damaged.append(item.photo)
            continue
        try:
            mask = item.draw(size)
        except ValueError as error:
            errors.append(str(error))
            continue
        if mask.shape == size[::-1] and size[0] != size[1]:
            lying = Image.fromarray(mask)
            with Image.open(item.photo, formats=FORMATS) as file:
                turn = file.getexif().get(ExifTags.Base.Orientation, 1)
            lying.getexif()[ExifTags.Base.Orientation] = turn
            upright = np.array(ImageOps.exif_transpose(lying))
            if upright.shape == size:
                mask = upright
                turned.append(item.photo)
        if mask.shape != size:
            scaled.append(item.photo)
            if abs(mask.shape[0] * size[1] / (mask.shape[1] * size[0]) - 1) > _ASPECT:
                bent.append(item.photo)
            mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
        areas = {int(c): int((mask == c).sum()) for c in np.unique(mask) if 0 < c < IGNORE}
        if not areas:
            empty.append(item.photo)
            continue
        taken += 1
        shown.update(areas.keys())
        small += max(areas.values()) < _MIN_AREA
        shutil.copyfile(item.photo, made / IMAGES / f"{name}{item.photo.suffix.lower()}")
        Image.fromarray(mask).save(made / MASKS / f"{name}.png")
        if is_split:
            lists[item.split or "train"].append(name)
    if errors:
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise ValueError(f"{len(errors)} photos: {chr(10).join(errors[:10])}{more}")
    if not taken:
        raise ValueError(f"{masks}: no mask shows a class, read as {plan.text}")
    classes = {k: name for k, name in sorted(plan.names.items()) if shown[k]}
    folds = _folds(list(classes))
    write_json(
        made / CLASSES,
        {"classes": {str(k): name for k, name in classes.items()}, "folds": folds},
    )
    if is_split:
        (made / LISTS).mkdir(parents=True)
        for name, stems in lists.items():
            text = "".join(f"{stem}\n" for stem in stems)
            (made / LISTS / f"{name}.txt").write_text(text, encoding="utf-8")
    left_out = {"masks that show nothing": empty, "photos that cannot be decoded": damaged}
    left_out |= dict(plan.left_out)
    total = len(plan.items) + len(plan.left_out.get("photos without a mask", ()))
    total += len(plan.left_out.get("photos without an object", ()))
    lines = [f"{out}: {taken} of {total} photos, {len(classes)} classes", f"masks: {plan.text}"]
    for k, name in classes.items():
        lines.append(f"  {k:3d}  {name}: {shown[k]} photo{'s' * (shown[k] != 1)}")
    notes: dict[str, Sequence[Path | str]] = {
        "masks of another size, scaled": scaled,
        "of these of another shape: do they belong to the photo?": bent,
        "masks turned like their photos": turned,
        "classes that no mask shows": [n for k, n in plan.names.items() if not shown[k]],
    }
    for text, files in [*notes.items(), *((f"left out: {t}", f) for t, f in left_out.items())]:
        if files:
            lines.append(f"{text}: {len(files)}: {_relative(files, images, masks)}")
    if is_split:
        lines.append(f"lists: {len(lists['train'])} train, {len(lists['val'])} val, by folder")
    if len(classes) == 1:
        lines.append(
            "one class: training needs base classes beside the novel one, so on this folder a run "
            "can only be tested (fss eval)"
        )
    else:
        hint = " --data.min_area 0.01" if 2 * small > taken else ""
        lines.append(f"fss train --data.source folder --data.root {out}{hint}")
    return Imported(lines)


def _size(photo: Image.Image) -> tuple[int, int]:
    photo.load()
    return photo.height, photo.width


def _names(paths: list[Path]) -> list[str]:
    """Return a file name for each photo: its path without ending and without train/ or val/."""
    short = [
        "_".join(part for part in path.with_suffix("").parts if split_of([part]) is None)
        or path.stem
        for path in paths
    ]
    count = Counter(name.casefold() for name in short)
    long = ["_".join(path.with_suffix("").parts) for path in paths]
    names = [a if count[a.casefold()] == 1 else b for a, b in zip(short, long, strict=True)]
    again = Counter(name.casefold() for name in names)
    return [
        name if again[name.casefold()] == 1 else f"{name}_{path.suffix[1:].lower()}"
        for name, path in zip(names, paths, strict=True)
    ]


def _folds(ids: list[int]) -> list[list[int]]:
    """Split classes in order into four folds, or as many as there are classes."""
    count = min(4, len(ids))
    return [part.tolist() for part in np.array_split(ids, count)]


def _relative(files: Sequence[Path | str], *folders: Path) -> str:
    texts: list[Path | str] = []
    for file in files:
        root = next((f for f in folders if isinstance(file, Path) and file.is_relative_to(f)), None)
        texts.append(str(file.relative_to(root)) if root and isinstance(file, Path) else str(file))
    return name_some(texts, Path())


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when the block ends, and is removed on error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
