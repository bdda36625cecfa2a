"""FSS-1000: a thousand classes of ten images, each with one object class.

Li et al., "FSS-1000: A 1000-Class Dataset for Few-Shot Segmentation", CVPR 2020.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.data.discovery import list_files, name_some, same_name, warn_left_out
from fss.data.file_source import ListedSource
from fss.data.images import ENDINGS, decode
from fss.data.lists import Listing, Pair, check_files, read_lines
from fss.data.masks import open_object
from fss.data.scan import PhotoForMask
from fss.data.source import IGNORE, Mask

MASK_ENDING = ".png"

# A photo in the place of a mask: more colors than edges of a mask give, a share of them saturated.
_MASK_COLORS = 256
_SATURATED = 32
_SHARE = 0.05


class Fss1000Source(ListedSource):
    """Folders of classes: FSS-1000, or any data set of one object class per image.

        FSS-1000/, or the folder itself
            CLASS/*.jpg, …  the images
            CLASS/*.png     their masks, not black where the class is: see `open_object`

    Class ids go from 1 on in the order of the names of all folders, without 255, so masks are
    uint16. There is one fold, whose novel classes are those of `test_list`; images of base classes
    are training images and images of novel classes test images. Classes of neither list, FSS-1000's
    own validation classes say, are left out.

    FSS-1000 as published has flaws that its authors left: masks of another size are scaled to
    their images, as HSNet does; a photo in the place of a mask and six copies of photos (.jpeg
    beside .jpg) are left out. Warnings count and name all of them.

    Args:
        root: the folder.
        train_list, test_list: files with a class name per line (HSNet's `trn.txt`, `test.txt`).
        skip_unreadable: leave out images that cannot be used or whose mask has another size, and
            warn.

    Raises:
        FileNotFoundError: the folder, a list or a mask is missing, or a class of a list.
        ValueError: a class in both lists or none in one, an unreadable file, or a mask of
            another size than its image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train_list: str | os.PathLike[str],
        test_list: str | os.PathLike[str],
        skip_unreadable: bool = False,
    ) -> None:
        self.skip_unreadable, self.scale_masks = skip_unreadable, not skip_unreadable
        folder = Path(root).expanduser()
        self.root = folder / "FSS-1000" if (folder / "FSS-1000").is_dir() else folder
        if not self.root.is_dir():
            raise FileNotFoundError(f"data folder {self.root} does not exist")
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        ids = [c for c in range(1, len(names) + 2) if c != IGNORE]
        known = dict(zip(names, ids, strict=False))
        train, test = (
            _read_names(Path(path), known, self.root) for path in (train_list, test_list)
        )
        both = sorted(set(train) & set(test))
        if both:
            raise ValueError(
                f"{test_list}: {len(both)} classes, {both[0]!r} first, are in {train_list} too"
            )
        self.class_names = {known[name]: name for name in sorted({*train, *test})}
        self.folds = (tuple(sorted(known[name] for name in test)),)
        splits: list[list[Pair]] = []
        left_out: dict[str, list[Path | str]] = {}
        for classes in (train, test):
            pairs: list[Pair] = []
            for name in classes:
                found = _list_class(self.root / name)
                pairs += found.pairs
                for reason, files in found.left_out.items():
                    left_out.setdefault(reason, []).extend(files)
            check_files(pairs, str(self.root))
            splits.append(pairs)
        warn_left_out(self.root, sum(map(len, splits)), left_out)
        self._take_splits(*(Listing(pairs, []) for pairs in splits))
        self._ids = [known[path.parent.name] for path in self._images]

    def name(self, index: int) -> str:
        return f"{self._images[index].parent.name}/{self._images[index].stem}"

    def class_areas(self, index: int) -> dict[int, int]:
        area = self._records[index].areas.get(1)
        return {self._ids[index]: area} if area else {}

    def load(self, index: int) -> tuple[NDArray[np.uint8], Mask]:
        image, mask = super().load(index)
        return image, mask.astype(np.uint16) * np.uint16(self._ids[index])

    def _open_mask(self, path: Path) -> Image.Image:
        return open_object(path)

    def _inspect_mask(self, path: Path) -> Image.Image:
        if decode(path, "mask", _is_photo):
            raise PhotoForMask(f"{path} is a photo in colors, not a mask")
        return open_object(path)


class _Class(NamedTuple):
    """The photos of a class's folder with their masks, and the files left out, by reason."""

    pairs: list[Pair]
    left_out: dict[str, list[Path]]


def _list_class(folder: Path) -> _Class:
    """List the photos of a class; a file with the stem of another one is left out."""
    taken, others = list_files(folder, ENDINGS)
    photos: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    copies: list[Path] = []
    for path in sorted(taken, key=lambda path: ENDINGS.index(path.suffix.lower())):
        kind = masks if path.suffix.lower() == MASK_ENDING else photos
        if kind.setdefault(same_name(path.stem), path) is not path:
            copies.append(path)
    if not photos:
        raise FileNotFoundError(
            f"{folder} has no photo: expected NAME.jpg, or another ending than {MASK_ENDING}, and "
            f"its mask NAME{MASK_ENDING}; found {name_some([*taken, *others], folder) or 'nothing'}"
        )
    pairs = [
        Pair(photo, masks.get(stem, photo.with_suffix(MASK_ENDING)))
        for stem, photo in sorted(photos.items(), key=lambda item: item[1])
    ]
    alone = [mask for stem, mask in masks.items() if stem not in photos]
    left_out = {"Of the name of another photo": copies, "Masks without a photo": alone}
    return _Class(pairs, left_out | {"Not read": others})


def _is_photo(picture: Image.Image) -> bool:
    """Tell whether a picture has many colors, and not only shades of one, as no mask has."""
    if picture.mode != "RGB" or picture.getcolors(_MASK_COLORS) is not None:
        return False
    channels = np.array(picture, dtype=np.int16)
    saturated = channels.max(2) - channels.min(2) > _SATURATED
    shades = channels[saturated]
    return saturated.mean() > _SHARE and (shades.argmax(1).min() != shades.argmax(1).max())


def _read_names(path: Path, known: dict[str, int], root: Path) -> list[str]:
    """Read a list of classes, and return the names of their folders."""
    folders = {same_name(name): name for name in known}
    lines = read_lines(path, "a class name").values()
    listed = sorted({same_name(line).strip("/\\") for line in lines})
    unknown = [name for name in listed if name not in folders]
    if unknown:
        raise FileNotFoundError(
            f"{path}: {len(unknown)} of {len(listed)} classes have no folder in {root}, the first "
            f"is {unknown[0]!r}; the data set is incomplete"
        )
    return [folders[name] for name in listed]
