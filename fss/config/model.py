"""The configuration of the network, and what a configuration must know of each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fss.config.checks import check_at_least, check_settings
from fss.config.fields import free

MethodName = Literal[
    "baseline", "pfenet", "bam", "sgone", "panet", "canet", "pmm", "rpmm", "ppnet", "asgnet",
    "hsnet", "cwt", "cyctr", "dcama", "hdmnet",
]  # fmt: skip


BackboneName = Literal[
    "resnet18", "resnet50", "resnet101", "vgg16_bn", "vgg16",
    "vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16", "vit_large_patch16",
    "vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2",
    "vit_large_patch14_reg4_dinov2",
]  # fmt: skip


class Method(NamedTuple):
    """What a configuration must know of a method; its network is in `fss.models.MODELS`.

    official: whether there are checkpoints of its authors' that fit.
    base_learner: whether it starts from a trained base learner.
    any_size: whether `data.size` may be other than a multiple of 8 plus 1.
    bins: whether it has PFENet's scales, `ModelConfig.bins`.
    """

    official: bool = True
    base_learner: bool = False
    any_size: bool = False
    bins: bool = False


METHODS: dict[str, Method] = {
    "baseline": Method(official=False),
    "pfenet": Method(bins=True),
    "bam": Method(base_learner=True),
    "sgone": Method(any_size=True),
    "panet": Method(any_size=True),
    "canet": Method(),
    "pmm": Method(),
    "rpmm": Method(),
    "ppnet": Method(any_size=True),
    "asgnet": Method(bins=True),
    "hsnet": Method(any_size=True),
    "cwt": Method(base_learner=True),
    "cyctr": Method(),
    "dcama": Method(any_size=True),
    "hdmnet": Method(base_learner=True),
}
"""The methods by `model.name`."""


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: "baseline", the paper's: PFENet with an ASPP instead of its FEM and only the main
            loss. The others are the published methods that docs/methods.md describes.
        backbone: the feature extractor; a vision transformer for "baseline" alone.
        stem: "plain", one 7×7 convolution (torchvision), or "deep", three 3×3 ones (semseg).
        stride_on: the bottleneck convolution that has the stride: "conv2" (torchvision) or "conv1"
            (Caffe, Keras).
        width: channels of the backbone's stem, or of a head of a vision transformer; 64 in every
            published one.
        weights: pretrained weights of the backbone: a file, "torchvision" (downloaded by name),
            "shapes" (embedded, for resnet18 of width 24) or "none" (random). A base learner brings
            its own backbone.
        base_weights: of a method with a base learner (BAM, HDMNet, CWT), that and its backbone: the
            result of `fss train-base` (its folder or a checkpoint in it), the authors' PSPNet
            checkpoint, or "none" (random).
        official: the authors' checkpoint of the method, to start the whole network from.
        channels: channels of the head; of "cwt", of each of its transformer's four.
        dropout: probability that the head drops a channel while training.
        bins: for "pfenet" and "asgnet", the side of the feature map at each scale: cells if above
            1, a share of the full side up to 1. By default those published for the data: (1, 0.5,
            0.25, 0.125) with "coco", else Pascal's (60, 30, 15, 8). An `official` file does not
            tell which.
    """

    name: MethodName = "baseline"
    backbone: BackboneName = "resnet50"
    stem: Literal["plain", "deep"] = "plain"
    stride_on: Literal["conv1", "conv2"] = "conv2"
    width: int = 64
    weights: str = free("torchvision", "resume", "finished")
    base_weights: str | None = free(None, "resume", "finished", "mean")
    official: str | None = free(None, "resume", "finished")
    channels: int = 256
    dropout: float = 0.5
    bins: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        if self.bins is not None:
            self.bins = tuple(self.bins)
        check_at_least("model.width", self.width, 1)
        check_at_least("model.channels", self.channels, 1)
        if not self.weights:
            raise ValueError('model.weights: expected a file, "torchvision", "shapes" or "none"')
        method = METHODS[self.name]
        if method.base_learner and not self.base_weights and not self.official:
            raise ValueError(
                f"model.base_weights: expected the base learner of {self.name}, got nothing; "
                "train one with fss train-base and give its folder, or give the authors' PSPNet "
                "checkpoint"
            )
        if not method.base_learner and self.base_weights not in (None, "none"):
            raise ValueError(
                f"model.base_weights: expected nothing, {self.name} has no base learner; "
                f"got {self.base_weights!r}"
            )
        if not method.official and self.official:
            raise ValueError(
                f"model.official: expected nothing, {self.name} has no checkpoint of its authors' "
                f"that fits; got {self.official!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected 0 up to below 1, got {self.dropout}")


PASCAL_BINS = (60, 30, 15, 8)
"""PFENet's `bins` as published for Pascal-5i."""
COCO_BINS = (1.0, 0.5, 0.25, 0.125)
"""PFENet's `bins` as published for COCO-20i, of a ResNet and a VGG alike."""
