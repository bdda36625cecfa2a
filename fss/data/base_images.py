"""Photos with masks of a fold's base classes, which a base learner trains on."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fss.data.source import IGNORE, Source
from fss.data.transforms import Transform

_NO_CLASS = -1


class BaseImages(Dataset[dict[str, Tensor]]):
    """Photos with masks of a fold's base classes; item i depends only on (seed, i).

    An item is `image` float32 [3, S, S] and `mask` int64 [S, S]: 0 background and novel classes, 1
    to n the base classes in ascending order of their ids, 255 ignored.

    Args:
        source: images and masks.
        classes: ids of the base classes.
        images: which images, numbers of the source.
        transform: of each image and its mask.
        length: of the data set, which runs through the images in a new order each time. None
            takes each image once, in order.
        seed: from 0.
    """

    def __init__(
        self,
        source: Source,
        classes: list[int],
        images: list[int],
        transform: Transform,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.images, self.transform = source, images, transform
        self.length, self.seed = length, seed
        self.label = np.zeros(256, dtype=np.uint8)
        self.label[sorted(classes)] = np.arange(1, len(classes) + 1)
        self.label[IGNORE] = IGNORE

    def __len__(self) -> int:
        return len(self.images) if self.length is None else self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"photo: expected 0 to {len(self) - 1}, got {index}")
        image = self.images[index % len(self.images)]
        if self.length is not None:
            round_, position = divmod(index, len(self.images))
            image = self.images[self._rng(0, round_).permutation(len(self.images))[position]]
        pixels, mask = self.source.load(image)
        # any crop will do: no class has to stay in it
        sample = self.transform(pixels, self.label[mask], self._rng(1, index), foreground=_NO_CLASS)
        return {"image": sample.image, "mask": sample.mask.long()}

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


def base_images(source: Source, fold: int, exclude_novel: bool = False) -> list[int]:
    """List the training images of a base learner, as numbers of the source: all, as BAM does.

    Args:
        source: images and folds.
        fold: which classes are novel.
        exclude_novel: leave out images that show a novel class, however small.

    Raises:
        ValueError: no image is left.
    """
    images, novel = source.indices("train"), set(source.folds[fold])
    if exclude_novel:
        images = [i for i in images if not novel.intersection(source.class_areas(i))]
    if not images:
        raise ValueError(
            f"data.exclude_novel: no training image without a novel class in fold {fold}; set it "
            "to false"
            if exclude_novel
            else "data: the source has no training image"
        )
    return images
