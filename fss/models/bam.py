"""BAM: Lang et al., "Learning What Not to Segment", CVPR 2022.

Equations are those of the paper; the published code is the reference where it says more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fss.models.backbone import Backbone
from fss.models.baseline import Baseline
from fss.models.ensemble import WithBaseLearner, gram_distance, gram_matrix
from fss.models.episode import Prediction
from fss.models.features import Features


class BAM(WithBaseLearner, Baseline):
    """A meta learner, a base learner that says what not to segment, and their ensemble.

    The meta learner is the baseline, its supports weighted by how like the query they are; the
    ensemble is that of `WithBaseLearner`.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        base_classes: number of base classes.
        shots: supports per query (K) that their weights are for; a single one needs no weight.
        channels: width of the meta learner.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifier
            drops 0.1 of its channels too.
    """

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

    def __init__(
        self,
        backbone: Backbone,
        base_classes: int,
        shots: int = 1,
        channels: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(backbone, channels, dropout)
        self.add_ensemble(backbone, base_classes, shots)

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
        weights = self.weigh(distances)
        distance = (weights * distances).sum(dim=1)
        prototype = (weights[:, :, None, None, None] * prototypes).sum(dim=1)
        prior = (weights.T[:, :, None, None, None] * features.priors).sum(dim=0)

        query = self.query(features)
        meta = self.compare(query, prototype.to(query.dtype), prior)
        base = self.base_learner(high)

        final = self.combine(meta, base, distance, base_class, size)
        return Prediction(final, (meta, base) if self.training else ())

    def summarize(self, low: Tensor, middle: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Compute prototypes [N, C, 1, 1] and Gram matrices [N, C', C'] of layer 2's channels."""
        return (*super().summarize(low, middle, mask), gram_matrix(low))
