"""Losses of logits [B, classes, h, w] against masks [B, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fss.models.episode import Prediction
from fss.models.pooling import resize


def cross_entropy(logits: Tensor, mask: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Average the cross-entropy of logits, resized to a mask [B, H, W], where it is not 255."""
    if logits.shape[2:] != mask.shape[1:]:
        logits = resize(logits, mask.shape[1:])
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    return functional.cross_entropy(logits, mask.long(), weight=class_weight, ignore_index=255)


def deep_supervision(
    prediction: Prediction, mask: Tensor, class_weight: Tensor | None = None
) -> Tensor:
    """Add to the prediction's cross-entropy the mean of the auxiliary ones, if there are any."""
    loss = cross_entropy(prediction.logits, mask, class_weight)
    if prediction.auxiliary:
        auxiliary = [cross_entropy(each, mask, class_weight) for each in prediction.auxiliary]
        loss = loss + torch.stack(auxiliary).mean()
    return loss


def dice(logits: Tensor, mask: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Average over the batch the dice losses of background and foreground, summed.

    With p the sigmoid of a channel and t where the mask is 0 or 1, over the pixels of an image,

        1 - 2·Σ p·t / max(Σ p² + Σ t², 1e-8)        (V-Net, Milletari et al. 2016, equation 3)

    Where the mask is 255, t is 0 in both channels. The two are weighted by `class_weight`, of which
    only the ratio counts. In float32 at least.

    Args:
        logits: [B, 2, h, w], resized to the mask.
        mask: [B, H, W].
        class_weight: [2].
    """
    if logits.shape[2:] != mask.shape[1:]:
        logits = resize(logits, mask.shape[1:])
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    t = torch.stack([mask == 0, mask == 1], dim=1).to(p.dtype)
    both = (p * t).sum(dim=(2, 3))
    sums = p.square().sum(dim=(2, 3)) + t.sum(dim=(2, 3))
    losses = 1 - 2 * both / sums.clamp(min=1e-8)
    if class_weight is not None:
        weight = class_weight.to(p.dtype)
        losses = losses * (weight / weight.mean())
    return losses.sum(dim=1).mean()
