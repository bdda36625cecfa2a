"""Sizes and class areas of all images of a data set, found once and cached."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image
from tqdm import tqdm

from fss.data.images import DAMAGED, FORMATS, check_pixels, check_sizes, unreadable
from fss.data.source import IGNORE
from fss.files import atomic_write


class Record(NamedTuple):
    """What the scan knows of an image: its height and width, and the pixels of each class."""

    size: tuple[int, int]
    areas: dict[int, int]


def scan(
    key: str,
    images: Sequence[Path],
    masks: Sequence[Path],
    open_mask: Callable[[Path], Image.Image],
) -> list[Record]:
    """Return the records of all images, from the cache or else from the files.

    They are kept in `$XDG_CACHE_HOME/fss` (`~/.cache/fss`) until the name, the size or the time of
    a file changes. Decoding runs in threads: it holds no lock of the interpreter.

    Args:
        key: names the cache: the data set and its folder.
        images: the images.
        masks: their masks, in the same order.
        open_mask: reads a mask as an 8-bit picture of one channel; `open_classes` reads class ids.

    Raises:
        ValueError: files that cannot be decoded, or masks of another size than their image; all
            are counted, the first ten named.
    """
    digest = hashlib.sha256()
    for path in (*images, *masks):
        status = path.stat()
        digest.update(
            f"{path.parent.name}/{path.name}|{status.st_size}|{status.st_mtime_ns}\n".encode()
        )
    fingerprint = digest.hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "fss" / f"areas-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    records = _read_cache(cache, fingerprint, len(images))
    if records is None:

        def attempt(image: Path, mask: Path) -> Record | ValueError:
            try:
                return inspect(image, mask, open_mask)
            except ValueError as error:
                return error

        with ThreadPoolExecutor() as pool:
            found = pool.map(attempt, images, masks)
            done = list(tqdm(found, "scanning masks", len(images), delay=2, unit="image"))
        records = [result for result in done if isinstance(result, Record)]
        _raise_all([result for result in done if isinstance(result, ValueError)])
        _write_cache(cache, fingerprint, records)
    return records


def inspect(image_path: Path, mask_path: Path, open_mask: Callable[[Path], Image.Image]) -> Record:
    """Return the record of one image; of the image itself only the header is read."""
    try:
        with Image.open(image_path, formats=FORMATS) as file:
            check_pixels(file)
            width, height = file.size
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except DAMAGED as error:
        raise unreadable(image_path, error) from error
    mask = open_mask(mask_path)
    size = (mask.height, mask.width)
    check_sizes(image_path, (width, height) if turned else (height, width), mask_path, size)
    counts = mask.histogram()
    return Record(size, {c: counts[c] for c in range(1, IGNORE) if counts[c]})


def _raise_all(errors: list[ValueError]) -> None:
    """Raise one error with the texts of the first ten and their number."""
    if len(errors) > 1:
        texts = "\n  ".join(str(error) for error in errors[:10])
        raise ValueError(f"{len(errors)} images cannot be used:\n  {texts}")
    if errors:
        raise errors[0]


def _read_cache(path: Path, fingerprint: str, length: int) -> list[Record] | None:
    """Return the cached records; None if the cache is absent, stale or broken."""
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
            "scanned at every start; set XDG_CACHE_HOME to a writable folder",
            stacklevel=4,
        )
