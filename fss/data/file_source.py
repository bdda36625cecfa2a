"""A source whose images and masks are files, listed one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.data.discovery import name_some
from fss.data.images import check_sizes, read_picture
from fss.data.lists import Listing, Pair
from fss.data.masks import open_classes
from fss.data.scan import PhotoForMask, Record, raise_all, scan
from fss.data.source import Mask


class ListedSource:
    """Images and masks in files: what the data sets on disk have in common.

    A data set finds its files, its classes and its folds, and then calls `_take`.
    """

    root: Path
    class_names: dict[int, str]
    folds: tuple[tuple[int, ...], ...]

    # Whether a mask of another size is scaled to its image, and whether photos that cannot be used
    # are left out. Both count and name them in a warning, instead of an error.
    scale_masks = False
    skip_unreadable = False
    mask_hint = ""  # what an error about masks of another kind says in the end

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images[index].stem

    def size(self, index: int) -> tuple[int, int]:
        return self._records[index].size

    def class_areas(self, index: int) -> dict[int, int]:
        return self._records[index].areas

    def indices(self, split: Literal["train", "test"]) -> list[int]:
        return list(self._indices[split])

    def listed_classes(self, split: Literal["train", "test"]) -> list[tuple[int, int]]:
        """List the image and the class of each line of a list with classes, in its order.

        Empty unless the lists are HSNet's: its episodes ask for these pairs, others draw the class.
        """
        return list(self._listed_classes[split])

    def load(self, index: int) -> tuple[NDArray[np.uint8], Mask]:
        """Load the RGB image [H, W, 3], turned as its EXIF orientation says, and its mask [H, W].

        Raises:
            ValueError: a file that cannot be decoded, or sizes that differ.
        """
        image = read_picture(self._images[index])
        mask = self._open_mask(self._masks[index])
        if self.scale_masks and (mask.height, mask.width) != image.shape[:2]:
            mask = mask.resize(image.shape[1::-1], Image.Resampling.NEAREST)
        check_sizes(
            self._images[index], image.shape[:2], self._masks[index], (mask.height, mask.width)
        )
        return image, np.array(mask)

    def _open_mask(self, path: Path) -> Image.Image:
        return open_classes(path)

    def _inspect_mask(self, path: Path) -> Image.Image:
        """Open a mask for the scan, which may refuse what `load` would read."""
        return self._open_mask(path)

    def _take(self, pairs: Sequence[Pair], train: Sequence[int], test: Sequence[int]) -> None:
        """Take the files and the numbers of each split, and scan the masks."""
        key = f"{type(self).__name__} {self.root.resolve()}"
        images, masks = ([getattr(pair, part) for pair in pairs] for part in ("image", "mask"))
        found = scan(key, images, masks, self._inspect_mask, self.scale_masks)
        errors = [one for one in found if isinstance(one, ValueError)]
        kept = [index for index, one in enumerate(found) if isinstance(one, Record)]
        if not self.skip_unreadable or not kept:
            fatal = [one for one in errors if not kept or not isinstance(one, PhotoForMask)]
            raise_all(fatal, self.mask_hint)
        if errors:
            warnings.warn(
                f"{self.root}: {len(kept)} of {len(pairs)} photos are taken, {len(errors)} are "
                f"left out: {name_some([str(error) for error in errors], self.root)}",
                stacklevel=4,
            )
        self._images = [images[index] for index in kept]
        self._masks = [masks[index] for index in kept]
        self._records = [one for one in found if isinstance(one, Record)]
        number = {old: new for new, old in enumerate(kept)}
        self._indices = {
            name: [number[index] for index in split if index in number]
            for name, split in (("train", train), ("test", test))
        }
        self._listed_classes: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
        scaled = [mask for mask, one in zip(self._masks, self._records, strict=True) if one.scaled]
        if scaled:
            warnings.warn(
                f"{self.root}: {len(scaled)} of {len(pairs)} masks have another size than their "
                f"photo and are scaled to it: {name_some(scaled, self.root)}; "
                "data.skip_unreadable: true leaves them out",
                stacklevel=4,
            )

    def _take_splits(self, train: Listing, test: Listing) -> None:
        """Take the files of two lists; a file in both is one image."""
        number = {
            pair: index for index, pair in enumerate(dict.fromkeys((*train.pairs, *test.pairs)))
        }
        self._take(
            list(number),
            [number[pair] for pair in train.pairs],
            [number[pair] for pair in test.pairs],
        )
        place = {pair: k for k, pair in enumerate(zip(self._images, self._masks, strict=True))}
        for name, listing in (("train", train), ("test", test)):
            present = [(place[pair], c) for pair, c in listing.classes if tuple(pair) in place]
            shown = [(index, c) for index, c in present if c in self.class_areas(index)]
            if len(shown) < len(present):
                self._name_unshown(name, present, shown)
            self._listed_classes[name] = shown

    def _name_unshown(
        self, split: str, listed: list[tuple[int, int]], shown: list[tuple[int, int]]
    ) -> None:
        """Warn of listed classes that the masks do not show, or raise if these are most."""
        missing = len(listed) - len(shown)
        index, class_id = next(each for each in listed if each not in set(shown))
        text = (
            f"{self.root}: {missing} of the {len(listed)} classes in the {split} list are not in "
            f"the mask of their photo, the first is class {class_id} in {self._masks[index]}"
        )
        if 2 * missing > len(listed):
            raise ValueError(f"{text}; expected the classes of HSNet's lists and masks")
        warnings.warn(f"{text}; they are left out", stacklevel=4)

    def _check_class_ids(self, hint: str = "correct the mask or the list") -> None:
        for path, record in zip(self._masks, self._records, strict=True):
            for class_id, area in record.areas.items():
                if class_id not in self.class_names:
                    ids = f"{min(self.class_names)} to {max(self.class_names)}"
                    raise ValueError(
                        f"{path}: class id {class_id} ({area} pixels) is not in the class list "
                        f"(ids {ids}, 0 background, 255 ignored); {hint}"
                    )
