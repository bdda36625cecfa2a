from __future__ import annotations

import statistics

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional

from fss.data import build_episodes, build_source, collate_episodes
from fss.evaluation.evaluate import (
    episode_classes,
    evaluate,
    evaluate_seeds,
    predict,
    segment,
    table,
)
from fss.evaluation.metrics import EpisodeIoU
from fss.models import Prediction


class Brightness(nn.Module):
    """Predicts foreground where the query is brighter than the support's foreground."""

    def forward(self, query_image, support_images, support_masks):
        mask = (support_masks == 1).unsqueeze(2)
        mean = (support_images * mask).sum((1, 2, 3, 4)) / (3 * mask.sum((1, 2, 3, 4)))
        score = query_image.mean(1) - mean[:, None, None]
        return Prediction(torch.stack([-score, score], dim=1), ())


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def test_segment_leaves_the_padding_out_and_aligns_corners():
    logits = torch.zeros(2, 9, 9)
    logits[1, :3, :4] = torch.linspace(-1, 1, 4)
    logits[1, 3:] = logits[1, :, 4:] = 100
    labels = segment(logits, (3, 4), (30, 40))
    assert labels.shape == (30, 40)
    assert torch.equal(labels, (torch.arange(40) >= 20).long().expand(30, 40))


def test_the_published_resize_takes_the_whole_canvas():
    """A photo of 600×480 lies on 472×376 of 473×473; the canvas becomes 600×600, off by 473/472."""
    logits = torch.zeros(2, 473, 473)
    logits[1] = torch.linspace(-1, 1, 473)
    published = segment(logits, (472, 376), (600, 480), "canvas")
    exact = segment(logits, (472, 376), (600, 480))
    assert published.shape == exact.shape == (600, 480)
    resized = functional.interpolate(
        logits[None], size=(600, 600), mode="bilinear", align_corners=True
    )
    assert torch.equal(published, resized[0, :, :600, :480].argmax(0))
    assert not torch.equal(published, exact)


def test_without_a_resize_the_networks_own_mask_counts(tiny, fabric):
    config = tiny(data={"protocol": "hsnet"}).data
    episodes = build_episodes(config, "test", 5, 0)
    classes = list(episode_classes(episodes.source, config.fold))
    score = evaluate(Brightness(), episodes, classes, fabric, 2, resize="network")
    metric = EpisodeIoU(classes)
    for item in map(episodes.__getitem__, range(5)):
        batch = collate_episodes([item])
        (labels,) = predict(Brightness(), batch, "network")
        assert labels.shape == (33, 33)
        metric.update(labels, item["query_mask"], item["class_id"])
    assert metric.result().iou == score.iou and score.miou > 0


def test_predict_is_at_the_original_size_and_keeps_the_mode():
    model = Brightness().train()
    image = torch.rand(2, 3, 17, 17)
    batch = {
        "query_image": image,
        "support_images": image[:, None],
        "support_masks": torch.ones(2, 1, 17, 17, dtype=torch.int64),
        "query_size": torch.tensor([[16, 8], [8, 16]]),
        "query_mask_original": [torch.zeros(31, 15), torch.zeros(20, 40)],
    }
    labels = predict(model, batch)
    assert [tuple(label.shape) for label in labels] == [(31, 15), (20, 40)]
    assert model.training
    score = (image - image.mean((1, 2, 3), keepdim=True)).mean(1)[1, :8, :16]
    expected = functional.interpolate(
        score[None, None], size=(20, 40), mode="bilinear", align_corners=True
    )
    assert (labels[1] == (expected[0, 0] > 0)).float().mean() > 0.99


def test_the_score_does_not_depend_on_batches_and_workers(tiny, fabric):
    config = tiny().data
    episodes = build_episodes(config, "test", 7, 0)
    classes = list(episode_classes(episodes.source, config.fold))
    scores = [
        evaluate(Brightness(), episodes, classes, fabric, batch_size, workers)
        for batch_size, workers in ((1, 0), (3, 0), (4, 2))
    ]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0].miou > 0
    assert sum(scores[0].episodes.values()) == 7


def test_classes_of_a_fold_are_disjoint(tiny):
    source = build_source(tiny().data)
    novel, base = episode_classes(source, 1), episode_classes(source, 1, novel=False)
    assert tuple(novel) == source.folds[1]
    assert {**novel, **base} == source.class_names and not novel.keys() & base.keys()


def test_seeds_give_mean_and_spread(tiny, fabric):
    config = tiny().data
    source = build_source(config)
    result = evaluate_seeds(Brightness(), source, config, fabric, (1, 2, 3), 5)
    values = result["miou"]["values"]
    assert len(set(values)) == 3
    assert result["miou"]["mean"] == pytest.approx(sum(values) / 3)
    assert result["miou"]["std"] == pytest.approx(statistics.stdev(values))
    assert sum(result["episodes"].values()) == 15
    lines = list(table(result))
    assert f"{100 * result['miou']['mean']:.2f}" in next(x for x in lines if x.startswith("mIoU"))
    for seed, names in result["unsampled"].items():
        assert not names or any(line.startswith(f"seed {seed} sampled no") for line in lines)


def test_one_seed_has_no_spread(tiny, fabric):
    config = tiny().data
    result = evaluate_seeds(Brightness(), build_source(config), config, fabric, (1,), 2, 1, False)
    assert result["fb_iou"]["std"] is None
    assert result["classes_are"] == "base" and len(result["iou"]) == 15
    assert "–" in "\n".join(table(result))


def test_both_means_and_intervals_are_given(tiny, fabric):
    """Three episodes leave classes unsampled."""
    config = tiny().data
    source = build_source(config)
    result = evaluate_seeds(Brightness(), source, config, fabric, (1, 2), 3)
    assert result["miou"]["mean"] > 0
    for mean, sampled, names in zip(
        result["miou"]["values"], result["miou_sampled"]["values"], result["unsampled"].values()
    ):
        assert len(names) >= 2
        assert sampled == pytest.approx(mean * 5 / (5 - len(names)))
    lines = "\n".join(table(result))
    assert "over sampled classes only" in lines and "over seeds" in lines
    one = evaluate_seeds(Brightness(), source, config, fabric, (3,), 30)
    low, high = one["bootstrap"][0]
    assert low < one["miou"]["mean"] < high
    assert f"{100 * low:.2f} to {100 * high:.2f} over episodes" in "\n".join(table(one))
