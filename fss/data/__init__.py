"""Data sets and few-shot episodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fss.data.coco import CocoSource
from fss.data.episodes import Draw, Episode, EpisodeDataset, Split, collate_episodes
from fss.data.folder import FolderSource
from fss.data.fss1000 import Fss1000Source
from fss.data.pascal import PascalSource
from fss.data.shapes import ShapesSource
from fss.data.source import IGNORE, Source
from fss.data.transforms import (
    MEAN,
    STD,
    EvalTransform,
    Sample,
    SquareTransform,
    TrainTransform,
    Transform,
)

if TYPE_CHECKING:
    from fss.config import DataConfig

__all__ = [
    "IGNORE",
    "MEAN",
    "STD",
    "CocoSource",
    "Episode",
    "EpisodeDataset",
    "EvalTransform",
    "FolderSource",
    "Fss1000Source",
    "PascalSource",
    "Sample",
    "ShapesSource",
    "Source",
    "Split",
    "SquareTransform",
    "TrainTransform",
    "Transform",
    "build_episodes",
    "build_source",
    "collate_episodes",
    "test_transform",
    "train_transform",
]


def build_source(config: DataConfig) -> Source:
    """Build the source that a configuration names.

    Raises:
        FileNotFoundError, ValueError: see `FolderSource`, `PascalSource`, ….
    """
    if config.source == "shapes":
        return ShapesSource(size=config.size, seed=config.seed)
    root, train, val = str(config.root), config.train_list, config.val_list
    skip = config.skip_unreadable
    if config.source == "folder":
        return FolderSource(root, skip_unreadable=skip)
    if config.source == "pascal":
        return PascalSource(root, train, val, skip)
    if config.source == "coco":
        return CocoSource(root, config.folds, train, val, skip)
    if config.source == "fss1000":
        return Fss1000Source(root, str(train), str(val), skip)
    raise ValueError(f"data.source: {config.source!r} has no source in build_source")


def train_transform(config: DataConfig) -> Transform:
    """Build the training transform of a configuration."""
    if config.protocol == "hsnet":
        return SquareTransform(config.size)
    return TrainTransform(config.size, config.scale, config.rotate)


def test_transform(config: DataConfig) -> Transform:
    """Build the evaluation transform of a configuration."""
    return (
        SquareTransform(config.size) if config.protocol == "hsnet" else EvalTransform(config.size)
    )


def _draw_by(config: DataConfig) -> Draw:
    if config.protocol == "pfenet":
        return "image"
    return "class" if config.source == "coco" else "pair"


def build_episodes(
    config: DataConfig, split: Split, episodes: int, seed: int, source: Source | None = None
) -> EpisodeDataset:
    """Build the episodes of a split; pass `source` to share one between splits."""
    return EpisodeDataset(
        source if source is not None else build_source(config),
        config.fold,
        split,
        config.shots,
        train_transform(config) if split == "train" else test_transform(config),
        episodes,
        seed,
        min_area=config.min_area,
        exclude_novel=config.exclude_novel,
        shuffle=split == "train" or config.shuffle_test,
        draw_by=_draw_by(config),
        repeat_supports=config.protocol == "hsnet",
        drop_small_classes=config.drop_small_classes,
        skip_unreadable=config.skip_unreadable,
    )
