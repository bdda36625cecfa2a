"""Segmentation of episodes and its score over one or several episode seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, Subset

from fss.captured import Body, Parts, captured_forward
from fss.config import DataConfig
from fss.data import EpisodeDataset, Source, Split, build_episodes
from fss.data.loader import episode_loader, explain_killed_worker
from fss.evaluation.feature_cache import FeatureCache, Names
from fss.evaluation.metrics import EpisodeIoU, Score, bootstrap_miou, over_seeds
from fss.files import atomic_write, read_text
from fss.models import FewShotModel
from fss.processes import fixed_shapes

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def episode_classes(source: Source, fold: int, novel: bool = True) -> dict[int, str]:
    """Return ids and names of a fold's novel classes, or of its base classes."""
    chosen = set(source.folds[fold])
    return {c: name for c, name in source.class_names.items() if (c in chosen) == novel}


def enlarge(
    logits: Tensor, region: Sequence[int], size: Sequence[int], resize: str = "photo"
) -> Tensor:
    """Resize the logits of one photo to its original size.

    The published code resizes the whole canvas to a square of the photo's longer side and takes the
    photo's part of that, although the photo covers only up to 472 of 473 pixels of the canvas.

    Args:
        logits: background and foreground [2, H, W] at the network's size.
        region: height and width that the photo covers of it, from the top left.
        size: original height and width.
        resize: "photo", only what the photo covers; "canvas", as published; or "network", none at
            all, as HSNet's test.

    Returns float32 [2, *size], or [2, H, W] without a resize.
    """
    if resize == "network":
        return logits.float()
    height, width = (int(side) for side in size)
    target = (height, width)
    logits = logits[None].float()
    if resize == "canvas":
        target = (max(target), max(target))
    else:
        logits = logits[..., : int(region[0]), : int(region[1])]
    resized = functional.interpolate(logits, size=target, mode="bilinear", align_corners=True)
    return resized[0, :, :height, :width]


def segment(
    logits: Tensor, region: Sequence[int], size: Sequence[int], resize: str = "photo"
) -> Tensor:
    """Label the pixels of one photo, int64 of the size that `enlarge` gives, 1 foreground."""
    return enlarge(logits, region, size, resize).argmax(0)


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Return the entries of a batch that a model takes, the usual three if it does not say so."""
    return getattr(model, "inputs", ("query_image", "support_images", "support_masks"))


def forward_of(model: nn.Module) -> Body:
    """Make the function that maps the single part of a step, a batch, to its queries' logits."""
    names = input_names(model)

    def forward(parts: Parts) -> Tensor:
        (batch,) = parts
        return model(*(batch[name] for name in names)).logits

    return forward


def cached_forward(model: FewShotModel, cache: FeatureCache, fabric: Fabric) -> Body:
    """Make the same function with features from a cache."""

    def forward(parts: Parts) -> Tensor:
        (batch,) = parts
        others = (batch.get(name) for name in model.inputs[3:])
        with fabric.autocast():
            features = cache.features(batch)
            return model.head(features, batch["query_image"].shape[-2:], *others).logits

    return forward


@torch.no_grad()
def predict(
    model: nn.Module,
    batch: dict[str, Any],
    resize: str = "photo",
    forward: Body | None = None,
) -> list[Tensor]:
    """Segment a batch of test episodes, each at its photo's original size; see `segment`.

    `forward` runs the model for it, if given.
    """
    training = model.training
    model.eval()
    logits = (forward or forward_of(model))([batch])
    model.train(training)
    sizes = [mask.shape for mask in batch["query_mask_original"]]
    return [
        segment(one, region, size, resize)
        for one, region, size in zip(logits, batch["query_size"].tolist(), sizes, strict=True)
    ]


def evaluate(
    model: nn.Module,
    dataset: EpisodeDataset,
    classes: Sequence[int],
    fabric: Fabric,
    batch_size: int = 1,
    workers: int = 0,
    resize: str = "photo",
    feature_cache: float = 0.0,
    graph: str = "off",
) -> Score:
    """Score a model on test episodes; see `evaluate_all`."""
    return evaluate_all(
        model, [dataset], classes, fabric, batch_size, workers, resize, feature_cache, graph
    )[0]


def evaluate_all(
    model: nn.Module,
    datasets: Sequence[EpisodeDataset],
    classes: Sequence[int],
    fabric: Fabric,
    batch_size: int = 1,
    workers: int = 0,
    resize: str = "photo",
    feature_cache: float = 0.0,
    graph: str = "off",
) -> list[Score]:
    """Score a model on several sets of test episodes, each process taking its share of all.

    Every process adds integers, so the sums and the scores are the same for any number of them.
    With a cache, the episodes of all sets run in the order of their classes and queries, so that
    photos are used again soon; the scores of each set are the same.

    Args:
        model: maps query images, support images and support masks to a `Prediction`.
        datasets: of test episodes.
        classes: ids over which IoU is averaged.
        fabric: device, precision and processes.
        batch_size: episodes at a time and process; the scores do not depend on it.
        workers: processes that load episodes.
        resize: see `segment`.
        feature_cache: GiB of features to keep, see `FeatureCache`.
        graph: "auto" runs whole batches as a CUDA graph on a GPU; not with a cache, where a batch
            computes what it lacks. See `captured_forward`.
    """
    # Per episode the index of its class, then its counts; each process fills its rows.
    rows = torch.zeros(sum(map(len, datasets)), 6, dtype=torch.int64)
    order = list(range(len(rows)))
    network = getattr(model, "module", model)  # Fabric wraps it
    caches = feature_cache > 0 and isinstance(network, FewShotModel)
    names = [name for dataset in datasets for name in _names(dataset)] if caches else []
    if caches:
        order.sort(key=lambda place: (names[place].class_id, names[place].query, place))
    # neighbors share photos: a process takes consecutive ones
    first, last = (len(rows) * (fabric.global_rank + n) // fabric.world_size for n in (0, 1))
    share = order[first:last]
    if caches:
        cache = FeatureCache(network, feature_cache, [names[place] for place in share])
        eager = recorded = cached_forward(network, cache, fabric)
    else:
        eager = forward_of(model)
        recorded = captured_forward(eager, model, input_names(model), fabric, graph)
    places = iter(share)
    episodes = Subset(ConcatDataset(datasets), share)
    with fixed_shapes(not caches):  # else a batch computes what it lacks
        for batch in episode_loader(episodes, batch_size, workers, fabric):
            forward = recorded if len(batch["class_id"]) == batch_size else eager
            predicted = predict(model, batch, resize, forward)
            labels = zip(
                predicted,
                batch["query_mask" if resize == "network" else "query_mask_original"],
                batch["class_id"].tolist(),
                strict=True,
            )
            for prediction, mask, class_id in labels:
                one = EpisodeIoU(classes)
                one.update(prediction, mask, class_id)
                row = rows[next(places)]
                row[0] = place = one.classes.index(class_id)
                row[1:] = one.counts[place]
    rows = fabric.all_reduce(rows.to(fabric.device), reduce_op="sum").cpu()
    return [_score(part, classes) for part in rows.split([len(d) for d in datasets])]


def _names(dataset: EpisodeDataset) -> list[Names]:
    """List the photos and the class of each episode."""
    drawn = (dataset.draw(index) for index in range(len(dataset)))
    name = dataset.source.name
    return [Names(name(e.query), tuple(map(name, e.supports)), e.class_id) for e in drawn]


def _score(rows: Tensor, classes: Sequence[int]) -> Score:
    """Score rows [episodes, 6]: the index of the class, then the counts of `EpisodeIoU`."""
    metric = EpisodeIoU(classes)
    metric.counts.index_add_(0, rows[:, 0], rows[:, 1:])
    interval = bootstrap_miou(rows[:, [0, 3, 4]], len(classes))
    kept = rows[:, :5].clone()
    kept[:, 0] = torch.tensor(classes)[rows[:, 0]]
    return replace(metric.result(), interval=interval, rows=kept)


EPISODE_COLUMNS = (
    "seed", "class_id",
    "background_intersection", "background_union", "intersection", "union",
)  # fmt: skip
"""What the table of a test's episodes says of each, in pixels."""


def write_episodes(path: Path, seeds: Sequence[int], scores: Sequence[Score]) -> None:
    """Write a CSV table of the episodes of a test, seed by seed, see `EPISODE_COLUMNS`."""
    lines = [",".join(EPISODE_COLUMNS)]
    for seed, score in zip(seeds, scores, strict=True):
        assert score.rows is not None
        lines += [",".join(map(str, (seed, *row))) for row in score.rows.tolist()]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def read_episodes(path: Path) -> Tensor:
    """Read what `write_episodes` wrote: int64 [episodes, 6].

    Raises:
        FileNotFoundError: no such file.
        ValueError: another table, or a damaged one.
    """
    head, *lines = read_text(path).split()
    rows = [line.split(",") for line in lines]
    if head != ",".join(EPISODE_COLUMNS) or any(len(row) != len(EPISODE_COLUMNS) for row in rows):
        raise ValueError(f"{path}: expected the columns {', '.join(EPISODE_COLUMNS)}, got {head}")
    return torch.tensor([[int(value) for value in row] for row in rows], dtype=torch.int64)


def evaluate_seeds(
    model: nn.Module,
    source: Source,
    config: DataConfig,
    fabric: Fabric,
    seeds: Sequence[int],
    episodes: int,
    batch_size: int = 1,
    novel: bool = True,
    resize: str = "photo",
    feature_cache: float = 0.0,
    graph: str = "off",
    episodes_file: Path | None = None,
) -> dict[str, Any]:
    """Score a model over several episode seeds; the result is plain values for JSON.

    Mean, sample standard deviation ("std") and half the 95 % interval of the mean ("ci95", both
    null for one seed) of mIoU, FB-IoU and of each class's IoU, all fractions; the values in the
    order of the seeds; "miou_sampled", without the classes that no episode showed, where "miou"
    counts 0; "bootstrap", a seed's 95 % interval of mIoU over its episodes; the number of episodes
    of each class; and, per seed, the classes that no episode showed. `feature_cache` and
    `graph` as for `evaluate_all`. The first process writes the counts of each episode to
    `episodes_file`, see `write_episodes`.
    """
    names = episode_classes(source, config.fold, novel)
    split: Split = "test" if novel else "validation"
    with explain_killed_worker(lambda: "Nothing was scored."):
        scores = evaluate_all(
            model,
            [build_episodes(config, split, episodes, seed, source) for seed in seeds],
            list(names),
            fabric,
            batch_size,
            config.workers,
            resize,
            feature_cache,
            graph,
        )
    if episodes_file is not None and fabric.is_global_zero:
        write_episodes(episodes_file, seeds, scores)
    return {
        "classes_are": "novel" if novel else "base",
        "fold": config.fold,
        "shots": config.shots,
        "episodes_per_seed": episodes,
        "seeds": list(seeds),
        "miou": _spread([score.miou for score in scores]),
        "miou_sampled": _spread([score.sampled_miou for score in scores]),
        "bootstrap": [list(score.interval or ()) for score in scores],
        "resize": resize,
        "fb_iou": _spread([score.fb_iou for score in scores]),
        "class_ids": {name: c for c, name in names.items()},
        "iou": {name: _spread([score.iou[c] for score in scores]) for c, name in names.items()},
        "episodes": {name: sum(score.episodes[c] for score in scores) for c, name in names.items()},
        "unsampled": {
            str(seed): [names[c] for c in score.unsampled]
            for seed, score in zip(seeds, scores, strict=True)
        },
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of what `evaluate_seeds` returns, IoU in percent."""
    width = max(len(name) for name in ("FB-IoU", *result["iou"]))
    if result.get("trained") == "nothing":
        yield f"matching with {result['weights']}, nothing trained, {result['size']} px"
    if result.get("seen_in_training"):
        yield f"left out, because training saw them: {', '.join(result['seen_in_training'])}"
    elif "seen_in_training" in result and result["seen_in_training"] is None:
        yield "which of these classes training saw is not known: its data are not at hand"
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    yield (
        f"fold {result['fold']}, {result['classes_are']} classes, {result['shots']}-shot, "
        f"{result['episodes_per_seed']} episodes for each of the seeds {seeds}"
    )
    yield f"{'':{width}}   IoU %  ± std  episodes"
    for name, spread in result["iou"].items():
        yield f"{name:{width}}  {_percent(spread)}  {result['episodes'][name]:8d}"
    yield f"{'mIoU':{width}}  {_percent(result['miou'])}{_interval(result)}"
    yield f"{'FB-IoU':{width}}  {_percent(result['fb_iou'])}"
    for seed, names in result["unsampled"].items():
        if names:
            yield f"seed {seed} sampled no {', '.join(names)}: counted as 0, as published"
    if any(result["unsampled"].values()):
        yield f"{'mIoU':{width}}  {_percent(result['miou_sampled'])}  over sampled classes only"


def _interval(result: dict[str, Any]) -> str:
    half = result["miou"]["ci95"]
    if half is not None:
        return f"  95 %: ± {100 * half:.2f} over seeds"
    low, high = result["bootstrap"][0]
    return f"  95 %: {100 * low:.2f} to {100 * high:.2f} over episodes"


def _percent(spread: dict[str, Any]) -> str:
    std = "    –" if spread["std"] is None else f"{100 * spread['std']:5.2f}"
    return f"{100 * spread['mean']:6.2f}  {std}"


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "ci95": over_seeds(values),
        "values": values,
    }
