"""Configurations of runs that take a second."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch

from fss.config import DataConfig, TrainConfig
from fss.data import build_source

TINY = {
    "data": {"source": "shapes", "size": 33, "min_area": 0.01, "workers": 0},
    "model": {"backbone": "resnet18", "width": 4, "weights": "none", "channels": 8},
    "regime": {"name": "svf"},
    "optimizer": {"lr": 0.01},
    "steps": 3,
    "batch_size": 2,
    "validation_every": 0,
    "validation_episodes": 3,
    "test_episodes": 3,
    "test_seeds": [1, 2],
    "pictures": 0,
    "log_every": 1,
    "accelerator": "cpu",
}


@functools.cache
def _shapes(size: int, seed: int):
    values = TINY["data"] | {"size": size, "seed": seed}
    return build_source(DataConfig(**values))


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch) -> None:
    """Lists the embedded photos once for all tests; a source never changes."""

    def cached(config):
        return (
            _shapes(config.size, config.seed) if config.source == "shapes" else build_source(config)
        )

    for user in ("fss.training.loop", "fss.evaluation.score", "fss.report.components"):
        monkeypatch.setattr(f"{user}.build_source", cached)


@pytest.fixture
def tiny(tmp_path) -> Callable[..., TrainConfig]:
    """Makes a tiny configuration; overrides of a part are dicts."""

    def make(**overrides: object) -> TrainConfig:
        values = copy.deepcopy(TINY) | {"out": str(tmp_path / "run")}
        for name, value in overrides.items():
            values[name] = values[name] | value if isinstance(value, dict) else value
        return TrainConfig.from_dict(values)

    return make


@pytest.fixture
def same() -> Callable[[object, object], bool]:
    """``same(a, b)``: whether two values of a checkpoint are equal to the last bit."""

    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return equal
