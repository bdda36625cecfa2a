"""The times of loading belong to their stages, and the need is that of the counted step."""

from __future__ import annotations

import time

import cv2
import pytest

from benchmarks.few_shot import loading
from benchmarks.few_shot.loading import PHOTOS, STAGES, Photos, Stages

SMALL = Photos(96, 72, 6_000, 65, (0.9, 1.1))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        loading.write_photos(folder / "data", SMALL, 60)
        yield folder / "data"


def _episodes(root, shots, count):
    return loading.dataset(root, SMALL, shots, count, min_area=16)


def test_photos_have_the_sides_and_about_the_bytes(root):
    photos = sorted((root / "JPEGImages").iterdir())
    assert len(photos) == 60
    for photo in photos[:5]:
        assert cv2.imread(str(photo)).shape == (72, 96, 3)
        assert 0.7 * SMALL.bytes < photo.stat().st_size <= SMALL.bytes


def test_every_stage_takes_time_and_none_twice(root):
    data = _episodes(root, 2, 6)
    started = time.thread_time()
    found = loading.measure(data, 3, passes=1)
    taken = time.thread_time() - started
    stages = found["seconds_per_image"]
    assert tuple(stages) == STAGES and min(stages.values()) > 0
    assert sum(stages.values()) * found["images"] < taken
    assert found["images"] == 18
    assert found["episodes_per_core_second"] == pytest.approx(1 / (3 * sum(stages.values())))


def test_a_stage_within_another_counts_once():
    def spin(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    stages = Stages()
    inner = stages.timed("inner", lambda: spin(0.02))

    def outer():
        spin(0.01)
        inner()

    stages.timed("outer", outer)()
    assert stages.seconds["inner"] == pytest.approx(0.02, rel=0.3)
    assert stages.seconds["outer"] == pytest.approx(0.01, rel=0.3)


def test_a_loader_has_a_rate(root):
    assert loading.throughput(_episodes(root, 1, 8), workers=1) > 0


def test_need_falls_with_the_work_and_the_gpu():
    need = loading.needed(473, 1, 8)
    assert need["H100"] > 2 * need["A100"]
    assert loading.needed(473, 5, 8)["H100"] < need["H100"] / 2
    assert loading.needed(641, 1, 8)["H100"] < need["H100"]


def test_table_shows_what_falls_short():
    row = {
        "peer": "Pascal, 473 px, 1-shot",
        "seconds_per_image": dict.fromkeys(STAGES, 0.001),
        "episodes_per_core_second": 100.0,
        "needed": {"H100": 800.0, "A100": 400.0},
    }
    result = {"settings": {"cores": 16, "batch": 8}, "groups": [{"rows": [row]}]}
    text = loading.table(result)
    assert "| 800 (**2.0**) | 400 (4.0) |" in text
    assert {photos.size for photos in PHOTOS.values()} == {473, 641}
