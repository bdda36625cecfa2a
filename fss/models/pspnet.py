"""PSPNet (Zhao et al. 2017), BAM's base learner: it segments the base classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.models.backbone import Backbone
from fss.models.pooling import resize


class PyramidPooling(nn.Module):
    """Means of a map over b × b bins for each b, reduced by a 1×1 convolution, batch norm and ReLU.

    [B, C, h, w] -> one map [B, C/len(bins), b, b] per b.
    """

    def __init__(self, channels: int, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.bins = tuple(bins)
        reduced = channels // len(bins)
        self.reduce = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU()
            )
            for _ in bins
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            reduce(functional.adaptive_avg_pool2d(x, bins))
            for bins, reduce in zip(self.bins, self.reduce, strict=True)
        ]


class BaseLearner(nn.Module):
    """Pyramid pooling and a classifier of background and the base classes.

    [B, C, h, w] -> logits [B, 1 + classes, h, w].

    Args:
        channels: of the map, a multiple of 4.
        classes: number of base classes; None ends before the last convolution, with features
            [B, width, h, w] (CWT's encoder).
        width: channels of the classifier.
    """

    def __init__(self, channels: int, classes: int | None, width: int = 512) -> None:
        super().__init__()
        if classes is not None and classes < 1:
            raise ValueError(f"classes: expected at least one base class, got {classes}")
        self.width = width
        self.pool = PyramidPooling(channels)
        self.classifier = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
        )
        if classes is not None:
            self.classifier.append(nn.Conv2d(width, 1 + classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.embed(x)
        for module in self.classifier[2:]:
            out = module(out)
        return out

    def embed(self, x: Tensor) -> Tensor:
        """Compute what the classifier finds before its ReLU, [B, width, h, w]."""
        pooled = [resize(part, x.shape[-2:]) for part in self.pool(x)]
        conv, norm = self.classifier[:2]
        return norm(_convolve_cat(conv, [x, *pooled]))

    def classify(self, embedded: Tensor) -> Tensor:
        """Compute the logits from what `embed` returned, which stays as it is."""
        return self.classifier[3:](embedded.relu())


class PSPNet(nn.Module):
    """A backbone and a `BaseLearner` on its layer 4, both in the mode of the model."""

    official_names: ClassVar[Mapping[str, str]] = {
        "base_learner.pool.": "ppm.",
        "base_learner.classifier.": "cls.",
    }

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.base_learner = BaseLearner(backbone.channels[3], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images [B, 3, H, W] to logits [B, 1 + classes, H, W]."""
        return resize(self.base_learner(self.backbone(images)), images.shape[-2:])


def _convolve_cat(conv: nn.Conv2d, parts: list[Tensor]) -> Tensor:
    """Compute ``conv(cat(parts))`` as a sum of convolutions, without the copy.

    A frozen convolution keeps no part for its backward pass.
    """
    convolve = functional.conv2d if conv.weight.requires_grad else frozen_conv2d
    weights = conv.weight.split([part.shape[1] for part in parts], dim=1)
    out = convolve(parts[0], weights[0], padding=conv.padding)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out = out + convolve(part, weight, padding=conv.padding)
    return out


def frozen_conv2d(x: Tensor, weight: Tensor, padding: int | tuple[int, int] = 0) -> Tensor:
    """Compute ``conv2d(x, weight, padding=padding)`` without a gradient of the weight.

    It keeps no map. torch's own keeps x for that gradient even where the weight needs none.

    x [B, Ci, H, W], weight [Co, Ci, kh, kw] -> [B, Co, H', W'].

    Raises:
        ValueError: a weight that needs a gradient.
    """
    if weight.requires_grad:
        raise ValueError("weight: expected one that needs no gradient; use torch's conv2d")
    return _FrozenConvolution.apply(x, weight, padding)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int | tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.padding = x.dtype, padding
        return functional.conv2d(x, weight, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # under autocast the convolution ran in the dtype of its output
        weight = weight.to(grad.dtype)
        # not `torch.nn.grad.conv2d_input`, whose stand-in for x has a GPU lay grad out and back
        grad_x = functional.conv_transpose2d(grad, weight, padding=ctx.padding)
        return grad_x.to(ctx.dtype), None, None
