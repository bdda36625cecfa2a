"""The seam of all few-shot models: features of episodes, and a head that reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fss.config import ModelConfig
from fss.models.backbone import CONVOLUTIONAL, Backbone
from fss.models.episode import Prediction, check_episode, check_target
from fss.models.loss import deep_supervision
from fss.models.pooling import resize
from fss.models.prior import prior_masks
from fss.models.vit import ViT

Maps = tuple[Tensor, ...]


class Supports(NamedTuple):
    """What a model reads of supports, whatever the query; [N, …] each, [B, K, …] of episodes.

    summaries: what the head reads of each support.
    mask, high: for the prior mask, the share of foreground [N, 1, h, w] at each position and the
        maps [N, C, h, w] that are compared there; None for a model without a prior.
    """

    summaries: Maps
    mask: Tensor | None = None
    high: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Supports:
        """Return the supports with each tensor changed."""
        mask, high = (None if each is None else change(each) for each in self[1:])
        return Supports(tuple(map(change, self.summaries)), mask, high)

    @staticmethod
    def stack(shots: Sequence[Supports]) -> Supports:
        """Join supports [N, …] of each of K shots to [N, K, …]."""
        kinds = zip(*(shot.summaries for shot in shots), strict=True)
        summaries = tuple(torch.stack(each, dim=1) for each in kinds)
        if shots[0].high is None:
            return Supports(summaries)
        mask, high = (torch.stack([shot[n] for shot in shots], dim=1) for n in (1, 2))
        return Supports(summaries, mask, high)


class Features(NamedTuple):
    """What a head reads of episodes of K shots.

    query: maps of the queries, [B, …] each, see `FewShotModel.maps` and `query_maps`.
    supports: summaries of each support, [B, K, …] each, see `FewShotModel.support_features`.
    priors: prior masks [K, B, 1, h, w]; None for a model without.
    """

    query: Maps
    supports: Maps
    priors: Tensor | None = None

    @staticmethod
    def of(query: Maps, supports: Supports) -> Features:
        """Put the maps of queries [B, …] beside their supports [B, K, …].

        The prior compares the last of the query's maps, if the supports have maps for it.
        """
        if supports.high is None or supports.mask is None:
            return Features(query, supports.summaries)
        priors = prior_masks(query[-1], supports.high, supports.mask)
        return Features(query, supports.summaries, priors)


class FewShotModel(nn.Module, ABC):
    """A head on a backbone that sees queries and supports.

    `features` runs the backbone, `head` reads what it found, and `forward` is one after the other.
    A method says what the backbone computes of any photo (`maps`), of queries besides
    (`query_maps`) and of supports (`support_features`), and has a `head`; see `PriorGuided` for
    what most published ones share.

    The backbone stays in evaluation mode whatever the mode of the model: its batch norms use their
    stored statistics, also while its parameters train, unless a regime says otherwise. It runs
    without autograd if nothing in it needs a gradient.

    Args:
        backbone: built with `backbone_options`.

    Attributes:
        inputs: the entries of a batch that `forward` takes, in order; from the fourth on `head`
            takes them, and does without outside of training and tests.
        targets: the entries that `loss` takes after the prediction, in order.
        backbones: names of those that the method can run on.
        backbone_options: arguments of `build_backbone` that the method needs.
        unused_layers: children of the backbone that the method does not run, and takes out.
        any_size: whether images of any size do; else their sides are multiples of 8 plus 1.
        needs_base_learner: whether training starts from a trained base learner, see
            `ModelConfig.base_weights`.
        needs_base_classes: whether it is built for the fold's base classes without that.
        transformer: beginnings of the names of parameters that have their own optimizer, see
            `OptimizerConfig.transformer_lr`.
        supports_train: whether a gradient reaches the backbone through the supports.
        votes: whether several supports vote, so that small differences make other logits or none.
        official_names: beginnings of our names and of those in the authors' files, see
            `official_keys`.
        official_shapes: shapes of the values that the authors have in another one, by our names.
        official_unused: beginnings of the names of what in the authors' files computes nothing.
        recompute_supports: keep of the supports what the head reads alone, and compute what leads
            to it again in the backward pass, one shot after the other: less memory, for the time
            of a forward pass of the supports.
    """

    inputs: ClassVar[tuple[str, ...]] = ("query_image", "support_images", "support_masks")
    targets: ClassVar[tuple[str, ...]] = ("query_mask",)
    backbones: ClassVar[tuple[str, ...]] = CONVOLUTIONAL
    backbone_options: ClassVar[Mapping[str, Any]] = {}
    unused_layers: ClassVar[tuple[str, ...]] = ()
    any_size: bool = False
    needs_base_learner: ClassVar[bool] = False
    needs_base_classes: ClassVar[bool] = False
    transformer: ClassVar[tuple[str, ...]] = ()
    supports_train: ClassVar[bool] = True
    votes: ClassVar[bool] = False
    official_names: ClassVar[Mapping[str, str]] = {}
    official_shapes: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    official_unused: ClassVar[tuple[str, ...]] = ()
    recompute_supports: bool = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if isinstance(backbone, ViT) and backbone.name not in self.backbones:
            raise ValueError(
                f"backbone: expected one of {', '.join(self.backbones)} for {type(self).__name__}, "
                f"whose head reads maps that a vision transformer has not; got {backbone.name}"
            )
        for layer in self.unused_layers:
            backbone.set_submodule(layer, nn.Sequential())
        self.backbone = backbone.eval()
        self.any_size = self.any_size or getattr(backbone, "any_size", False)

    @classmethod
    @abstractmethod
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
        """Compute what the head reads, in one run of the backbone over all images.

        Where batch norms use statistics of the batch, queries and each of the K shots are batches
        of their own, as in the published code; also with `recompute_supports`.

        Args:
            query_image: normalized images [B, 3, H, W], H-1 and W-1 multiples of 8 unless the model
                takes `any_size`.
            support_images: K supports per query [B, K, 3, H, W].
            support_masks: integers or bool [B, K, H, W]; 1 is foreground, anything else is not.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
            RuntimeError: `recompute_supports` with batch norms that use the batch's statistics.
        """
        self.check(query_image, support_images, support_masks)
        by_batch = any(isinstance(m, _BatchNorm) and m.training for m in self.backbone.modules())
        if self.recompute_supports and self.supports_train and torch.is_grad_enabled():
            if by_batch:
                raise RuntimeError(
                    "recompute_supports: expected batch norms of the backbone with stored "
                    "statistics, got some that would take a batch into theirs twice; turn it off, "
                    "or freeze them"
                )
            return self._features_by_shot(query_image, support_images, support_masks)
        if by_batch:
            return self._features_by_batch(query_image, support_images, support_masks)
        batch, shots = support_masks.shape[:2]
        images = torch.cat([query_image, support_images.flatten(0, 1)])
        with self._recorded(images):
            maps = self.maps(images)
            seen = tuple(each[:batch] for each in maps)
            query = (*seen, *self.query_maps(*seen))
        supports = self.support_features(
            tuple(each[batch:] for each in maps), support_masks.flatten(0, 1)
        )
        supports = supports.map(lambda each: each.unflatten(0, (batch, shots)))
        with self._recorded(images):
            return Features.of(query, supports)

    def _features_by_batch(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Features:
        """Compute `features` with one run of the backbone for the queries and one for each shot."""
        with self._recorded(query_image):
            seen = self.maps(query_image)
            query = (*seen, *self.query_maps(*seen))
        shots = []
        for images, masks in zip(support_images.unbind(1), support_masks.unbind(1), strict=True):
            with self._recorded(images):
                maps = self.maps(images)
            shots.append(self.support_features(maps, masks))
        with self._recorded(query_image):
            return Features.of(query, Supports.stack(shots))

    def _features_by_shot(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Features:
        """Compute `features` of each shot in a checkpoint, which keeps its photos and results."""
        with self._recorded(query_image):
            seen = self.maps(query_image)
            query = (*seen, *self.query_maps(*seen))

        def of_shot(images: Tensor, masks: Tensor, *query: Tensor) -> tuple[Tensor | None, ...]:
            with self._recorded(images):
                maps = self.maps(images)
            supports = self.support_features(maps, masks).map(lambda each: each.unsqueeze(1))
            with self._recorded(images):
                _, summaries, priors = Features.of(query, supports)
            return (*summaries, priors)

        shots = [
            checkpoint(of_shot, images, masks, *query, use_reentrant=False)
            for images, masks in zip(support_images.unbind(1), support_masks.unbind(1), strict=True)
        ]
        *summaries, priors = zip(*shots, strict=True)
        joined = tuple(torch.cat(each, dim=1) for each in summaries)
        return Features(query, joined, None if priors[0] is None else torch.cat(priors))

    def maps(self, images: Tensor) -> Maps:
        """Compute what the backbone finds in photos [N, 3, H, W], whatever their role: [N, …]."""
        return self.backbone.features(images)

    def query_maps(self, *maps: Tensor) -> Maps:
        """Compute what of queries the head reads besides their `maps`."""
        return ()

    @abstractmethod
    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute what the model reads of N supports, whatever the query.

        Args:
            maps: of the supports, see `maps`.
            masks: integers or bool [N, H, W]; 1 is foreground, anything else is not.
        """

    @torch.no_grad()
    def encode_supports(self, images: Tensor, masks: Tensor) -> Supports:
        """Compute once what `segment` reads of K supports, which serve any number of queries.

        Args:
            images: normalized images [K, 3, H, W], of a size as for `features`.
            masks: integers or bool [K, H, W]; 1 is foreground, anything else is not.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        self.check(images[:1], images[None], masks[None])
        return self.support_features(self.maps(images), masks)

    @torch.no_grad()
    def segment(self, queries: Tensor, supports: Supports, *others: Tensor | None) -> Tensor:
        """Compute logits [B, 2, H, W] of queries [B, 3, H, W] by supports of `encode_supports`.

        `others` as for `forward`.

        Raises:
            ValueError: another number of supports than the model can weigh (BAM).
        """
        maps = self.maps(queries)
        repeated = supports.map(lambda each: each.expand(len(queries), *each.shape))
        features = Features.of((*maps, *self.query_maps(*maps)), repeated)
        return self.head(features, queries.shape[-2:], *others).logits

    def check(self, query_image: Tensor, support_images: Tensor, support_masks: Tensor) -> None:
        """Raise TypeError or ValueError unless `features` takes these inputs."""
        check_episode(query_image, support_images, support_masks, self._parameter(), self.any_size)

    def _parameter(self) -> Tensor:
        """Return a parameter, of the head if it has any, of whose dtype and device inputs are."""
        heads = (part for name, part in self.named_children() if name != "backbone")
        return next(chain(*(part.parameters() for part in heads), self.backbone.parameters()))

    def shrink_mask(self, masks: Tensor, like: Tensor) -> Tensor:
        """Resize the foreground of masks [N, H, W] to a share [N, 1, h, w], the size of a map."""
        # not of the map's dtype, which autocast may have chosen
        foreground = (masks == 1).unsqueeze(1).to(self._parameter().dtype)
        return resize(foreground, like.shape[-2:])

    def _recorded(self, x: Tensor) -> AbstractContextManager[object]:
        """Let autograd record the backbone on x only if something there needs a gradient."""
        needed = x.requires_grad or any(p.requires_grad for p in self.backbone.parameters())
        return torch.set_grad_enabled(needed and torch.is_grad_enabled())

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Add to the prediction's cross-entropy the mean of the auxiliary ones, if there are any.

        Each is averaged over the pixels that are not 255, weighted by `class_weight`.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            class_weight: weights of background and foreground [2]; each mean is divided by the
                weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        return deep_supervision(prediction, query_mask, class_weight)
