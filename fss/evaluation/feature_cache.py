"""Backbone features of photos that return in later test episodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fss.models.features import Features, FewShotModel, Maps, Supports

Value = TypeVar("Value")


class _Kept(NamedTuple, Generic[Value]):
    value: Value
    nbytes: int


class Shelf(Generic[Value]):
    """A cache that knows all future accesses (Belady's rule).

    When full, it evicts the value with the most bytes times turns until its next use, which is
    Belady's rule for values of unlike size. A value that is not used again is not kept.

    Args:
        capacity: bytes.
        turns: the keys that each turn uses.

    Attributes:
        nbytes: of all that is kept.
    """

    def __init__(self, capacity: int, turns: Sequence[Sequence[Hashable]]) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._turns = turns
        self._turn = 0
        self._uses: dict[Hashable, deque[int]] = {}
        for turn, keys in enumerate(turns):
            for key in dict.fromkeys(keys):
                self._uses.setdefault(key, deque()).append(turn)
        self._kept: dict[Hashable, _Kept[Value]] = {}

    def get(self, key: Hashable) -> Value | None:
        """Return the value of a key, None if it is not kept."""
        kept = self._kept.get(key)
        return None if kept is None else kept.value

    def advance(self, turns: int) -> None:
        """End that many turns, and drop what only they used."""
        ended = self._turns[self._turn : self._turn + turns]
        self._turn += turns
        for keys in ended:
            for key in keys:
                if key in self._kept and self._next_use(key) is None:
                    self._drop(key)

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Keep a value of so many bytes, if it is used again and its place is worth it."""
        if self._next_use(key) is None:
            return
        if key in self._kept:
            self._drop(key)
        self._kept[key] = _Kept(value, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.capacity:
            self._drop(max(self._kept, key=self._rent))

    def _rent(self, key: Hashable) -> int:
        return self._kept[key].nbytes * (1 + self._uses[key][0] - self._turn)

    def _next_use(self, key: Hashable) -> int | None:
        uses = self._uses.get(key, deque())
        while uses and uses[0] < self._turn:
            uses.popleft()
        return uses[0] if uses else None

    def _drop(self, key: Hashable) -> None:
        self.nbytes -= self._kept.pop(key).nbytes


class Names(NamedTuple):
    """The photos of an episode and its class."""

    query: str
    supports: tuple[str, ...]
    class_id: int


class FeatureCache:
    """Keeps what a frozen backbone computes of test photos, which have no random transform.

    Of a support stays what the head reads of it and, for the prior, layer 4 where its mask is not
    0: all other positions have similarity 0. That is a twentieth of its maps where the class covers
    a twentieth of the photo. Of a query stay the model's `maps` and `query_maps`, of which the
    first also serve the same photo as a support under a new mask. What is missing from a batch
    goes through the backbone together. The weights must stay as they are.

    Args:
        model: in evaluation mode while it is used.
        gib: the most to keep, GiB.
        episodes: all that are to come, in their order; see `Shelf`.

    Attributes:
        photos: of how many the model's `maps` were computed.
        roles: of how many was computed what it reads of a query or of a support.
    """

    def __init__(self, model: FewShotModel, gib: float, episodes: Sequence[Names]) -> None:
        self.model = model
        self.photos = self.roles = 0
        self.shelf: Shelf[Maps] = Shelf(int(gib * 2**30), uses(episodes))
        self._covered = False  # whether supports have a prior

    @torch.no_grad()
    def features(self, batch: Mapping[str, Any]) -> Features:
        """Return what `FewShotModel.features` computes of a batch of test episodes.

        Args:
            batch: of `collate_episodes`: images, masks, and the names of photos and classes.
        """
        dtype = next(self.model.parameters()).dtype
        query_image, support_images = (
            batch[name].to(dtype) for name in ("query_image", "support_images")
        )
        support_masks = batch["support_masks"]
        self.model.check(query_image, support_images, support_masks)
        count, shots = support_masks.shape[:2]
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        masks = support_masks.flatten(0, 1)

        classes = batch["class_id"].tolist()
        photos = [*batch["query_name"], *(n for names in batch["support_names"] for n in names)]
        queries = [_query(name) for name in photos[:count]]
        supports = [
            _support(name, class_id)
            for names, class_id in zip(batch["support_names"], classes, strict=True)
            for name in names
        ]
        found = {
            key: maps
            for key in (*map(_photo, photos), *queries, *supports)
            if (maps := self.shelf.get(key)) is not None
        }
        self.shelf.advance(count)

        unseen = _places(supports, found)
        needed = [*range(count), *(count + place for place in unseen)]
        missing = [needed[n] for n in _places([_photo(photos[n]) for n in needed], found)]
        if missing:
            self.photos += len(missing)
            seen = (maps.split(1) for maps in self.model.maps(images[missing]))
            self._add(found, [_photo(photos[n]) for n in missing], zip(*seen, strict=True))
        missing = _places(queries, found)
        if missing:
            self.roles += len(missing)
            maps = _stacked([found[_photo(photos[n])] for n in missing])
            made = [each.split(1) for each in self.model.query_maps(*maps)]
            rows = zip(*made, strict=True) if made else [()] * len(missing)
            self._add(found, [queries[n] for n in missing], rows)
        if unseen:
            self.roles += len(unseen)
            maps = _stacked([found[_photo(photos[count + n])] for n in unseen])
            made = self.model.support_features(maps, masks[unseen])
            self._covered = made.high is not None
            self._add(found, [supports[n] for n in unseen], _rows(made))

        maps = _stacked([found[_photo(name)] for name in photos[:count]])
        more = _stacked([found[key] for key in queries])
        parts = list(zip(*(found[key] for key in supports), strict=True))
        prior = [_padded(parts.pop(0)) for _ in range(2 if self._covered else 0)]
        kept = Supports(tuple(torch.stack(each) for each in parts), *prior)
        kept = kept.map(lambda each: each.unflatten(0, (count, shots)))
        return Features.of((*maps, *more), kept)

    def _add(
        self, found: dict[Hashable, Maps], keys: Sequence[Hashable], made: Iterable[Maps]
    ) -> None:
        """Add the maps made for the keys to what was found, and to the shelf."""
        for key, maps in zip(keys, made, strict=True):
            # a copy: a slice would keep the whole batch
            found[key] = kept = tuple(tensor.clone() for tensor in maps)
            self.shelf.put(key, kept, sum(tensor.nbytes for tensor in kept))


def _rows(supports: Supports) -> Iterator[Maps]:
    """Yield, per support, weights [1, 1, n] and layer 4 [C, 1, n] of some positions, and summaries.

    The positions are those whose weight is not 0, and one of the others, if there is one. Without
    a prior there are summaries alone.
    """
    if supports.mask is None or supports.high is None:
        yield from zip(*supports.summaries, strict=True)
        return
    flat = zip(supports.mask.flatten(1), supports.high.flatten(2), strict=True)
    for n, (weights, maps) in enumerate(flat):
        kept = torch.cat([weights.nonzero(), (weights == 0).nonzero()[:1]]).flatten()
        summaries = (summary[n] for summary in supports.summaries)
        yield weights[None, None, kept], maps[:, None, kept], *summaries


def uses(episodes: Sequence[Names]) -> list[list[Hashable]]:
    """List the keys that each episode asks for: a support's photo only before it is known."""
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
    """List the place of each key that is not found, of equal ones the last."""
    return list({key: place for place, key in enumerate(keys) if key not in found}.values())


def _stacked(entries: Sequence[Maps]) -> Maps:
    """Join the maps [1, C, h, w] of several entries, one batch for each kind.

    torch.stack of maps without the first dimension would give up channels_last.
    """
    return tuple(torch.cat(kind) for kind in zip(*entries, strict=True))


def _padded(maps: Sequence[Tensor]) -> Tensor:
    """Stack maps [C, 1, n] as [N, C, 1, max n], repeating the last position, which adds nothing."""
    longest = max(each.shape[2] for each in maps)
    return torch.stack(
        [
            torch.cat([each, each[..., -1:].expand(-1, -1, longest - each.shape[2])], dim=2)
            for each in maps
        ]
    )
