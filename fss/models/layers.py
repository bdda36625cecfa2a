"""Layers that the published heads share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def check_head(channels: int, dropout: float = 0.0) -> None:
    """Raise TypeError or ValueError unless a head can have this width and dropout."""
    if not isinstance(channels, int) or isinstance(channels, bool):
        raise TypeError(f"channels: expected an integer, got {channels!r}")
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")


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


def reduction(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    """Build a 1×1 convolution without bias, a ReLU and the dropout of whole channels."""
    return pointwise(in_channels, out_channels).append(nn.Dropout2d(dropout))
