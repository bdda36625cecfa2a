"""What goes into a few-shot model and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """Output of a few-shot model.

    logits: background and foreground [B, 2, H, W] at the size of the query image.
    auxiliary: further logits which only the training loss reads; () for models without any.
    """

    logits: Tensor
    auxiliary: tuple[Tensor, ...]


def check_episode(
    query_image: Tensor,
    support_images: Tensor,
    support_masks: Tensor,
    parameter: Tensor,
    any_size: bool = False,
) -> None:
    """Check that a model that has `parameter` can segment these episodes.

    Expected: query_image [B, 3, H, W] and support_images [B, K, 3, H, W] of the parameter's dtype,
    support_masks [B, K, H, W] of an integer dtype or bool, one device, H-1 and W-1 multiples of 8
    unless the model takes `any_size`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, size or device.
    """
    named = (
        ("query_image", query_image),
        ("support_images", support_images),
        ("support_masks", support_masks),
    )
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    for name, images in named[:2]:
        mixed = images.is_floating_point() and torch.is_autocast_enabled(parameter.device.type)
        if images.dtype != parameter.dtype and not mixed:
            raise TypeError(
                f"{name}: expected the model's dtype {parameter.dtype}, got {images.dtype}; "
                "normalize images with the ImageNet mean and standard deviation, then convert them"
            )
    if support_masks.is_floating_point() or support_masks.is_complex():
        raise TypeError(
            f"support_masks: expected integers (0 background, 1 foreground, 255 ignored) or bool, "
            f"got {support_masks.dtype}"
        )
    if query_image.ndim != 4 or query_image.shape[1] != 3:
        raise ValueError(f"query_image: expected [B, 3, H, W], got {list(query_image.shape)}")
    batch, _, height, width = query_image.shape
    if not any_size and (height % 8 != 1 or width % 8 != 1):
        raise ValueError(
            f"query_image: expected a height and a width of a multiple of 8 plus 1 "
            f"(such as 225, 473, 641), got {height}×{width}; "
            f"{_nearest(height)}×{_nearest(width)} would do"
        )
    if support_images.ndim != 5 or support_images.shape[2] != 3:
        raise ValueError(
            f"support_images: expected [B, K, 3, H, W], got {list(support_images.shape)}"
        )
    shots = support_images.shape[1]
    if shots == 0:
        raise ValueError("support_images: expected at least one support per query, got K = 0")
    if support_images.shape != (batch, shots, 3, height, width):
        raise ValueError(
            f"support_images: expected {[batch, shots, 3, height, width]}, the batch and the size "
            f"of query_image, got {list(support_images.shape)}"
        )
    if support_masks.shape != (batch, shots, height, width):
        raise ValueError(
            f"support_masks: expected {[batch, shots, height, width]}, one mask of the same size "
            f"for each of support_images, got {list(support_masks.shape)}"
        )
    for name, tensor in named:
        if tensor.device != parameter.device:
            raise ValueError(
                f"{name}: expected the model's device {parameter.device}, got {tensor.device}"
            )


def check_target(
    prediction: Prediction,
    query_mask: Tensor,
    class_weight: Tensor | None,
    name: str = "query_mask",
) -> None:
    """Check that a mask [B, H, W], called `name`, and a class weight [2] fit a prediction.

    Raises:
        TypeError, ValueError: a mask or weights of another dtype, shape or device.
    """
    logits = prediction.logits
    expected = [logits.shape[0], *logits.shape[2:]]
    if not isinstance(query_mask, Tensor) or query_mask.dtype not in (torch.uint8, torch.int64):
        got = getattr(query_mask, "dtype", type(query_mask).__name__)
        raise TypeError(
            f"{name}: expected uint8 or int64 (0 background, from 1 on the classes, 255 ignored), "
            f"got {got}"
        )
    if list(query_mask.shape) != expected:
        raise ValueError(
            f"{name}: expected {expected}, the size of the prediction, got {list(query_mask.shape)}"
        )
    if class_weight is not None and class_weight.shape != (2,):
        raise ValueError(
            f"class_weight: expected [2], for background and foreground, "
            f"got {list(class_weight.shape)}"
        )
    for what, tensor in ((name, query_mask), ("class_weight", class_weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"{what}: expected the prediction's device {logits.device}, got {tensor.device}"
            )


def _nearest(size: int) -> int:
    return max(1, round((size - 1) / 8)) * 8 + 1
