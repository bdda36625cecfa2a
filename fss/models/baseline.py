"""The baseline of the SVF paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.models.aspp import ASPP
from fss.models.backbone import ResNet
from fss.models.episode import Prediction, check_episode, check_target
from fss.models.pooling import masked_average_pool, resize
from fss.models.prior import prior_mask


class Baseline(nn.Module):
    """PFENet with its feature enrichment module replaced by ASPP, and only the main loss.

    Layers 2 and 3 of the backbone are reduced to `channels` channels, for query and support
    each. The mean support feature under the mask, the mean of K shots, is compared with each query
    position by convolutions which also see the prior mask. The head has no batch norm: neither
    PFENet's layers nor BAM's ASPP have any.

    The backbone stays in evaluation mode whatever the mode of the model: its batch norms use their
    stored statistics, also while its parameters train. It runs without autograd if nothing in
    it needs a gradient.

    Sources: SVF (Sun et al. 2022), section 4.1; PFENet (Tian et al. 2020), section 3.

    Args:
        backbone: a backbone of output stride 8.
        channels: width of the head.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifier
            drops 0.1 of its channels too.
    """

    def __init__(self, backbone: ResNet, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        if not isinstance(channels, int) or isinstance(channels, bool):
            raise TypeError(f"channels: expected an integer, got {channels!r}")
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")
        self.backbone = backbone
        features = backbone.channels[1] + backbone.channels[2]
        self.query_reduce = _reduce(features, channels, dropout)
        self.support_reduce = _reduce(features, channels, dropout)
        self.merge = nn.Sequential(
            nn.Conv2d(2 * channels + 1, channels, 1, bias=False), nn.ReLU(inplace=True)
        )
        self.aspp = ASPP(channels)
        self.project = nn.Sequential(
            nn.Conv2d(5 * channels, channels, 1, bias=False), nn.ReLU(inplace=True)
        )
        self.residual = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1 if dropout else 0.0),
            nn.Conv2d(channels, 2, 1),
        )
        self.train()

    def train(self, mode: bool = True) -> Baseline:
        """Sets the mode of the head; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

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
        check_episode(query_image, support_images, support_masks, self.classifier[-1].weight)
        batch, shots, height, width = support_masks.shape
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        foreground = (support_masks == 1).flatten(0, 1).unsqueeze(1).to(images.dtype)

        differentiable = images.requires_grad or any(
            parameter.requires_grad for parameter in self.backbone.parameters()
        )
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            layer2, layer3 = self.backbone.features(images)
            foreground = resize(foreground, layer3.shape[-2:])
            # two calls: the query's part of layer 3 need not be copied beside the masked supports
            query4 = self.backbone.layer4(layer3[:batch])
            support4 = self.backbone.layer4(layer3[batch:] * foreground)
            prior = prior_mask(
                query4,
                support4.unflatten(0, (batch, shots)),
                foreground.unflatten(0, (batch, shots)),
            )

        query = _reduced(self.query_reduce, layer3[:batch], layer2[:batch])
        support = _reduced(self.support_reduce, layer3[batch:], layer2[batch:])
        prototypes = masked_average_pool(support, foreground)
        prototype = prototypes.unflatten(0, (batch, shots)).mean(dim=1)
        merged = self.merge(
            torch.cat([query, prototype.expand_as(query), prior.to(query.dtype)], dim=1)
        )
        merged = self.project(self.aspp(merged))
        merged = merged + self.residual(merged)
        return Prediction(resize(self.classifier(merged), (height, width)), ())

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy over the pixels that are not 255, weighted by `class_weight`.

        Args:
            prediction: of this model.
            query_mask: int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            class_weight: weights of background and foreground [2]; the mean is divided by the
                weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        return functional.cross_entropy(
            prediction.logits, query_mask, weight=class_weight, ignore_index=255
        )


def _reduce(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
    )


def _reduced(reduce: nn.Sequential, *features: Tensor) -> Tensor:
    """``reduce(cat(features))`` without the copy: its convolution is 1×1, so a sum of theirs."""
    conv, *rest = reduce
    weights = conv.weight.split([feature.shape[1] for feature in features], dim=1)
    out = functional.conv2d(features[0], weights[0])
    for feature, weight in zip(features[1:], weights[1:], strict=True):
        out = out + functional.conv2d(feature, weight)
    for module in rest:
        out = module(out)
    return out
