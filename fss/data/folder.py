"""Images and masks in the Pascal VOC layout."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fss.data.discovery import (
    MASK_ENDINGS,
    MASK_FOLDER,
    list_files,
    name_some,
    same_name,
    warn_left_out,
)
from fss.data.file_source import ListedSource
from fss.data.images import ENDINGS
from fss.data.lists import Pair, read_lines
from fss.data.source import IGNORE
from fss.files import parse_json, read_text

IMAGES = "JPEGImages"
MASKS = "SegmentationClass"
LISTS = "ImageSets/Segmentation"
CLASSES = "classes.json"


class FolderSource(ListedSource):
    """A folder in the Pascal VOC layout.

        JPEGImages/*.jpg, …             the images
        SegmentationClass/*.png         a mask of class ids per image, same stem, mode P or L
        ImageSets/Segmentation/train.txt and val.txt    optional: stems of the train and test images
        classes.json                    {"classes": {"1": "bag", ...}, "folds": [[1, 2], ...]}

    Images may have any of `ENDINGS`, masks any of `MASK_ENDINGS`; files left out are
    named in a warning. Without lists every image is in both splits. The masks are scanned once;
    what is found is kept in `$XDG_CACHE_HOME/fss` (`~/.cache/fss`) until a file's name, size or
    time changes.

    Args:
        root: the folder.
        classes: the class names in the order of their ids from 1, or by id; by default those of
            classes.json.
        folds: the novel class ids of each fold; by default those of classes.json, or else the
            classes in order, split into four equal parts.
        skip_unreadable: leave out images that cannot be used, and warn; by default an error.

    Raises:
        FileNotFoundError: a folder, a list, a mask or the class list is missing.
        ValueError: an unreadable file, a mask that does not fit its image or the class list, folds
            that do not fit the classes.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        classes: Sequence[str] | Mapping[int, str] | None = None,
        folds: Sequence[Sequence[int]] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.skip_unreadable = skip_unreadable
        self.root = Path(root).expanduser()
        command = _import_command(self.root / IMAGES, self.root / MASKS)
        self.mask_hint = f"; {command} reads other kinds of masks"
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data folder {self.root} does not exist; expected a folder with {IMAGES}/, "
                f"{MASKS}/ and {CLASSES}"
            )
        images, others = self._files(IMAGES, ENDINGS)
        masks, other_masks = self._files(MASKS, MASK_ENDINGS)
        if not images:
            found = f" but {name_some(others, self.root)}" if others else ""
            raise FileNotFoundError(
                f"{self.root / IMAGES} has no .jpg, .jpeg, .png or other picture that can be read"
                f"{found}; {command} takes photos in folders below it"
            )
        self.class_names, stored_folds = self._classes(classes)
        self.folds = self._folds(folds if folds is not None else stored_folds)

        lists = self._lists(images)
        stems = sorted(set(lists[0]) | set(lists[1])) if lists else sorted(images)
        unmasked = [stem for stem in stems if stem not in masks]
        if unmasked:
            raise FileNotFoundError(
                f"{images[unmasked[0]]} has no mask: expected "
                f"{self.root / MASKS / unmasked[0]}.png ({len(unmasked)} of {len(stems)} "
                f"images lack one); add the masks, or list the images to use in {LISTS}/train.txt "
                f"and val.txt; {command} leaves such images out and knows other names of masks"
            )
        position = {stem: index for index, stem in enumerate(stems)}
        train, test = (
            [[position[stem] for stem in listed] for listed in lists]
            if lists
            else (list(range(len(stems))), list(range(len(stems))))
        )
        warn_left_out(
            self.root,
            len(stems),
            {
                "Not read": [*others, *other_masks],
                "Without a photo": [masks[stem] for stem in sorted(set(masks) - set(images))],
            },
        )
        self._take([Pair(images[stem], masks[stem]) for stem in stems], train, test)
        self._check_class_ids()

    def _files(self, folder: str, endings: Sequence[str]) -> tuple[dict[str, Path], list[Path]]:
        """Return the files with one of the endings by their stem, and what else is there."""
        path = self.root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} does not exist; the Pascal VOC layout has {IMAGES}/ and {MASKS}/ in the "
                f"data folder, {_other_layout(self.root)}"
            )
        taken, others = list_files(path, endings)
        files: dict[str, Path] = {}
        for file in taken:
            stem = same_name(file.stem)
            if stem in files:
                raise ValueError(f"{files[stem]} and {file} have the same stem; keep one")
            files[stem] = file
        return files, others

    def _classes(
        self, classes: Sequence[str] | Mapping[int, str] | None
    ) -> tuple[dict[int, str], Any]:
        origin, folds = "classes", None
        if classes is None:
            path = self.root / CLASSES
            origin = str(path)
            if not path.is_file():
                raise FileNotFoundError(
                    f'{path} does not exist; write {{"classes": {{"1": "first name", ...}}}} into '
                    "it, or give the class list"
                )
            try:
                content = parse_json(read_text(path), path)
                classes, folds = content["classes"], content.get("folds")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f'{path}: expected {{"classes": {{"1": "first name", ...}}}}, got something '
                    f"else ({type(error).__name__}: {error})"
                ) from error
        if isinstance(classes, Mapping):
            items = list(classes.items())
        elif isinstance(classes, Sequence) and not isinstance(classes, str):
            items = list(enumerate(classes, start=1))
        else:
            raise TypeError(f"{origin}: expected names in order or by id, got {classes!r}")
        names: dict[int, str] = {}
        for key, name in items:
            if not str(key).isdecimal() or not 1 <= int(key) < IGNORE:
                raise ValueError(f"{origin}: expected class ids from 1 to 254, got {key!r}")
            names[int(key)] = str(name)
        if not names:
            raise ValueError(f"{origin}: expected at least one class, got none")
        return dict(sorted(names.items())), folds

    def _folds(self, folds: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
        ids = list(self.class_names)
        if folds is None:
            if len(ids) == 1:
                raise ValueError(
                    "folds: one class cannot be both novel and a base class to train on; add "
                    f'photos of others, or write "folds": [[{ids[0]}]] into {CLASSES} to test on it'
                )
            if len(ids) % 4:
                raise ValueError(
                    f"folds: {len(ids)} classes cannot be split into four equal parts; give the "
                    f'novel class ids of each fold, as folds or as "folds" in {CLASSES}'
                )
            part = len(ids) // 4
            return tuple(tuple(ids[k * part : (k + 1) * part]) for k in range(4))
        try:
            result = tuple(tuple(int(c) for c in fold) for fold in folds)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(
                f"folds: expected a list of class ids per fold, got {folds!r}"
            ) from error
        for k, fold in enumerate(result):
            unknown = sorted(set(fold) - set(ids))
            if unknown or not fold or len(set(fold)) != len(fold):
                raise ValueError(
                    f"folds: expected different class ids out of {ids} in fold {k}, got {fold}"
                )
        return result

    def _lists(self, images: dict[str, Path]) -> list[list[str]] | None:
        paths = [self.root / LISTS / f"{name}.txt" for name in ("train", "val")]
        present = [path for path in paths if path.is_file()]
        if not present:
            return None
        lists = []
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist, {present[0].name} does; write both lists or none"
                )
            stems = {}
            for number, line in read_lines(path, "an image name").items():
                stem = next((name for name in _spellings(line) if name in images), None)
                if stem is None:
                    raise FileNotFoundError(
                        f"{path}, line {number}: {line!r} is no image of {self.root / IMAGES}; "
                        "expected a file name without its ending"
                    )
                stems[stem] = number
            lists.append(list(stems))
        return lists


def _import_command(images: Path | str, masks: Path | str, out: Path | str = "NEW") -> str:
    return f"`fss data import {shlex.join(map(str, (images, masks, out)))}`"


def _other_layout(root: Path) -> str:
    """Say what a folder in another layout has, and the command that imports it."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    masks = [path for path in folders if MASK_FOLDER.search(path.name) or path.name == MASKS]
    masks += sorted(root.glob("*.json"))
    photos = [path for path in folders if path not in masks]
    out = root.with_name(f"{root.name}-fss")
    if len(photos) == 1 and masks:
        command = _import_command(photos[0], masks[0], out)
        return f"this has {photos[0].name} and {masks[0].name}: {command} writes it from them"
    if folders or list_files(root, ENDINGS)[0]:
        found = name_some(folders, root) or "photos"
        return f"this has {found}: {_import_command(root, root, out)} looks for photos and masks"
    return f"this is empty; {_import_command('PHOTOS', 'MASKS', root)} writes it from others"


def _spellings(line: str) -> Iterator[str]:
    """Yield the stems that a line of a list may mean: alone, or with folder, ending or mask."""
    for text in (line, *line.split()[:1]):
        name = same_name(text).replace("\\", "/").rpartition("/")[2]
        yield name
        yield Path(name).stem
