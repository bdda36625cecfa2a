"""A new method is one file of its head, a line in the registry and a configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fss.data import build_episodes
from fss.evaluation.evaluate import enlarge
from fss.evaluation.score import evaluate_run
from fss.models import MODELS, Prediction
from fss.models.features import Features
from fss.models.pooling import resize
from fss.models.prior_guided import PriorGuided
from fss.segment.segmenter import FewShotSegmenter
from fss.training.run import train


class Cosine(PriorGuided):
    """Weighs two maps: the cosine of query and prototype, and the prior mask."""

    def __init__(self, backbone, channels=256, dropout=0.5):
        super().__init__(backbone, channels, dropout)
        self.classifier = nn.Conv2d(2, 2, 1)

    def head(self, features: Features, size) -> Prediction:
        prototype = features.supports[0].mean(dim=1)
        cosine = functional.cosine_similarity(self.query(features), prototype).unsqueeze(1)
        evidence = torch.cat([cosine, features.priors.mean(dim=0)], dim=1)
        return Prediction(resize(self.classifier(evidence), size), ())


@pytest.mark.parametrize("regime", ["svf", "full"])
def test_it_trains_and_is_tested_and_segments(tiny, monkeypatch, regime):
    # by a name that configurations have: another is one more word in `ModelConfig.name`
    monkeypatch.setitem(MODELS, "baseline", Cosine)
    config = tiny(steps=2, regime={"name": regime}, data={"shots": 2})
    result = train(config)["test"]
    assert 0 < result["fb_iou"]["mean"] < 1
    cached = evaluate_run(config.out, checkpoint="last", feature_cache=1.0)
    plain = evaluate_run(config.out, checkpoint="last")
    assert cached["miou"] == plain["miou"] == result["miou"]

    segmenter = FewShotSegmenter.load(Path(config.out), "last", device="cpu")
    assert isinstance(segmenter.model, Cosine)
    episodes = build_episodes(config.data, "test", 1, 0)
    drawn, item = episodes.draw(0), episodes[0]
    photos = [episodes.source.load(i) for i in drawn.supports]
    segmenter.support(*zip(*((image, ids == drawn.class_id) for image, ids in photos)))
    found = segmenter(episodes.source.load(drawn.query)[0]).probability
    inputs = (item[name][None] for name in segmenter.model.inputs)
    with torch.no_grad():
        (logits,) = segmenter.model(*inputs).logits
    logits = enlarge(logits, item["query_size"], found.shape, config.resize)
    np.testing.assert_allclose(found, logits.softmax(0)[1], atol=1e-4)
