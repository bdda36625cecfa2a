"""CWT: Lu et al., "Simpler is Better: Few-shot Semantic Segmentation with Classifier Weight
Transformer", ICCV 2021.

Sections are those of the paper; the published code is the reference where it says more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import ModelConfig
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_target
from fss.models.features import Features, FewShotModel, Maps, Supports
from fss.models.pooling import interpolation, resize
from fss.models.pspnet import BaseLearner
from fss.models.random_numbers import random_numbers

_BITS = 23  # of a random weight, beside its sign


class WeightTransformer(nn.Module):
    """Adapts the weights of a classifier to the positions of a query (section 3.3).

    Attention with one projection P_h per head h for queries, keys and values alike, then a residual
    and a layer norm: of the weight w of a class and the features f_i of the positions,

        a_hi = softmax_i((P_h w)·(P_h f_i) / √d)
        w' = LayerNorm(w + out([Σ_i a_hi·P_h f_i for each h]))

    computed as (P_hᵀ P_h w)·f_i and P_h Σ_i a_hi·f_i, so that no position is projected.

    Args:
        channels: of weights and positions.
        head_channels: of a head (d); the authors take as many as `channels`.
        heads: number of heads.
        dropout: probability that an output is dropped; unless it is 0, attention drops 0.1 too.
    """

    def __init__(
        self, channels: int, head_channels: int, heads: int = 4, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(channels, heads * head_channels, bias=False)
        self.out = nn.Linear(heads * head_channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.attention_dropout = nn.Dropout(0.1 if dropout else 0.0)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.project.weight, std=math.sqrt(2 / (channels + head_channels)))
        nn.init.xavier_normal_(self.out.weight)

    def forward(self, weights: Tensor, positions: Tensor) -> Tensor:
        """Adapt weights [B, n, C] to features [B, C, N] of positions."""
        projection = self.project.weight.unflatten(0, (self.heads, -1))
        asked = self.project(weights).unflatten(2, (self.heads, -1)).transpose(1, 2)
        directions = asked @ projection / math.sqrt(projection.shape[1])
        attention = (directions @ positions.unsqueeze(1)).softmax(dim=3)
        pooled = self.attention_dropout(attention) @ positions.mT.unsqueeze(1)
        heads = (pooled @ projection.mT).transpose(1, 2).flatten(2)
        return self.norm(weights + self.dropout(self.out(heads)))


class CWT(FewShotModel):
    """A classifier that is fitted to the supports, and a transformer that adapts it to the query.

    The encoder is a PSPNet up to its classifier (backbone, pyramid pooling and a 3×3 convolution),
    trained on the base classes before and frozen. In an episode `fit_classifier` fits the
    weights of background and foreground to the supports' features, and `WeightTransformer` adapts
    them to the query's features f, normalized to length 1. The prediction is w'·f. The transformer
    alone trains.

    As published, the classifier sees features that are not normalized, and K supports are pixels
    of one fit. Supports are computed without autograd, whatever trains: the backbone, under a
    regime that trains it, gets its gradient through the query's features alone. The authors draw
    the initial classifier at random in each test; see `initial_weights` for ours. Their code also
    runs the first supports of an epoch with the encoder in training mode, which shifts the
    statistics of its batch norms until the run ends; a test reads the file's again. It is not
    repeated here.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of each of the transformer's heads.
        dropout: probability that an output of the transformer is dropped.
        iterations, lr: of the fit, see `fit_classifier`.
    """

    needs_base_learner = True
    supports_train = False
    official_names: ClassVar[Mapping[str, str]] = {
        "base_learner.pool.": "ppm.",
        "base_learner.classifier.": "bottleneck.",
        "weight_transformer.project.": "w_qkvs.",
        "weight_transformer.out.": "fc.",
        "weight_transformer.norm.": "layer_norm.",
    }
    official_unused = ("classifier.",)

    def __init__(
        self,
        backbone: Backbone,
        channels: int = 512,
        dropout: float = 0.5,
        iterations: int = 200,
        lr: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        self.iterations, self.lr = iterations, lr
        base_learner = BaseLearner(backbone.channels[3], None)
        self.base_learner = base_learner.requires_grad_(False).eval()
        self.weight_transformer = WeightTransformer(base_learner.width, channels, dropout=dropout)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> CWT:
        return cls(backbone, config.channels, config.dropout)

    def train(self, mode: bool = True) -> CWT:
        """Set the mode of the transformer; backbone and encoder stay in evaluation mode."""
        super().train(mode)
        self.base_learner.eval()
        return self

    def maps(self, images: Tensor) -> Maps:
        """Compute the encoder's features [N, C, h, w]."""
        return (self.base_learner(self.backbone(images)),)

    def features(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Features:
        """Compute what the head reads, of the supports without autograd; see `FewShotModel`."""
        if not any(p.requires_grad for p in self.backbone.parameters()):
            return super().features(query_image, support_images, support_masks)
        self.check(query_image, support_images, support_masks)
        shots = zip(support_images.unbind(1), support_masks.unbind(1), strict=True)
        with torch.no_grad():
            supports = [self.support_features(self.maps(images), masks) for images, masks in shots]
        return Features.of(self.maps(query_image), Supports.stack(supports))

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Return what the classifier is fitted to: features [N, C, h, w] and masks [N, H, W]."""
        return Supports((maps[0].detach(), masks))

    def encode_supports(self, images: Tensor, masks: Tensor) -> Supports:
        """Fit the classifier, once for all queries: its weights [1, 2, C] are all that is kept."""
        maps, masks = super().encode_supports(images, masks).summaries
        return Supports((self.fit(maps[None], masks[None]),))

    def fit(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Fit the classifier of each episode; see `fit_classifier`."""
        return fit_classifier(
            maps, masks, initial_weights(masks, maps.shape[2]), self.iterations, self.lr
        )

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Adapt the classifier to the queries and classify their positions.

        Args:
            features: of K supports their features and masks, or the classifier fitted to them.
            size: height and width of the logits.
        """
        first, *masks = features.supports
        fitted = self.fit(first, *masks) if masks else first[:, 0]
        positions = functional.normalize(features.query[0], dim=1).flatten(2)
        adapted = self.weight_transformer(fitted.to(self._parameter().dtype), positions)
        logits = (adapted @ positions).unflatten(2, features.query[0].shape[2:])
        return Prediction(resize(logits, size), ())

    def _parameter(self) -> Tensor:
        return self.weight_transformer.project.weight

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Average the episodes' cross-entropies, in each of which both classes weigh the same.

        The foreground of an episode is weighted by its background pixels per foreground pixel, and
        the mean is divided by the weights' sum.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            class_weight: further weights of background and foreground [2].

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        logits = prediction.logits.to(torch.promote_types(prediction.logits.dtype, torch.float32))
        classes = torch.stack([query_mask == 0, query_mask == 1], dim=1).to(logits.dtype)
        counts = classes.sum(dim=(2, 3))
        weights = torch.stack([torch.ones_like(counts[:, 0]), _balance(counts)], dim=1)
        if class_weight is not None:
            weights = weights * class_weight.to(weights.dtype)
        each = -(logits.log_softmax(dim=1) * classes).sum(dim=(2, 3))
        total = (weights * counts).sum(dim=1).clamp(min=torch.finfo(logits.dtype).tiny)
        return ((weights * each).sum(dim=1) / total).mean()


def _balance(counts: Tensor) -> Tensor:
    """Divide the number of background pixels by that of foreground pixels, [B, 2] -> [B]."""
    return counts[:, 0] / counts[:, 1].clamp(min=1)


@torch.no_grad()
def fit_classifier(
    maps: Tensor, masks: Tensor, initial: Tensor, iterations: int = 200, lr: float = 0.1
) -> Tensor:
    """Fit a linear classifier of background and foreground to K supports by gradient descent.

    The loss is the cross-entropy at the masks' size, where the foreground's pixels weigh as much as
    the background's: its gradient by the difference z = z_1 - z_0 of a pixel's logits is

        g = (σ(z) - y) / 2n_y        n_y pixels of its class y, 0 where the mask is 255

    for the foreground and -g for the background, so that the mean of both weights stays as it was,
    and a step changes their difference by -2·lr times the foreground's gradient. Enlarging a map
    is a product with a matrix on either side, and its gradient one with their transposes.

    Args:
        maps: features [B, K, C, h, w] of the supports.
        masks: integers or bool [B, K, H, W]; 0 background, 1 foreground, 255 ignored.
        initial: weights [B, 2, C].
        iterations, lr: number of steps, and their rate.

    Returns:
        weights [B, 2, C] in float32 at least, without a gradient. A class without a pixel, which
        the authors' code cannot divide by, weighs nothing.
    """
    batch, shots, _, *small = maps.shape
    dtype = torch.promote_types(maps.dtype, torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        positions = maps.to(dtype).transpose(1, 2).flatten(2)
        foreground = masks == 1
        background = ~foreground & (masks != 255)
        target, other = foreground.to(dtype), background.to(dtype)
        share = sum(
            each / (2 * each.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1))
            for each in (target, other)
        )
        target, share = target.flatten(0, 1), share.flatten(0, 1)
        rows, columns = (
            interpolation(cells, pixels, True, like=share).mT.expand(batch * shots, -1, -1)
            for cells, pixels in zip(small, masks.shape[2:], strict=True)
        )
        first, second = initial.to(dtype).split(1, dim=1)
        mean, difference = (first + second) / 2, second - first
        # few operations: each is there `iterations` times in an exported graph
        right, down, back = columns.mT, rows.mT, positions.mT
        for _ in range(iterations):
            logits = torch.bmm(difference, positions).reshape(batch * shots, *small)
            logits = torch.bmm(torch.bmm(rows, logits), right)
            gradient = share * (logits.sigmoid() - target)
            gradient = torch.bmm(torch.bmm(down, gradient), columns).reshape(batch, 1, -1)
            difference = torch.baddbmm(difference, gradient, back, alpha=-2 * lr)
        return torch.cat([mean - difference / 2, mean + difference / 2], dim=1)


def initial_weights(masks: Tensor, channels: int) -> Tensor:
    """Draw the classifier's initial weights [B, 2, C] from -1/√C to 1/√C, torch's for a 1×1 layer.

    The authors draw them anew in each episode. Here the foreground of an episode's masks
    [B, K, H, W] is the seed, whatever the order of the supports and the rest of the batch: the same
    supports always give the same weights, on any device.
    """
    foreground = (masks == 1).sum(dim=1).flatten(1)
    places = random_numbers(foreground.new_zeros(1), 0, foreground.shape[1])
    # 24 bits of each: their sum is exact in float64 too, in which ONNX Runtime adds integers
    drawn = random_numbers((foreground * (places >> 40)).sum(dim=1), 1, 2 * channels)
    uniform = (drawn >> (63 - _BITS)).to(torch.float32) / 2**_BITS
    return (uniform / math.sqrt(channels)).unflatten(1, (2, channels))
