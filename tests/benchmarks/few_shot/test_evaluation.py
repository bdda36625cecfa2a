"""The count of what an evaluation computes, by its draws, is what its cache computes."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric

import fss.evaluation.evaluate
from benchmarks.few_shot import evaluation
from fss.config import DataConfig, ModelConfig
from fss.data import build_episodes, build_source
from fss.evaluation.evaluate import evaluate_all
from fss.evaluation.feature_cache import FeatureCache
from fss.models import build_model

DATA = DataConfig(source="shapes", size=33, min_area=0.01, shots=2, workers=0)


@pytest.mark.parametrize("name", ["baseline", "bam"])
@pytest.mark.parametrize("gib", [1.0, 1e-4, 4e-5])
def test_counts(name, gib, monkeypatch):
    caches = []

    def make(*arguments):
        caches.append(FeatureCache(*arguments))
        return caches[-1]

    monkeypatch.setattr(fss.evaluation.evaluate, "FeatureCache", make)
    base_weights = "none" if name == "bam" else None
    model = ModelConfig(name, "resnet18", width=4, weights="none", base_weights=base_weights)
    network = build_model(model, dict.fromkeys(range(15), ""), 2).eval()
    source = build_source(DATA)
    sets = [build_episodes(DATA, "test", 15, seed, source) for seed in (0, 1)]
    fabric = Fabric(accelerator="cpu", devices=1)
    with torch.no_grad():
        evaluate_all(network, sets, source.folds[0], fabric, 3, feature_cache=gib)
    assert evaluation.work(network, sets, 3, gib) == (caches[0].photos, caches[0].roles)


def test_the_table_has_a_column_per_size():
    row = {"shots": 1, "left": {"1": 0.2, "2": 0.1}}
    lines = evaluation.table(
        [
            row,
            row
            | {"one_by_one": 1, "batched": 1, "known": 0.1}
            | {"predicted": {"1": 3.6, "2": 5.3}},
        ]
    ).splitlines()
    assert lines[2] == "| 1 | – | – | – | 20 % | 10 % |"
    assert lines[3] == "| 1 | 1000 ms | 1000 ms | 100 ms | 20 %, 3.6 times | 10 %, 5.3 times |"
