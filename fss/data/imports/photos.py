"""Which photo of a folder has which mask of another, whatever the names and folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fss.data.discovery import MASK_FOLDER, MASK_WORDS, list_files, name_some, same_name
from fss.data.images import ENDINGS

TRAIN = ("train", "training", "trn")
TEST = ("val", "valid", "validation", "test", "testing")

# What tools add to the name of a photo for its mask, and to tell a photo from its mask.
_MASK = re.compile(
    rf"^(?:{MASK_WORDS})[ _.-]+|(?:[ _.-]+(?:{MASK_WORDS}|gtfine_labelids|gtfine_labeltrainids))"
    r"(?:[ _.-]*\d{1,2})?$",
    re.IGNORECASE,
)
_PHOTO = re.compile(
    r"^(?:images?|img|photo)[ _.-]+|[ _.-]+(?:images?|img|photo|rgb|sat|leftimg8bit)$",
    re.IGNORECASE,
)


class Photo(NamedTuple):
    """A photo, its path below its folder, and its masks with the folder that names each."""

    path: Path
    below: Path
    masks: list[tuple[Path, str]]


class Matched(NamedTuple):
    """Photos with their masks, and the files left out, by reason."""

    photos: list[Photo]
    left_out: dict[str, list[Path]]


def split_of(words: Iterable[str]) -> str | None:
    """Return the split that folders or parts of a name tell: "train", "val" or None."""
    for word in words:
        if word.lower() in (*TRAIN, *TEST):
            return "train" if word.lower() in TRAIN else "val"
    return None


def walk(folder: Path, endings: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """List the files with one of the endings in a folder and below it, and the other files."""
    taken, others = list_files(folder, endings)
    for below in [path for path in others if path.is_dir()]:
        others.remove(below)
        more, other = walk(below, endings)
        taken += more
        others += other
    return taken, others


def match_masks(images: Path, masks: Path) -> Matched:
    """Find the masks of the photos in a folder and below it.

    A mask has the name of its photo, perhaps with `_mask` or another word that tools add, or with
    the photo's ending before its own. The folders below `images` and `masks` are the same, or those
    of the masks have more, or names alone decide. Both may be one folder.

    Raises:
        ValueError: no photo has a mask, or a mask may belong to several photos.
    """
    photos, others = walk(images, ENDINGS)
    files, other_masks = (photos, []) if masks == images else walk(masks, ENDINGS)
    if masks == images:
        files = masks_among(photos, images)
        photos = sorted(set(photos) - set(files))
    found = {path: Photo(path, path.relative_to(images), []) for path in photos}
    index: dict[str, list[tuple[int, Photo]]] = {}
    for photo in found.values():
        for rank, name in enumerate(dict.fromkeys(_spellings(photo.below.name, _PHOTO))):
            index.setdefault(name, []).append((rank, photo))
    alone: list[Path] = []
    for path in files:
        below = path.relative_to(masks)
        photo = _photo_of(path, below, index)
        if photo is None:
            alone.append(path)
        else:
            folders = [part for part in below.parts[:-1] if part.lower() not in (*TRAIN, *TEST)]
            own = [part for part in folders if part not in photo.below.parts]
            photo.masks.append((path, (own or folders or [""])[-1]))
    matched = [photo for photo in found.values() if photo.masks]
    if not matched:
        unread = ""
        if other_masks:
            kinds = ", ".join(sorted({path.suffix or path.name for path in other_masks}))
            unread = (
                f". Not read: {len(other_masks)} files of {masks} ({kinds}), "
                f"{name_some(other_masks[:3], masks)}; save masks as PNG"
            )
        raise ValueError(
            f"no photo of {images} has a mask in {masks}: the photos are "
            f"{name_some(photos[:3], images) or 'none'}, the masks "
            f"{name_some(files[:3], masks) or 'none'}; expected the same names, endings "
            f"aside{unread}"
        )
    reasons = {
        "photos without a mask": [p.path for p in found.values() if not p.masks],
        "masks without a photo": alone,
        "other files": [*others, *other_masks],
    }
    return Matched(matched, reasons)


def _photo_of(path: Path, below: Path, index: dict[str, list[tuple[int, Photo]]]) -> Photo | None:
    """Find the photo of a mask: first by folder and name, then by name."""
    folders = below.parts[:-1]
    for name in _spellings(below.name, _MASK):
        candidates = index.get(name, [])
        for fits in (
            lambda photo: photo.below.parts[:-1] == folders,
            lambda photo: set(photo.below.parts[:-1]) <= set(folders),
            lambda photo: True,
        ):
            close = [(rank, photo) for rank, photo in candidates if fits(photo)]
            best = [photo for rank, photo in close if rank == min(rank for rank, _ in close)]
            if len(best) > 1:
                raise ValueError(
                    f"{path}: expected one photo of this name, found "
                    f"{', '.join(str(photo.path) for photo in best[:3])}; rename or remove one"
                )
            if best:
                return best[0]
    return None


def _spellings(name: str, words: re.Pattern[str]) -> Iterator[str]:
    """Yield the names that a file may be known by, the closest first."""
    stem = same_name(Path(name).stem)
    yield stem
    if Path(stem).suffix.lower() in ENDINGS:
        yield Path(stem).stem
    bare = words.sub("", stem, count=1)
    if bare and bare != stem:
        yield bare
        if Path(bare).suffix.lower() in ENDINGS:
            yield Path(bare).stem


def masks_among(files: list[Path], root: Path) -> list[Path]:
    """List the pictures below a folder that are masks: in masks/ and the like, or of others there.

    These have `_mask` or the like in their name, or are PNG beside JPEG.
    """
    stems = Counter((path.parent, same_name(path.stem)) for path in files)
    masks = []
    for path in files:
        stem = same_name(path.stem)
        bare = {name for name in _spellings(path.name, _MASK) if name != stem}
        is_apart = any(MASK_FOLDER.search(part) for part in path.relative_to(root).parts[:-1])
        beside = path.suffix.lower() == ".png" and stems[path.parent, stem] > 1
        if is_apart or beside or any(stems[path.parent, name] for name in bare):
            masks.append(path)
    return masks
