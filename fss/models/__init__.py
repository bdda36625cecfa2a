"""Few-shot segmentation models and their backbones."""

from __future__ import annotations

from fss.config import ModelConfig
from fss.models.backbone import ResNet, build_backbone
from fss.models.baseline import Baseline
from fss.models.episode import Prediction
from fss.models.weights import load_backbone

__all__ = [
    "Baseline",
    "Prediction",
    "ResNet",
    "build_backbone",
    "build_model",
    "load_backbone",
]


def build_model(config: ModelConfig) -> Baseline:
    """Builds the configured model with its pretrained backbone and a random head.

    Raises:
        ValueError: an unknown model or backbone, or an option out of range.
        FileNotFoundError, ImportError, ConnectionError, ValueError: see `load_backbone`.
    """
    if config.name != "baseline":
        raise ValueError(f"model: expected baseline, got {config.name!r}")
    backbone = build_backbone(config.backbone, config.stem, config.stride_on, config.width)
    load_backbone(backbone, config.weights)
    return Baseline(backbone, config.channels, config.dropout)
