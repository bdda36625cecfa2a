"""Views of supports, and the episodes that supports make among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from fss.data import EvalTransform, SquareTransform, TrainTransform

Example = tuple[NDArray[np.uint8], NDArray[np.bool_]]
"""A picture RGB uint8 [H, W, 3] and where in it the object is, bool [H, W]."""
View = tuple[Tensor, Tensor]
"""An image [3, S, S], normalized, and its mask int64 [S, S]."""

_POOL = 16
"""Views to train on, of all supports together; of each at least three."""
_IMAGES = 2
"""Images of a step, at most, or else a single episode: each costs the same."""
_MOST_SHOTS = 2
"""Supports of an episode, unless the model is for more."""
_HELD_OUT = (4, 3)
"""Queries that the measure is taken on: of one support, of several."""
SCENES = 16
"""Pictures without a mask that are used, at most."""
_PASTED, _PASTED_HELD_OUT = 24, 2
"""Views of these with a pasted object, to train on and to measure on."""
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


class Episodes(NamedTuple):
    """Some queries with K supports each.

    query_images [B, 3, S, S], query_masks int64 [B, S, S], support_images [B, K, 3, S, S],
    support_masks int64 [B, K, S, S]; 1 is the object, 255 neither object nor background. Of those
    held out the supports are [1, K, …], the same for all queries.
    """

    query_images: Tensor
    query_masks: Tensor
    support_images: Tensor
    support_masks: Tensor


class SupportViews:
    """Episodes made of supports alone.

    Of several supports each in turn is the query of others, of a single one its views are each
    other's: scaled, cropped, turned, flipped, blurred and recolored, more strongly than views of
    several. A fixed pool of views to train on is made once, and one to measure on from another
    random stream.

    Into pictures without a mask the object of a support is pasted, at another size and place, and
    the pictures are queries too: they bring other backgrounds. What is not surely background there
    is left out. With one support all queries are such, with several every other one. Source: Ghiasi
    et al., "Simple Copy-Paste Is a Strong Data Augmentation Method for Instance Segmentation",
    2021.

    Args:
        examples: the supports.
        transform: how the segmenter prepares pictures, at the size S of the views.
        shots: supports that the model is for, where it is for a fixed number; supports are then
            repeated, in other views, until there are so many.
        seed: of both random streams.
        device: of the episodes.
        scenes: pictures without a mask.

    Attributes:
        share: mean share of the object in what the views show.

    Raises:
        ValueError: a support without background.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        transform: EvalTransform | SquareTransform,
        shots: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scenes: Sequence[Scene] = (),
    ) -> None:
        for number, (_, found) in enumerate(examples, start=1):
            if found.all():
                raise ValueError(
                    f"support mask{f' {number}' if len(examples) > 1 else ''}: expected some "
                    "background to tell the object from, got a mask that covers its image; leave "
                    "this support out to tune"
                )
        count = len(examples)
        others = max(1, count - 1)
        self._shots = min(others, _MOST_SHOTS)
        if shots is not None and count > 1:
            self._shots = shots
        self._batch = max(1, _IMAGES // (1 + self._shots))
        train, held_out = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        self._rng, self._device = train, device
        strength = 1.0 if count == 1 else 0.5
        self._plain = [plain_view(*example, transform) for example in examples]
        each = max(3, _POOL // count)
        self._pool = [
            [_view(example, plain, transform, strength, train) for _ in range(each)]
            for example, plain in zip(examples, self._plain, strict=True)
        ]
        asked = [number % count for number in range(_HELD_OUT[count > 1])]
        self._held_out = [
            (at, _view(examples[at], self._plain[at], transform, strength, held_out))
            for at in asked
        ]
        self._pasted: list[tuple[int, View]] = []
        for random, wanted, into in (
            (train, _PASTED, self._pasted),
            (held_out, _PASTED_HELD_OUT, self._held_out),
        ):
            for number in range(wanted if scenes else 0):
                at = number % count
                view = _pasted(scenes[number % len(scenes)], examples[at], transform, random)
                if view is not None:
                    into.append((at, view))
        every = [view for views in self._pool for view in views]
        masks = torch.stack([mask for _, mask in every + [view for _, view in self._pasted]])
        self.share = float((masks == 1).sum() / (masks != 255).sum())
        self._turn: list[int] = []
        self._drawn = 0

    def sample(self) -> Episodes:
        """Return the episodes of a step."""
        return self._episodes([self._sample() for _ in range(self._batch)])

    def held_out(self) -> list[Episodes]:
        """Return the episodes that are never trained on, by the supports as they are."""
        count = len(self._plain)
        asked: dict[int, list[View]] = {}
        for query, view in self._held_out:
            asked.setdefault(query, []).append(view)
        result = []
        for query, views in asked.items():
            others = [(query + 1 + step) % count for step in range(max(1, count - 1))]
            supports = [self._plain[others[step % len(others)]] for step in range(self._shots)]
            episodes = self._episodes([(view, supports) for view in views])
            images, masks = episodes.support_images[:1], episodes.support_masks[:1]
            result.append(episodes._replace(support_images=images, support_masks=masks))
        return result

    def _sample(self) -> tuple[View, list[View]]:
        count = len(self._pool)
        self._drawn += 1
        pasted = None
        if self._pasted and (count == 1 or self._drawn % 2 == 0):
            query, pasted = self._pasted[self._rng.integers(len(self._pasted))]
        else:
            if not self._turn:
                self._turn = self._rng.permutation(count).tolist()
            query = self._turn.pop()
        others = [number for number in self._rng.permutation(count).tolist() if number != query]
        own = [self._pool[query][n] for n in self._rng.permutation(len(self._pool[query]))]
        view = own.pop(0) if pasted is None else pasted
        if not others:  # views of a single support are each other's
            plain = pasted is not None and self._rng.random() < 0.5  # as a segmenter has it
            return view, [self._plain[query]] if plain else own[: self._shots]
        supports = []
        for step in range(self._shots):
            pool = self._pool[others[step % len(others)]]
            supports.append(pool[self._rng.integers(len(pool))])
        return view, supports

    def _episodes(self, episodes: list[tuple[View, list[View]]]) -> Episodes:
        queries, supports = zip(*episodes, strict=True)
        query_images, query_masks = (torch.stack(part) for part in zip(*queries, strict=True))
        pairs = [[torch.stack(part) for part in zip(*each, strict=True)] for each in supports]
        support_images, support_masks = (torch.stack(part) for part in zip(*pairs, strict=True))
        parts = (query_images, query_masks, support_images, support_masks)
        return Episodes(*(part.to(self._device) for part in parts))


def plain_view(
    pixels: NDArray[np.uint8],
    found: NDArray[np.bool_],
    transform: EvalTransform | SquareTransform,
) -> View:
    """Prepare a support as the network sees it: image [3, S, S], mask int64 [S, S].

    The mask has at least a pixel of the object.
    """
    sample = transform(pixels, found.astype(np.uint8))
    result = sample.mask.long()
    if not (result == 1).any():  # nearest-neighbor scaling can drop an object of a few pixels
        valid = result != 255
        height, width = int(valid.any(1).sum()), int(valid.any(0).sum())
        y, x = np.argwhere(found).mean(0) / found.shape
        result[int(y * height), int(x * width)] = 1
    return sample.image, result


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
    plain: View,
    transform: EvalTransform | SquareTransform,
    strength: float,
    rng: np.random.Generator,
) -> View:
    """Return a random view that shows object and background; the plain one if none is found.

    Args:
        strength: see `_warped`.
    """
    pixels, found = example
    return _warped(pixels, found.astype(np.uint8), transform, strength, rng) or plain


def _pasted(
    scene: Scene,
    example: Example,
    transform: EvalTransform | SquareTransform,
    rng: np.random.Generator,
) -> View | None:
    """Return a random view of a picture with the object of a support in it; None if none is found.

    255 is where neither the object nor what is surely background is.
    """
    pixels, mask = scene.pixels.copy(), np.where(scene.background, 0, 255).astype(np.uint8)
    image, found = example
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    image, found = image[box], found[box]
    height, width = mask.shape
    scale = rng.uniform(*_SIDES) * max(height, width) / max(found.shape)
    size = tuple(
        int(np.clip(round(side * scale), 1, most))
        for side, most in zip(found.shape[::-1], (width, height), strict=True)
    )
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    found = cv2.resize(found.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) == 1
    if rng.random() < 0.5:
        image, found = image[:, ::-1], found[:, ::-1]
    y, x = rng.integers(height - size[1] + 1), rng.integers(width - size[0] + 1)
    place = slice(y, y + size[1]), slice(x, x + size[0])
    soft = cv2.GaussianBlur(found.astype(np.float32), (3, 3), 0)[..., None]
    pixels[place] = np.rint(soft * image + (1 - soft) * pixels[place]).astype(np.uint8)
    mask[place][found] = 1
    return _warped(pixels, mask, transform, 0.5, rng)


def _warped(
    pixels: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    transform: EvalTransform | SquareTransform,
    strength: float,
    rng: np.random.Generator,
) -> View | None:
    """Return a random view that shows object and background, None if none is found.

    Args:
        strength: 1 for scales from 0.5 to 2, turns by 30 degrees and colors from 0.5 to 1.5.
    """
    size = transform.size
    if isinstance(transform, SquareTransform):
        mask = np.asarray(cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST), np.uint8)
        pixels = np.asarray(cv2.resize(pixels, (size, size)), np.uint8)
    fitted = size / max(mask.shape)
    scale = (fitted * 2**-strength, fitted * 2**strength)
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
