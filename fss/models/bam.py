"""BAM: Lang et al., "Learning What Not to Segment", CVPR 2022.

Equations are those of the paper; the published code is the reference where it says more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.baseline import Baseline
from fss.models.episode import Prediction, check_target
from fss.models.features import Features
from fss.models.loss import cross_entropy
from fss.models.pooling import resize
from fss.models.pspnet import BaseLearner

# The last convolution of the base learner: here, and in the authors' files.
_BASE_OUTPUTS = ("base_learner.classifier.4.weight", "learner_base.1.4.weight")


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
    """

    def __init__(self, shots: int, hidden: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shots, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, shots, 1)
        )

    def forward(self, distances: Tensor) -> Tensor:
        ordered, order = distances.sort(dim=1)
        maps = ordered[:, :, None, None].to(self.layers[0].weight.dtype)
        scores = self.layers(maps)[:, :, 0, 0].to(distances.dtype)
        return scores.gather(1, order.argsort(dim=1)).softmax(dim=1)


class BAM(Baseline):
    """A meta learner, a base learner that says what not to segment, and their ensemble.

    The meta learner is the baseline, its supports weighted by how like the query they are. The base
    learner, trained before and frozen, segments the fold's base classes in the query. With the
    meta learner's probabilities p^0 and p^1, the base learner's foreground p_b (the sum of its
    classes, while training without the episode's own) and the distance ψ of query and supports,

        background = F_ensemble(F_ψ(p^0, ψ), p_b)
        foreground = F_ψ(p^1, ψ)

    with two 1×1 convolutions F that initially return their first argument. As published, these maps
    are both the prediction and the logits of the final loss, and tests on novel classes sum all
    base classes in p_b. The authors write 15 and 60 base classes and 473 or 641 pixels into
    their code; here any number and size works: pyramid pooling averages over a number of bins,
    and all maps meet at the query's size.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        base_classes: number of base classes.
        shots: supports per query (K) that their weights are for; a single one needs no weight.
        channels: width of the meta learner.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifier
            drops 0.1 of its channels too.
    """

    inputs = (*Baseline.inputs, "base_class")
    targets = (*Baseline.targets, "query_base_mask")
    needs_base_learner = True
    official_names: ClassVar[Mapping[str, str]] = {
        "query_reduce.": "down_query.",
        "support_reduce.": "down_supp.",
        "merge.": "init_merge.",
        "aspp.pooled.": "ASPP_meta.layer6_0.0.",
        "aspp.pointwise.": "ASPP_meta.layer6_1.0.",
        "aspp.atrous.0.": "ASPP_meta.layer6_2.0.",
        "aspp.atrous.1.": "ASPP_meta.layer6_3.0.",
        "aspp.atrous.2.": "ASPP_meta.layer6_4.0.",
        "project.": "res1_meta.",
        "residual.": "res2_meta.",
        "classifier.": "cls_meta.",
        "distance_merge.": "gram_merge.",
        "base_merge.": "cls_merge.",
        "shot_weights.layers.": "kshot_rw.",
        "base_learner.pool.": "learner_base.0.",
        "base_learner.classifier.": "learner_base.1.",
    }
    official_shapes: ClassVar[Mapping[str, tuple[int, ...]]] = {  # a 1×1 convolution
        "distance_merge.weight": (1, 2, 1, 1),
        "base_merge.weight": (1, 2, 1, 1),
    }

    def __init__(
        self,
        backbone: Backbone,
        base_classes: int,
        shots: int = 1,
        channels: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(backbone, channels, dropout)
        self.shots = shots
        self.distance_merge = WeightedSum()
        self.base_merge = WeightedSum()
        if shots > 1:
            self.shot_weights = ShotWeights(shots)
        base_learner = BaseLearner(backbone.channels[3], base_classes)
        self.base_learner = base_learner.requires_grad_(False).eval()

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> BAM:
        return cls(backbone, base_classes, shots, config.channels, config.dropout)

    @classmethod
    def count_base_classes(cls, state: Mapping[str, Any]) -> int:
        """Return how many outputs the base learner has besides the background's.

        The state dict may be the authors'. Without a base learner in it this is 1, so that loading
        it tells what is missing.
        """
        return next((len(state[name]) - 1 for name in _BASE_OUTPUTS if name in state), 1)

    def train(self, mode: bool = True) -> BAM:
        """Set the mode of the meta learner; backbone and base learner stay in evaluation mode."""
        super().train(mode)
        self.base_learner.eval()
        return self

    def head(
        self, features: Features, size: Sequence[int], base_class: Tensor | None = None
    ) -> Prediction:
        """Combine the meta learner with the base learner.

        Auxiliary are, while training, the logits of the meta learner [B, 2, h, w] and of the base
        learner [B, 1 + n, h, w].

        Args:
            features: of K supports; K is 1 or `shots`.
            size: height and width of the logits.
            base_class: int64 [B], index of the episode's class among the base classes, -1 for a
                novel one; needed while training, and else not used.
        """
        prototypes, grams = features.supports
        low, _, high = features.query
        distances = gram_distance(gram_matrix(low), grams)
        weights = self._weigh(distances)
        distance = (weights * distances).sum(dim=1)[:, None, None, None]
        prototype = (weights[:, :, None, None, None] * prototypes).sum(dim=1)
        prior = (weights.T[:, :, None, None, None] * features.priors).sum(dim=0)

        query = self.query(features)
        meta = self.compare(query, prototype.to(query.dtype), prior)
        base = self.base_learner(high)

        background, foreground = meta.softmax(dim=1).split(1, dim=1)
        not_this = self._base_foreground(base.softmax(dim=1), base_class)
        background = self.base_merge(self.distance_merge(background, distance), not_this)
        foreground = self.distance_merge(foreground, distance)
        final = resize(torch.cat([background, foreground], dim=1), size)
        return Prediction(final, (meta, base) if self.training else ())

    def summarize(self, low: Tensor, middle: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Compute prototypes [N, C, 1, 1] and Gram matrices [N, C', C'] of layer 2's channels."""
        return (*super().summarize(low, middle, mask), gram_matrix(low))

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
            meta, base = prediction.auxiliary
            loss = loss + cross_entropy(meta, query_mask, class_weight)
            loss = loss + cross_entropy(base, query_base_mask)
        return loss

    def _weigh(self, distances: Tensor) -> Tensor:
        """Compute weights [B, K] of the supports from their distances."""
        if distances.shape[1] == 1:
            return torch.ones_like(distances)
        if distances.shape[1] != self.shots:
            raise ValueError(
                f"support_images: expected K = {' or '.join(sorted({'1', str(self.shots)}))} "
                "supports per query, which this model was built for, got "
                f"K = {distances.shape[1]}; the weights of the supports are trained for one K"
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
