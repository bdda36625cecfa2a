"""Backbone features of photos that return in later test episodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fss.evaluation.shelf import Shelf
from fss.models.episode import check_episode
from fss.models.features import Features, FewShotModel
from fss.models.pooling import resize
from fss.models.prior import prior_masks

_Maps = tuple[Tensor, ...]


class Names(NamedTuple):
    """The photos of an episode and its class."""

    query: str
    supports: tuple[str, ...]
    class_id: int


class FeatureCache:
    """Keeps what a frozen backbone computes of test photos, which have no random transform.

    Of a support stays what the head reads of it (`FewShotModel.summarise`) and, for the prior,
    layer 4 where its mask is not 0: all other positions have similarity 0. That is a twentieth of
    its maps where the class covers a twentieth of the photo. Of a query stay the maps of layers 2,
    3 and 4, of which the first two also serve the same photo as a support under a new mask. What
    is missing from a batch goes through the backbone together. The weights must stay as they are.

    Args:
        model: a few-shot model, in evaluation mode while it is used; any other is left alone.
        gib: the most to keep, GiB; 0 keeps nothing.
        episodes: all that are to come, in their order; see `Shelf`.

    Attributes:
        photos: how many went through layers 1 to 3.
        layer4: how many went through layer 4, as a query or under a mask.
    """

    def __init__(self, model: nn.Module, gib: float, episodes: Sequence[Names]) -> None:
        network = getattr(model, "module", model)  # Fabric wraps it
        self.model = network if isinstance(network, FewShotModel) and gib > 0 else None
        self.photos = self.layer4 = 0
        self.shelf: Shelf[_Maps] = Shelf(int(gib * 2**30), uses(episodes) if self.model else [])

    @contextmanager
    def serve(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within, the model takes the features of this batch of test episodes from the cache."""
        if self.model is None:
            yield
            return
        episodes = [
            Names(query, tuple(supports), class_id)
            for query, supports, class_id in zip(
                batch["query_name"],
                batch["support_names"],
                batch["class_id"].tolist(),
                strict=True,
            )
        ]

        def features(
            query_image: Tensor, support_images: Tensor, support_masks: Tensor
        ) -> Features:
            return self._features(query_image, support_images, support_masks, episodes)

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
        episodes: Sequence[Names],
    ) -> Features:
        assert self.model is not None
        model, backbone = self.model, self.model.backbone
        check_episode(query_image, support_images, support_masks, model.query_reduce[0].weight)
        batch, shots = support_masks.shape[:2]
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        masks = (support_masks == 1).flatten(0, 1).unsqueeze(1).to(images.dtype)

        photos = [episode.query for episode in episodes]
        photos += [name for episode in episodes for name in episode.supports]
        queries = [_query(name) for name in photos[:batch]]
        supports = [_support(name, e.class_id) for e in episodes for name in e.supports]
        found = {
            key: maps
            for key in (*map(_photo, photos), *queries, *supports)
            if (maps := self.shelf.get(key)) is not None
        }
        self.shelf.advance(batch)

        unseen = _places(supports, found)
        needed = [*range(batch), *(batch + place for place in unseen)]
        missing = [needed[n] for n in _places([_photo(photos[n]) for n in needed], found)]
        if missing:
            self.photos += len(missing)
            seen = (maps.split(1) for maps in backbone.features(images[missing]))
            self._add(found, [_photo(photos[n]) for n in missing], zip(*seen, strict=True))
        missing = _places(queries, found)
        if missing:
            self.layer4 += len(missing)
            _, middle = _stacked([found[_photo(photos[n])] for n in missing])
            self._add(found, [queries[n] for n in missing], zip(backbone.layer4(middle).split(1)))
        if unseen:
            self.layer4 += len(unseen)
            low, middle = _stacked([found[_photo(photos[batch + n])] for n in unseen])
            made = self._supports(low, middle, masks[unseen])
            self._add(found, [supports[n] for n in unseen], made)

        low, middle = _stacked([found[_photo(name)] for name in photos[:batch]])
        (high,) = _stacked([found[key] for key in queries])
        weights, positions, *summaries = zip(*(found[key] for key in supports), strict=True)
        priors = prior_masks(
            high,
            _padded(positions).unflatten(0, (batch, shots)),
            _padded(weights).unflatten(0, (batch, shots)),
        )
        stacked = (torch.stack(each).unflatten(0, (batch, shots)) for each in summaries)
        return Features(low, middle, high, tuple(stacked), priors)

    def _supports(self, low: Tensor, middle: Tensor, masks: Tensor) -> Iterator[_Maps]:
        """Of each support the weights [1, 1, n] and layer 4 [C, 1, n] of some positions, summaries.

        The positions are those whose weight is not 0, and one of the others, if there is one.
        """
        assert self.model is not None
        masks = resize(masks, middle.shape[-2:])
        high = self.model.backbone.layer4(middle * masks)
        summaries = self.model.summarise(low, middle, masks)
        for n, (maps, weights) in enumerate(zip(high.flatten(2), masks.flatten(1), strict=True)):
            kept = torch.cat([weights.nonzero(), (weights == 0).nonzero()[:1]]).flatten()
            yield (
                weights[None, None, kept],
                maps[:, None, kept],
                *(summary[n] for summary in summaries),
            )

    def _add(
        self, found: dict[Hashable, _Maps], keys: Sequence[Hashable], made: Iterable[_Maps]
    ) -> None:
        """Adds the maps made of the keys to what was found, and to the shelf."""
        for key, maps in zip(keys, made, strict=True):
            # a copy: a slice would keep the whole batch
            found[key] = kept = tuple(tensor.clone() for tensor in maps)
            self.shelf.put(key, kept, sum(tensor.nbytes for tensor in kept))


def uses(episodes: Sequence[Names]) -> list[list[Hashable]]:
    """The keys that each episode asks for: a support's photo only before the support is known."""
    known: set[Hashable] = set()
    turns = []
    for query, supports, class_id in episodes:
        keys = [_photo(query), _query(query)]
        for name in supports:
            key = _support(name, class_id)
            keys += [key] if key in known else [key, _photo(name)]
            known.add(key)
        turns.append(keys)
    return turns


def _photo(name: str) -> Hashable:
    return "photo", name


def _query(name: str) -> Hashable:
    return "query", name


def _support(name: str, class_id: int) -> Hashable:
    return "support", name, class_id


def _places(keys: Sequence[Hashable], found: Mapping[Hashable, Any]) -> list[int]:
    """The place of each key that is not found, of equal ones the last."""
    return list({key: place for place, key in enumerate(keys) if key not in found}.values())


def _stacked(entries: Sequence[_Maps]) -> list[Tensor]:
    """The maps [1, C, h, w] of several entries, one batch for each kind.

    torch.stack of maps without the first dimension would give up channels_last.
    """
    return [torch.cat(kind) for kind in zip(*entries, strict=True)]


def _padded(maps: Sequence[Tensor]) -> Tensor:
    """Maps [C, 1, n] to [N, C, 1, max n]: the last position is repeated, which adds nothing."""
    longest = max(each.shape[2] for each in maps)
    return torch.stack(
        [
            torch.cat([each, each[..., -1:].expand(-1, -1, longest - each.shape[2])], dim=2)
            for each in maps
        ]
    )
