"""ASGNet: Li et al., "Adaptive Prototype Learning and Allocation", CVPR 2021.

The published code is the reference where it says more than the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import PASCAL_BINS, ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.layers import check_head, classifier, pointwise_cat, two_convolutions
from fss.models.pfenet import FeatureEnrichment
from fss.models.pooling import masked_average_pool, nearest, resize

_SUPERPIXELS = 5
_SUPERPIXEL_AREA = 100  # positions per superpixel
_DISTANCE_UNIT = 10.0  # positions that count as much as one unit of the features
_TRAIN_ITERATIONS, _EVAL_ITERATIONS = 10, 5


class ASGNet(FewShotModel):
    """Superpixel-guided clustering of the supports, and guided prototype allocation.

    Layers 2 and 3 of the backbone are reduced to `channels` channels by one linear layer, for query
    and support alike. The foreground of each support is clustered to up to 5 prototypes, one for
    every 100 positions, see `place_seeds` and `cluster`; a foreground of less than two has its mean
    feature instead (section 4.1). Of the prototypes of all supports each query position gets the
    one of the largest cosine, and the sum of all cosines is its probability (section 4.2). Both,
    and the query, go through the modules of PFENet that follow.

    As published:

    - nothing that concerns the supports is differentiated: they teach no weight. So they run
      without autograd, apart from the queries;
    - prototypes are clustered in 10 iterations while training and in 5 otherwise;
    - seeds are placed on the mask resized to the nearest pixel, and clustering reads where the
      mask, resized with aligned corners, is wholly foreground;
    - of the seeds as many are used as have a row other than 0, or, if there are more of them, a
      column other than 0;
    - the sum of cosines grows with the number of prototypes.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifiers
            drop 0.1 of their channels too.
        bins: bins per side of each scale, see `PFENet`.
    """

    unused_layers = ("layer4",)
    supports_train = False
    official_names: ClassVar[Mapping[str, str]] = {
        "reduce.": "down_conv.",
        "enrich.merge.": "corr_conv.",
        "enrich.alpha.": "alpha_conv.",
        "enrich.beta.": "beta_conv.",
        "enrich.classifiers.": "inner_cls.",
        "enrich.project.": "res1.",
        "residual.": "res2.",
        "classifier.": "cls.",
    }
    official_unused = ("layer4.",)

    def __init__(
        self,
        backbone: Backbone,
        channels: int = 256,
        dropout: float = 0.5,
        bins: Sequence[float] = PASCAL_BINS,
    ) -> None:
        super().__init__(backbone)
        check_head(channels, dropout)
        dropped = 0.1 if dropout else 0.0
        features = backbone.channels[1] + backbone.channels[2]
        self.reduce = nn.Sequential(
            nn.Conv2d(features, channels, 1, bias=False), nn.Dropout2d(dropout)
        )
        self.enrich = FeatureEnrichment(channels, bins, dropped)
        self.residual = two_convolutions(channels)
        self.classifier = classifier(channels, 2, dropped)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> ASGNet:
        return cls(backbone, config.channels, config.dropout, config.bins or PASCAL_BINS)

    def maps(self, images: Tensor) -> Maps:
        """Return the photos: the backbone sees those of supports without autograd."""
        return (images,)

    def query_maps(self, *maps: Tensor) -> Maps:
        """Compute layers 2 and 3 of the queries."""
        return self.backbone.features(maps[0])

    @torch.no_grad()
    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute prototypes [N, 5, C] of the supports, and which of the five there are [N, 5]."""
        low, middle = self.backbone.features(maps[0])
        features = pointwise_cat(self.reduce, middle, low)
        mask = self.shrink_mask(masks, middle)
        seeds, count = place_seeds(nearest(masks == 1, features.shape[-2:]))
        iterations = _TRAIN_ITERATIONS if self.training else _EVAL_ITERATIONS
        clustered = cluster(features, mask > 1 - 1e-6, seeds, iterations)
        mean = masked_average_pool(features, mask).flatten(1)
        slot = torch.arange(_SUPERPIXELS, device=count.device)
        exists = slot < count.clamp(min=1)[:, None]
        alone = (count < 2)[:, None, None]
        prototypes = torch.where(alone, mean[:, None].to(clustered.dtype), clustered)
        return Supports((prototypes, exists.to(prototypes.dtype)))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Segment the queries by the prototypes that their positions get.

        While training, the auxiliary logits are those of each scale.
        """
        _, low, middle = features.query
        prototypes, exists = (each.flatten(1, 2) for each in features.supports)
        query = pointwise_cat(self.reduce, middle, low)
        guide, probability = allocate(query, prototypes, exists)
        enriched, auxiliary = self.enrich(query, guide.to(query.dtype), probability)
        enriched = enriched + self.residual(enriched)
        return Prediction(resize(self.classifier(enriched), size), auxiliary)


def place_seeds(mask: Tensor, seeds: int = _SUPERPIXELS) -> tuple[Tensor, Tensor]:
    """Place seeds in masks, each as far as can be from the background and the seeds before.

    Within the smallest box around the foreground, the next seed is the foreground position of the
    largest Euclidean distance to the nearest background position or seed of the box, of equal ones
    the first row by row. A box without background has its first seed at its last corner. There is
    one seed for every 100 positions, rounded, half to even.

    Args:
        mask: foreground, bool [N, h, w].
        seeds: the most seeds.

    Returns:
        Rows and columns int64 [N, seeds, 2], 0 where there is no seed, and how many of the seeds
        ASGNet uses, int64 [N]: the rows or the columns that are not 0, whichever are more. Fewer
        than two are none.
    """
    height, width = mask.shape[1:]
    row, column = (torch.arange(side, device=mask.device) for side in (height, width))
    inside = _between(mask.any(dim=2))[:, :, None] & _between(mask.any(dim=1))[:, None, :]
    background = inside & ~mask
    far = height * height + width * width + 1
    squares = (row[:, None] - row) ** 2
    distance = torch.where(background[:, None], squares[:, :, None], far).amin(dim=2)
    squares = (column[:, None] - column) ** 2
    distance = (distance[:, :, None] + squares).amin(dim=3)

    place = row[:, None] * width + column
    score = torch.where(background.any(dim=(1, 2))[:, None, None], distance, place)
    placed = []
    for _ in range(seeds):
        seed = torch.where(mask, score, -1).flatten(1).argmax(dim=1)
        at = torch.stack([seed // width, seed % width], dim=1)
        placed.append(at)
        rows, columns = ((row - at[:, :1]) ** 2, (column - at[:, 1:]) ** 2)
        distance = torch.minimum(distance, rows[:, :, None] + columns[:, None, :])
        score = distance

    count = (mask.sum(dim=(1, 2)).double() / _SUPERPIXEL_AREA).round().long().clamp(max=seeds)
    count = torch.where(count < 2, 0, count)
    exists = torch.arange(seeds, device=mask.device) < count[:, None]
    at = torch.stack(placed, dim=1) * exists[..., None]
    return at, (at != 0).sum(dim=1).amax(dim=1)


def cluster(features: Tensor, region: Tensor, seeds: Tensor, iterations: int) -> Tensor:
    """Cluster the features of a region around seeds, as differentiable SLIC does (equation 2).

    A point is a feature and its position, and a center begins as the point of its seed. In each
    iteration, with distances d_ps = (|f_p - f_s|² + |x_p - x_s|² / 100)^½,

        center_s = Σ_p exp(-d_ps) · point_p / Σ_p exp(-d_ps)

    Args:
        features: [N, C, h, w].
        region: the points that count, bool [N, 1, h, w]; an empty one gives 0.
        seeds: rows and columns int64 [N, S, 2].
        iterations: from 1.

    Returns:
        The features of the centers [N, S, C], in float32 at least.
    """
    height, width = features.shape[-2:]
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        sides = (torch.arange(n, device=features.device, dtype=dtype) for n in (height, width))
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij")) / _DISTANCE_UNIT
        grid = grid.expand(len(features), -1, -1, -1)
        points = torch.cat([features.to(dtype), grid], dim=1).flatten(2).mT
        inside = region.flatten(2).mT
        place = (seeds[..., 0] * width + seeds[..., 1])[..., None]
        centers = points.gather(1, place.expand(-1, -1, points.shape[2]))
        for _ in range(iterations):
            # not by a matrix product, which cancels digits of close points
            distance = torch.stack(
                [torch.linalg.vector_norm(points - c[:, None], dim=2) for c in centers.unbind(1)],
                dim=2,
            )
            lowest = torch.finfo(dtype).min
            share = (-distance).masked_fill(~inside, lowest).softmax(dim=1) * inside
            centers = share.mT @ points
        return centers[..., :-2]


def allocate(query: Tensor, prototypes: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Give each query position the prototype of the largest cosine, of equal ones the first.

    Args:
        query: features [B, C, h, w].
        prototypes: [B, P, C].
        exists: 1 for each prototype that there is, else 0, [B, P].

    Returns:
        The prototypes [B, C, h, w] and the sum of the cosines to all [B, 1, h, w], in float32 at
        least.
    """
    size = query.shape[-2:]
    with torch.autocast(query.device.type, enabled=False):
        prototypes = prototypes.to(torch.promote_types(prototypes.dtype, torch.float32))
        positions = functional.normalize(query.flatten(2).to(prototypes.dtype), dim=1, eps=1e-7)
        cosine = functional.normalize(prototypes, dim=2, eps=1e-7) @ positions
        there = exists[..., None]
        probability = (cosine * there).sum(dim=1, keepdim=True)
        best = cosine.masked_fill(there == 0, -2).argmax(dim=1)
        guide = prototypes.gather(1, best[..., None].expand(-1, -1, prototypes.shape[2])).mT
    return guide.unflatten(2, size), probability.unflatten(2, size)


def _between(marked: Tensor) -> Tensor:
    """Mark what lies between the first and the last mark of each row, bool [N, n]."""
    counts = marked.long().cumsum(dim=1)
    return (counts > 0) & ((counts < counts[:, -1:]) | marked)
