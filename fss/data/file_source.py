"""A source whose images and masks are files, listed one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.data.images import check_sizes, read_picture
from fss.data.lists import Pair
from fss.data.masks import open_classes
from fss.data.scan import scan
from fss.data.source import Mask


class ListedSource:
    """Images and masks in files: what the data sets on disk have in common.

    A data set finds its files, its classes and its folds, and then calls `_take`.
    """

    root: Path
    class_names: dict[int, str]
    folds: tuple[tuple[int, ...], ...]

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

    def load(self, index: int) -> tuple[NDArray[np.uint8], Mask]:
        """Load the RGB image [H, W, 3], turned as its EXIF orientation says, and its mask [H, W].

        Raises:
            ValueError: a file that cannot be decoded, or sizes that differ.
        """
        image = read_picture(self._images[index])
        mask = np.array(self._open_mask(self._masks[index]))
        check_sizes(self._images[index], image.shape[:2], self._masks[index], mask.shape)
        return image, mask

    def _open_mask(self, path: Path) -> Image.Image:
        return open_classes(path)

    def _take(
        self, images: Sequence[Path], masks: Sequence[Path], train: list[int], test: list[int]
    ) -> None:
        """Take the files and the numbers of each split, and scan the masks."""
        self._images, self._masks = list(images), list(masks)
        self._indices = {"train": train, "test": test}
        key = f"{type(self).__name__} {self.root.resolve()}"
        self._records = scan(key, self._images, self._masks, self._open_mask)

    def _take_splits(self, train: Sequence[Pair], test: Sequence[Pair]) -> None:
        """Take the files of two lists; a file in both is one image."""
        number = {pair: index for index, pair in enumerate(dict.fromkeys((*train, *test)))}
        images, masks = zip(*number, strict=True)
        self._take(images, masks, [number[pair] for pair in train], [number[pair] for pair in test])

    def _check_class_ids(self, hint: str = "correct the mask or the list") -> None:
        for path, record in zip(self._masks, self._records, strict=True):
            for class_id, area in record.areas.items():
                if class_id not in self.class_names:
                    ids = f"{min(self.class_names)} to {max(self.class_names)}"
                    raise ValueError(
                        f"{path}: class id {class_id} ({area} pixels) is not in the class list "
                        f"(ids {ids}, 0 background, 255 ignored); {hint}"
                    )
