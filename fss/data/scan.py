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

_RULES = 2  # of how masks are read: a cache of other rules is stale


class Record(NamedTuple):
    """What the scan knows of an image: its height and width, and the pixels of each class.

    `scaled` tells whether its mask has another size and was scaled to the image's.
    """

    size: tuple[int, int]
    areas: dict[int, int]
    scaled: bool = False


class PhotoForMask(ValueError):
    """A photo in the place of a mask: its image is left out, and named."""


def scan(
    key: str,
    images: Sequence[Path],
    masks: Sequence[Path],
    open_mask: Callable[[Path], Image.Image],
    scale: bool = False,
) -> list[Record | ValueError]:
    """Return the records of all images, from the cache or else from the files.

    They are kept in `$XDG_CACHE_HOME/fss` (`~/.cache/fss`) until the name, the size or the time of
    a file changes. Decoding runs in threads: it holds no lock of the interpreter. In the place of a
    record is the error of an image or a mask that cannot be used; such are tried again each time.

    Args:
        key: names the cache: the data set and its folder.
        images: the images.
        masks: their masks, in the same order.
        open_mask: reads a mask as an 8-bit picture of one channel; `open_classes` reads class ids.
        scale: scale a mask of another size than its image, which is an error otherwise.
    """
    digest = hashlib.sha256(f"{scale}|{_RULES}".encode())
    for path in (*images, *masks):
        status = path.stat()
        digest.update(
            f"{path.parent.name}/{path.name}|{status.st_size}|{status.st_mtime_ns}\n".encode()
        )
    fingerprint = digest.hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "fss" / f"areas-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    records = _read_cache(cache, fingerprint, len(images))
    result: list[Record | ValueError | None] = list(records or [None] * len(images))
    unknown = [index for index, record in enumerate(result) if record is None]

    def attempt(index: int) -> Record | ValueError:
        try:
            return inspect(images[index], masks[index], open_mask, scale)
        except ValueError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = pool.map(attempt, unknown)
        bar = tqdm(found, "scanning masks", len(unknown), delay=2, unit="image")
        for index, one in zip(unknown, bar, strict=True):
            result[index] = one
    readable = [one if isinstance(one, Record) else None for one in result]
    if readable != records:
        _write_cache(cache, fingerprint, readable)
    return [one for one in result if one is not None]


def inspect(
    image_path: Path,
    mask_path: Path,
    open_mask: Callable[[Path], Image.Image],
    scale: bool = False,
) -> Record:
    """Return the record of one image; of the image itself only the header is read.

    Raises:
        ValueError: a file that cannot be decoded, or a mask of another size, unless `scale`.
    """
    try:
        with Image.open(image_path, formats=FORMATS) as file:
            check_pixels(file)
            width, height = file.size
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except DAMAGED as error:
        raise unreadable(image_path, error) from error
    image_size = (width, height) if turned else (height, width)
    mask = open_mask(mask_path)
    scaled = scale and (mask.height, mask.width) != image_size
    if scaled:
        mask = mask.resize(image_size[::-1], Image.Resampling.NEAREST)
    check_sizes(image_path, image_size, mask_path, (mask.height, mask.width))
    counts = mask.histogram()
    return Record(image_size, {c: counts[c] for c in range(1, IGNORE) if counts[c]}, scaled)


def raise_all(errors: list[ValueError], hint: str = "") -> None:
    """Raise one error with the texts of the first ten and their number; of none, do nothing.

    The hint follows unless all errors have a cause: files that cannot be decoded.
    """
    if not errors:
        return
    hint = hint if any(error.__cause__ is None for error in errors) else ""
    if len(errors) == 1:
        raise ValueError(f"{errors[0]}{hint}") from errors[0].__cause__
    texts = "\n  ".join(str(error) for error in errors[:10])
    raise ValueError(f"{len(errors)} images cannot be used:\n  {texts}{hint}")


def _read_cache(path: Path, fingerprint: str, length: int) -> list[Record | None] | None:
    """Return the cached records, with gaps; None if the cache is absent, stale or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint:
            return None
        records = [None if each is None else _read_record(*each) for each in content["records"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return records if len(records) == length else None


def _read_record(size: list[int], areas: dict[str, int], scaled: bool) -> Record:
    height, width = size
    areas_by_id = {int(c): int(area) for c, area in areas.items()}
    return Record((int(height), int(width)), areas_by_id, bool(scaled))


def _write_cache(path: Path, fingerprint: str, records: list[Record | None]) -> None:
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
