"""Segmentation of episodes and its score over one or several episode seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset

from fss.config import DataConfig
from fss.data import EpisodeDataset, Source, Split, build_episodes
from fss.loading import episode_loader
from fss.metrics import EpisodeIoU, Score


def episode_classes(source: Source, fold: int, novel: bool = True) -> dict[int, str]:
    """Ids and names of a fold's novel classes, or of its base classes."""
    chosen = set(source.folds[fold])
    return {c: name for c, name in source.class_names.items() if (c in chosen) == novel}


def segment(logits: Tensor, region: Sequence[int], size: Sequence[int]) -> Tensor:
    """Label map of one photo at its original size.

    Args:
        logits: background and foreground [2, H, W] at the network's size.
        region: height and width that the photo covers of it, from the top left.
        size: original height and width.

    Returns int64 [*size], 1 foreground.
    """
    height, width = (int(side) for side in region)
    logits = logits[None, :, :height, :width].float()
    resized = functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)
    return resized[0].argmax(0)


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The entries of a batch that a model takes; one that does not say so takes the usual three."""
    return getattr(model, "inputs", ("query_image", "support_images", "support_masks"))


@torch.no_grad()
def predict(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Label maps of a batch of test episodes, each [h, w] at its photo's original size."""
    training = model.training
    model.eval()
    logits = model(*(batch[name] for name in input_names(model))).logits
    model.train(training)
    sizes = [mask.shape for mask in batch["query_mask_original"]]
    return [
        segment(one, region, size)
        for one, region, size in zip(logits, batch["query_size"].tolist(), sizes, strict=True)
    ]


def evaluate(
    model: nn.Module,
    dataset: EpisodeDataset,
    classes: Sequence[int],
    fabric: Fabric,
    batch_size: int = 1,
    workers: int = 0,
) -> Score:
    """Score of a model on test episodes, each process taking its share of them.

    Args:
        model: maps query images, support images and support masks to a `Prediction`.
        dataset: of test episodes.
        classes: ids over which IoU is averaged.
        fabric: device, precision and processes.
        batch_size: episodes at a time and process; the score does not depend on it.
        workers: processes that load episodes.
    """
    metric = EpisodeIoU(classes)
    share = Subset(dataset, range(fabric.global_rank, len(dataset), fabric.world_size))
    for batch in episode_loader(share, batch_size, workers, fabric):
        labels = zip(
            predict(model, batch),
            batch["query_mask_original"],
            batch["class_id"].tolist(),
            strict=True,
        )
        for prediction, mask, class_id in labels:
            metric.update(prediction, mask, class_id)
    metric.counts = fabric.all_reduce(metric.counts.to(fabric.device), reduce_op="sum").cpu()
    return metric.result()


def evaluate_seeds(
    model: nn.Module,
    source: Source,
    config: DataConfig,
    fabric: Fabric,
    seeds: Sequence[int],
    episodes: int,
    batch_size: int = 1,
    novel: bool = True,
) -> dict[str, Any]:
    """Scores over several episode seeds, as plain values for JSON.

    Mean and sample standard deviation ("std", null for one seed) of mIoU, FB-IoU and of each
    class's IoU, all fractions; the values in the order of the seeds; the number of episodes of
    each class; and, per seed, the classes that no episode showed.
    """
    names = episode_classes(source, config.fold, novel)
    split: Split = "test" if novel else "validation"
    scores = [
        evaluate(
            model,
            build_episodes(config, split, episodes, seed, source),
            list(names),
            fabric,
            batch_size,
            config.workers,
        )
        for seed in seeds
    ]
    return {
        "classes_are": "novel" if novel else "base",
        "fold": config.fold,
        "shots": config.shots,
        "episodes_per_seed": episodes,
        "seeds": list(seeds),
        "miou": _spread([score.miou for score in scores]),
        "fb_iou": _spread([score.fb_iou for score in scores]),
        "iou": {name: _spread([score.iou[c] for score in scores]) for c, name in names.items()},
        "episodes": {name: sum(score.episodes[c] for score in scores) for c, name in names.items()},
        "unsampled": {
            str(seed): [names[c] for c in score.unsampled]
            for seed, score in zip(seeds, scores, strict=True)
        },
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a table of what `evaluate_seeds` returns, IoU in percent."""
    width = max(len(name) for name in ("FB-IoU", *result["iou"]))
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    yield (
        f"fold {result['fold']}, {result['classes_are']} classes, {result['shots']}-shot, "
        f"{result['episodes_per_seed']} episodes for each of the seeds {seeds}"
    )
    yield f"{'':{width}}   IoU %  ± std  episodes"
    for name, spread in result["iou"].items():
        yield f"{name:{width}}  {_percent(spread)}  {result['episodes'][name]:8d}"
    yield f"{'mIoU':{width}}  {_percent(result['miou'])}"
    yield f"{'FB-IoU':{width}}  {_percent(result['fb_iou'])}"
    for seed, names in result["unsampled"].items():
        if names:
            yield f"seed {seed} sampled no {', '.join(names)}: counted as 0, as published"


def _percent(spread: dict[str, Any]) -> str:
    std = "    –" if spread["std"] is None else f"{100 * spread['std']:5.2f}"
    return f"{100 * spread['mean']:6.2f}  {std}"


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }
