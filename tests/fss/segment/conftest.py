"""Networks of runs that were never trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import svf_fast
from fss.config import TrainConfig
from fss.models import FewShotModel, build_model
from fss.models.regimes import apply_regime


@pytest.fixture
def untrained(tiny) -> Callable[..., tuple[TrainConfig, FewShotModel]]:
    """Builds the random network of a tiny run; S is not the pretrained one, where S trains."""

    def make(**overrides: object) -> tuple[TrainConfig, FewShotModel]:
        config = tiny(**overrides)
        torch.manual_seed(0)
        names = {number: str(number) for number in range(1, 16)}
        network = build_model(config.model, names, config.data.shots)
        apply_regime(network, config.regime)
        with torch.no_grad():
            for parameter in svf_fast.svf_parameters(network):
                parameter.mul_(1.2)
        return config, network

    return make
