from __future__ import annotations

import numpy as np
import pytest
import torch

from fss.evaluation.metrics import (
    EpisodeIoU,
    bootstrap_miou,
    episode_counts,
    foreground_iou,
    over_seeds,
)

# Predicted and true foreground share 1 pixel of 4; one pixel is ignored, though predicted.
PREDICTION = torch.tensor([[1, 1, 0], [1, 1, 0]])
MASK = torch.tensor([[1, 0, 1], [255, 0, 0]])


def test_one_episode_by_hand():
    metric = EpisodeIoU([3])
    metric.update(PREDICTION, MASK, 3)
    # background: predicted {02, 12}, true {01, 11, 12}; foreground: {00, 01, 11} and {00, 02}.
    assert metric.counts.tolist() == [[1, 4, 1, 4, 1]]
    score = metric.result()
    assert score.miou == score.iou[3] == 0.25
    assert score.fb_iou == 0.25


def test_episodes_are_summed_before_the_division():
    metric = EpisodeIoU([3, 7])
    metric.update(PREDICTION, MASK, 3)
    metric.update(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.int64), 3)
    metric.update(torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), 7)
    score = metric.result()
    assert score.iou == {3: 5 / 8, 7: 0.0}
    assert score.miou == 5 / 16
    assert score.fb_iou == pytest.approx(((1 + 3) / (4 + 4) + 5 / (8 + 1)) / 2)
    assert score.episodes == {3: 2, 7: 1}


def test_an_unsampled_class_counts_zero_and_is_reported():
    metric = EpisodeIoU([3, 7])
    metric.update(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.int64), 7)
    score = metric.result()
    assert score.miou == 0.5
    assert score.unsampled == [3]


def test_counts_of_two_halves_add_up():
    generator = torch.Generator().manual_seed(0)
    whole, halves = EpisodeIoU([1, 2]), [EpisodeIoU([1, 2]), EpisodeIoU([1, 2])]
    for episode in range(6):
        prediction = torch.randint(2, (5, 7), generator=generator)
        mask = torch.tensor([0, 1, 255])[torch.randint(3, (5, 7), generator=generator)]
        for metric in (whole, halves[episode % 2]):
            metric.update(prediction, mask, 1 + episode % 2)
    assert torch.equal(halves[0].counts + halves[1].counts, whole.counts)
    assert whole.counts.dtype == torch.int64


def test_counts_of_a_batch_are_those_of_its_episodes():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(2, (4, 5, 7), generator=generator)
    mask = torch.tensor([0, 1, 255])[torch.randint(3, (4, 5, 7), generator=generator)]
    metric = EpisodeIoU([0, 1, 2, 3])
    for episode in range(4):
        metric.update(prediction[episode], mask[episode], episode)
    assert torch.equal(episode_counts(prediction, mask), metric.counts)


def test_foreground_iou_of_one_episode():
    assert foreground_iou(PREDICTION, MASK) == 0.25


@pytest.mark.parametrize(
    ("prediction", "mask", "class_id", "message"),
    [
        (
            torch.zeros(2, 2),
            MASK,
            3,
            r"prediction: expected the mask's size \[2, 3\], got \[2, 2\]",
        ),
        (PREDICTION, MASK, 4, r"class_id: expected one of \[3\], got 4"),
        (PREDICTION, MASK * 2, 3, r"mask: expected the values 0, 1 and 255, got \[0, 2, 510\]"),
    ],
)
def test_bad_input(prediction, mask, class_id, message):
    with pytest.raises(ValueError, match=message):
        EpisodeIoU([3]).update(prediction, mask, class_id)


def test_no_classes():
    with pytest.raises(ValueError, match="classes: expected at least one"):
        EpisodeIoU([])


def test_the_interval_over_seeds_is_students():
    # 12.706·s/√2 with s = 0.1/√2, and 2.776·s/√5
    assert over_seeds([0.5, 0.6]) == pytest.approx(12.706 * 0.05, rel=1e-6)
    values = [0.60, 0.62, 0.61, 0.59, 0.63]
    assert over_seeds(values) == pytest.approx(2.776 * np.std(values, ddof=1) / 5**0.5)
    assert over_seeds([0.5]) is None


def test_students_quantile_has_no_jump_behind_the_table():
    ratio = [over_seeds([0.0] * n + [1.0]) for n in (20, 21, 22)]
    assert ratio[0] > ratio[1] > ratio[2]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """IoU of episodes of 100 pixels around 0.6: 95 of 100 intervals, 85 at least by chance."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        intersections = generator.binomial(100, generator.beta(6, 4, 200))
        rows = torch.from_numpy(np.stack([np.arange(200) % 2, intersections, [100] * 200], 1))
        low, high = bootstrap_miou(rows, 2, 200, seed)
        assert low < high
        covered += low <= 0.6 <= high
    assert 85 <= covered <= 100


def test_equal_episodes_have_no_interval_and_missing_classes_count_zero():
    rows = torch.tensor([[0, 3, 4]] * 10)
    assert bootstrap_miou(rows, 1) == (0.75, 0.75)
    assert bootstrap_miou(rows, 2) == (0.375, 0.375)
    assert bootstrap_miou(rows[:, :], 2, seed=1) == bootstrap_miou(rows, 2, seed=1)
