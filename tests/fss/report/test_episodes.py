from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import nn

from fss.data import build_episodes
from fss.evaluation.evaluate import episode_classes
from fss.models import Prediction
from fss.report.episodes import draw_episodes


class Everything(nn.Module):
    """Predicts foreground everywhere."""

    def forward(self, query_image, support_images, support_masks):
        foreground = torch.ones_like(query_image[:, 0])
        return Prediction(torch.stack([-foreground, foreground], dim=1), ())


def test_episodes_of_two_shots(tiny, tmp_path):
    config = tiny(data={"shots": 2}).data
    episodes = build_episodes(config, "test", 20, 0)
    names = episode_classes(episodes.source, config.fold)
    path = tmp_path / "episodes.png"
    draw_episodes(path, Everything(), episodes, names, 3, torch.device("cpu"))
    picture = cv2.imread(str(path))
    assert picture.shape[1] > 1000 and picture.shape[0] > 600
    # The last column is under the prediction's orange, BGR (0, 159, 230) over grey.
    blue, _, red = (picture[:, -200:, channel].astype(int) for channel in range(3))
    assert np.mean(red - blue > 60) > 0.3
