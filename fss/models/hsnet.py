"""HSNet: Min et al., "Hypercorrelation Squeeze for Few-Shot Segmentation", ICCV 2021.

Sections are those of the paper; the published code is the reference where it says more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import ModelConfig
from fss.models.backbone import ResNet
from fss.models.block_features import BlockFeatures, group_norm
from fss.models.episode import Prediction
from fss.models.features import Features, Maps, Supports
from fss.models.pooling import resize


class CenterPivotConv4d(nn.Module):
    """A 4D convolution whose kernel is 0 except where either half of it is at its center.

    With c(q, s) at query position q and support position s, both of two dimensions, and pads of
    half a kernel,

        y(q, s) = Σ_p conv1_p · c(q + p, t·s) + Σ_p conv2_p · c(q, t·s + p)    (section 4.3)

    where t is the stride over support positions. These are two 2D convolutions: over the query at
    every t-th support position, and over the support at every query position. Each has a bias.

    [B, h, w, h', w', C] -> [B, h, w, ⌈h'/t⌉, ⌈w'/t⌉, C']; h and w are the query's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :, :: self.stride, :: self.stride]
        return _over_support(self._over_short_sides, x) + _over_query(self.conv1, kept)

    def _over_short_sides(self, maps: Tensor) -> Tensor:
        """Apply conv2 with a stride no longer than a side: one position remains as well.

        With longer ones oneDNN leaves parts of a bfloat16 kernel's gradient unset (torch 2.13).
        """
        stride = [min(self.stride, side) for side in maps.shape[2:]]
        weight, bias, padding = self.conv2.weight, self.conv2.bias, self.conv2.padding
        return functional.conv2d(maps, weight, bias, stride, padding)


class GroupNorm4d(nn.GroupNorm):
    """Group norm of [B, h, w, h', w', C]: the statistics are of all positions of an episode."""

    def forward(self, x: Tensor) -> Tensor:
        maps = x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return super().forward(maps).permute(0, 2, 3, 1).reshape(x.shape)


class HSNet(BlockFeatures):
    """4D convolutions squeeze the cosines of all query positions to all support positions.

    A block's hypercorrelation is the cosine of each position of the query to each position of the
    masked support, negative ones set to 0; those of a layer are the channels of a 4D map.
    Center-pivot convolutions squeeze its support dimensions, from the coarsest layer to the finest
    the squeezed maps are summed and mixed, and what remains is averaged over the support's
    positions and decoded.

    It is a model of one support. Of K supports it makes K predictions; a pixel with v votes is
    foreground if v / max(1, max v) ≥ ½, where max v is the largest of its image, as in the
    published code. So with at most two votes anywhere one suffices. While training with K
    supports, which the published training does not, the loss is the mean of their losses.

    The 4D maps are large: of a ResNet-50 at 400 pixels 110 MB an episode and support in float32,
    of which layer 2 has 100 (4·50⁴ values). They are made layer by layer and support by support,
    and freed unless a gradient needs them.

    The published network on VGG-16 takes one without batch norms, which is not among the backbones
    here.

    Args:
        backbone: a ResNet built with `backbone_options`.
        channels: width of the head, a multiple of 8; 128 in the published one.
    """

    official_names: ClassVar[Mapping[str, str]] = {
        "backbone.": "backbone.",
        "squeeze.0.": "hpn_learner.encoder_layer2.",
        "squeeze.1.": "hpn_learner.encoder_layer3.",
        "squeeze.2.": "hpn_learner.encoder_layer4.",
        "mix.0.": "hpn_learner.encoder_layer3to2.",
        "mix.1.": "hpn_learner.encoder_layer4to3.",
        "decoder.": "hpn_learner.decoder1.",
        "classifier.": "hpn_learner.decoder2.",
    }
    official_unused: ClassVar[tuple[str, ...]] = ("backbone.fc.",)
    votes: ClassVar[bool] = True

    def __init__(self, backbone: ResNet, channels: int = 128) -> None:
        super().__init__(backbone, channels)
        half = self.widths[1]
        # kernels, and strides over the support, of layers 2, 3 and 4: all end at a 32nd of layer 2
        self.squeeze = nn.ModuleList(
            _block((depth, *self.widths), kernels, strides)
            for depth, kernels, strides in zip(
                self.depths,
                ((5, 5, 3), (5, 3, 3), (3, 3, 3)),
                ((4, 4, 2), (4, 2, 2), (2, 2, 2)),
                strict=True,
            )
        )
        # what goes on from layer 3 to 2, and from 4 to 3
        self.mix = nn.ModuleList(_block((channels,) * 4, (3, 3, 3), (1, 1, 1)) for _ in range(2))
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, half, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, 2, 3, padding=1),
        )

    @classmethod
    def from_config(
        cls, backbone: ResNet, config: ModelConfig, base_classes: int, shots: int
    ) -> HSNet:
        return cls(backbone, config.channels)

    def maps(self, images: Tensor) -> Maps:
        """Compute the feature of each block of layers 2 to 4."""
        return tuple(self.backbone.block_sums(images))

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute the masked features of each block, scaled to unit length."""
        return Supports(tuple(unit(each * self.shrink_mask(masks, each)) for each in maps))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Segment the queries by each support, and let them vote if there are several.

        While training with several supports, the auxiliary logits are those of each, and the
        logits their mean. Else the vote has the gradient of that mean, as it has none of its own.
        """
        query = [unit(each) for each in features.query]
        shots = [
            resize(self.compare(query, support), size)
            for support in zip(*(each.unbind(1) for each in features.supports), strict=True)
        ]
        if len(shots) == 1:
            return Prediction(shots[0], ())
        if not (self.training or shots[0].requires_grad):
            return Prediction(vote(shots), ())
        mean = torch.stack(shots).mean(dim=0)
        if self.training:
            return Prediction(mean, tuple(shots))
        return Prediction(vote(shots) + (mean - mean.detach()), ())

    def compare(self, query: Sequence[Tensor], support: Sequence[Tensor]) -> Tensor:
        """Compute logits [B, 2, h, w] by one support, at a quarter of the images' side.

        Args:
            query, support: maps [B, C, h, w] of all blocks, of unit length at each position.
        """
        queries, supports = self.by_layer(query), self.by_layer(support)
        mixed = self.squeeze[2](hypercorrelation(queries[2], supports[2]))
        for n in (1, 0):
            squeezed = self.squeeze[n](hypercorrelation(queries[n], supports[n]))
            mixed = self.mix[n](_resize_query(mixed, squeezed.shape[1:3]) + squeezed)
        decoded = self.decoder(mixed.mean(dim=(3, 4)).permute(0, 3, 1, 2))
        height, width = decoded.shape[-2:]
        return self.classifier(resize(decoded, (2 * height, 2 * width)))


def unit(maps: Tensor) -> Tensor:
    """Scale the vectors of maps [B, C, h, w] to unit length: f / (|f| + 1e-5)."""
    return maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-5)


def hypercorrelation(query: Sequence[Tensor], support: Sequence[Tensor]) -> Tensor:
    """Compute the cosines of all positions of the blocks of a layer, negative ones 0.

    Maps [B, C, h, w] and [B, C, h', w'] of unit length of n blocks -> [B, h, w, h', w', n].
    """
    pairs = zip(query, support, strict=True)
    cosines = [q.flatten(2).transpose(1, 2) @ s.flatten(2) for q, s in pairs]
    # in place: what the squeezing convolution keeps is all that autograd keeps
    positive = torch.stack(cosines, dim=-1).relu_()
    return positive.unflatten(2, support[0].shape[2:]).unflatten(1, query[0].shape[2:])


def vote(shots: Sequence[Tensor]) -> Tensor:
    """Combine K predictions, logits [B, 2, H, W], by HSNet's vote, to logits of its result.

    With v votes for the foreground, the difference of the logits is 2v - max(1, max v) + ½: above
    0 where v is at least half of the most votes that a pixel of the image has, never 0.
    """
    votes = torch.stack([each.argmax(dim=1) for each in shots]).sum(dim=0)
    most = votes.amax(dim=(1, 2), keepdim=True).clamp(min=1)
    margin = (2 * votes - most).to(shots[0].dtype) + 0.5
    return torch.stack([-margin / 2, margin / 2], dim=1)


def _block(channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> nn.Module:
    """Build 4D convolutions with these channels in and between, each with group norm and ReLU."""
    layers: list[nn.Module] = []
    for (into, out), kernel, stride in zip(pairwise(channels), kernels, strides, strict=True):
        convolution = CenterPivotConv4d(into, out, kernel, stride)
        layers += [convolution, group_norm(out, GroupNorm4d), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _over_support(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Change maps [N, C, h', w'], those of [B, h, w, h', w', C] at each position of the query."""
    maps = x.flatten(0, 2).permute(0, 3, 1, 2)
    return change(maps).permute(0, 2, 3, 1).unflatten(0, x.shape[:3])


def _over_query(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Change maps [N, C, h, w], those of [B, h, w, h', w', C] at each position of the support."""
    swap = (0, 3, 4, 1, 2, 5)
    return _over_support(change, x.permute(swap)).permute(swap)


def _resize_query(x: Tensor, size: Sequence[int]) -> Tensor:
    return _over_query(lambda maps: resize(maps, size), x)
