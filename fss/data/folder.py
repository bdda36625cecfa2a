"""Images and masks in the Pascal VOC layout."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from fss.files import atomic_write

from .source import IGNORE

IMAGES = "JPEGImages"
MASKS = "SegmentationClass"
LISTS = "ImageSets/Segmentation"
CLASSES = "classes.json"


class Record(NamedTuple):
    """What the scan knows of an image: its size and the pixels of each class."""

    size: tuple[int, int]
    areas: dict[int, int]


class FolderSource:
    """A folder in the Pascal VOC layout.

        JPEGImages/*.jpg|jpeg|png       the images
        SegmentationClass/*.png         a mask of class ids per image, same stem, mode P or L
        ImageSets/Segmentation/train.txt and val.txt    optional: stems of the train and test images
        classes.json                    {"classes": {"1": "bag", ...}, "folds": [[1, 2], ...]}

    Without lists every image is in both splits. The masks are scanned once; what is found is kept
    in `$XDG_CACHE_HOME/fss` (`~/.cache/fss`) until a file's name, size or time changes.

    Args:
        root: the folder.
        classes: the class names in the order of their ids from 1, or by id; by default those of
            classes.json.
        folds: the novel class ids of each fold; by default those of classes.json, or else the
            classes in order cut into four equal parts.

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
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data folder {self.root} does not exist; expected a folder with {IMAGES}/, "
                f"{MASKS}/ and {CLASSES}"
            )
        images = self._files(IMAGES, (".jpg", ".jpeg", ".png"))
        masks = self._files(MASKS, (".png",))
        if not images:
            raise FileNotFoundError(f"{self.root / IMAGES} has no .jpg, .jpeg or .png image")
        self.class_names, stored_folds = self._classes(classes)
        self.folds = self._folds(folds if folds is not None else stored_folds)

        lists = self._lists(images)
        self._stems = sorted(set(lists[0]) | set(lists[1])) if lists else sorted(images)
        unmasked = [stem for stem in self._stems if stem not in masks]
        if unmasked:
            raise FileNotFoundError(
                f"{images[unmasked[0]]} has no mask: expected "
                f"{self.root / MASKS / unmasked[0]}.png ({len(unmasked)} of {len(self._stems)} "
                f"images lack one); add the masks, or list the images to use in {LISTS}/train.txt "
                "and val.txt"
            )
        self._images = [images[stem] for stem in self._stems]
        self._masks = [masks[stem] for stem in self._stems]
        position = {stem: index for index, stem in enumerate(self._stems)}
        everything = list(range(len(self._stems)))
        train, test = (
            [[position[stem] for stem in stems] for stems in lists]
            if lists
            else (everything, everything)
        )
        self._indices = {"train": train, "test": test}
        self._records = self._scan()
        self._check_class_ids()

    def __len__(self) -> int:
        return len(self._stems)

    def name(self, index: int) -> str:
        return self._stems[index]

    def size(self, index: int) -> tuple[int, int]:
        return self._records[index].size

    def class_areas(self, index: int) -> dict[int, int]:
        return self._records[index].areas

    def indices(self, split: Literal["train", "test"]) -> list[int]:
        return list(self._indices[split])

    def load(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The RGB image [H, W, 3], turned as its EXIF orientation says, and its mask [H, W].

        Raises:
            ValueError: a file that cannot be decoded, or sizes that differ.
        """
        path = self._images[index]
        try:
            with Image.open(path) as file:
                image = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error
        mask = _read_mask(self._masks[index])
        _check_sizes(path, image.shape[:2], self._masks[index], mask.shape)
        return image, mask

    def _files(self, folder: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
        path = self.root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} does not exist; the Pascal VOC layout has {IMAGES}/ and {MASKS}/ in the "
                "data folder"
            )
        files: dict[str, Path] = {}
        for file in sorted(path.iterdir()):
            if file.suffix.lower() not in suffixes or file.name.startswith("."):
                continue
            if file.stem in files:
                raise ValueError(f"{files[file.stem]} and {file} have the same stem; keep one")
            files[file.stem] = file
        return files

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
                content = json.loads(path.read_text(encoding="utf-8"))
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
            if len(ids) % 4:
                raise ValueError(
                    f"folds: {len(ids)} classes cannot be cut into four equal parts; give the "
                    f'novel class ids of each fold, as folds or as "folds" in {CLASSES}'
                )
            part = len(ids) // 4
            return tuple(tuple(ids[k * part : (k + 1) * part]) for k in range(4))
        try:
            result = tuple(tuple(int(c) for c in fold) for fold in folds)
        except (TypeError, ValueError) as error:
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
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            stems = {line.strip(): number for number, line in lines if line.strip()}
            for stem, number in stems.items():
                if stem not in images:
                    raise FileNotFoundError(
                        f"{path}, line {number}: {stem!r} is no image of {self.root / IMAGES}; "
                        "expected a file name without its ending"
                    )
            if not stems:
                raise ValueError(f"{path}: expected an image name per line, the file is empty")
            lists.append(list(stems))
        return lists

    def _check_class_ids(self) -> None:
        for path, record in zip(self._masks, self._records, strict=True):
            for class_id, area in record.areas.items():
                if class_id not in self.class_names:
                    ids = f"{min(self.class_names)} to {max(self.class_names)}"
                    raise ValueError(
                        f"{path}: class id {class_id} ({area} pixels) is not in the class list "
                        f"(ids {ids}, 0 background, 255 ignored); correct the mask or the list"
                    )

    def _scan(self) -> list[Record]:
        """Sizes and class areas of all images, from the cache or else from the masks."""
        digest = hashlib.sha256()
        for path in (*self._images, *self._masks):
            status = path.stat()
            digest.update(f"{path.name}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        fingerprint = digest.hexdigest()
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        key = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]
        cache = Path(base) / "fss" / f"areas-{key}.json"
        records = _read_cache(cache, fingerprint, len(self))
        if records is None:
            with ThreadPoolExecutor() as pool:
                found = pool.map(_inspect, self._images, self._masks)
                bar = tqdm(found, "scanning masks", len(self), delay=2, unit="image")
                records = list(bar)
            _write_cache(cache, fingerprint, records)
        return records


def _inspect(image_path: Path, mask_path: Path) -> Record:
    try:
        with Image.open(image_path) as file:
            width, height = file.size
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(image_path, error) from error
    mask = _read_mask(mask_path)
    _check_sizes(image_path, (width, height) if turned else (height, width), mask_path, mask.shape)
    counts = np.bincount(mask.ravel(), minlength=256)
    present = np.flatnonzero(counts[1:IGNORE]) + 1
    return Record(mask.shape, {int(c): int(counts[c]) for c in present})


def _read_mask(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as file:
            if file.mode not in ("P", "L"):
                raise ValueError(
                    f"{path}: expected class ids in one 8-bit channel (mode P or L), got mode "
                    f"{file.mode}; save the mask with class ids, not colours"
                )
            return np.array(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _check_sizes(
    image_path: Path, image: tuple[int, ...], mask_path: Path, mask: tuple[int, ...]
) -> None:
    if image != mask:
        raise ValueError(
            f"{mask_path} is {mask[0]}×{mask[1]} pixels (height×width), its image {image_path} "
            f"{image[0]}×{image[1]}; a mask has the size of its image"
        )


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be decoded ({error}); replace the file, or remove it together with its "
        "image or mask"
    )


def _read_cache(path: Path, fingerprint: str, length: int) -> list[Record] | None:
    """The cached records, or None where the cache is absent, stale or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint:
            return None
        records = [
            Record((int(height), int(width)), {int(c): int(area) for c, area in areas.items()})
            for (height, width), areas in content["records"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return records if len(records) == length else None


def _write_cache(path: Path, fingerprint: str, records: list[Record]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps({"fingerprint": fingerprint, "records": records}).encode())
    except OSError as error:
        warnings.warn(
            f"the class areas cannot be cached in {path.parent} ({error}), so the masks are "
            "scanned at every start; set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=4,
        )
