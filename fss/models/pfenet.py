"""PFENet: Tian et al., "Prior Guided Feature Enrichment Network", TPAMI 2020."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fss.config import PASCAL_BINS, ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction
from fss.models.features import Features
from fss.models.layers import classifier, pointwise, pointwise_cat, two_convolutions
from fss.models.pooling import average_bins, resize
from fss.models.prior_guided import PriorGuided


class FeatureEnrichment(nn.Module):
    """The feature enrichment module (FEM): query, prototype and prior, merged at several scales.

    Per scale n, from the finest to the coarsest, with the query averaged over b_n × b_n bins,

        X_n = merge([query_n, prototype, prior_n])             inter-source enrichment
        X_n = X_n + α([X_n, X_{n-1}])                          inter-scale merging, top-down; n > 1
        X_n = X_n + β(X_n)

    and then the maps of all scales, at the size of the query, are merged by a 1×1 convolution.
    X_{n-1} passes from scale to scale at the size of the query, as in the published code.

    Args:
        channels: of query, prototype and output.
        bins: bins per side of each scale, see `PFENet`.
        dropout: of the auxiliary classifiers' channels.
    """

    def __init__(self, channels: int, bins: Sequence[float], dropout: float) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.merge = nn.ModuleList(pointwise(2 * channels + 1, channels) for _ in bins)
        self.alpha = nn.ModuleList(pointwise(2 * channels, channels) for _ in bins[1:])
        self.beta = nn.ModuleList(two_convolutions(channels) for _ in bins)
        self.classifiers = nn.ModuleList(classifier(channels, 2, dropout) for _ in bins)
        self.project = pointwise(len(bins) * channels, channels)

    def forward(
        self, query: Tensor, prototype: Tensor, prior: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the enriched query [B, C, h, w] and, while training, logits per scale.

        Logits are [B, 2, b_n, b_n].

        Args:
            query: features [B, C, h, w].
            prototype: mean support feature [B, C, 1, 1], or one for each position [B, C, h, w].
            prior: prior mask [B, 1, h, w].
        """
        enriched: list[Tensor] = []
        logits: list[Tensor] = []
        alike = tuple(prototype.shape[-2:]) == (1, 1)
        for n, bins in enumerate(self.bins):
            side = max(1, int(bins * query.shape[2])) if bins <= 1 else int(bins)
            size = (side, side)
            binned = prototype if alike else average_bins(prototype, size)
            x = pointwise_cat(self.merge[n], average_bins(query, size), binned, resize(prior, size))
            if n:
                x = x + pointwise_cat(self.alpha[n - 1], x, resize(enriched[-1], size))
            x = x + self.beta[n](x)
            if self.training:
                logits.append(self.classifiers[n](x))
            enriched.append(resize(x, query.shape[-2:]))
        return pointwise_cat(self.project, *enriched), tuple(logits)


class PFENet(PriorGuided):
    """Prior guided feature enrichment network.

    Layers 2 and 3 of the backbone are reduced to `channels` channels, for query and support each.
    The mean support feature under the mask and the prior mask, means of K shots each, enrich the
    query at the scales of `bins`.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifiers
            drop 0.1 of their channels too.
        bins: bins per side of each scale, whatever the size of the image; up to 1 their share of
            the map's side. Published are those here for Pascal, and 1, 1/2, 1/4, 1/8 for COCO.
    """

    official_names: ClassVar[Mapping[str, str]] = {
        "query_reduce.": "down_query.",
        "support_reduce.": "down_supp.",
        "enrich.merge.": "init_merge.",
        "enrich.alpha.": "alpha_conv.",
        "enrich.beta.": "beta_conv.",
        "enrich.classifiers.": "inner_cls.",
        "enrich.project.": "res1.",
        "residual.": "res2.",
        "classifier.": "cls.",
    }

    def __init__(
        self,
        backbone: Backbone,
        channels: int = 256,
        dropout: float = 0.5,
        bins: Sequence[float] = PASCAL_BINS,
    ) -> None:
        super().__init__(backbone, channels, dropout)
        if not bins or any(not (0 < b <= 1 or b == int(b) > 1) for b in bins):
            raise ValueError(
                f"bins: expected integers above 1, or shares of the map above 0; got {list(bins)}"
            )
        dropped = 0.1 if dropout else 0.0
        self.enrich = FeatureEnrichment(channels, bins, dropped)
        self.residual = two_convolutions(channels)
        self.classifier = classifier(channels, 2, dropped)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> PFENet:
        return cls(backbone, config.channels, config.dropout, config.bins or PASCAL_BINS)

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Segment the queries, enriched at several scales.

        While training, the auxiliary logits are those of each scale.
        """
        enriched, auxiliary = self.enrich(
            self.query(features),
            features.supports[0].mean(dim=1),
            features.priors.mean(dim=0),
        )
        enriched = enriched + self.residual(enriched)
        return Prediction(resize(self.classifier(enriched), size), auxiliary)
