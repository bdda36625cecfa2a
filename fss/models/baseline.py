"""The baseline of the SVF paper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fss.models.backbone import BACKBONES, Backbone
from fss.models.episode import Prediction
from fss.models.features import Features
from fss.models.layers import classifier, pointwise, two_convolutions
from fss.models.pooling import cat_maps, resize
from fss.models.prior_guided import PriorGuided


class ASPP(nn.Module):
    """Five views of a map side by side: a 1×1 convolution, 3×3 ones of dilation 6, 12 and 18, and
    the 1×1 convolution of the image's mean (DeepLabv3, section 3.3), each followed by ReLU.

    [B, C, h, w] -> [B, 5·C, h, w]. As in BAM's meta learner there is no batch norm, so a batch of
    one and a map of one pixel work, and its weights start from He's normal distribution, with
    standard deviation √(2 / inputs of a weight); biases start as torch's.
    """

    dilations = (6, 12, 18)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pooled = nn.Conv2d(channels, channels, 1)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.atrous = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
            for dilation in self.dilations
        )
        for conv in (self.pooled, self.pointwise, *self.atrous):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True))
        views = [pooled, self.pointwise(x)] + [conv(x) for conv in self.atrous]
        return cat_maps(views, like=x).relu()


class Baseline(PriorGuided):
    """PFENet with its feature enrichment module replaced by ASPP, and only the main loss.

    Layers 2 and 3 of the backbone are reduced to `channels` channels, for query and support
    each. The mean support feature under the mask, the mean of K shots, is compared with each query
    position by convolutions which also see the prior mask. The head has no batch norm: neither
    PFENet's layers nor BAM's ASPP have any.

    Sources: SVF (Sun et al. 2022), section 4.1; PFENet (Tian et al. 2020), section 3.

    Args:
        backbone: a backbone of output stride 8, a VGG, or a ViT.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifier
            drops 0.1 of its channels too.
    """

    backbones = BACKBONES

    def __init__(self, backbone: Backbone, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__(backbone, channels, dropout)
        self.merge = pointwise(2 * channels + 1, channels)
        self.aspp = ASPP(channels)
        self.project = pointwise(5 * channels, channels)
        self.residual = two_convolutions(channels)
        self.classifier = classifier(channels, 2, 0.1 if dropout else 0.0)

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Compare the queries with the mean prototype and prior of their supports."""
        query = self.query(features)
        prototype = features.supports[0].mean(dim=1)
        logits = self.compare(query, prototype, features.priors.mean(dim=0))
        return Prediction(resize(logits, size), ())

    def compare(self, query: Tensor, prototype: Tensor, prior: Tensor) -> Tensor:
        """Compute logits [B, 2, h, w].

        Args:
            query: features [B, C, h, w].
            prototype: mean support feature [B, C, 1, 1].
            prior: prior mask [B, 1, h, w].
        """
        merged = self.merge(cat_maps([query, prototype, prior.to(query.dtype)], like=query))
        merged = self.project(self.aspp(merged))
        merged = merged + self.residual(merged)
        return self.classifier(merged)
