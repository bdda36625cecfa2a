"""The ensemble of a meta learner and a base learner that says what not to segment (BAM, HDMNet).

Equations are those of Lang et al., "Learning What Not to Segment", CVPR 2022; the published codes
are the reference where they say more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_target
from fss.models.features import FewShotModel
from fss.models.loss import cross_entropy
from fss.models.pooling import resize
from fss.models.pspnet import BaseLearner

# The last convolution of the base learner: here, and in the files of BAM's and HDMNet's authors.
_BASE_OUTPUTS = (
    "base_learner.classifier.4.weight",
    "learner_base.1.4.weight",
    "base_learnear.2.weight",
)


class WeightedSum(nn.Module):
    """A 1×1 convolution of two maps to one, w_1·a + w_2·b; initially it returns its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.weight[0] * first + self.weight[1] * second


class ShotWeights(nn.Module):
    """Weights of K supports from their distances to the query, ψ [B, K] -> [B, K], sum 1.

    Two linear layers over the sorted distances, so that the order of the supports does not matter.

    Args:
        shots: number of supports (K).
        hidden: width between the layers.
        restore_order: give each weight to the support whose distance it is of (BAM); otherwise the
            weight of the smallest distance goes to the first support, and so on (HDMNet).
    """

    def __init__(self, shots: int, hidden: int = 2, restore_order: bool = True) -> None:
        super().__init__()
        self.restore_order = restore_order
        self.layers = nn.Sequential(
            nn.Conv2d(shots, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, shots, 1)
        )

    def forward(self, distances: Tensor) -> Tensor:
        ordered, order = distances.sort(dim=1)
        maps = ordered[:, :, None, None].to(self.layers[0].weight.dtype)
        scores = self.layers(maps)[:, :, 0, 0].to(distances.dtype)
        if self.restore_order:
            scores = scores.gather(1, order.argsort(dim=1))
        return scores.softmax(dim=1)


class WithBaseLearner(FewShotModel):
    """A meta learner, a base learner that says what not to segment, and their ensemble.

    The base learner, trained before and frozen, segments the fold's base classes in the query. With
    the meta learner's probabilities p^0 and p^1, the base learner's foreground p_b (the sum of its
    classes, while training without the episode's own) and the distance ψ of query and supports,

        background = F_ensemble(F_ψ(p^0, ψ), p_b)
        foreground = F_ψ(p^1, ψ)

    with two 1×1 convolutions F that initially return their first argument. As published, these maps
    are both the prediction and the logits of the final loss, and tests on novel classes sum all
    base classes in p_b. The authors write 15 and 60 base classes and the size of the photos into
    their code; here any number and size works: pyramid pooling averages over a number of bins,
    and all maps meet at the query's size. The base learner's dropout is always off.

    A model calls `add_ensemble` after its own layers are made.
    """

    inputs = (*FewShotModel.inputs, "base_class")
    targets = (*FewShotModel.targets, "query_base_mask")
    needs_base_learner = True
    official_shapes: ClassVar[Mapping[str, tuple[int, ...]]] = {  # a 1×1 convolution
        "distance_merge.weight": (1, 2, 1, 1),
        "base_merge.weight": (1, 2, 1, 1),
    }
    shots: int

    def add_ensemble(
        self, backbone: Backbone, base_classes: int, shots: int, restore_order: bool = True
    ) -> None:
        """Add the base learner of a backbone, the ensemble and the weights of K = `shots`."""
        self.shots = shots
        self.distance_merge = WeightedSum()
        self.base_merge = WeightedSum()
        if shots > 1:
            self.shot_weights = ShotWeights(shots, restore_order=restore_order)
        base_learner = BaseLearner(backbone.channels[3], base_classes)
        self.base_learner = base_learner.requires_grad_(False).eval()

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> WithBaseLearner:
        return cls(backbone, base_classes, shots, config.channels, config.dropout)

    @classmethod
    def count_base_classes(cls, state: Mapping[str, Any]) -> int:
        """Return how many outputs the base learner has besides the background's.

        The state dict may be the authors'. Without a base learner in it this is 1, so that loading
        it tells what is missing.
        """
        return next((len(state[name]) - 1 for name in _BASE_OUTPUTS if name in state), 1)

    def train(self, mode: bool = True) -> WithBaseLearner:
        """Set the mode of the meta learner; backbone and base learner stay in evaluation mode."""
        super().train(mode)
        self.base_learner.eval()
        return self

    def combine(
        self,
        meta: Tensor,
        base: Tensor,
        distance: Tensor,
        base_class: Tensor | None,
        size: Sequence[int],
    ) -> Tensor:
        """Compute the ensemble's maps [B, 2, *size].

        Args:
            meta: logits [B, 2, h, w] of the meta learner.
            base: logits [B, 1 + n, h, w] of the base learner.
            distance: ψ of query and supports [B].
            base_class: int64 [B], index of the episode's class among the base classes, -1 for a
                novel one; needed while training, and else not used.
        """
        distance = distance[:, None, None, None]
        background, foreground = meta.softmax(dim=1).split(1, dim=1)
        not_this = self._base_foreground(base.softmax(dim=1), base_class)
        background = self.base_merge(self.distance_merge(background, distance), not_this)
        foreground = self.distance_merge(foreground, distance)
        return resize(torch.cat([background, foreground], dim=1), size)

    def loss(
        self,
        prediction: Prediction,
        query_mask: Tensor,
        query_base_mask: Tensor,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Sum the cross-entropies of the final logits and, while training, of both learners'.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            query_base_mask: int64 [B, H, W]; 0 background, 1 to n the base classes, 255 ignored.
            class_weight: weights of background and foreground [2], not for the base learner; each
                mean is divided by the weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        check_target(prediction, query_base_mask, None, "query_base_mask")
        loss = cross_entropy(prediction.logits, query_mask, class_weight)
        if prediction.auxiliary:
            meta, base = prediction.auxiliary[:2]
            loss = loss + cross_entropy(meta, query_mask, class_weight)
            loss = loss + cross_entropy(base, query_base_mask)
        return loss

    def weigh(self, distances: Tensor) -> Tensor:
        """Compute weights [B, K] of the supports from their distances."""
        if distances.shape[1] == 1:
            return torch.ones_like(distances)
        if distances.shape[1] != self.shots:
            raise ValueError(
                f"support_images: expected K = {' or '.join(sorted({'1', str(self.shots)}))} "
                "supports per query, which this model was built for, got "
                f"K = {distances.shape[1]}; it learns a weight for each: give as many, or one, or "
                f"train with data.shots {distances.shape[1]}"
            )
        return self.shot_weights(distances)

    def _base_foreground(self, probabilities: Tensor, base_class: Tensor | None) -> Tensor:
        """Sum over the base classes to [B, 1, h, w], while training without the episode's own."""
        if not self.training:
            return probabilities[:, 1:].sum(dim=1, keepdim=True)
        batch, classes = probabilities.shape[:2]
        if not isinstance(base_class, Tensor) or base_class.dtype != torch.int64:
            got = getattr(base_class, "dtype", type(base_class).__name__)
            raise TypeError(
                "base_class: expected int64, the index of the episode's class among the base "
                f"classes or -1, got {got}"
            )
        if base_class.shape != (batch,) or base_class.device != probabilities.device:
            raise ValueError(
                f"base_class: expected {[batch]} on {probabilities.device}, one per query, got "
                f"{list(base_class.shape)} on {base_class.device}"
            )
        # class 0 is background: base class i has channel i + 1, and -1 excludes background again
        channel = torch.arange(classes, device=probabilities.device)
        kept = (channel != 0) & (channel != base_class[:, None] + 1)
        return (probabilities * kept[:, :, None, None]).sum(dim=1, keepdim=True)


def gram_matrix(features: Tensor) -> Tensor:
    """Compute the cosines between the channels of a map: G_ij = f_i·f_j / (|f_i||f_j| + 1e-7).

    features [B, C, h, w] -> [B, C, C] in float32 at least; f_i is channel i at all positions.
    """
    rows = features.flatten(2)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True, dtype=dtype)
    return (rows @ rows.mT).to(dtype) / (norms * norms.mT + 1e-7)


def gram_distance(query: Tensor, supports: Tensor) -> Tensor:
    """Compute ψ_k = |G_query - G_support,k| / C, the Frobenius norm (BAM, section 4.4).

    Gram matrices [B, C, C] of the queries and [B, K, C, C] of their supports -> [B, K].
    """
    return torch.linalg.matrix_norm(query.unsqueeze(1) - supports) / query.shape[1]
