"""Losses of logits [B, classes, h, w] against masks [B, H, W]."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fss.models.pooling import resize


def cross_entropy(logits: Tensor, mask: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Average the cross-entropy of logits, resized to a mask [B, H, W], where it is not 255."""
    if logits.shape[2:] != mask.shape[1:]:
        logits = resize(logits, mask.shape[1:])
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    return functional.cross_entropy(logits, mask.long(), weight=class_weight, ignore_index=255)
