"""What a data set is to the episodes: images with masks, class names and folds."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Mask value of pixels that losses and metrics ignore."""

Mask = NDArray[np.uint8] | NDArray[np.uint16]
"""Class ids [H, W]; uint16 where a data set has more than 254 classes (none has the id 255)."""


@runtime_checkable
class Source(Protocol):
    """Images with dense class masks.

    Class ids begin at 1 and skip 255; 0 is background and 255 is ignored. Images are numbered
    from 0 to `len(source) - 1`, in an order that does not change from run to run.

    Attributes:
        class_names: the name of each class id.
        folds: the novel class ids of each fold; a fold's base classes are all others.
    """

    class_names: dict[int, str]
    folds: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def name(self, index: int) -> str:
        """Return the name of an image, for logs and pictures."""
        ...

    def load(self, index: int) -> tuple[NDArray[np.uint8], Mask]:
        """Load the RGB image [H, W, 3] and its mask [H, W].

        Raises:
            ValueError: a file that cannot be decoded, named.
        """
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, without loading it."""
        ...

    def class_areas(self, index: int) -> dict[int, int]:
        """Return, from a cache, the pixels of each class that the mask shows."""
        ...

    def indices(self, split: Literal["train", "test"]) -> list[int]:
        """List the images of a split; all images if the source has no splits."""
        ...
