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

Example = tuple[NDArray[np.uint8], NDArray[np.bool_]]
"""A picture RGB uint8 [H, W, 3] and where in it the object is, bool [H, W]."""

_POOL = 16
"""Views to train on, of all supports together; of each at least three."""
_IMAGES = 2
"""Images of a step, at most, or else a single episode: each costs the same."""
_MOST_SHOTS = 2
"""Supports of an episode, unless the model is for more."""
_HELD_OUT = (4, 3)
"""Queries that the measure is taken on: of one support, of several."""
_TRIES = 10


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

    Args:
        examples: the supports.
        transform: how the segmenter prepares pictures, at the size S of the views.
        shots: supports that the model is for, where it is for a fixed number; supports are then
            repeated, in other views, until there are so many.
        seed: of both random streams.
        device: of the episodes.

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
        masks = torch.stack([mask for views in self._pool for _, mask in views])
        self.share = float((masks == 1).sum() / (masks != 255).sum())
        self._turn: list[int] = []

    def sample(self) -> Episodes:
        """Return the episodes of a step."""
        return self._episodes([self._sample() for _ in range(self._batch)])

    def held_out(self) -> list[Episodes]:
        """Return the episodes that are never trained on, by the supports as they are."""
        count = len(self._plain)
        asked: dict[int, list[Any]] = {}
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

    def _sample(self) -> tuple[Any, list[Any]]:
        count = len(self._pool)
        if not self._turn:
            self._turn = self._rng.permutation(count).tolist()
        query = self._turn.pop()
        others = [number for number in self._rng.permutation(count).tolist() if number != query]
        # views of a single support are each other's
        views = self._rng.permutation(len(self._pool[query])).tolist()
        supports = []
        for step in range(self._shots):
            if others:
                pool = self._pool[others[step % len(others)]]
                supports.append(pool[self._rng.integers(len(pool))])
            else:
                supports.append(self._pool[query][views[1 + step]])
        return self._pool[query][views[0]], supports

    def _episodes(self, episodes: list[tuple[Any, list[Any]]]) -> Episodes:
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
) -> tuple[Tensor, Tensor]:
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


def _view(
    example: Example,
    plain: tuple[Tensor, Tensor],
    transform: EvalTransform | SquareTransform,
    strength: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Return a random view that shows object and background; the plain one if none is found.

    Args:
        strength: 1 for scales from 0.5 to 2, turns by 30 degrees and colors from 0.5 to 1.5.
    """
    pixels, found = example
    size = transform.size
    if isinstance(transform, SquareTransform):
        mask = cv2.resize(found.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST)
        pixels = np.asarray(cv2.resize(pixels, (size, size)), np.uint8)
    else:
        mask = found.astype(np.uint8)
    fitted = size / max(mask.shape)
    scale = (fitted * 2**-strength, fitted * 2**strength)
    warp = TrainTransform(size, scale, 30 * strength)
    for _ in range(_TRIES):
        sample = warp(_recolored(pixels, 0.5 * strength, rng), mask, rng)
        if (sample.mask == 1).any() and (sample.mask == 0).any():
            return sample.image, sample.mask.long()
    return plain


def _recolored(
    pixels: NDArray[np.uint8], strength: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Change brightness, contrast and saturation by factors from 1 - strength to 1 + strength."""
    image = Image.fromarray(pixels)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(1 - strength, 1 + strength))
    return np.asarray(image)
