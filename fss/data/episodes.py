"""Few-shot episodes: a query and K supports of one class, sampled from a seed."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from fss.config.checks import check_at_least, check_positive, misfit
from fss.data.source import IGNORE, Mask, Source
from fss.data.transforms import Sample, Transform

Split = Literal["train", "validation", "test"]
Draw = Literal["image", "pair", "class"]

# Streams of random numbers of one seed: the order of the queries, all else of an episode, and the
# number that a model's own randomness depends on.
_ORDER, _EPISODE, _SAMPLING = 0, 1, 2

# Episodes tried in one place before a data set is declared broken.
_READ_TRIES = 10


class UnreadableImage(ValueError):
    """An image or a mask of an episode that cannot be read."""


class Episode(NamedTuple):
    """The images of an episode, as numbers of the source, and the class to segment."""

    query: int
    class_id: int
    supports: tuple[int, ...]


class EpisodeDataset(Dataset[dict[str, Any]]):
    """Episodes of one split of a fold; item i depends on (seed, i) alone, not on the workers.

    An image is listed when one of the split's classes covers at least `min_area` of it. Queries run
    through the listed images in a new random order each pass. The class is sampled from the split's
    classes that the query shows at any size (see `draw_by`), the supports from the images listed
    under the class, without the query. The class becomes 1, ignored pixels stay 255, all else
    becomes 0.

    An item is a dict of `query_image` float32 [3, S, S], `query_mask` uint8 [S, S], `query_padding`
    bool [S, S] (see `Sample`), `support_images` float32 [K, 3, S, S], `support_masks` uint8
    [K, S, S], `class_id`, `index` (i), `sampling` int64 [] (at random from the seed and i, for a
    model that draws at random), `query_name` and `support_names`. For a model that segments the
    base classes too there are `query_base_mask` uint8 [S, S], under the transform of the query (0
    background and novel classes, 1 to n the fold's base classes in the order of their ids, 255
    ignored), in the split "train" `support_base_masks` uint8 [K, S, S], and `base_class` int64 [],
    the place of the episode's class among them from 0, -1 when it is novel; not where the fold
    leaves no base class or more than 254. The evaluation transform adds `query_size` int64 [2], the
    height and width of the pasted query, and `query_mask_original` int64 [H, W], the mask at the
    size of the image.

    Args:
        source: images, masks and folds.
        fold: which classes are novel, from 0.
        split: "train" has base classes and training images, "validation" base classes and test
            images, "test" novel classes and test images.
        shots: supports per episode (K).
        transform: of each image and mask: `TrainTransform` or `EvalTransform`.
        episodes: length of the data set.
        seed: from 0.
        min_area: pixels at original size when at least 1, else a share of the image.
        exclude_novel: train only on images without any novel class, however small (the † filter).
        shuffle: visit the queries in a new random order each pass; otherwise in the list's order,
            as the published BAM tests, whose 1000 episodes use the first 1000 images only.
        draw_by: what queries run through: "image", as above (PFENet, BAM); "pair", each pair of an
            image and a class that it is listed under, which is then the episode's (HSNet on Pascal
            and FSS-1000); "class" samples a class, then a query among its images, whatever the
            order (HSNet on COCO). For the last two, lists that name the class of each image, as
            HSNet's do, hold as they are, whatever `min_area`.
        repeat_supports: sample each support independently from the images other than the query, so
            that one may appear twice (HSNet); otherwise they are K different images.
        drop_small_classes: omit classes of the split with no more than K images and warn; otherwise
            they are an error.
        skip_unreadable: replace an episode that has an unreadable image and warn; an item then
            also has `unreadable`, an error for each such image. Otherwise such an image is an
            error.

    Attributes:
        classes: the split's class ids.
        base_classes: the fold's base class ids, ascending.
        queries: the listed images.
        class_images: per class the listed images that it covers by at least `min_area`.

    Raises:
        TypeError: a count that is not an integer.
        ValueError: an argument out of range, no image left, or a class with fewer than K + 1.
    """

    def __init__(
        self,
        source: Source,
        fold: int,
        split: Split,
        shots: int,
        transform: Transform,
        episodes: int,
        seed: int = 0,
        min_area: float = 2048,
        exclude_novel: bool = False,
        shuffle: bool = True,
        draw_by: Draw = "image",
        repeat_supports: bool = False,
        drop_small_classes: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        for name, value, lowest in (
            ("fold", fold, 0),
            ("shots", shots, 1),
            ("episodes", episodes, 1),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(misfit(name, int, repr(value)))
            check_at_least(name, value, lowest)
        if fold >= len(source.folds):
            raise ValueError(
                f"fold: expected 0 to {len(source.folds) - 1}, the source has "
                f"{len(source.folds)} folds; got {fold}"
            )
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split: expected train, validation or test; got {split!r}")
        if draw_by not in ("image", "pair", "class"):
            raise ValueError(f"draw_by: expected image, pair or class; got {draw_by!r}")
        check_positive("min_area", min_area)
        self.source, self.fold, self.split = source, fold, split
        self.shots, self.transform = shots, transform
        self.episodes, self.seed = episodes, seed
        self.min_area, self.exclude_novel = min_area, exclude_novel
        self.shuffle, self.draw_by, self.repeat_supports = shuffle, draw_by, repeat_supports
        self.drop_small_classes, self.skip_unreadable = drop_small_classes, skip_unreadable
        novel = source.folds[fold]
        self.base_classes = tuple(sorted(c for c in source.class_names if c not in novel))
        self.classes = novel if split == "test" else self.base_classes
        if not self.classes:
            kind = "novel" if split == "test" else "base"
            raise ValueError(
                f"fold {fold} has no {kind} class: of {len(source.class_names)} classes, "
                f"{len(novel)} are novel; change the folds, or add photos of other classes"
            )
        labels = {class_id: label for label, class_id in enumerate(self.base_classes, start=1)}
        self._base_table = _table(labels) if 0 < len(labels) < IGNORE else None
        self.queries, self.class_images = self._list_images(set(novel))
        self._shown = {
            index: sorted(set(source.class_areas(index)).intersection(self.classes))
            for index in self.queries
        }
        self._pairs = self._list_pairs() if draw_by == "pair" else []
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._unreadable = 0

    def __len__(self) -> int:
        return self.episodes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None and cv2.getNumThreads() > 1:
            # Workers share the cores already, and a forked OpenCV thread pool can hang.
            cv2.setNumThreads(0)
        errors: list[str] = []
        while True:
            try:
                item = self._item(index, len(errors))
            except UnreadableImage as error:
                errors.append(str(error.__cause__))
                if not self.skip_unreadable:
                    raise ValueError(
                        f"{error}; data.skip_unreadable: true goes on with other images"
                    ) from error
                if len(errors) == _READ_TRIES:
                    raise ValueError(
                        f"{error}; so were images of the {_READ_TRIES - 1} episodes drawn in its "
                        "place: check the data folder"
                    ) from error
                self._unreadable += 1
                warnings.warn(
                    f"{error}; another episode takes its place ({self._unreadable} unreadable so "
                    "far in this process)",
                    stacklevel=2,
                )
                continue
            if self.skip_unreadable:
                item["unreadable"] = errors
            return item

    def _item(self, index: int, attempt: int) -> dict[str, Any]:
        episode = self.draw(index, attempt)
        rng = self._rng(_EPISODE, index, 1, *([attempt] if attempt else []))
        query, original = self._load(index, episode.query, episode.class_id, rng)
        supports = [self._load(index, i, episode.class_id, rng)[0] for i in episode.supports]
        item = {
            "query_image": query.image,
            "query_mask": _binary(query.mask.numpy(), episode.class_id),
            "query_padding": query.padding,
            "support_images": torch.stack([support.image for support in supports]),
            "support_masks": torch.stack(
                [_binary(support.mask.numpy(), episode.class_id) for support in supports]
            ),
            "class_id": episode.class_id,
            "index": index,
            "sampling": torch.tensor(self._sampling(index)),
            "query_name": self.source.name(episode.query),
            "support_names": [self.source.name(i) for i in episode.supports],
        }
        if self._base_table is not None:
            item["query_base_mask"] = _labels(query.mask.numpy(), self._base_table)
            if self.split == "train":
                bases = [_labels(support.mask.numpy(), self._base_table) for support in supports]
                item["support_base_masks"] = torch.stack(bases)
            position = bisect_left(self.base_classes, episode.class_id)
            item["base_class"] = torch.tensor(-1 if self.split == "test" else position)
        if query.size is not None:
            item["query_size"] = torch.tensor(query.size)
            item["query_mask_original"] = _binary(original, episode.class_id).long()
        return item

    def _sampling(self, index: int) -> int:
        """Return 63 random bits."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(_SAMPLING, index))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def draw(self, index: int, attempt: int = 0) -> Episode:
        """Sample the images and the class of an episode, without loading anything.

        `attempt` counts the unreadable episodes that this one replaces.
        """
        if not 0 <= index < self.episodes:
            raise IndexError(f"episode: expected 0 to {self.episodes - 1}, got {index}")
        round_, position = divmod(index, self.epoch)
        if self._order is None or self._order[0] != round_:
            order = np.arange(self.epoch)
            if self.shuffle:
                order = self._rng(_ORDER, round_).permutation(order)
            self._order = (round_, order)
        rng = self._rng(_EPISODE, index, 0, *([attempt] if attempt else []))
        place = rng.integers(self.epoch) if attempt else self._order[1][position]
        query, class_id = self._choose(int(place), rng)
        images = self.class_images[class_id]
        if self.repeat_supports:
            others = [i for i in images if i != query]
            supports = [int(i) for i in rng.choice(others, self.shots)]
        else:
            # One more than needed, so that the query can be left out.
            drawn = rng.choice(images, self.shots + 1, replace=False)
            supports = [int(i) for i in drawn if i != query][: self.shots]
        return Episode(query, class_id, tuple(supports))

    @property
    def epoch(self) -> int:
        """Return the number of queries until all were asked for once."""
        return len(self._pairs or self.queries)

    def _choose(self, place: int, rng: np.random.Generator) -> tuple[int, int]:
        """Return the query and the class of a place in the order of the queries."""
        if self.draw_by == "pair":
            return self._pairs[place]
        if self.draw_by == "class":
            class_id = self.classes[rng.integers(len(self.classes))]
            images = self.class_images[class_id]
            return images[rng.integers(len(images))], class_id
        query = self.queries[place]
        shown = self._shown[query]
        return query, shown[rng.integers(len(shown))]

    def _list_pairs(self) -> list[tuple[int, int]]:
        """List each image with each class that it is listed under, in the order of the list."""
        members = {c: set(images) for c, images in self.class_images.items()}
        listed = self._listed_classes() or [(i, c) for i in self.queries for c in self._shown[i]]
        return [(i, c) for i, c in listed if i in members.get(c, ())]

    def _listed_classes(self) -> list[tuple[int, int]]:
        """Return the pairs of image and class in the source's lists, if these have classes."""
        listed = getattr(self.source, "listed_classes", None)
        if self.draw_by == "image" or listed is None:
            return []
        return list(listed("train" if self.split == "train" else "test"))

    def _list_images(self, novel: set[int]) -> tuple[list[int], dict[int, list[int]]]:
        source, kind = self.source, "novel" if self.split == "test" else "base"
        images = source.indices("train" if self.split == "train" else "test")
        if not images:
            raise ValueError(f"the source has no image for the {self.split} split")
        kept = images
        if self.split == "train" and self.exclude_novel:
            kept = [i for i in images if not novel.intersection(source.class_areas(i))]
            if not kept:
                raise ValueError(
                    f"exclude_novel leaves no training image in fold {self.fold}: each of the "
                    f"{len(images)} shows a novel class; turn exclude_novel off or choose other "
                    "folds"
                )
        class_images: dict[int, list[int]] = {class_id: [] for class_id in self.classes}
        listed = []
        named: dict[int, list[int]] = {}
        for i, class_id in self._listed_classes():
            named.setdefault(i, []).append(class_id)
        for i in kept:
            counting = (
                [c for c in self.classes if c in named.get(i, ())]
                if named
                else counting_classes(source, i, self.classes, self.min_area)
            )
            if counting:
                listed.append(i)
            for class_id in counting:
                class_images[class_id].append(i)
        if not listed:
            unit = "pixels" if self.min_area >= 1 else "of the image"
            raise ValueError(
                f"min_area leaves no {self.split} image in fold {self.fold}: no {kind} class "
                f"covers {self.min_area} {unit} in any of the {len(kept)}; lower min_area"
            )
        filters = f"min_area {self.min_area}"
        if kept is not images:
            filters += " and exclude_novel"
        small = [c for c, members in class_images.items() if len(members) <= self.shots]
        if small and self.drop_small_classes:
            names = ", ".join(f"{source.class_names[c]} {len(class_images[c])}" for c in small)
            self.classes = tuple(c for c in self.classes if c not in small)
            if not self.classes:
                raise ValueError(
                    f"drop_small_classes leaves no {kind} class in fold {self.fold}: none has "
                    f"{self.shots + 1} {self.split} images after {filters} ({names})"
                )
            warnings.warn(
                f"{self.split}, fold {self.fold}: {len(small)} classes with fewer than "
                f"{self.shots + 1} images after {filters} are left out: {names}",
                stacklevel=3,
            )
            class_images = {c: class_images[c] for c in self.classes}
            remaining = set().union(*class_images.values())
            listed = [i for i in listed if i in remaining]
        elif small:
            class_id = small[0]
            raise ValueError(
                f"class {source.class_names[class_id]!r} ({class_id}) has "
                f"{len(class_images[class_id])} {self.split} images in fold {self.fold} after "
                f"{filters}; {self.shots} shots need {self.shots + 1} (query and supports): take "
                "fewer shots, loosen the filters, or omit such classes "
                f"(data.drop_small_classes: true; {len(small)} here)"
            )
        return listed, class_images

    def _load(
        self, episode: int, image_index: int, class_id: int, rng: np.random.Generator
    ) -> tuple[Sample, Mask]:
        try:
            image, classes = self.source.load(image_index)
        except (OSError, ValueError) as error:
            raise UnreadableImage(
                f"episode {episode} ({self.split}, seed {self.seed}): {error}"
            ) from error
        return self.transform(image, classes, rng, class_id), classes

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


def counting_classes(
    source: Source, index: int, classes: Iterable[int], min_area: float
) -> list[int]:
    """List those of `classes` that cover `min_area` of an image: pixels, or a share if below 1."""
    areas = source.class_areas(index)
    height, width = source.size(index)
    smallest = min_area if min_area >= 1 else min_area * height * width
    return [c for c in classes if areas.get(c, 0) >= smallest]


def collate_episodes(batch: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Build a batch: tensors stacked, numbers as int64 [B], names and original masks in lists.

    `query_mask_original` stays a list because the originals differ in size.
    """
    items = list(batch)
    result: dict[str, Any] = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, torch.Tensor) and key != "query_mask_original":
            result[key] = default_collate(values)  # a loader's process stacks in shared memory
        elif isinstance(first, int):
            result[key] = torch.tensor(values)
        else:
            result[key] = values
    return result


def _binary(classes: Mask, class_id: int) -> Tensor:
    """Return uint8: 1 where the class is, 255 where ignored, else 0."""
    return _labels(classes, _table({class_id: 1}))


def _table(labels: Mapping[int, int]) -> NDArray[np.uint8]:
    """Return the label of each class id: 0 for those not given, 255 for ignored pixels."""
    table = np.zeros(max(IGNORE, *labels) + 1, dtype=np.uint8)
    table[list(labels)] = list(labels.values())
    table[IGNORE] = IGNORE
    return table


def _labels(classes: Mask, table: NDArray[np.uint8]) -> Tensor:
    """Return the label of each pixel, as uint8: an eighth of a loss's int64 to stack and send."""
    if classes.dtype == np.uint8:
        return torch.from_numpy(cv2.LUT(classes, table[: IGNORE + 1]))
    labels = np.where(classes < len(table), table[np.minimum(classes, len(table) - 1)], 0)
    return torch.from_numpy(labels.astype(np.uint8))
