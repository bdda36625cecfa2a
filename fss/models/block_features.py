"""What HSNet and DCAMA share: features of every block of a ResNet, and the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fss.models.backbone import ARCHITECTURES, ResNet
from fss.models.episode import Prediction, check_target
from fss.models.features import FewShotModel
from fss.models.layers import check_head
from fss.models.loss import cross_entropy


class BlockFeatures(FewShotModel):
    """A head that reads every block of layers 2 to 4 of an undilated ResNet.

    A block's feature is the sum of its paths, before its last ReLU. The maps of layers 2, 3 and 4
    have an 8th, a 16th and a 32nd of the image's side, rounded up.

    Args:
        backbone: a ResNet built with `backbone_options`.
        channels: width of the head, a multiple of 8; 128 in the published ones.
        dropout: of the head, if it has any.

    Attributes:
        depths: blocks of layers 2, 3 and 4.
        widths: channels that a block of convolutions goes through: an 8th, a half and all.
    """

    backbones = tuple(ARCHITECTURES)
    backbone_options: ClassVar[Mapping[str, Any]] = {"output_stride": 32, "sums": True}
    any_size = True

    def __init__(self, backbone: ResNet, channels: int = 128, dropout: float = 0.0) -> None:
        super().__init__(backbone)
        check_head(channels, dropout)
        if channels % 8:
            raise ValueError(
                "model.channels: expected a multiple of 8, of which narrower layers have an 8th "
                f"and a half; got {channels}"
            )
        layers = (backbone.layer2, backbone.layer3, backbone.layer4)
        self.depths = tuple(len(layer) for layer in layers)
        self.widths = (channels // 8, channels // 2, channels)

    def by_layer(self, maps: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Split the maps of all blocks of layers 2, 3 and 4 into those of each layer."""
        second, third = self.depths[0], self.depths[0] + self.depths[1]
        return [maps[:second], maps[second:third], maps[third:]]

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Average the cross-entropy over all pixels: those that are 255 count as background.

        Args:
            prediction: of this model; of its auxiliary logits, if there are any, the mean of their
                losses is the loss.
            query_mask: uint8 or int64 [B, H, W]; 1 foreground, anything else is not.
            class_weight: weights of background and foreground [2]; the mean is divided by the
                weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        target = (query_mask == 1).to(query_mask.dtype)
        logits = prediction.auxiliary or (prediction.logits,)
        losses = [cross_entropy(each, target, class_weight) for each in logits]
        return sum(losses[1:], losses[0]) / len(losses)


def group_norm(channels: int, kind: type[nn.GroupNorm] = nn.GroupNorm) -> nn.GroupNorm:
    """Build a group norm of 4 groups, or fewer where these had less than 2 channels each."""
    return kind(math.gcd(4, max(channels // 2, 1)), channels)
