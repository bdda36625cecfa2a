"""What baseline, PFENet and BAM share: features, prototypes and priors of episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_episode, check_target
from fss.models.pooling import masked_average_pool, resize
from fss.models.prior import prior_masks


class Features(NamedTuple):
    """What a head reads of episodes of K shots.

    query_low, query_middle, query_high: maps [B, C, h, w] of layers 2, 3 and 4.
    supports: what `FewShotModel.summarise` makes of each support, [B, K, …] each.
    priors: prior masks [K, B, 1, h, w].
    """

    query_low: Tensor
    query_middle: Tensor
    query_high: Tensor
    supports: tuple[Tensor, ...]
    priors: Tensor


class FewShotModel(nn.Module):
    """A head on a backbone that sees queries and supports.

    The backbone stays in evaluation mode whatever the mode of the model: its batch norms use their
    stored statistics, also while its parameters train. It runs without autograd if nothing in
    it needs a gradient.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped.

    Attributes:
        inputs: the entries of a batch that `forward` takes, in order.
        targets: the entries that `loss` takes after the prediction, in order.
        needs_base_learner: whether a base learner is trained before and starts the model, see
            `ModelConfig.base_weights`.
    """

    inputs: tuple[str, ...] = ("query_image", "support_images", "support_masks")
    targets: tuple[str, ...] = ("query_mask",)
    needs_base_learner = False

    def __init__(self, backbone: Backbone, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        if not isinstance(channels, int) or isinstance(channels, bool):
            raise TypeError(f"channels: expected an integer, got {channels!r}")
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")
        self.backbone = backbone.eval()
        features = backbone.channels[1] + backbone.channels[2]
        self.query_reduce = _reduction(features, channels, dropout)
        self.support_reduce = _reduction(features, channels, dropout)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> FewShotModel:
        """Build the model on a backbone, with the head that a configuration describes.

        Args:
            backbone: of `config`.
            config: its `channels` and `dropout`, and what else the model has settings for.
            base_classes: number of the fold's base classes.
            shots: supports per query (K) that the model is for.
        """
        return cls(backbone, config.channels, config.dropout)

    @classmethod
    def count_base_classes(cls, state: Mapping[str, Any]) -> int:
        """Return for how many base classes the network of a state dict was built."""
        return 0

    def train(self, mode: bool = True) -> FewShotModel:
        """Sets the mode of the head; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Features:
        """Maps and priors, from one run of the backbone over all images and a masked layer 4.

        Args:
            query_image: normalised images [B, 3, H, W], H-1 and W-1 multiples of 8.
            support_images: K supports per query [B, K, 3, H, W].
            support_masks: integers or bool [B, K, H, W]; 1 is foreground, anything else is not.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        check_episode(query_image, support_images, support_masks, self.query_reduce[0].weight)
        batch, shots = support_masks.shape[:2]
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        mask = (support_masks == 1).flatten(0, 1).unsqueeze(1).to(images.dtype)
        differentiable = images.requires_grad or any(
            parameter.requires_grad for parameter in self.backbone.parameters()
        )
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            low, middle = self.backbone.features(images)
            mask = resize(mask, middle.shape[-2:])
            # two calls: the query's part of layer 3 need not be copied beside the masked supports
            query_high = self.backbone.layer4(middle[:batch])
            support_high = self.backbone.layer4(middle[batch:] * mask)
            priors = prior_masks(
                query_high,
                support_high.unflatten(0, (batch, shots)),
                mask.unflatten(0, (batch, shots)),
            )
        summaries = self.summarise(low[batch:], middle[batch:], mask)
        supports = tuple(each.unflatten(0, (batch, shots)) for each in summaries)
        return Features(low[:batch], middle[:batch], query_high, supports, priors)

    def query(self, features: Features) -> Tensor:
        """The reduced features of the queries [B, C, h, w]."""
        return pointwise_cat(self.query_reduce, features.query_middle, features.query_low)

    def summarise(self, low: Tensor, middle: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """What the head reads of each support but for the prior, whatever the query; [N, …] each.

        The first is the prototype [N, C, 1, 1], the mean reduced feature under the mask.

        Args:
            low, middle: maps [N, C, h, w] of layers 2 and 3.
            mask: foreground [N, 1, h, w], floating.
        """
        return (masked_average_pool(pointwise_cat(self.support_reduce, middle, low), mask),)

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy over the pixels that are not 255, weighted by `class_weight`.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            class_weight: weights of background and foreground [2]; the mean is divided by the
                weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        return cross_entropy(prediction.logits, query_mask, class_weight)


def classifier(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """A 3×3 and a 1×1 convolution: [B, C, h, w] to logits [B, classes, h, w]."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(channels, classes, 1),
    )


def two_convolutions(channels: int) -> nn.Sequential:
    """Two 3×3 convolutions, each with a ReLU: the residual path of the published heads."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    )


def pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1×1 convolution without bias and a ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.ReLU(inplace=True))


def pointwise_cat(layer: nn.Sequential, *parts: Tensor) -> Tensor:
    """``layer(cat(parts))`` without the copy: its convolution is 1×1, so a sum of theirs.

    A part [B, C, 1, 1] stands for a map of one value per channel.
    """
    conv, *rest = layer
    weights = conv.weight.split([part.shape[1] for part in parts], dim=1)
    out = functional.conv2d(parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out = out + functional.conv2d(part.to(parts[0].dtype), weight)
    for module in rest:
        out = module(out)
    return out


def cross_entropy(logits: Tensor, mask: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits [B, C, h, w], resized to the mask [B, H, W], without 255."""
    if logits.shape[2:] != mask.shape[1:]:
        logits = resize(logits, mask.shape[1:])
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    return functional.cross_entropy(logits, mask.long(), weight=class_weight, ignore_index=255)


def _reduction(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    return pointwise(in_channels, out_channels).append(nn.Dropout2d(dropout))
