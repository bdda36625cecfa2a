"""DCAMA: Shi et al., "Dense Cross-Query-and-Support Attention Weighted Mask Aggregation for
Few-Shot Segmentation", ECCV 2022.

Sections are those of the paper; the published code is the reference where it says more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from fss.models.pooling import cat_maps, resize

_HEADS = 8


class MaskAggregation(nn.Module):
    """Attention of query tokens to support tokens whose values are the support's mask.

    With queries Q and keys K of H heads, each of d channels, linear in the tokens plus their
    positions, and the share m_j of foreground at support token j,

        mask_i = mean over heads of Σ_j softmax_j(Q_i · K_j / √d) m_j          (section 3.2)

    There is no projection of the values or of the result. As in the published code both
    projections start from the same values.

    Args:
        channels: of the tokens, a multiple of 8.
        dropout: probability that a value of a token, its position added, and a weight of the
            attention are dropped.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.key.load_state_dict(self.query.state_dict())

    def forward(self, query: Tensor, supports: Tensor, masks: Tensor) -> Tensor:
        """Compute coarse masks [B, h, w].

        Args:
            query: maps [B, C, h, w].
            supports: maps [B, K, C, h', w'].
            masks: shares of foreground [B, K, 1, h', w'].
        """
        channels = query.shape[1] // _HEADS
        keys = self._tokens(supports.flatten(0, 1)).unflatten(0, supports.shape[:2]).flatten(1, 2)
        q = self.query(self._tokens(query)).unflatten(2, (_HEADS, channels)).transpose(1, 2)
        k = self.key(keys).unflatten(2, (_HEADS, channels)).transpose(1, 2)
        # zeros beside the mask, to as many channels as the keys have: the kernels that do not keep
        # the matrix of attention want that
        values = functional.pad(masks.flatten(1)[:, None, :, None].to(q.dtype), (0, channels - 1))
        values = values.expand(-1, _HEADS, -1, -1)
        dropout = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(q, k, values, dropout_p=dropout)
        return found[..., 0].mean(dim=1).unflatten(1, query.shape[2:])

    def _tokens(self, maps: Tensor) -> Tensor:
        """Turn maps [N, C, h, w] to tokens [N, h·w, C] with their positions."""
        tokens = maps.flatten(2).transpose(1, 2)
        tokens = tokens + sine_positions(tokens.shape[1], tokens.shape[2], tokens)
        return functional.dropout(tokens, self.dropout, self.training)


class DCAMA(BlockFeatures):
    """Masks of the supports, averaged for each query position by attention, then refined.

    Each block of layers 2 to 4 attends by its layer's `MaskAggregation`. The coarse masks of a
    layer are the channels that convolutions widen; from the coarsest layer to the finest they are
    summed and mixed. Beside the last blocks of layers 2 and 1, of query and support, they are
    decoded to the image's size.

    K supports are one support of K times as many tokens, whose positions begin anew in each; of
    the features that skip to the decoder the largest of the K counts. So training and tests may
    have different K; the published training has one. The published code mixes up the supports of a
    batch of several queries if K is above 1, and tests with a batch of one; here a batch computes
    what each of its episodes does alone.

    It is for a ResNet. The published Swin transformer is not among the backbones here.

    Args:
        backbone: a ResNet built with `backbone_options`, layer 2 of a multiple of 8 channels.
        channels: width of the convolutions, a multiple of 8; 128 in the published one.
        dropout: see `MaskAggregation`.
    """

    official_names: ClassVar[Mapping[str, str]] = {
        "backbone.": "feature_extractor.",
        **{
            f"attention.{n}.{name}.": f"model.DCAMA_blocks.{n}.linears.{i}."
            for n in range(3)
            for i, name in enumerate(("query", "key"))
        },
        "widen.0.": "model.conv3.",
        "widen.1.": "model.conv2.",
        "widen.2.": "model.conv1.",
        "mix.0.": "model.conv5.",
        "mix.1.": "model.conv4.",
        "decoder.0.": "model.mixer1.",
        "decoder.1.": "model.mixer2.",
        "classifier.": "model.mixer3.",
    }
    # the positions in their files are what `sine_positions` computes
    official_unused: ClassVar[tuple[str, ...]] = ("feature_extractor.fc.", "model.pe.")

    def __init__(self, backbone: ResNet, channels: int = 128, dropout: float = 0.5) -> None:
        super().__init__(backbone, channels, dropout)
        if backbone.channels[1] % _HEADS:
            raise ValueError(
                f"backbone: expected a multiple of {_HEADS} channels of layer 2, one for each head "
                f"of the attention, got {backbone.channels[1]}; take a wider one"
            )
        self.last = len(backbone.layer1) - 1
        self.attention = nn.ModuleList(
            MaskAggregation(width, dropout) for width in backbone.channels[1:]
        )
        # of layers 2, 3 and 4
        self.widen = nn.ModuleList(
            _block((depth, *self.widths), kernels)
            for depth, kernels in zip(self.depths, ((5, 5, 3), (5, 3, 3), (3, 3, 3)), strict=True)
        )
        # what goes on from layer 3 to 2, and from 4 to 3
        self.mix = nn.ModuleList(_block((channels,) * 4, (3, 3, 3)) for _ in range(2))
        narrow, half, _ = self.widths
        skipped = 2 * (backbone.channels[0] + backbone.channels[1])
        self.decoder = nn.ModuleList(
            _two_convolutions(*widths).append(nn.ReLU(inplace=True))
            for widths in ((channels + skipped, channels, half), (half, half, narrow))
        )
        self.classifier = _two_convolutions(narrow, narrow, 2)

    @classmethod
    def from_config(
        cls, backbone: ResNet, config: ModelConfig, base_classes: int, shots: int
    ) -> DCAMA:
        return cls(backbone, config.channels, config.dropout)

    def maps(self, images: Tensor) -> Maps:
        """Compute the feature of layer 1's last block and of each block of layers 2 to 4."""
        return tuple(self.backbone.block_sums(images, first=1)[self.last :])

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Return the maps, and the share of foreground at the positions of layers 2, 3 and 4."""
        layers = self.by_layer(maps[1:])
        return Supports((*maps, *(self.shrink_mask(masks, each[-1]) for each in layers)))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Segment the queries by the masks of their supports."""
        early, *query = features.query
        early_support, *support = features.supports
        masks = support[len(query) :]
        queries, supports = self.by_layer(query), self.by_layer(support[: len(query)])
        mixed: Tensor | None = None
        for n in (2, 1, 0):
            pairs = zip(queries[n], supports[n], strict=True)
            coarse = torch.stack([self.attention[n](q, s, masks[n]) for q, s in pairs], dim=-1)
            widened = self.widen[n](coarse.permute(0, 3, 1, 2))
            if mixed is None:
                mixed = widened
            else:
                mixed = self.mix[n](resize(mixed, widened.shape[-2:]) + widened)
        parts = [mixed, queries[0][-1], supports[0][-1].amax(dim=1)]
        # to the size of layer 1, which is twice theirs if the side is a multiple of 8
        parts = [resize(part, early.shape[-2:]) for part in parts]
        parts += [early, early_support.amax(dim=1)]
        decoded = self.decoder[0](cat_maps(parts, like=early))
        height, width = decoded.shape[-2:]
        decoded = self.decoder[1](resize(decoded, (2 * height, 2 * width)))
        return Prediction(self.classifier(resize(decoded, size)), ())


def sine_positions(length: int, channels: int, like: Tensor) -> Tensor:
    """Compute the sine encoding of positions p from 0, [length, channels], of a tensor's dtype.

    Channel 2i is sin(p·ω) and channel 2i + 1 cos(p·ω) with ω = 10000^(-2i/channels), computed in
    float32 as in the published code.
    """
    even = torch.arange(0, channels, 2, device=like.device)
    frequencies = torch.exp(even * -(math.log(10000.0) / channels))
    angles = torch.arange(length, device=like.device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :channels].to(like.dtype)


def _block(channels: Sequence[int], kernels: Sequence[int]) -> nn.Sequential:
    """Build convolutions with these channels in and between, each with group norm and ReLU."""
    layers: list[nn.Module] = []
    for (into, out), kernel in zip(pairwise(channels), kernels, strict=True):
        convolution = nn.Conv2d(into, out, kernel, padding=kernel // 2)
        layers += [convolution, group_norm(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _two_convolutions(into: int, between: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, between, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(between, out, 3, padding=1),
    )
