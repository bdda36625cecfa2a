"""Few-shot segmentation models and their backbones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fss.config import COCO_BINS, METHODS, PASCAL_BINS, ModelConfig, TrainConfig
from fss.models.asgnet import ASGNet
from fss.models.backbone import VGG, Backbone, ResNet, build_backbone
from fss.models.bam import BAM
from fss.models.baseline import Baseline
from fss.models.canet import CANet
from fss.models.cwt import CWT
from fss.models.cyctr import CyCTR
from fss.models.dcama import DCAMA
from fss.models.episode import Prediction
from fss.models.features import FewShotModel
from fss.models.hdmnet import HDMNet
from fss.models.hsnet import HSNet
from fss.models.matching import Matching, build_matching, matching_size
from fss.models.official import load_base_learner, load_official
from fss.models.panet import PANet
from fss.models.pfenet import PFENet
from fss.models.pmm import PMM, RPMM
from fss.models.ppnet import PPNet
from fss.models.pspnet import PSPNet
from fss.models.regimes import (
    FACTORS,
    apply_regime,
    convert_backbone,
    leaves_adapter,
    trains_singular_values,
)
from fss.models.sgone import SGOne
from fss.models.state_dict import read_state_dict
from fss.models.vit import ViT
from fss.models.weights import backbone_name, backbone_of, load_backbone
from svf_fast import Factors

__all__ = [
    "BAM",
    "CWT",
    "DCAMA",
    "MODELS",
    "PMM",
    "RPMM",
    "VGG",
    "ASGNet",
    "Backbone",
    "Baseline",
    "CANet",
    "CyCTR",
    "FewShotModel",
    "HDMNet",
    "HSNet",
    "Matching",
    "PANet",
    "PFENet",
    "PPNet",
    "PSPNet",
    "Prediction",
    "ResNet",
    "SGOne",
    "ViT",
    "backbone_name",
    "backbone_of",
    "build_backbone",
    "build_matching",
    "build_model",
    "leaves_adapter",
    "load_backbone",
    "load_base_learner",
    "load_official",
    "matching_size",
    "rebuild_model",
]

MODELS: dict[str, type[FewShotModel]] = {
    "baseline": Baseline,
    "pfenet": PFENet,
    "bam": BAM,
    "sgone": SGOne,
    "panet": PANet,
    "canet": CANet,
    "pmm": PMM,
    "rpmm": RPMM,
    "ppnet": PPNet,
    "asgnet": ASGNet,
    "hsnet": HSNet,
    "cwt": CWT,
    "cyctr": CyCTR,
    "dcama": DCAMA,
    "hdmnet": HDMNet,
}
"""The methods of few-shot segmentation by `model.name`."""


def build_model(
    config: ModelConfig, base_classes: Mapping[int, str] | None = None, shots: int = 1
) -> FewShotModel:
    """Build the configured model with its pretrained backbone and a random head.

    Args:
        config: the network and its files.
        base_classes: names of the fold's base classes by id, which BAM and PPNet need; with the
            authors' checkpoint None means as many as that has.
        shots: supports per query (K) that BAM learns to weigh.

    Raises:
        ValueError: an unknown model or backbone, or an option out of range.
        FileNotFoundError, ImportError, ConnectionError, ValueError: see `load_backbone`,
            `load_base_learner` and `load_official`.
    """
    if config.name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}; got {config.name!r}")
    if METHODS[config.name].bins and config.official:
        _check_bins(config.official, config.bins)
    kind = MODELS[config.name]
    learned = kind.needs_base_learner and config.base_weights != "none"
    count = len(base_classes or ())
    if (kind.needs_base_learner or kind.needs_base_classes) and base_classes is None:
        if not config.official:
            raise ValueError(
                f"base_classes: expected the names of base classes for {config.name}, got None"
            )
        file = Path(config.official).expanduser()
        count = kind.count_base_classes(read_state_dict(file, "model.official").values)
    backbone = _backbone(config, kind)
    if not (config.official or learned):
        load_backbone(backbone, config.weights)
    model = kind.from_config(backbone, config, count, shots)
    if config.official:
        load_official(model, config.official)
    elif learned:
        load_base_learner(model, str(config.base_weights), base_classes)
    return model


def _check_bins(official: str, bins: tuple[float, ...] | None) -> None:
    """Check that the scales of a file of PFENet's or ASGNet's authors are known.

    Its tensors do not tell.

    Raises:
        ValueError: no scales.
    """
    scales = f"{list(PASCAL_BINS)} for Pascal, {list(COCO_BINS)} for COCO"
    if bins is None:
        raise ValueError(
            f"model.bins: expected the scales of {official} ({scales}), got nothing. Its tensors "
            "are the same for both, and with the wrong scales it predicts wrongly: give "
            'model.bins, or the data that it was trained on, data.source "pascal" or "coco"'
        )
    named, shares = "coco" in official.lower(), all(side <= 1 for side in bins)
    if named and not shares:
        warnings.warn(
            f"model.bins: {official} is named after COCO, and is used with {list(bins)}; published "
            f"are {scales}. With the wrong ones it predicts wrongly, and its tensors do not tell",
            stacklevel=3,
        )


def rebuild_model(
    config: TrainConfig, state: Mapping[str, Tensor], as_trained: bool = True
) -> FewShotModel:
    """Build the trained network of a run from its configuration and state dict; reads no file.

    Args:
        config: of the run, with the K that it was trained for.
        state: the network's state dict.
        as_trained: with the strategy and the fused blocks of training. Else unfused.

    Raises:
        LookupError, TypeError, RuntimeError: a state dict of another network.
    """
    kind = MODELS[config.model.name]
    count = kind.count_base_classes(state)
    model = kind.from_config(_backbone(config.model, kind), config.model, count, config.data.shots)
    like = next(model.backbone.parameters())  # a run may have trained in another precision
    factors = {
        name: Factors(*(state[f"backbone.{name}.{part}"].to(like) for part in FACTORS))
        for name, _ in model.backbone.named_modules()
        if all(f"backbone.{name}.{part}" in state for part in FACTORS)
    }
    if as_trained or not trains_singular_values(config.regime):
        apply_regime(model, config.regime, factors)
    else:
        convert_backbone(model.backbone, factors, config.regime, fuse=False, factors=factors)
    model.load_state_dict(state)
    return model


def _backbone(config: ModelConfig, kind: type[FewShotModel]) -> Backbone:
    if config.backbone not in kind.backbones:
        raise ValueError(
            f"model.backbone: expected one of {', '.join(kind.backbones)} for {config.name}, got "
            f"{config.backbone!r}"
        )
    return build_backbone(
        config.backbone, config.stem, config.stride_on, config.width, **kind.backbone_options
    )
