"""SG-One: Zhang et al., "SG-One: Similarity Guidance Network for One-Shot Semantic Segmentation",
IEEE Transactions on Cybernetics 2020.

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
from fss.models.episode import Prediction
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.layers import check_head
from fss.models.pooling import enlarged_average_pool, resize
from fss.models.vgg import stage_names


class SGOne(FewShotModel):
    """A similarity map guides the segmentation of the query.

    The guidance branch G is a convolution of layer 4. With v the mean of the support's G, resized
    to the photo, under its mask (masked average pooling, section III-B), and S the segmentation
    branch, which merges layers 2 to 4 step by step,

        similarity = cos(G(query), v)
        logits = classifier(relu(conv(similarity·S(query))))

    at the size of the map, then resized to the photo. K supports have the mean of their v, as in
    the published test of five; its other one, the union of five predictions, is not here.

    Layer 4 ends with the max-pool of VGG's last stage, of 3×3 positions and without a stride; so
    does that of a ResNet. As published, the 1×1 classifier pads its input by a position on each
    side, whose logits are its bias, and the larger map is what is resized.

    Args:
        backbone: with the `backbone_options`; published is VGG-16 without batch norm.
        channels: width of the segmentation branch; the guidance branch has four times as many.
    """

    backbone_options: ClassVar[Mapping[str, Any]] = {"vgg_dilation": 1}
    any_size = True
    official_names: ClassVar[Mapping[str, str]] = {
        **stage_names([f"netB.features_{n}." for n in range(1, 6)]),
        "backbone.": "netB.",
        "guide.": "netB.cls.0.",
        "side2.": "netB.side3_1.0.",
        "side3.": "netB.side4_1.0.",
        "side4.": "netB.side5_1.0.",
        "merge.": "classifier_6.0.",
        "classifier.": "exit_layer.",
    }

    def __init__(self, backbone: Backbone, channels: int = 128) -> None:
        super().__init__(backbone)
        check_head(channels)
        _, low, middle, high = backbone.channels
        self.guide = nn.Conv2d(high, 4 * channels, 3, padding=1)
        self.side2 = nn.Conv2d(low, channels, 3, padding=1)
        self.side3 = nn.Conv2d(channels + middle, channels, 3, padding=1)
        self.side4 = nn.Conv2d(channels + high, channels, 3, padding=1)
        for conv in (self.guide, self.side2, self.side3, self.side4):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.merge = nn.Conv2d(channels, channels, 3, padding=1)
        self.classifier = nn.Conv2d(channels, 2, 1, padding=1)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> SGOne:
        return cls(backbone, config.channels)

    def maps(self, images: Tensor) -> Maps:
        """Compute layers 2, 3 and 4 of photos [N, 3, H, W]."""
        low, middle = self.backbone.features(images)
        high = functional.max_pool2d(self.backbone.layer4(middle), 3, stride=1, padding=1)
        return low, middle, high

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute the representative vectors v [N, 4·C] of the supports' objects."""
        return Supports((enlarged_average_pool(self.guide(maps[-1]), masks == 1, offset=0),))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Segment the queries, guided by where they are like the supports' objects."""
        high = features.query[-1]
        vector = features.supports[0].mean(dim=1)[:, :, None, None]
        similarity = functional.cosine_similarity(self.guide(high), vector, dim=1).unsqueeze(1)
        guided = self.segmentation(*features.query)
        merged = self.merge(guided * similarity.to(guided.dtype)).relu()
        return Prediction(resize(self.classifier(merged), size, align_corners=False), ())

    def segmentation(self, low: Tensor, middle: Tensor, high: Tensor) -> Tensor:
        """Merge layers 2, 3 and 4 to [B, C, h, w]."""
        x = self.side2(low).relu()
        x = self.side3(torch.cat([x, middle], dim=1)).relu()
        return self.side4(torch.cat([x, high], dim=1))
