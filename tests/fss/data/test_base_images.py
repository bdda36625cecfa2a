from __future__ import annotations

import pytest

from fss.config import DataConfig
from fss.data import EvalTransform, build_source
from fss.data.base_images import BaseImages
from fss.evaluation.evaluate import episode_classes


@pytest.fixture(scope="module")
def source():
    return build_source(DataConfig(source="shapes", size=33))


def test_masks_number_the_base_classes_and_know_no_novel_one(source):
    classes = list(episode_classes(source, 1, novel=False))
    novel = set(source.folds[1])
    seen = set()
    for image in source.indices("test")[:60]:
        photos = BaseImages(source, classes[::-1], [image], EvalTransform(33))
        mask = photos[0]["mask"]
        original = EvalTransform(33)(*source.load(image)).mask
        for label in original.unique().tolist():
            expected = 255 if label == 255 else 0 if label in {0, *novel} else None
            expected = sorted(classes).index(label) + 1 if expected is None else expected
            assert mask[original == label].unique().tolist() == [expected]
            seen.add(expected)
    assert {0, 255} < seen and max(seen - {255}) <= 15


def test_each_pass_shows_each_photo_once_in_a_fresh_order(source):
    images = source.indices("train")[:7]
    shown: list[int] = []

    class Named:
        def load(self, index):
            shown.append(index)
            return source.load(index)

    photos = BaseImages(Named(), [1, 2], images, EvalTransform(33), length=14, seed=5)
    for i in range(14):
        photos[i]
    assert sorted(shown[:7]) == sorted(shown[7:]) == sorted(images)
    assert shown[:7] != shown[7:]
    with pytest.raises(IndexError, match="photo: expected 0 to 13, got 14"):
        photos[14]
