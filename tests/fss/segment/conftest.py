"""Networks of runs that were never trained, and small segmenters with a few photos."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import svf_fast
from fss.config import TrainConfig
from fss.data import ShapesSource
from fss.models import FewShotModel, build_model
from fss.models.regimes import apply_regime
from fss.runs.checkpoint import save_checkpoint
from fss.segment.segmenter import FewShotSegmenter


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


@pytest.fixture(scope="module")
def examples():
    """Photos of 65 px that show one class, with its mask."""
    source = ShapesSource(size=65)
    found = []
    for index in source.indices("test"):
        if source.class_areas(index).get(1, 0) > 0.1 * source.image_size**2:
            image, mask = source.load(index)
            found.append((image, mask == 1))
        if len(found) == 4:
            return found
    raise AssertionError("too few photos")


@pytest.fixture(scope="module")
def _embedded():
    return FewShotSegmenter(size=49, device="cpu")


@pytest.fixture
def embedded(_embedded):
    """The embedded backbone, as it came."""
    return copy.deepcopy(_embedded)


@pytest.fixture
def run(tmp_path, untrained):
    """Loads the segmenter of a run of a few random weights."""

    def make(**overrides: object) -> FewShotSegmenter:
        config, network = untrained(**overrides)
        save_checkpoint(tmp_path / "best.pt", config, {"model": network.state_dict(), "step": 1})
        return FewShotSegmenter.load(tmp_path, device="cpu")

    return make
