"""Joint transforms of an image and its mask, for training and for evaluation.

The choices are those of the published PFENet and BAM training; pixels that a transform adds get the
ImageNet mean (0 once normalized) and the mask value 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fss.config.checks import check_at_least, check_rotation, check_scale
from fss.data.source import IGNORE, Mask

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
"""ImageNet's mean of red, green and blue, of values from 0 to 1."""
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
"""ImageNet's standard deviation of red, green and blue, of values from 0 to 1."""

_FILL = tuple(float(255 * value) for value in MEAN)
_KEPT_FOREGROUND = 0.85
_CROP_TRIES = 30


class Sample(NamedTuple):
    """A transformed image and its mask.

    `image` is float32 [3, S, S], normalized; `mask` [S, S] has the type and the values of the
    original; `size` is, of an evaluation, the pasted height and width; `padding` bool [S, S] is
    what the transform added to the photo.
    """

    image: Tensor
    mask: Tensor
    size: tuple[int, int] | None
    padding: Tensor


class Transform(Protocol):
    """Maps an RGB image uint8 [H, W, 3] and its mask uint8 or uint16 [H, W] of class ids.

    `foreground` is the id that the transform must not lose; 255 is ignored.
    """

    def __call__(
        self,
        image: NDArray[np.uint8],
        mask: Mask,
        rng: np.random.Generator,
        foreground: int = 1,
    ) -> Sample: ...


class TrainTransform:
    """Random scale, rotation, blur, flip and crop; then normalization.

    The rotation (up to ±`rotate`), the 5×5 Gaussian blur and the horizontal flip apply to half of
    the images each. Crops are tried until one keeps 85 % of the foreground, at most 30 times; then
    the best one is used, and foreground is never lost altogether.

    Args:
        size: side of the square output, pixels.
        scale: range of the random scale.
        rotate: largest rotation, degrees.
    """

    def __init__(
        self, size: int, scale: tuple[float, float] = (0.9, 1.1), rotate: float = 10.0
    ) -> None:
        check_at_least("size", size, 9)
        check_scale("scale", scale)
        check_rotation("rotate", rotate)
        self.size, self.scale, self.rotate = size, scale, rotate

    def __call__(
        self,
        image: NDArray[np.uint8],
        mask: Mask,
        rng: np.random.Generator,
        foreground: int = 1,
    ) -> Sample:
        _check_pair(image, mask)
        pixels = image.astype(np.float32)
        warped, warped_mask, added = self._warp(pixels, mask, rng)
        if (mask == foreground).any() and not (warped_mask == foreground).any():
            # Nearest-neighbor warping can drop an object of a few pixels.
            warped, warped_mask, added = pixels, mask, np.zeros(mask.shape, np.uint8)
        if rng.random() < 0.5:
            warped = cv2.GaussianBlur(warped, (5, 5), 0)
        if rng.random() < 0.5:
            warped, warped_mask, added = (x[:, ::-1] for x in (warped, warped_mask, added))
        top, left = (max(self.size - side, 0) // 2 for side in warped_mask.shape)
        padded = _pad(warped_mask, self.size)
        rows, columns = _choose_crop(padded == foreground, self.size, rng)
        # The image is not padded: what the crop adds to it is the mean, 0 once normalized.
        pixels = _normalize(warped, self.size, top - rows.start, left - columns.start)
        labels, padding = (
            torch.from_numpy(np.ascontiguousarray(x[rows, columns]))
            for x in (padded, _pad(added, self.size))
        )
        return Sample(pixels, labels, None, padding.bool())

    def _warp(
        self, image: NDArray[np.float32], mask: Mask, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], Mask, NDArray[np.uint8]]:
        """Scale and rotate image and mask; the third is 255 where the rotation added something."""
        factor = rng.uniform(*self.scale)
        angle = rng.uniform(-self.rotate, self.rotate) if rng.random() < 0.5 else 0.0
        height, width = (max(1, round(side * factor)) for side in mask.shape)
        image, mask = _resize(image, mask, height, width)
        added = np.zeros(mask.shape, np.uint8)
        if angle:
            matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
            image = cv2.warpAffine(
                image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=_FILL
            )
            mask, added = (
                cv2.warpAffine(
                    each, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE
                )
                for each in (mask, added)
            )
        return image, mask, added


class EvalTransform:
    """Resizes the longer side to `size`, pastes top-left on a square canvas, normalizes.

    Both sides are floored to a multiple of 8: size 473 gives at most 472. The canvas is 0 before
    normalization and 255 in the mask. `Sample.size` is the pasted (height, width): crop a
    prediction to it and resize that to the original size.

    Args:
        size: side of the square output, pixels.
    """

    def __init__(self, size: int) -> None:
        check_at_least("size", size, 9)
        self.size = size

    def __call__(
        self,
        image: NDArray[np.uint8],
        mask: Mask,
        rng: np.random.Generator | None = None,
        foreground: int = 1,
    ) -> Sample:
        _check_pair(image, mask)
        longer = max(mask.shape)
        height, width = (max(8, side * self.size // longer // 8 * 8) for side in mask.shape)
        pixels, mask = _resize(image.astype(np.float32), mask, height, width)
        canvas = np.full((self.size, self.size), IGNORE, dtype=mask.dtype)
        canvas[:height, :width] = mask
        normalized = _normalize(pixels, self.size, 0, 0, fill=-MEAN / STD)
        padding = torch.ones(self.size, self.size, dtype=torch.bool)
        padding[:height, :width] = False
        return Sample(normalized, torch.from_numpy(canvas), (height, width), padding)


class SquareTransform:
    """Resizes image and mask to a square whatever their shape, and normalizes: HSNet's choice.

    `Sample.size` is the whole square: resize a prediction to the original size.

    Args:
        size: side of the square output, pixels (HSNet takes 400).
    """

    def __init__(self, size: int) -> None:
        check_at_least("size", size, 9)
        self.size = size

    def __call__(
        self,
        image: NDArray[np.uint8],
        mask: Mask,
        rng: np.random.Generator | None = None,
        foreground: int = 1,
    ) -> Sample:
        _check_pair(image, mask)
        pixels, mask = _resize(image.astype(np.float32), mask, self.size, self.size)
        normalized = _normalize(pixels, self.size, 0, 0)
        padding = torch.zeros(mask.shape, dtype=torch.bool)
        return Sample(normalized, torch.from_numpy(mask), (self.size, self.size), padding)


def _resize(
    image: NDArray[np.float32], mask: Mask, height: int, width: int
) -> tuple[NDArray[np.float32], Mask]:
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image, cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)


def _pad(mask: Mask, size: int) -> Mask:
    """Pad both sides to at least `size`, equally left and right, above and below."""
    height, width = (max(size - side, 0) for side in mask.shape)
    if not height and not width:
        return mask
    border = (height // 2, height - height // 2, width // 2, width - width // 2)
    return cv2.copyMakeBorder(mask, *border, cv2.BORDER_CONSTANT, value=IGNORE)


def _choose_crop(
    foreground: NDArray[np.bool_], size: int, rng: np.random.Generator
) -> tuple[slice, slice]:
    total = np.count_nonzero(foreground)
    highest = [side - size + 1 for side in foreground.shape]
    best, most = (slice(0), slice(0)), 0
    for _ in range(_CROP_TRIES):
        top, left = (int(rng.integers(bound)) for bound in highest)
        crop = slice(top, top + size), slice(left, left + size)
        kept = np.count_nonzero(foreground[crop])
        if kept >= _KEPT_FOREGROUND * total:
            return crop
        if kept > most:
            best, most = crop, kept
    if most:
        return best
    pixel = np.argwhere(foreground)[rng.integers(total)]
    top, left = (
        int(np.clip(at - size // 2, 0, bound - 1)) for at, bound in zip(pixel, highest, strict=True)
    )
    return slice(top, top + size), slice(left, left + size)


def _normalize(
    image: NDArray[np.float32],
    size: int,
    top: int,
    left: int,
    fill: Sequence[float] | NDArray[np.float32] = (0.0, 0.0, 0.0),
) -> Tensor:
    """Return a normalized image [3, size, size] in which `image` begins at (top, left).

    Pixels outside of `image` are `fill`; its parts outside the result are cropped.
    """
    rows, columns = (slice(max(at, 0), max(at, 0) + size) for at in (-top, -left))
    seen = image[rows, columns]
    top, left = max(top, 0), max(left, 0)
    seen = seen[: size - top, : size - left]
    result = np.empty((3, size, size), dtype=np.float32)
    for channel, plane in enumerate(result):
        inside = plane[top : top + seen.shape[0], left : left + seen.shape[1]]
        if inside.shape != plane.shape:
            plane[:] = fill[channel]
        np.subtract(seen[..., channel], 255 * MEAN[channel], out=inside)
        inside /= 255 * STD[channel]
    return torch.from_numpy(result)


def _check_pair(image: NDArray[np.uint8], mask: Mask) -> None:
    for name, array, ndim, dtypes in (
        ("image", image, 3, ("uint8",)),
        ("mask", mask, 2, ("uint8", "uint16")),
    ):
        got = getattr(array, "dtype", type(array).__name__)
        if not isinstance(array, np.ndarray) or got not in dtypes:
            raise TypeError(f"{name}: expected a numpy array of {' or '.join(dtypes)}, got {got}")
        if array.ndim != ndim or 0 in array.shape:
            raise ValueError(
                f"{name}: expected shape {'[H, W, 3]' if ndim == 3 else '[H, W]'}, "
                f"got {list(array.shape)}"
            )
    if image.shape != (*mask.shape, 3):
        raise ValueError(
            f"mask: expected the height and width of its image {list(image.shape)} (RGB), got "
            f"{list(mask.shape)}"
        )
