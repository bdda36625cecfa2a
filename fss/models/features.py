"""What baseline, PFENet and BAM share: features, prototypes and priors of episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_episode, check_target
from fss.models.pooling import masked_average_pool, resize
from fss.models.prior import prior_masks


class Supports(NamedTuple):
    """What a model reads of supports, whatever the query; [N, …] each, [B, K, …] of episodes.

    mask: share of foreground [N, 1, h, w] at each position of layer 3, floating.
    high: maps [N, C, h, w] of layer 4 under the mask.
    summaries: see `FewShotModel.summarize`.
    """

    mask: Tensor
    high: Tensor
    summaries: tuple[Tensor, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> Supports:
        """Return the supports with each tensor changed."""
        return Supports(change(self.mask), change(self.high), tuple(map(change, self.summaries)))


class Features(NamedTuple):
    """What a head reads of episodes of K shots.

    query_low, query_middle, query_high: maps [B, C, h, w] of layers 2, 3 and 4.
    supports: summaries of each support, [B, K, …] each, see `FewShotModel.summarize`.
    priors: prior masks [K, B, 1, h, w].
    """

    query_low: Tensor
    query_middle: Tensor
    query_high: Tensor
    supports: tuple[Tensor, ...]
    priors: Tensor

    @staticmethod
    def of(low: Tensor, middle: Tensor, high: Tensor, supports: Supports) -> Features:
        """Compare the maps of queries [B, C, h, w] with their supports [B, K, …]."""
        priors = prior_masks(high, supports.high, supports.mask)
        return Features(low, middle, high, supports.summaries, priors)


class FewShotModel(nn.Module, ABC):
    """A head on a backbone that sees queries and supports.

    `features` runs the backbone, `head` reads what it found, and `forward` is one after the other.

    The backbone stays in evaluation mode whatever the mode of the model: its batch norms use their
    stored statistics, also while its parameters train, unless a regime says otherwise. It runs
    without autograd if nothing in it needs a gradient.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped.

    Attributes:
        inputs: the entries of a batch that `forward` takes, in order.
        targets: the entries that `loss` takes after the prediction, in order.
        needs_base_learner: whether training starts from a trained base learner, see
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
        """Return how many base classes the network of a state dict was built for."""
        return 0

    def train(self, mode: bool = True) -> FewShotModel:
        """Set the mode of the head; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        query_image: Tensor,
        support_images: Tensor,
        support_masks: Tensor,
        *others: Tensor | None,
    ) -> Prediction:
        """Segment the queries into background and what the supports show.

        Args:
            query_image, support_images, support_masks: see `features`.
            others: what the model's `head` takes besides, in the order of `inputs`.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        features = self.features(query_image, support_images, support_masks)
        return self.head(features, query_image.shape[-2:], *others)

    @abstractmethod
    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Predict the queries' masks from features, as logits [B, 2, *size]."""

    def features(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Features:
        """Compute maps and priors in one run of the backbone over all images and a masked layer 4.

        Where batch norms use statistics of the batch, queries and each of the K shots are batches
        of their own, as in the published code.

        Args:
            query_image: normalized images [B, 3, H, W], H-1 and W-1 multiples of 8.
            support_images: K supports per query [B, K, 3, H, W].
            support_masks: integers or bool [B, K, H, W]; 1 is foreground, anything else is not.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        self.check(query_image, support_images, support_masks)
        if any(isinstance(m, _BatchNorm) and m.training for m in self.backbone.modules()):
            return self._features_by_batch(query_image, support_images, support_masks)
        batch, shots = support_masks.shape[:2]
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        with self._recorded(images):
            low, middle = self.backbone.features(images)
            # two calls: the query's part of layer 3 need not be copied beside the masked supports
            high = self.backbone.layer4(middle[:batch])
        supports = self.support_features(low[batch:], middle[batch:], support_masks.flatten(0, 1))
        supports = supports.map(lambda each: each.unflatten(0, (batch, shots)))
        with self._recorded(images):
            return Features.of(low[:batch], middle[:batch], high, supports)

    def _features_by_batch(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Features:
        """Compute `features` with one run of the backbone for the queries and one for each shot."""
        with self._recorded(query_image):
            low, middle = self.backbone.features(query_image)
            high = self.backbone.layer4(middle)
        shots = []
        for images, masks in zip(support_images.unbind(1), support_masks.unbind(1), strict=True):
            with self._recorded(images):
                maps = self.backbone.features(images)
            shots.append(self.support_features(*maps, masks))
        mask, support_high, summaries = zip(*shots, strict=True)
        stacked = (torch.stack(each, dim=1) for each in zip(*summaries, strict=True))
        supports = Supports(
            torch.stack(mask, dim=1), torch.stack(support_high, dim=1), tuple(stacked)
        )
        with self._recorded(query_image):
            return Features.of(low, middle, high, supports)

    def support_features(self, low: Tensor, middle: Tensor, masks: Tensor) -> Supports:
        """Compute what the model reads of N supports, whatever the query.

        Args:
            low, middle: maps [N, C, h, w] of layers 2 and 3.
            masks: integers or bool [N, H, W]; 1 is foreground, anything else is not.
        """
        # not of the maps' dtype, which autocast may have chosen
        mask = (masks == 1).unsqueeze(1).to(self.query_reduce[0].weight.dtype)
        mask = resize(mask, middle.shape[-2:])
        with self._recorded(middle):
            high = self.backbone.layer4(middle * mask)
        return Supports(mask, high, self.summarize(low, middle, mask))

    @torch.no_grad()
    def encode_supports(self, images: Tensor, masks: Tensor) -> Supports:
        """Compute once what `segment` reads of K supports, which serve any number of queries.

        Args:
            images: normalized images [K, 3, H, W], H-1 and W-1 multiples of 8.
            masks: integers or bool [K, H, W]; 1 is foreground, anything else is not.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        self.check(images[:1], images[None], masks[None])
        return self.support_features(*self.backbone.features(images), masks)

    @torch.no_grad()
    def segment(self, queries: Tensor, supports: Supports) -> Tensor:
        """Compute logits [B, 2, H, W] of queries [B, 3, H, W] by supports of `encode_supports`.

        Raises:
            ValueError: another number of supports than the model can weigh (BAM).
        """
        low, middle = self.backbone.features(queries)
        high = self.backbone.layer4(middle)
        repeated = supports.map(lambda each: each.expand(len(queries), *each.shape))
        return self.head(Features.of(low, middle, high, repeated), queries.shape[-2:]).logits

    def check(self, query_image: Tensor, support_images: Tensor, support_masks: Tensor) -> None:
        """Raise TypeError or ValueError unless `features` takes these inputs."""
        check_episode(query_image, support_images, support_masks, self.query_reduce[0].weight)

    def _recorded(self, x: Tensor) -> AbstractContextManager[object]:
        """Let autograd record the backbone on x only if something there needs a gradient."""
        needed = x.requires_grad or any(p.requires_grad for p in self.backbone.parameters())
        return torch.set_grad_enabled(needed and torch.is_grad_enabled())

    def query(self, features: Features) -> Tensor:
        """Reduce the features of the queries to [B, C, h, w]."""
        return pointwise_cat(self.query_reduce, features.query_middle, features.query_low)

    def summarize(self, low: Tensor, middle: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Compute what the head reads of each support besides the prior; [N, …] each.

        The first is the prototype [N, C, 1, 1], the mean reduced feature under the mask.

        Args:
            low, middle: maps [N, C, h, w] of layers 2 and 3.
            mask: foreground [N, 1, h, w], floating.
        """
        return (masked_average_pool(pointwise_cat(self.support_reduce, middle, low), mask),)

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Average the cross-entropy over the pixels that are not 255, weighted by `class_weight`.

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
    """Build a 3×3 and a 1×1 convolution: [B, C, h, w] to logits [B, classes, h, w]."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(channels, classes, 1),
    )


def two_convolutions(channels: int) -> nn.Sequential:
    """Build two 3×3 convolutions with a ReLU each, the residual path of the published heads."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    )


def pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build a 1×1 convolution without bias and a ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.ReLU(inplace=True))


def pointwise_cat(layer: nn.Sequential, *parts: Tensor) -> Tensor:
    """Compute ``layer(cat(parts))`` without the copy, as a sum of 1×1 convolutions.

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
    """Average the cross-entropy of logits, resized to a mask [B, H, W], where it is not 255."""
    if logits.shape[2:] != mask.shape[1:]:
        logits = resize(logits, mask.shape[1:])
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    return functional.cross_entropy(logits, mask.long(), weight=class_weight, ignore_index=255)


def _reduction(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    return pointwise(in_channels, out_channels).append(nn.Dropout2d(dropout))
