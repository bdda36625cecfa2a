"""Few-shot segmentation models and their backbones."""

from __future__ import annotations

from collections.abc import Mapping

from fss.config import ModelConfig
from fss.models.backbone import VGG, Backbone, ResNet, build_backbone
from fss.models.bam import BAM
from fss.models.baseline import Baseline
from fss.models.episode import Prediction
from fss.models.features import FewShotModel
from fss.models.matching import Matching
from fss.models.official import load_base_learner, load_official
from fss.models.pfenet import PFENet
from fss.models.pspnet import PSPNet
from fss.models.weights import backbone_of, load_backbone

__all__ = [
    "BAM",
    "VGG",
    "Backbone",
    "Baseline",
    "FewShotModel",
    "Matching",
    "PFENet",
    "PSPNet",
    "Prediction",
    "ResNet",
    "backbone_of",
    "build_backbone",
    "build_model",
    "load_backbone",
    "load_base_learner",
    "load_official",
]


def build_model(
    config: ModelConfig, base_classes: Mapping[int, str] | None = None, shots: int = 1
) -> FewShotModel:
    """Builds the configured model with its pretrained backbone and a random head.

    Args:
        config: the network and its files.
        base_classes: names of the fold's base classes by id, which BAM needs.
        shots: supports per query (K) that BAM learns to weigh.

    Raises:
        ValueError: an unknown model or backbone, or an option out of range.
        FileNotFoundError, ImportError, ConnectionError, ValueError: see `load_backbone`,
            `load_base_learner` and `load_official`.
    """
    if config.name not in ("baseline", "pfenet", "bam"):
        raise ValueError(f"model: expected one of baseline, pfenet, bam; got {config.name!r}")
    backbone = build_backbone(config.backbone, config.stem, config.stride_on, config.width)
    brought = config.official or (config.name == "bam" and config.base_weights != "none")
    if not brought:
        load_backbone(backbone, config.weights)
    model: FewShotModel
    if config.name == "baseline":
        model = Baseline(backbone, config.channels, config.dropout)
    elif config.name == "pfenet":
        model = PFENet(backbone, config.channels, config.dropout, config.bins)
    else:
        if base_classes is None:
            raise ValueError("base_classes: expected the names of base classes for bam, got None")
        model = BAM(backbone, len(base_classes), shots, config.channels, config.dropout)
    if config.official:
        load_official(model, config.official)
    elif isinstance(model, BAM) and brought:
        load_base_learner(model, str(config.base_weights), base_classes)
    return model
