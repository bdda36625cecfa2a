"""PMM and RPMM: Yang et al., "Prototype Mixture Models for Few-shot Semantic Segmentation", ECCV
2020.
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
from fss.models.canet import CANet, DenseComparison, convolution, tiled
from fss.models.episode import Prediction, check_target
from fss.models.features import Features, Maps, Supports
from fss.models.loss import cross_entropy
from fss.models.pooling import cat_maps, resize

_CONCENTRATION = 20.0
_ITERATIONS = 10


class PMM(DenseComparison):
    """Prototype mixture model: several prototypes of object and background each.

    EM (`mixture`) finds the prototypes of all positions of the K supports together, whose features
    are multiplied by the mask for those of the object, by 1 - mask for the background's. They
    serve twice: each of the object's is compared with the query, and the comparisons are summed
    (P-Match); and each position of the query gets the probability of background and
    object, the softmax over all prototypes of their products with its feature, summed over those
    of each (P-Conv), which is the mask that CANet's optimization begins with.

    As in the published code no gradient passes prototypes and probabilities, so that the supports
    train nothing. EM begins there with random unit vectors, drawn for each process; here with the
    same ones always, whatever the seed, so that a prediction can be repeated.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head.
        dropout: probability that a channel is dropped after ASPP's convolutions.
    """

    prototypes: ClassVar[tuple[int, ...]] = (3,)
    batch_norm: ClassVar[tuple[str, ...]] = ("reduce", "comparison", "merge", "project")
    official_names: ClassVar[Mapping[str, str]] = {
        "backbone.": "model_res.",
        "merge.": "layer56.",
        **DenseComparison.official_names,
        **{
            ours: f"layer6.{theirs}"
            for ours, theirs in CANet.official_names.items()
            if ours.startswith("aspp.")
        },
    }

    supports_train = False

    def __init__(self, backbone: Backbone, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__(backbone, channels, dropout, self.batch_norm)
        norm = "merge" in self.batch_norm
        into = channels if norm else channels + 2
        self.merge = convolution(into, channels, 3, 1, None if norm else dropout)
        for module in self.aspp.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        generator = torch.Generator().manual_seed(0)
        starts = torch.randn(sum(self.prototypes), channels, generator=generator)
        # not in the state dict: the authors' has none
        self.register_buffer("starts", functional.normalize(starts).T, persistent=False)

    @classmethod
    def from_config(
        cls, backbone: Backbone, config: ModelConfig, base_classes: int, shots: int
    ) -> PMM:
        return cls(backbone, config.channels, config.dropout)

    @torch.no_grad()
    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute the reduced features [N, C, h, w] and masks [N, 1, h, w] of the supports."""
        return Supports((self.reduced(*maps), self.shrink_mask(masks, maps[1])))

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Compare the queries with the prototypes, and begin with the mask that these give."""
        query = self.reduced(*features.query)
        objects, mask = self.represent(query, features, self.starts)
        x = self.merge(reduce(torch.add, tiled(self.comparison, query, objects)))
        return Prediction(resize(self.optimize(x, mask), size, align_corners=False), ())

    def represent(self, query: Tensor, features: Features, start: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the object's prototypes [B, k, C] and probabilities [B, 2, h, w] of the query.

        Args:
            query: reduced features [B, C, h, w].
            features: of the episodes, whose supports are those of `support_features`.
            start: unit vectors [C, k] that EM begins with.
        """
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            # [B, C, n] of the positions of all shots
            support, mask = (each.transpose(1, 2).flatten(2) for each in features.supports)
            objects, grounds = (
                mixture(support * share, start, _ITERATIONS, _CONCENTRATION)
                for share in (mask, 1 - mask)
            )
            both = torch.cat([grounds, objects], dim=2)
            shares = (both.mT @ query.flatten(2).to(both.dtype)).softmax(dim=1)
            shares = shares.unflatten(1, (2, -1)).sum(dim=2)
        return objects.mT, shares.unflatten(2, query.shape[2:])

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Sum the cross-entropies of the prediction and, for RPMM in training, of earlier stages.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            class_weight: weights of background and foreground [2]; each mean is divided by the
                weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        loss = cross_entropy(prediction.logits, query_mask, class_weight)
        for logits in prediction.auxiliary:
            logits = resize(logits, query_mask.shape[1:], align_corners=False)
            loss = loss + cross_entropy(logits, query_mask, class_weight)
        return loss


class RPMM(PMM):
    """Residual prototype mixture models: stages of 1, 3 and 6 prototypes, one after the other.

    The layers are those of all stages. A stage merges its comparisons with the probabilities of
    its prototypes, and its optimization begins with the softmax of the stage before, the first with
    an empty mask. There is a batch norm after the reduction only; the other layers
    have dropout. The loss is the sum of the stages'.

    As in the published code the prediction is the last stage's by one support, and by several,
    outside of training, the sum of all stages' probabilities, divided by 5; this changes which
    class is chosen only through the earlier stages. EM begins there with vectors that each pass
    draws; here with the same ones always.
    """

    prototypes: ClassVar[tuple[int, ...]] = (1, 3, 6)
    batch_norm: ClassVar[tuple[str, ...]] = ("reduce",)

    def head(self, features: Features, size: Sequence[int]) -> Prediction:
        """Segment the queries in stages; auxiliary are, while training, those before the last."""
        query = self.reduced(*features.query)
        mask = query.new_zeros(len(query), 2, *query.shape[2:])
        stages: list[Tensor] = []
        masks: list[Tensor] = []
        for start in self.starts.split(self.prototypes, dim=1):
            objects, shares = self.represent(query, features, start)
            x = reduce(torch.add, tiled(self.comparison, query, objects))
            x = self.merge(cat_maps([x, shares.to(x.dtype)], like=x))
            stages.append(self.optimize(x, mask))
            mask = stages[-1].softmax(dim=1)
            masks.append(mask)
        *earlier, last = stages
        if self.training:
            return Prediction(resize(last, size, align_corners=False), tuple(earlier))
        if features.supports[0].shape[1] > 1:
            last = reduce(torch.add, masks) / 5
        return Prediction(resize(last, size, align_corners=False), ())


@torch.no_grad()
def mixture(x: Tensor, start: Tensor, iterations: int, concentration: float) -> Tensor:
    """Fit unit vectors μ to features by expectation maximization.

        E: w_nk = softmax_k(κ · x_n·μ_k)
        M: μ_k = Σ_n w_nk x_n / (Σ_n w_nk + 1e-6),  divided by |μ_k| + 1e-6

    Features of 0 change nothing; without any other, μ is 0.

    Args:
        x: features [B, C, n].
        start: unit vectors [C, k].
        iterations: steps E and M.
        concentration: κ of the von Mises-Fisher distribution.

    Returns:
        [B, C, k], in float32 at least.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mu = start.to(x.dtype).expand(len(x), -1, -1)
    for _ in range(iterations):
        weights = (concentration * (x.mT @ mu)).softmax(dim=2)
        mu = x @ (weights / (weights.sum(dim=1, keepdim=True) + 1e-6))
        mu = mu / (torch.linalg.vector_norm(mu, dim=1, keepdim=True) + 1e-6)
    return mu
