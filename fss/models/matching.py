"""Segmentation by the nearest prototype, without any training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_episode, check_target
from fss.models.features import cross_entropy
from fss.models.pooling import resize

_SHARPNESS = 20.0


class Matching(nn.Module):
    """Labels each position by the nearer of two prototypes, of object and background.

    Features f are those of layers 2 to 4 of the backbone, each of length 1 at each position. The
    prototypes are the mean features of the supports' object and background, and

        logits = 20·(cos(f, background), cos(f, object)).

    Nothing is trained and no threshold is chosen: the cosines are compared with each other. Where
    parameters of the backbone require gradients, `forward` is differentiable in them.
    Source of non-parametric matching and of the factor: PANet (Wang et al. 2019), section 3.3.

    Args:
        backbone: a pretrained backbone, which stays in evaluation mode.
    """

    inputs = ("query_image", "support_images", "support_masks")
    targets = ("query_mask",)

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def train(self, mode: bool = True) -> Matching:
        """Set the mode; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Prediction:
        """Segment the queries into background and what the supports show.

        Args:
            query_image: normalized images [B, 3, H, W], H-1 and W-1 multiples of 8.
            support_images: K supports per query [B, K, 3, H, W].
            support_masks: integers or bool [B, K, H, W]; 1 is the object, 255 neither object nor
                background.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        parameter = next(self.backbone.parameters())
        check_episode(query_image, support_images, support_masks, parameter)
        needed = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
            episodes = zip(support_images, support_masks, strict=True)
            prototypes = torch.stack([self._encode(*episode) for episode in episodes])
            return Prediction(self._compare(query_image, prototypes), ())

    def loss(
        self, prediction: Prediction, query_mask: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """Average the cross-entropy over the pixels that are not 255; see `FewShotModel.loss`."""
        check_target(prediction, query_mask, class_weight)
        return cross_entropy(prediction.logits, query_mask, class_weight)

    @torch.no_grad()
    def encode_supports(self, images: Tensor, masks: Tensor) -> Tensor:
        """Compute the prototypes of background and object [2, C] of K supports.

        Each support counts the same. Of images [K, 3, H, W] and masks [K, H, W] as in `forward`.
        """
        return self._encode(images, masks)

    @torch.no_grad()
    def segment(self, queries: Tensor, prototypes: Tensor) -> Tensor:
        """Compute logits [B, 2, H, W] of queries [B, 3, H, W] by prototypes [2, C] or [B, 2, C]."""
        return self._compare(queries, prototypes)

    def _encode(self, images: Tensor, masks: Tensor) -> Tensor:
        features = self._features(images)
        shares = torch.stack([masks == 0, masks == 1], dim=1).to(features.dtype)
        shares = resize(shares, features.shape[-2:])
        areas = shares.sum(dim=(2, 3))
        sums = torch.einsum("kchw,kphw->kpc", features, shares)
        means = sums / areas.clamp(min=1e-6)[..., None]
        return functional.normalize(means, dim=2).sum(dim=0) / len(images)

    def _compare(self, queries: Tensor, prototypes: Tensor) -> Tensor:
        features = functional.normalize(self._features(queries), dim=1)
        prototypes = functional.normalize(prototypes, dim=-1).expand(len(queries), -1, -1)
        cosines = torch.einsum("bchw,bpc->bphw", features, prototypes)
        return resize(_SHARPNESS * cosines, queries.shape[-2:])

    def _features(self, images: Tensor) -> Tensor:
        """Join layers 2 to 4 [B, C, h, w], each of length 1 at each position."""
        low, middle = self.backbone.features(images)
        maps = (resize(low, middle.shape[-2:]), middle, self.backbone.layer4(middle))
        return torch.cat([functional.normalize(each, dim=1) for each in maps], dim=1)
