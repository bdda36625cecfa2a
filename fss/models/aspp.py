"""Atrous spatial pyramid pooling."""

from __future__ import annotations

from torch import Tensor, nn

from fss.models.pooling import cat_maps


class ASPP(nn.Module):
    """Five views of a map side by side: a 1×1 convolution, 3×3 ones of dilation 6, 12 and 18, and
    the 1×1 convolution of the image's mean (DeepLabv3, section 3.3), each followed by ReLU.

    [B, C, h, w] -> [B, 5·C, h, w]. As in BAM's meta learner there is no batch norm, so a batch of
    one and a map of one pixel do.
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

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True))
        views = [pooled, self.pointwise(x)] + [conv(x) for conv in self.atrous]
        return cat_maps(views, like=x).relu()
