"""What a model needs of the supports, computed once for any number of queries."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fss.models import FewShotModel, Matching
from fss.models.episode import check_episode
from fss.models.features import Features
from fss.models.pooling import resize
from fss.models.prior import prior_masks


class Supports(ABC):
    """K supports as a model sees them; the model's weights must stay as they are."""

    @abstractmethod
    def segment(self, queries: Tensor) -> Tensor:
        """Logits [B, 2, H, W] of normalised queries [B, 3, H, W]."""


class MatchedSupports(Supports):
    """Prototypes of `Matching`.

    Args:
        model: in evaluation mode.
        images: normalised supports [K, 3, H, W].
        masks: int64 [K, H, W]; 0 background, 1 the object, 255 neither.
    """

    def __init__(self, model: Matching, images: Tensor, masks: Tensor) -> None:
        self.model = model
        self._prototypes = model.prototypes(images, masks)

    def segment(self, queries: Tensor) -> Tensor:
        return self.model.compare(queries, self._prototypes)


class LearntSupports(Supports):
    """What the head of a `FewShotModel` reads of the supports; arguments as above.

    Raises:
        ValueError: another number of supports than the model can weigh (BAM).
    """

    @torch.no_grad()
    def __init__(self, model: FewShotModel, images: Tensor, masks: Tensor) -> None:
        check_episode(images[:1], images[None], masks[None], model.query_reduce[0].weight)
        self.model = model
        self._images, self._masks = images[None], masks[None]
        low, middle = model.backbone.features(images)
        self._mask = resize((masks == 1).unsqueeze(1).to(images.dtype), middle.shape[-2:])
        self._high = model.backbone.layer4(middle * self._mask)
        self._summaries = model.summarise(low, middle, self._mask)

    @torch.no_grad()
    def segment(self, queries: Tensor) -> Tensor:
        batch = len(queries)
        # An attribute of the instance comes before the method of its class.
        self.model.features = self._features  # type: ignore[method-assign, assignment]
        try:
            images, masks = (
                each.expand(batch, *each.shape[1:]) for each in (self._images, self._masks)
            )
            return self.model(queries, images, masks).logits
        finally:
            del self.model.features

    def _features(self, queries: Tensor, images: Tensor, masks: Tensor) -> Features:
        low, middle = self.model.backbone.features(queries)
        high = self.model.backbone.layer4(middle)

        def repeated(maps: Tensor) -> Tensor:
            return maps.expand(len(queries), *maps.shape)

        priors = prior_masks(high, repeated(self._high), repeated(self._mask))
        return Features(low, middle, high, tuple(map(repeated, self._summaries)), priors)


def see_supports(model: nn.Module, images: Tensor, masks: Tensor) -> Supports:
    """Supports as a model sees them, see `Supports`."""
    if isinstance(model, Matching):
        return MatchedSupports(model, images, masks)
    assert isinstance(model, FewShotModel)
    return LearntSupports(model, images, masks)
