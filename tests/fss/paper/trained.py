"""What a regime makes of a backbone, so that two are compared by that and not by their settings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

import torch

from fss.config import ModelConfig, RegimeConfig
from fss.models import build_model
from fss.models.regimes import apply_regime


def what_trains(backbone: str, regime: RegimeConfig) -> Any:
    """Return what trains in a narrow backbone, a hash of its weights, what statistics move."""
    moving = regime.layers if regime.batch_norm_statistics == "batch" else None
    return *_applied(backbone, json.dumps(dataclasses.asdict(regime))), moving


@functools.cache
def _applied(backbone: str, regime: str) -> tuple[tuple[str, ...], str]:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone, width=2, weights="none", channels=4))
    apply_regime(model, RegimeConfig(**json.loads(regime)))
    network = model.get_submodule("backbone")
    names = tuple(sorted(name for name, p in network.named_parameters() if p.requires_grad))
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return names, digest.hexdigest()
