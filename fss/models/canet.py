"""CANet: Zhang et al., "CANet: Class-Agnostic Segmentation Networks with Iterative Refinement and
Attentive Few-Shot Learning", CVPR 2019; and what PMM, which is built on it, shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.baseline import ASPP
from fss.models.episode import Prediction
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.layers import check_head
from fss.models.pooling import cat_maps, masked_average_pool, resize


class DenseComparison(FewShotModel):
    """Compares each position of the query with vectors of the supports, and refines the mask.

    Layers 2 and 3 of the backbone, side by side, are reduced by a 3×3 convolution of dilation 2,
    the same for query and support. `comparison`, another one, sees the reduced query and one vector
    at all positions. What comes of it is refined by `optimize`. The backbone's layer 4 is not used,
    and taken out.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a channel is dropped, after each convolution with dropout.
        batch_norm: names of the layers that have a batch norm instead of dropout.
    """

    unused_layers = ("layer4",)
    official_names: ClassVar[Mapping[str, str]] = {
        "reduce.": "layer5.",
        "comparison.": "layer55.",
        "residuals.0.": "residule1.",
        "residuals.1.": "residule2.",
        "residuals.2.": "residule3.",
        "project.": "layer7.",
        "classifier.": "layer9.",
    }

    def __init__(
        self, backbone: Backbone, channels: int, dropout: float, batch_norm: Sequence[str] = ()
    ) -> None:
        super().__init__(backbone)
        check_head(channels, dropout)
        features = backbone.channels[1] + backbone.channels[2]
        drops = {
            name: None if name in batch_norm else dropout
            for name in ("reduce", "comparison", "project")
        }
        self.reduce = convolution(features, channels, 3, 2, drops["reduce"])
        self.comparison = convolution(2 * channels, channels, 3, 2, drops["comparison"])
        self.residuals = nn.ModuleList(
            residual(into, channels) for into in (channels + 2, channels, channels)
        )
        self.aspp = ASPP(channels)
        self.aspp_dropout = nn.Dropout2d(dropout)
        self.project = convolution(5 * channels, channels, 1, 1, drops["project"])
        self.classifier = nn.Conv2d(channels, 2, 1)

    def reduced(self, low: Tensor, middle: Tensor) -> Tensor:
        """Reduce maps [N, C, h, w] of layers 2 and 3 to [N, channels, h, w]."""
        conv, *rest = self.reduce
        # not of the maps side by side: autograd would keep that copy of both
        of_low, of_middle = conv.weight.split([low.shape[1], middle.shape[1]], dim=1)
        out = _convolve(conv, low, of_low, conv.bias) + _convolve(conv, middle, of_middle)
        return _through(rest, out)

    def optimize(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute logits [B, 2, h, w]: a pass of the iterative optimization module of the paper.

            x = x + F_1([x, mask]),  x = x + F_2(x),  x = x + F_3(x)

        and ASPP, where F is two 3×3 convolutions, each after a ReLU.

        Args:
            x: what the comparison gave [B, C, h, w].
            mask: probabilities of background and object [B, 2, h, w].
        """
        first, *others = self.residuals
        x = x + first(cat_maps([x, mask.to(x.dtype)], like=x))
        for each in others:
            x = x + each(x)
        return self.classifier(self.project(self.aspp_dropout(self.aspp(x))))


class CANet(DenseComparison):
    """Dense comparison with the supports' mean feature, and iterative optimization of the mask.

    With the prototype z_k of support k (the mean reduced feature under its mask), the reduced
    query q and the mask y_0 = 0,

        x = Σ_k λ_k · comparison([q, z_k])                  dense comparison
        y_t = softmax(optimize(x, y_{t-1}))                 iterative optimization

    and the prediction is `iterations` passes after the first. While training it is the one after
    an y that no gradient passes, emptied with probability `reset`. The weights λ, which sum to 1,
    are an attention's if the model is built for several shots; else all the same.

    The authors' code differs in three ways. It has one shot only: the attention is the paper's,
    with what the paper leaves open (a ReLU, the max-pooling's stride of 2) chosen here. While
    training its y is the photo's prediction one epoch ago, with another support; here it is the
    present network's in the same episode, as in a test. And its validation stops after fewer than
    5 passes if the score on the novel classes falls; here, as in the paper, all are made.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a channel is dropped, after each convolution outside of the
            residual paths; unless it is 0, y is emptied with probability 0.7 while training.
        shots: supports per query (K) that the model is built for; with others it works too.
        iterations: passes after the first, outside of training.
    """

    official_names: ClassVar[Mapping[str, str]] = {
        "backbone.": "",
        **DenseComparison.official_names,
        "aspp.pooled.": "layer6_0.0.",
        "aspp.pointwise.": "layer6_1.0.",
        "aspp.atrous.0.": "layer6_2.0.",
        "aspp.atrous.1.": "layer6_3.0.",
        "aspp.atrous.2.": "layer6_4.0.",
        "attention.": "attention.",  # theirs has none
    }

    def __init__(
        self,
        backbone: Backbone,
        channels: int = 256,
        dropout: float = 0.5,
        shots: int = 1,
        iterations: int = 4,
    ) -> None:
        super().__init__(backbone, channels, dropout)
        self.iterations = iterations
        self.reset = 0.7 if dropout else 0.0
        self.attention = None
        if shots > 1:
            self.attention = nn.Sequential(
                nn.Conv2d(2 * channels, channels, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
                nn.Conv2d(channels, 1, 3, padding=1, bias=False),  # which the softmax takes out
            )
        for name, parameter in self.named_parameters():
            if not name.startswith("backbone.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> CANet:
        return cls(backbone, config.channels, config.dropout, shots)

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute the prototype [N, C, 1, 1] of each support."""
        mask = self.shrink_mask(masks, maps[1])
        return Supports((masked_average_pool(self.reduced(*maps), mask),))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Compare the queries with the prototypes of their supports, and refine the masks."""
        x = self.compare(self.reduced(*features.query), features.supports[0].flatten(2))
        mask = x.new_zeros(len(x), 2, *x.shape[2:])
        with torch.no_grad():
            for _ in range(1 if self.training else self.iterations):
                mask = self.optimize(x, mask).softmax(dim=1)
            if self.training:
                mask = mask * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.reset)
        return Prediction(resize(self.optimize(x, mask), size), ())

    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Compare reduced queries [B, C, h, w] with prototypes [B, K, C], to [B, C, h, w]."""
        maps = tiled(self.comparison, query, prototypes)
        if self.attention is None:
            return reduce(torch.add, maps) / len(maps)
        scores = [each.mean(dim=(1, 2, 3)) for each in tiled(self.attention, query, prototypes)]
        weights = torch.stack(scores).softmax(dim=0).to(query.dtype)[..., None, None, None]
        # not stacked, which would lay them out anew
        return reduce(torch.add, (w * x for w, x in zip(weights, maps, strict=True)))


def convolution(
    in_channels: int, out_channels: int, kernel: int, dilation: int, dropout: float | None
) -> nn.Sequential:
    """Build a convolution that keeps the size, a ReLU and the dropout of whole channels.

    With `dropout` None there is a batch norm before the ReLU instead.
    """
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding=kernel // 2 * dilation, dilation=dilation
    )
    if dropout is None:
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Dropout2d(dropout))


def residual(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build the residual path of CANet: two 3×3 convolutions, each after a ReLU."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
    )


def tiled(layer: nn.Sequential, maps: Tensor, vectors: Tensor) -> list[Tensor]:
    """Compute ``layer(cat([maps, vector]))`` for each vector, which stands at all positions.

    The layer begins with a convolution, whose part for the maps is computed once. Its part for a
    vector is, at a position, the sum of (weight_t · vector) over those taps t of the kernel that
    are inside the map.

    Args:
        layer: a convolution that keeps the size, and what follows it.
        maps: [B, C, h, w].
        vectors: [B, N, C'].

    Returns:
        N maps [B, Co, h, w].
    """
    conv, *rest = layer
    of_maps, of_vectors = conv.weight.split([maps.shape[1], vectors.shape[2]], dim=1)
    same = _convolve(conv, maps, of_maps, conv.bias)
    inside = functional.unfold(
        maps.new_ones(1, 1, *maps.shape[2:]), conv.kernel_size, conv.dilation, conv.padding
    )[0]
    taps = torch.einsum("bnc,octu->bntuo", vectors.to(maps.dtype), of_vectors).flatten(2, 3)
    # positions before channels, as they lie in channels_last
    parts = (inside.mT @ taps).mT.unflatten(3, maps.shape[2:])
    return [_through(rest, same + part) for part in parts.unbind(1)]


def _convolve(conv: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve as `conv` does, with a part of its weight."""
    return functional.conv2d(x, weight, bias, padding=conv.padding, dilation=conv.dilation)


def _through(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x
