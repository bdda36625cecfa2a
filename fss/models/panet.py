"""PANet: Wang et al., "PANet: Few-Shot Image Semantic Segmentation with Prototype Alignment", ICCV
2019.

Equations are those of the paper; the published code is the reference where it says more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_target
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.loss import cross_entropy
from fss.models.pooling import enlarged_average_pool, resize
from fss.models.vgg import stage_names


class PANet(FewShotModel):
    """Prototypes of background and object, compared with each position, and their alignment.

    The features F are those of the whole backbone, its layer 4 at output stride 8 without the last
    ReLU: published for VGG-16 without batch norm, whose last stage is dilated. A ResNet is that of
    PPNet's code, which has PANet on it as its baseline. A prototype p_j is the mean of F, resized
    to the photo, under the mask of j, background (0) or object (1), and the mean over K supports
    (section 3.2); pixels of a mask that are 255 are neither, while the published data loader takes
    them for background. The logits are

        logit_j = 20·cos(F, p_j)                                    (section 3.3)

    at the size of the map, then resized to the photo. Nothing is learnt but the backbone: the
    model has no parameters beside it, so a regime must train some of that, and without training it
    segments as well.

    While training, the roles are exchanged (section 3.4, prototype alignment regularization): the
    mean F of the query where it was predicted j is the prototype that segments each support.

    Args:
        backbone: with the `backbone_options`.
    """

    targets = (*FewShotModel.targets, "support_masks")
    backbone_options: ClassVar[Mapping[str, Any]] = {
        "last_relu": False,
        "late_dilation": True,
        "vgg_dilation": 2,
    }
    any_size = True
    official_names: ClassVar[Mapping[str, str]] = {
        **stage_names([f"encoder.backbone.features.{n}." for n in (0, 2, 4, 6, 8)]),
        "backbone.": "encoder.backbone.",  # of a ResNet
    }

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> PANet:
        return cls(backbone)

    def maps(self, images: Tensor) -> Maps:
        """Compute layer 4 of photos [N, 3, H, W]."""
        return (self.backbone(images),)

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute prototypes [N, 2, C]; while training, also keep the maps for the alignment."""
        prototypes = [enlarged_average_pool(maps[0], masks == j) for j in (0, 1)]
        found = (torch.stack(prototypes, dim=1),)
        return Supports((*found, *maps) if self.training else found)

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Compare the queries with the mean prototypes of their supports.

        Auxiliary are, while training, the logits of the supports [B, K, 2, h, w] by the queries'
        prototypes, and whether any object was found in the query [B], 0 or 1.
        """
        prototypes, *maps = features.supports
        (query,) = features.query
        logits = compare(query, prototypes.mean(dim=1))
        auxiliary = self._align(query, logits, maps[0]) if self.training else ()
        return Prediction(resize(logits, size, align_corners=False), auxiliary)

    def _align(self, query: Tensor, logits: Tensor, supports: Tensor) -> tuple[Tensor, Tensor]:
        """Segment supports [B, K, C, h, w] by the prototypes of what was found in the queries."""
        masks = predicted_masks(logits)
        prototypes = masked_means(query, masks)
        shots = supports.shape[1]
        found = compare(supports.flatten(0, 1), prototypes.repeat_interleave(shots, dim=0))
        return found.unflatten(0, (-1, shots)), masks[:, 1].any(dim=(1, 2)).to(prototypes.dtype)

    def loss(
        self,
        prediction: Prediction,
        query_mask: Tensor,
        support_masks: Tensor,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Add to the cross-entropy of the queries, while training, that of their supports.

        The latter is averaged over all supports of the batch; an episode in whose query no object
        was found counts 0.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            support_masks: integers [B, K, H, W]; 0 background, 1 foreground, else ignored.
            class_weight: weights of background and foreground [2]; each mean is divided by the
                weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        loss = cross_entropy(prediction.logits, query_mask, class_weight)
        if not prediction.auxiliary:
            return loss
        return loss + alignment_loss(*prediction.auxiliary, support_masks, class_weight)


def compare(features: Tensor, prototypes: Tensor) -> Tensor:
    """Compute 20·cos of features [B, C, h, w] to prototypes [B, n, C]: [B, n, h, w].

    In float32 at least; a norm below 1e-8 counts as that.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, prototypes = features.to(dtype), prototypes.to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        products = torch.einsum("bchw,bnc->bnhw", features, prototypes)
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-8)
    return 20 * products / lengths / prototypes.norm(dim=2).clamp(min=1e-8)[:, :, None, None]


def predicted_masks(logits: Tensor) -> Tensor:
    """Return where logits [B, 2, h, w] are largest for background and object: bool, alike."""
    predicted = logits.argmax(dim=1)
    return torch.stack([predicted == j for j in (0, 1)], dim=1)


def masked_means(features: Tensor, masks: Tensor) -> Tensor:
    """Average features [B, C, h, w] under masks bool [B, n, h, w]: [B, n, C], 0 if empty."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    masks = masks.to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.einsum("bchw,bnhw->bnc", features.to(dtype), masks)
    return sums / (masks.sum(dim=(2, 3)) + 1e-5)[:, :, None]


def alignment_loss(
    logits: Tensor,
    found: Tensor,
    masks: Tensor,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Average the cross-entropy of supports; those of queries without any object found count 0.

    logits [B, K, 2, h, w], found [B], masks [B, K, H, W] and weights of the classes [2].
    """
    losses = [
        support_cross_entropy(each, mask, class_weight, align_corners)
        for each, mask in zip(logits.unbind(1), masks.unbind(1), strict=True)
    ]
    return (found * torch.stack(losses).mean(dim=0)).mean()


def support_cross_entropy(
    logits: Tensor,
    masks: Tensor,
    class_weight: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Average, for each support, the cross-entropy of logits [B, 2, h, w] where a mask is 0 or 1.

    masks: [B, H, W]. Returns [B], 0 for a mask without such pixels.
    """
    masks = masks.long()
    logits = resize(logits, masks.shape[1:], align_corners)
    weights = masks.new_ones(2) if class_weight is None else class_weight
    counted = (masks == 0) | (masks == 1)
    target = torch.where(counted, masks, 0)
    weight = weights.to(logits.dtype)[target] * counted
    losses = functional.cross_entropy(logits, target, reduction="none") * weight
    total = weight.sum(dim=(1, 2))
    return losses.sum(dim=(1, 2)) / torch.where(total > 0, total, 1)
