"""95 % intervals of a mean IoU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def over_seeds(values: Sequence[float]) -> float | None:
    """Half the width of the interval of the mean, t·s/√n; None of a single value.

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
    """The 2.5 % and 97.5 % quantiles of mIoU when the episodes are drawn again with replacement.

    As in `Score.miou`, a class of which no episode is drawn counts 0.

    Args:
        rows: int64 [episodes, 3], the place of the class, its intersection and union.
        classes: number of classes.
        samples: times that as many episodes are drawn.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(samples, classes, 2, dtype=torch.float64)
    drawn = torch.randint(len(rows), (samples, len(rows)), generator=generator)
    for sample, chosen in zip(total, drawn, strict=True):
        sample.index_add_(0, rows[chosen, 0], rows[chosen, 1:].double())
    miou = (total[..., 0] / total[..., 1].clamp(min=1)).mean(dim=1)
    low, high = miou.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
