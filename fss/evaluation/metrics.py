"""Intersection over union of few-shot episodes, and 95 % intervals of its mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


@dataclass(frozen=True)
class Score:
    """Result of a set of episodes; all IoU are fractions between 0 and 1.

    Attributes:
        miou: mean foreground IoU over the classes; a class without an episode counts 0, as in the
            published code.
        fb_iou: mean of the background's and the foreground's IoU, each over all episodes.
        iou: foreground IoU of each class.
        episodes: number of episodes of each class.
        interval: 95 % interval of `miou` over the draw of the episodes (bootstrap), if computed.
        rows: int64 [episodes, 5], the class id of each episode, intersection and union of the
            background and of the foreground; if kept.
    """

    miou: float
    fb_iou: float
    iou: dict[int, float]
    episodes: dict[int, int]
    interval: tuple[float, float] | None = None
    rows: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def sampled_miou(self) -> float:
        """Return the mean foreground IoU over the classes that have an episode; 0 without any."""
        sampled = [iou for class_id, iou in self.iou.items() if self.episodes[class_id]]
        return sum(sampled) / max(1, len(sampled))

    @property
    def unsampled(self) -> list[int]:
        """Return the classes that no episode showed; they pull `miou` down."""
        return [class_id for class_id, count in self.episodes.items() if count == 0]


class EpisodeIoU:
    """Sums intersections and unions over episodes, per class.

    Of class c, IoU_c = Σ_e |P_e ∩ T_e| / Σ_e |P_e ∪ T_e| over its episodes e, with P_e the pixels
    predicted as foreground and T_e the true ones, pixels of value 255 in the mask left out.

    Args:
        classes: ids of the classes that are averaged, the fold's.

    Attributes:
        counts: int64 [classes, 5]: intersection and union of the background, of the foreground,
            and episodes. Sums over processes are the counts of all.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        if not classes:
            raise ValueError("classes: expected at least one class id, got none")
        self.classes = list(classes)
        self.counts = torch.zeros(len(self.classes), 5, dtype=torch.int64)

    def update(self, prediction: Tensor, mask: Tensor, class_id: int) -> None:
        """Add an episode.

        Args:
            prediction: integers or bool [h, w], 1 foreground.
            mask: integers [h, w], 0 background, 1 foreground, 255 ignored.
            class_id: one of `classes`.

        Raises:
            ValueError: shapes that differ, another value in the mask, an unknown class.
        """
        if prediction.shape != mask.shape:
            raise ValueError(
                f"prediction: expected the mask's size {list(mask.shape)}, "
                f"got {list(prediction.shape)}"
            )
        if class_id not in self.classes:
            raise ValueError(f"class_id: expected one of {self.classes}, got {class_id}")
        if bool(((mask != 0) & (mask != 1) & (mask != 255)).any()):
            raise ValueError(
                f"mask: expected the values 0, 1 and 255, got {mask.unique().tolist()}"
            )
        row = episode_counts(prediction, mask)
        self.counts[self.classes.index(class_id)] += row.to(self.counts.device)

    def result(self) -> Score:
        """Return the score of the episodes added so far; an empty union gives 0."""
        background, foreground = _iou(self.counts[:, 0:2].sum(0)), _iou(self.counts[:, 2:4].sum(0))
        iou = _iou(self.counts[:, 2:4]).tolist()
        return Score(
            miou=sum(iou) / len(iou),
            fb_iou=float((background + foreground) / 2),
            iou=dict(zip(self.classes, iou, strict=True)),
            episodes=dict(zip(self.classes, self.counts[:, 4].tolist(), strict=True)),
        )


def episode_counts(prediction: Tensor, mask: Tensor) -> Tensor:
    """Count what one episode, or each of several, adds to `EpisodeIoU.counts`.

    Does not synchronize with the device.

    Args:
        prediction: integers or bool [..., h, w], 1 foreground.
        mask: integers [..., h, w], 0 background, 1 foreground, 255 ignored.

    Returns int64 [..., 5].
    """
    valid, truth, predicted = mask != 255, mask == 1, prediction == 1
    pixels = valid.sum((-2, -1))
    both = (predicted & truth).sum((-2, -1))
    either = ((predicted | truth) & valid).sum((-2, -1))
    return torch.stack([pixels - either, pixels - both, both, either, torch.ones_like(both)], -1)


def foreground_iou(prediction: Tensor, mask: Tensor) -> float:
    """Return the foreground IoU of one episode: prediction [h, w], mask [h, w] with 255 ignored."""
    metric = EpisodeIoU([1])
    metric.update(prediction, mask, 1)
    return metric.result().miou


def over_seeds(values: Sequence[float]) -> float | None:
    """Return half the width of the interval of the mean, t·s/√n; None for a single value.

    From 22 values on t is 1.96 + 2.5/(n - 1), within 0.002 of Student's.
    """
    degrees = len(values) - 1
    if degrees < 1:
        return None
    t = _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.5 / degrees
    return t * statistics.stdev(values) / math.sqrt(len(values))


def bootstrap_miou(
    rows: Tensor, classes: int, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of mIoU over resamples of the episodes (bootstrap).

    Episodes are sampled with replacement. As in `Score.miou`, a class without an episode counts 0.

    Args:
        rows: int64 [episodes, 3], the index of the class, its intersection and union.
        classes: number of classes.
        samples: number of resamples, each of as many episodes.
        seed: of the sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(samples, classes, 2, dtype=torch.float64)
    drawn = torch.randint(len(rows), (samples, len(rows)), generator=generator)
    for sample, chosen in zip(total, drawn, strict=True):
        sample.index_add_(0, rows[chosen, 0], rows[chosen, 1:].double())
    miou = (total[..., 0] / total[..., 1].clamp(min=1)).mean(dim=1)
    low, high = miou.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_difference(
    first: Tensor, second: Tensor, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Return mIoU of the second less that of the first, and its 95 % interval over episodes.

    Both were tested on the same episodes: these are sampled together, with replacement, so that
    what makes an episode easy or hard for both falls out of the difference.

    Args:
        first, second: int64 [episodes, 3], the class of each episode, intersection and union.
        samples: number of resamples.
        seed: of the sampling.

    Raises:
        ValueError: episodes of other classes.
    """
    if first.shape != second.shape or not torch.equal(first[:, 0], second[:, 0]):
        raise ValueError(
            f"second: expected the {len(first)} episodes of the first, in its order, got "
            f"{len(second)} of other classes"
        )
    _, classes = first[:, 0].unique(return_inverse=True)
    counts = torch.stack([first[:, 1:], second[:, 1:]], dim=1).double()  # [episodes, 2, 2]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(first), (samples, len(first)), generator=generator)
    whole = torch.arange(len(first))
    differences = []
    for chosen in (whole, *drawn):
        sums = counts.new_zeros(int(classes.max()) + 1, 2, 2)
        sums.index_add_(0, classes[chosen], counts[chosen])
        miou = (sums[..., 0] / sums[..., 1].clamp(min=1)).mean(dim=0)
        differences.append(float(miou[1] - miou[0]))
    resampled = torch.tensor(differences[1:], dtype=torch.float64)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return differences[0], low, high


def _iou(counts: Tensor) -> Tensor:
    """Divide intersections by unions, [..., 2] to float64 [...]."""
    return counts[..., 0].double() / counts[..., 1].clamp(min=1)
