from __future__ import annotations

import numpy as np
import pytest
import torch

from fss.evaluation.intervals import bootstrap_miou, over_seeds


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
