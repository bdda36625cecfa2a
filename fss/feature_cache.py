"""Backbone features of photos that return in later test episodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fss.models.episode import check_episode
from fss.models.features import Features, FewShotModel
from fss.models.pooling import resize
from fss.models.prior import prior_masks

_Maps = tuple[Tensor, ...]


class FeatureCache:
    """Keeps what a frozen backbone computes of test photos, which have no random transform.

    Layers 2 and 3 depend on the photo alone, layer 4 of a query too; layer 4 of a support sees the
    photo under the mask of one class. Each is computed once per photo, or photo and class, as long
    as it is among the latest that fit; those missing from a batch go through the backbone together.
    The weights must stay as they are: a cache is for one model at one step.

    Args:
        model: a few-shot model, in evaluation mode while it is used; any other is left alone.
        gib: the most to keep, GiB; 0 keeps nothing.

    Attributes:
        hits, misses: photos found and computed.
    """

    def __init__(self, model: nn.Module, gib: float) -> None:
        network = getattr(model, "module", model)  # Fabric wraps it
        self.model = network if isinstance(network, FewShotModel) and gib > 0 else None
        self.capacity = int(gib * 2**30)
        self.bytes = self.hits = self.misses = 0
        self._maps: OrderedDict[Hashable, _Maps] = OrderedDict()

    @contextmanager
    def serve(self, batch: dict[str, Any]) -> Iterator[None]:
        """Within, the model takes the features of this batch of test episodes from the cache."""
        if self.model is None:
            yield
            return
        queries = batch["query_name"]
        supports = [name for names in batch["support_names"] for name in names]
        shots = len(supports) // len(queries)
        classes = [c for c in batch["class_id"].tolist() for _ in range(shots)]

        def features(
            query_image: Tensor, support_images: Tensor, support_masks: Tensor
        ) -> Features:
            return self._features(
                query_image, support_images, support_masks, queries, supports, classes
            )

        # An attribute of the instance comes before the method of its class.
        self.model.features = features  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.model.features

    @torch.no_grad()
    def _features(
        self,
        query_image: Tensor,
        support_images: Tensor,
        support_masks: Tensor,
        queries: Sequence[str],
        supports: Sequence[str],
        classes: Sequence[int],
    ) -> Features:
        assert self.model is not None
        backbone = self.model.backbone
        check_episode(query_image, support_images, support_masks, self.model.query_reduce[0].weight)
        batch, shots = support_masks.shape[:2]
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        names = [*queries, *supports]
        photos = self._take(
            [("photo", name) for name in names],
            lambda chosen: backbone.features(images[chosen]),
        )
        low, middle = (torch.stack(maps) for maps in zip(*photos, strict=True))
        mask = (support_masks == 1).flatten(0, 1).unsqueeze(1).to(images.dtype)
        mask = resize(mask, middle.shape[-2:])
        query_high = self._take(
            [("query", name) for name in queries],
            lambda chosen: (backbone.layer4(middle[:batch][chosen]),),
        )
        support_high = self._take(
            [("support", *key) for key in zip(supports, classes, strict=True)],
            lambda chosen: (backbone.layer4(middle[batch:][chosen] * mask[chosen]),),
        )
        high = torch.stack([maps[0] for maps in query_high])
        priors = prior_masks(
            high,
            torch.stack([maps[0] for maps in support_high]).unflatten(0, (batch, shots)),
            mask.unflatten(0, (batch, shots)),
        )
        return Features(
            low[:batch], middle[:batch], high, low[batch:], middle[batch:], mask, priors
        )

    def _take(
        self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[_Maps]:
        """The maps of each key; `compute` makes those at the places it is given, [n, C, h, w]."""
        found = {key: self._maps[key] for key in keys if key in self._maps}
        for key in found:
            self._maps.move_to_end(key)
        missing = {key: place for place, key in enumerate(keys) if key not in found}
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            made = compute(list(missing.values()))
            for n, key in enumerate(missing):
                # a copy: a slice would keep the whole batch
                found[key] = tuple(maps[n].clone() for maps in made)
                self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: Hashable, maps: _Maps) -> None:
        self._maps[key] = maps
        self.bytes += sum(tensor.nbytes for tensor in maps)
        while self.bytes > self.capacity:
            _, oldest = self._maps.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in oldest)
