"""What a data set is to the episodes: images with masks, class names and folds."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Mask value of pixels that no loss and no metric counts."""

Mask = NDArray[np.uint8] | NDArray[np.uint16]
"""Class ids [H, W]; uint16 where a data set has more than 254 classes (none has the id 255)."""


@runtime_checkable
class Source(Protocol):
    """Images with dense class masks.

    Class ids begin at 1 and leave out 255; 0 is background and 255 is ignored. Images are numbered
    from 0 to `len(source) - 1`, in an order that does not change from run to run.

    Attributes:
        class_names: the name of each class id.
        folds: the novel class ids of each fold; a fold's base classes are all others.
    """

    class_names: dict[int, str]
    folds: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Number of images."""
        ...

    def name(self, index: int) -> str:
        """The name of an image, for logs and pictures."""
        ...

    def load(self, index: int) -> tuple[NDArray[np.uint8], Mask]:
        """The RGB image [H, W, 3] and its mask [H, W].

        Raises:
            ValueError: a file that cannot be decoded, named.
        """
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels, without loading it."""
        ...

    def class_areas(self, index: int) -> dict[int, int]:
        """Pixels of each class that the mask shows (no background, no ignored pixels), cached."""
        ...

    def indices(self, split: Literal["train", "test"]) -> list[int]:
        """The images of a split; all of them where the source makes no difference."""
        ...
