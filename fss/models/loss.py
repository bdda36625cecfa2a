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
