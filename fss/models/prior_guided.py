"""What baseline, PFENet, BAM and their heirs share: reduced features, prototypes and a prior."""

from __future__ import annotations

from torch import Tensor

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.layers import check_head, pointwise_cat, reduction
from fss.models.pooling import masked_average_pool


class PriorGuided(FewShotModel):
    """A head that reads layers 2 and 3, reduced, of queries and supports, and the prior mask.

    The prior compares layer 4 of the queries with that of the supports, whose layer 3 is masked
    before; of a ViT layer 4 itself is, whose blocks need the tokens of all. `features.query` are
    the maps of layers 2, 3 and 4; `features.supports` what `summarize` says.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped.
    """

    def __init__(self, backbone: Backbone, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__(backbone)
        check_head(channels, dropout)
        features = backbone.channels[1] + backbone.channels[2]
        self.query_reduce = reduction(features, channels, dropout)
        self.support_reduce = reduction(features, channels, dropout)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> PriorGuided:
        return cls(backbone, config.channels, config.dropout)

    def query_maps(self, *maps: Tensor) -> Maps:
        """Compute layer 4 of the queries from their layers 2 and 3; a ViT has it already."""
        # not in one call with the supports: the queries' layer 3 would be copied beside theirs
        return () if len(maps) > 2 else (self.backbone.layer4(maps[1]),)

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute a masked layer 4 of the supports, and their summaries."""
        low, middle, *known = maps
        mask = self.shrink_mask(masks, middle)
        with self._recorded(middle):
            high = known[0] * mask if known else self.backbone.layer4(middle * mask)
        return Supports(self.summarize(low, middle, mask), mask, high)

    def query(self, features: Features) -> Tensor:
        """Reduce the features of the queries to [B, C, h, w]."""
        low, middle, _ = features.query
        return pointwise_cat(self.query_reduce, middle, low)

    def summarize(self, low: Tensor, middle: Tensor, mask: Tensor) -> Maps:
        """Compute what the head reads of each support besides the prior; [N, …] each.

        The first is the prototype [N, C, 1, 1], the mean reduced feature under the mask.

        Args:
            low, middle: maps [N, C, h, w] of layers 2 and 3.
            mask: foreground [N, 1, h, w], floating.
        """
        return (masked_average_pool(pointwise_cat(self.support_reduce, middle, low), mask),)
