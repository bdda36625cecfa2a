"""PPNet: Liu et al., "Part-Aware Prototype Network for Few-Shot Semantic Segmentation", ECCV 2020.

The published code is the reference where it says more than the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_target
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.loss import cross_entropy
from fss.models.panet import alignment_loss, compare, masked_means, predicted_masks
from fss.models.pooling import enlarged_average_pool, interpolation, resize

# Below this many positions at its own size, an object's parts are found at the photo's size.
_FEW = 10
_ROUNDS = 10
_BASE_WEIGHT = 0.1
# The last convolution of the base classes: here, and in the authors' files.
_BASE_OUTPUTS = ("base_classifier.0.bias", "aspp.c0.bias")


class PPNet(FewShotModel):
    """PANet with several prototypes of each class, one for each of its parts.

    This is the network of the paper without unlabeled photos: part-aware prototypes (section 4.2)
    and a semantic branch (section 4.5); the graph that refines prototypes by superpixels of
    unlabeled photos (section 4.3) is not here. F is layer 4 of the backbone at output stride 8
    without the last ReLU. k-means divides the positions of all K supports that show the object into
    `parts`, and those of the background likewise; with the mean g_j of F under the mask of j, as in
    PANet, and the mean F of part k,

        p_jk = mean_jk + share·g_j
        logit_j = 20·max_k cos(F, p_jk)

    resized to the photo. The object's positions are those of F resized to twice its size, the
    background's those of F; if a support has at most ten of them, they are those of F resized to
    the photo. k-means starts from positions that do not depend on the order of the supports (see
    `find_parts`), not from random ones as in the published code, and has ten rounds; a part that
    loses its positions keeps its mean until the last round, then has 0. A support whose mask is
    empty adds nothing, in the published code a position of zeros. Pixels of masks that are 255
    belong to neither, while the published data loader takes them for background.

    While training, the parts of what was found in the query segment the supports, as in PANet, and
    the semantic branch classifies the base classes in query and supports: a sum of dilated
    convolutions of relu(F), DeepLab's.

    Args:
        backbone: with the `backbone_options`.
        base_classes: number of base classes of the semantic branch.
        parts: prototypes of a class.
        share: of the mean of a class in the prototypes of its parts; the published code has 0.5
            with the semantic branch, 0.8 without.
    """

    targets = (
        *FewShotModel.targets,
        "support_masks",
        "query_base_mask",
        "support_base_masks",
    )
    backbone_options: ClassVar[Mapping[str, Any]] = {
        "last_relu": False,
        "late_dilation": True,
        "vgg_dilation": 2,
    }
    any_size = True
    needs_base_classes = True
    official_names: ClassVar[Mapping[str, str]] = {
        "backbone.": "encoder.",
        "base_classifier.": "aspp.c",
    }

    def __init__(
        self, backbone: Backbone, base_classes: int, parts: int = 5, share: float = 0.5
    ) -> None:
        super().__init__(backbone)
        if base_classes < 1:
            raise ValueError(f"base_classes: expected at least one base class, got {base_classes}")
        if parts < 1:
            raise ValueError(f"parts: expected at least 1, got {parts}")
        self.parts, self.share = parts, share
        self.base_classifier = nn.ModuleList(
            nn.Conv2d(backbone.channels[3], 1 + base_classes, 3, padding=rate, dilation=rate)
            for rate in (6, 12, 18, 24)
        )
        for conv in self.base_classifier:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> PPNet:
        return cls(backbone, base_classes)

    @classmethod
    def count_base_classes(cls, state: Mapping[str, Any]) -> int:
        """Return how many outputs the semantic branch has besides the background's."""
        return next((len(state[name]) - 1 for name in _BASE_OUTPUTS if name in state), 1)

    def maps(self, images: Tensor) -> Maps:
        """Compute layer 4 of photos [N, 3, H, W]."""
        return (self.backbone(images),)

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute the classes' means [N, 2, C], and keep what is divided into parts."""
        means = [enlarged_average_pool(maps[0], masks == j, align_corners=True) for j in (0, 1)]
        return Supports((torch.stack(means, dim=1), *maps, masks))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Compare the queries with the parts of their supports.

        Auxiliary are, while training, the logits of the supports [B, K, 2, h, w] by the queries'
        parts, whether any object was found in the query [B], 0 or 1, and the logits of the base
        classes [B, K + 1, n, h, w], of the supports and then of the query.
        """
        means, maps, masks = features.supports
        (query,) = features.query
        scales = (1, 2)
        parts = [
            find_parts(maps, masks == j, masks == j, scale, self.parts)
            for j, scale in enumerate(scales)
        ]
        logits = self._compare(query, parts, means.mean(dim=1))
        auxiliary: tuple[Tensor, ...] = ()
        if self.training:
            photos = torch.cat([maps, query[:, None]], dim=1)
            semantic = self.semantic(photos.flatten(0, 1)).unflatten(0, photos.shape[:2])
            auxiliary = (*self._align(query, logits, maps, size), semantic)
        return Prediction(resize(logits, size), auxiliary)

    def semantic(self, maps: Tensor) -> Tensor:
        """Classify the base classes at each position: [N, C, h, w] to [N, 1 + classes, h, w]."""
        views = [conv(maps.relu()) for conv in self.base_classifier]
        return torch.stack(views).sum(dim=0)

    def loss(
        self,
        prediction: Prediction,
        query_mask: Tensor,
        support_masks: Tensor,
        query_base_mask: Tensor,
        support_base_masks: Tensor,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Add to the cross-entropy of queries that of supports and a tenth of the base classes'.

        The last two while training only. A mean over the base classes is one over all pixels of
        the batch.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            support_masks: integers [B, K, H, W]; 0 background, 1 foreground, else ignored.
            query_base_mask, support_base_masks: uint8 or int64 [B, H, W] and [B, K, H, W]; 0
                background, 1 to n the base classes, 255 ignored.
            class_weight: weights of background and foreground [2], not for the base classes; each
                mean is divided by the weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        check_target(prediction, query_base_mask, None, "query_base_mask")
        loss = cross_entropy(prediction.logits, query_mask, class_weight)
        if not prediction.auxiliary:
            return loss
        logits, found, semantic = prediction.auxiliary
        loss = loss + alignment_loss(logits, found, support_masks, class_weight, align_corners=True)
        base_masks = torch.cat([support_base_masks, query_base_mask[:, None]], dim=1)
        base = cross_entropy(semantic.flatten(0, 1), base_masks.flatten(0, 1))
        return loss + _BASE_WEIGHT * base

    def _compare(self, features: Tensor, parts: Sequence[Tensor], means: Tensor) -> Tensor:
        """Compute logits [B, 2, h, w] by the parts [B, n, C] of each class and its mean."""
        prototypes = torch.stack(list(parts), dim=1) + self.share * means[:, :, None]
        logits = compare(features, prototypes.flatten(1, 2))
        return logits.unflatten(1, (len(parts), self.parts)).amax(dim=2)

    def _align(
        self, query: Tensor, logits: Tensor, supports: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Segment supports [B, K, C, h, w] by the parts of what was found in the queries."""
        masks = predicted_masks(logits)
        large = functional.interpolate(masks.to(torch.uint8), size=tuple(size), mode="nearest")
        parts = [
            find_parts(query[:, None], masks[:, j, None], large[:, j, None] == 1, 2, self.parts)
            for j in (0, 1)
        ]
        shots = supports.shape[1]
        repeated = [
            each.repeat_interleave(shots, dim=0) for each in (*parts, masked_means(query, masks))
        ]
        found = self._compare(supports.flatten(0, 1), repeated[:2], repeated[2])
        return found.unflatten(0, (-1, shots)), masks[:, 1].any(dim=(1, 2)).to(found.dtype)


def find_parts(maps: Tensor, mask: Tensor, large: Tensor, scale: int, parts: int) -> Tensor:
    """Divide masked positions of K maps by k-means, and average each part: [B, parts, C].

    As the means and the products with them are linear in the maps, resized maps are not computed.
    It starts from the positions in the middle of equal pieces of their order by the product with
    the mean of all. A position as far from two means to the last digit may go to either.

    Args:
        maps: [B, K, C, h, w].
        mask: bool [B, K, H', W'], of which the nearest are taken at `scale` times the maps' size.
        large: bool [B, K, H, W], the mask at the photo's size, which is used for those of the K
            that have at most ten positions in the first.
        scale: 1 or 2.
        parts: number of parts. One without any position has 0.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    with torch.autocast(maps.device.type, enabled=False):
        positions = _Positions(maps, mask, large, scale)
        with torch.no_grad():
            means, _ = positions.means(positions.starts(parts))
            for _ in range(_ROUNDS - 1):
                moved, empty = positions.means(positions.nearest(means))
                means = torch.where(empty, means, moved)
            nearest = positions.nearest(means)
        return positions.means(nearest)[0]


class _Positions:
    """The masked positions of K maps [B, K, C, h, w], resized to two sizes.

    Attributes:
        chosen: bool [B, P], of all positions of each of the K at the one size and at the other.
    """

    def __init__(self, maps: Tensor, mask: Tensor, large: Tensor, scale: int) -> None:
        self.maps = maps
        sizes = [scale * side for side in maps.shape[-2:]]
        # interpolate takes no bool
        small = functional.interpolate(mask.to(torch.uint8), size=sizes, mode="nearest") == 1
        few = small.sum(dim=(2, 3), keepdim=True) <= _FEW
        masks = (small & ~few, large & few)
        self.chosen = torch.cat([each.flatten(2) for each in masks], dim=2).flatten(1)
        self.sizes = [each.shape[-2:] for each in masks]
        self.grids = [
            tuple(
                interpolation(side, end, True, like=maps)
                for side, end in zip(maps.shape[-2:], size, strict=True)
            )
            for size in self.sizes
        ]

    def starts(self, parts: int) -> Tensor:
        """Choose where k-means starts, whatever the order of the K: bool [B, parts, P].

        Of the positions in the order of their product with their mean, those in the middle of
        `parts` equal pieces.
        """
        mean, _ = self.means(self.chosen[:, None])
        order = self.products(mean)[:, 0].masked_fill(~self.chosen, torch.inf).argsort()
        count = self.chosen.sum(dim=1, keepdim=True)
        ranks = (2 * torch.arange(parts, device=count.device) + 1) * count // (2 * parts)
        every = torch.arange(order.shape[1], device=count.device)
        return order.gather(1, ranks)[:, :, None] == every

    def products(self, vectors: Tensor) -> Tensor:
        """Multiply the features at each position by vectors [B, n, C]: [B, n, P]."""
        small = torch.einsum("bkchw,bnc->bnkhw", self.maps, vectors)
        resized = [(rows.mT @ small @ columns).flatten(3) for rows, columns in self.grids]
        return torch.cat(resized, dim=3).flatten(2)

    def nearest(self, means: Tensor) -> Tensor:
        """Return which positions are nearest to each of means [B, n, C]: bool [B, n, P]."""
        distances = means.square().sum(dim=2)[:, :, None] - 2 * self.products(means)
        index = distances.argmin(dim=1, keepdim=True)
        return index == torch.arange(means.shape[1], device=means.device)[:, None]

    def means(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """Average the chosen among positions bool [B, n, P]: [B, n, C], and whether there are none.

        Without any the mean is 0.
        """
        weights = (members & self.chosen[:, None]).to(self.maps.dtype)
        counts = weights.sum(dim=2, keepdim=True)
        lengths = [rows.shape[1] * columns.shape[1] for rows, columns in self.grids]
        split = weights.unflatten(2, (self.maps.shape[1], -1)).split(lengths, dim=3)
        spread = sum(
            rows @ each.unflatten(3, size) @ columns.mT
            for each, size, (rows, columns) in zip(split, self.sizes, self.grids, strict=True)
        )
        sums = torch.einsum("bnkhw,bkchw->bnc", spread, self.maps)
        return sums / counts.clamp(min=1), counts == 0
