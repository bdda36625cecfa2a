"""Views of supports, and the episodes that supports make among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from fss.data import EvalTransform, SquareTransform, TrainTransform

Example = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""A picture RGB uint8 [H, W, 3] and its mask [H, W]: 1 the object, 255 ignored, else 0."""
View = tuple[Tensor, Tensor]
"""An image [3, S, S], normalized, and its mask int64 [S, S]."""

_POOL = 16
"""Views to train on, of all supports together; of each at least three."""
_SUPPORTS, _VIEWS = 5, 4
"""Supports of a round, at most, and views of them, at least."""
_SUPPORTS_HELD_OUT = 10
"""Supports that are measured, at most."""
_EPISODES_HELD_OUT = 3
"""Episodes that are measured, at most, where each costs its own time."""
_MOST_SHOTS = 2
"""Supports of an episode there, unless the model is for more."""
SCENES = 16
"""Pictures without a mask that are used, at most."""
_PASTED, _PASTED_HELD_OUT = 24, 2
"""Views of these with a pasted object, to train on and to measure on."""
_PASTED_OF_ONE, _PASTED_OF_SEVERAL = 3, 2
"""Of these in a round."""
_SIDES = (0.3, 0.7)
"""Longer side of a pasted object over that of the picture."""
_SURE = 0.7
"""Share of what looks like background that is taken to be background: the least like the object."""
_TRIES = 10


class Scene(NamedTuple):
    """A picture without a mask.

    pixels: RGB uint8 [H, W, 3].
    background: bool [H, W], where surely nothing of the object is.
    """

    pixels: NDArray[np.uint8]
    background: NDArray[np.bool_]


class Round(NamedTuple):
    """Views, and which of them are segmented by the example of which others.

    images [N, 3, S, S], masks int64 [N, S, S]; 1 is the object, 255 neither object nor background.
    episodes: of each the query and its supports, by their places among the views.
    """

    images: Tensor
    masks: Tensor
    episodes: tuple[tuple[int, tuple[int, ...]], ...]


class SupportViews:
    """Episodes made of supports alone.

    A view is a crop of a support at the size at which the segmenter sees pictures: scaled, turned,
    flipped, blurred and recolored, more strongly where there is a single support. Of several
    supports each in turn is the query of all others, of a single one its views are each other's. A
    fixed pool of views to train on is made once, and one to measure on from another random stream.

    Into pictures without a mask the object of a support is pasted, at another size and place, and
    the pictures are queries too: they bring other backgrounds. What is not surely background there
    is left out. With one support all queries are such. Source: Ghiasi et al., "Simple Copy-Paste Is
    a Strong Data Augmentation Method for Instance Segmentation", 2021.

    Args:
        examples: the supports.
        transform: how the segmenter prepares pictures.
        size: side S of the views, not larger than that of the transform.
        shots: supports that the model is for, where it is for a fixed number; supports are then
            repeated until there are so many.
        together: all views of a round are computed once, so that it has as many episodes as it can
            have; else one to train on.
        seed: of both random streams.
        device: of the views.
        scenes: pictures without a mask.

    Raises:
        ValueError: see `check_supports`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        transform: EvalTransform | SquareTransform,
        size: int,
        shots: int | None = None,
        together: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scenes: Sequence[Scene] = (),
    ) -> None:
        check_supports(examples)
        largest = 2 * transform.size  # views show less: large photos would only take time
        examples = [shrunk(*example, largest) for example in examples]
        scenes = [Scene(*shrunk(*scene, largest)) for scene in scenes]
        count = len(examples)
        self._shots = shots if count > 1 else None
        self._together = together
        train, held_out = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        self._rng, self._device = train, device
        strength = 1.0 if count == 1 else 0.5

        def view(at: int, rng: np.random.Generator) -> View:
            return _view(examples[at], transform, size, strength, rng)

        def pasted(wanted: int, rng: np.random.Generator) -> list[tuple[int, View]]:
            found = []
            for number in range(wanted if scenes else 0):
                at = number % count
                scene = scenes[number % len(scenes)]
                made = _pasted(scene, examples[at], transform, size, rng)
                if made is not None:
                    found.append((at, made))
            return found

        each = max(3, _POOL // count)
        self._pool = [[view(at, train) for _ in range(each)] for at in range(count)]
        self._pasted = pasted(_PASTED, train)
        measured: Sequence[int] = range(count)
        if count > _SUPPORTS_HELD_OUT:
            measured = held_out.permutation(count)[:_SUPPORTS_HELD_OUT].tolist()
        asked = [at for at in measured for _ in range(_views_of_each(count))]
        self._held_out = [(at, view(at, held_out)) for at in asked]
        self._pasted_held_out = pasted(_PASTED_HELD_OUT, held_out)

    def sample(self) -> Round:
        """Return the episodes of a step."""
        count = len(self._pool)
        alone = count == 1 and bool(self._pasted)
        chosen = [
            (at, self._pool[at][number])
            for at in self._rng.permutation(count)[:_SUPPORTS].tolist()
            for number in self._permutation(len(self._pool[at]))[: _views_of_each(count, alone)]
        ]
        wanted = _PASTED_OF_ONE if count == 1 else _PASTED_OF_SEVERAL
        drawn = self._permutation(len(self._pasted))[:wanted]
        return self._round(chosen, [self._pasted[number] for number in drawn], 1)

    def held_out(self) -> Round:
        """Return the episodes that are never trained on."""
        return self._round(self._held_out, self._pasted_held_out, _EPISODES_HELD_OUT)

    def _permutation(self, count: int) -> list[int]:
        return self._rng.permutation(count).tolist()

    def _round(
        self, views: list[tuple[int, View]], pasted: list[tuple[int, View]], most: int
    ) -> Round:
        """Make the episodes of views of supports, of `most` if not all are computed together."""
        count = len(self._pool)
        episodes = []
        for query, (at, _) in enumerate([*views, *pasted]):
            supports = [number for number, (other, _) in enumerate(views) if other != at]
            if count == 1:  # one of its other views
                supports = [(query + 1) % len(views)] if query < len(views) else [0]
            if supports != [query]:
                episodes.append((query, supports))
        if not self._together:
            drawn = [episodes[number] for number in self._permutation(len(episodes))[:most]]
            episodes = [(query, self._some(supports)) for query, supports in drawn]
        images, masks = (
            torch.stack(part).to(self._device)
            for part in zip(*[view for _, view in [*views, *pasted]], strict=True)
        )
        return Round(images, masks, tuple((query, tuple(each)) for query, each in episodes))

    def _some(self, supports: list[int]) -> list[int]:
        """Draw as many supports as an episode has, again where there are too few."""
        drawn = [supports[number] for number in self._permutation(len(supports))]
        if self._shots is None:
            return drawn[:_MOST_SHOTS]
        return [drawn[step % len(drawn)] for step in range(self._shots)]


def _views_of_each(count: int, alone: bool = False) -> int:
    """Return how many views of each of some supports a round has."""
    return 1 if alone else max(1, _VIEWS // count)


def check_supports(examples: Sequence[Example]) -> None:
    """Check that there are supports, and that each shows object and background.

    Raises:
        ValueError: otherwise.
    """
    if not examples:
        raise ValueError("supports: expected at least one, got none")
    for number, (_, mask) in enumerate(examples, start=1):
        name = f"support mask{f' {number}' if len(examples) > 1 else ''}"
        if not (mask == 1).any():
            raise ValueError(f"{name}: expected a pixel of the object, got an empty mask")
        if not (mask == 0).any():
            raise ValueError(
                f"{name}: expected some background to tell the object from, got a mask that "
                "covers its image, ignored pixels aside; leave this support out to tune"
            )


def plain_view(
    pixels: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    transform: EvalTransform | SquareTransform,
) -> View:
    """Prepare a support as the network sees it: image [3, S, S], mask int64 [S, S].

    Of object and background the result has a pixel at least, where the mask has one.
    """
    sample = transform(pixels, mask)
    result = sample.mask.long()
    assert sample.size is not None
    height, width = sample.size
    for value in (0, 1):  # nearest-neighbor scaling can drop what has a few pixels
        if (mask == value).any() and not (result == value).any():
            there = np.argwhere(mask == value)
            y, x = there[len(there) // 2] / mask.shape
            result[int(y * height), int(x * width)] = value
    return sample.image, result


def shrunk(
    pixels: NDArray[np.uint8], mask: NDArray[Any], largest: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Scale a picture and its mask so that no side is longer, unless all of a value is lost."""
    height, width = mask.shape
    scale = largest / max(height, width)
    if scale >= 1:
        return pixels, mask
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smaller = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    if any((mask == value).any() and not (smaller == value).any() for value in (0, 1)):
        return pixels, mask
    pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    return pixels, smaller.astype(mask.dtype)


def surely_background(
    probability: NDArray[np.float32], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Choose the pixels [H, W] outside a predicted mask that are least like the object."""
    outside = probability[~mask]
    if not outside.size:
        return np.zeros_like(mask)
    return ~mask & (probability <= np.quantile(outside, _SURE))


def _view(
    example: Example,
    transform: EvalTransform | SquareTransform,
    size: int,
    strength: float,
    rng: np.random.Generator,
) -> View:
    """Return a random view that shows object and background.

    Where the object fills the picture but for an edge, crops seldom show background: then it is a
    view of the whole picture, smaller. No two are the same.

    Args:
        strength: see `_warped`.
    """
    view = _warped(*example, transform, size, strength, rng)
    view = view or _warped(*example, transform, size, strength, rng, whole=True)
    if view is None:
        pixels, mask = example
        pixels = _recolored(pixels, 0.5 * strength, rng)
        view = plain_view(pixels, mask, type(transform)(size))
    return view


def _pasted(
    scene: Scene,
    example: Example,
    transform: EvalTransform | SquareTransform,
    size: int,
    rng: np.random.Generator,
) -> View | None:
    """Return a random view of a picture with the object of a support in it; None if none is found.

    255 is where neither the object nor what is surely background is.
    """
    pixels, mask = scene.pixels.copy(), np.where(scene.background, 0, 255).astype(np.uint8)
    image, found = example[0], example[1] == 1
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    image, found = image[box], found[box]
    height, width = mask.shape
    scale = rng.uniform(*_SIDES) * max(height, width) / max(found.shape)
    sides = tuple(
        int(np.clip(round(side * scale), 1, most))
        for side, most in zip(found.shape[::-1], (width, height), strict=True)
    )
    image = cv2.resize(image, sides, interpolation=cv2.INTER_AREA)
    found = cv2.resize(found.astype(np.uint8), sides, interpolation=cv2.INTER_NEAREST) == 1
    if rng.random() < 0.5:
        image, found = image[:, ::-1], found[:, ::-1]
    y, x = rng.integers(height - sides[1] + 1), rng.integers(width - sides[0] + 1)
    place = slice(y, y + sides[1]), slice(x, x + sides[0])
    soft = cv2.GaussianBlur(found.astype(np.float32), (3, 3), 0)[..., None]
    pixels[place] = np.rint(soft * image + (1 - soft) * pixels[place]).astype(np.uint8)
    mask[place][found] = 1
    return _warped(pixels, mask, transform, size, 0.5, rng)


def _warped(
    pixels: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    transform: EvalTransform | SquareTransform,
    size: int,
    strength: float,
    rng: np.random.Generator,
    whole: bool = False,
) -> View | None:
    """Return a random view that shows object and background, None if none is found.

    Args:
        size: side of the view; the picture is scaled as the transform does it.
        strength: 1 for scales from 0.5 to 2, turns by 30 degrees and colors from 0.5 to 1.5.
        whole: show the whole picture, or more, instead of a crop.
    """
    side = transform.size
    if isinstance(transform, SquareTransform):
        mask = np.asarray(cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST), np.uint8)
        pixels = np.asarray(cv2.resize(pixels, (side, side)), np.uint8)
    fitted = (size if whole else side) / max(mask.shape)
    scale = (fitted * 2**-strength, fitted * (1 if whole else 2**strength))
    warp = TrainTransform(size, scale, 30 * strength)
    for _ in range(_TRIES):
        sample = warp(_recolored(pixels, 0.5 * strength, rng), mask, rng)
        if (sample.mask == 1).any() and (sample.mask == 0).any():
            return sample.image, sample.mask.long()
    return None


def _recolored(
    pixels: NDArray[np.uint8], strength: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Change brightness, contrast and saturation by factors from 1 - strength to 1 + strength."""
    image = Image.fromarray(pixels)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(1 - strength, 1 + strength))
    return np.asarray(image)
