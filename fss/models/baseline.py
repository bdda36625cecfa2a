"""The baseline of the SVF paper."""

from __future__ import annotations

from torch import Tensor

from fss.models.aspp import ASPP
from fss.models.backbone import Backbone
from fss.models.episode import Prediction
from fss.models.features import FewShotModel, classifier, pointwise, two_convolutions
from fss.models.pooling import cat_maps, resize


class Baseline(FewShotModel):
    """PFENet with its feature enrichment module replaced by ASPP, and only the main loss.

    Layers 2 and 3 of the backbone are reduced to `channels` channels, for query and support
    each. The mean support feature under the mask, the mean of K shots, is compared with each query
    position by convolutions which also see the prior mask. The head has no batch norm: neither
    PFENet's layers nor BAM's ASPP have any.

    Sources: SVF (Sun et al. 2022), section 4.1; PFENet (Tian et al. 2020), section 3.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifier
            drops 0.1 of its channels too.
    """

    def __init__(self, backbone: Backbone, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__(backbone, channels, dropout)
        self.merge = pointwise(2 * channels + 1, channels)
        self.aspp = ASPP(channels)
        self.project = pointwise(5 * channels, channels)
        self.residual = two_convolutions(channels)
        self.classifier = classifier(channels, 2, 0.1 if dropout else 0.0)

    def forward(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Prediction:
        """Segments the queries into background and what the supports show.

        Args:
            query_image: normalised images [B, 3, H, W], H-1 and W-1 multiples of 8.
            support_images: K supports per query [B, K, 3, H, W].
            support_masks: integers or bool [B, K, H, W]; 1 is foreground, anything else is not.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        features = self.features(query_image, support_images, support_masks)
        query = self.query(features)
        prototype = features.supports[0].mean(dim=1)
        logits = self.compare(query, prototype, features.priors.mean(dim=0))
        return Prediction(resize(logits, query_image.shape[-2:]), ())

    def compare(self, query: Tensor, prototype: Tensor, prior: Tensor) -> Tensor:
        """Query [B, C, h, w], prototype [B, C, 1, 1], prior [B, 1, h, w] to logits [B, 2, h, w]."""
        merged = self.merge(cat_maps([query, prototype, prior.to(query.dtype)], like=query))
        merged = self.project(self.aspp(merged))
        merged = merged + self.residual(merged)
        return self.classifier(merged)
