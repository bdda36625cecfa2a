from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fss.config import DataConfig
from fss.data import (
    EpisodeDataset,
    EvalTransform,
    FolderSource,
    ShapesSource,
    SquareTransform,
    TrainTransform,
    build_episodes,
    build_source,
    collate_episodes,
)


class Listed:
    """A source of given class areas; an image is 40×50 pixels, its red channel is its number."""

    def __init__(self, areas: list[dict[int, int]], train=None, test=None) -> None:
        self.class_names = {1: "ant", 2: "bee", 3: "cat", 4: "dog"}
        self.folds = ((1, 2), (3, 4))
        self.areas, self.splits = areas, {"train": train, "test": test}
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.areas)

    def name(self, index: int) -> str:
        return f"image{index}"

    def size(self, index: int) -> tuple[int, int]:
        return 40, 50

    def class_areas(self, index: int) -> dict[int, int]:
        return self.areas[index]

    def indices(self, split: str) -> list[int]:
        chosen = self.splits[split]
        return list(range(len(self))) if chosen is None else chosen

    def load(self, index: int):
        if index in self.broken:
            raise ValueError(f"{self.name(index)}.jpg cannot be decoded (truncated)")
        image = np.full((40, 50, 3), index, dtype=np.uint8)
        mask = np.zeros((40, 50), dtype=np.uint8)
        flat, start = mask.reshape(-1), 100
        for class_id, area in self.areas[index].items():
            flat[start : start + area] = class_id
            start += area
        flat[-7:] = 255
        return image, mask


def number(image: torch.Tensor) -> int:
    """Which image of `Listed` a transformed image shows."""
    return round(float(image[0, 5, 5]) * 0.229 * 255 + 0.485 * 255)


MIXED = [{1: 300, 3: 300}, {1: 400}, {2: 300}, {3: 500, 4: 10}, {3: 300}, {4: 300}, {4: 200, 2: 5}]
MIXED = MIXED * 2


def episodes(source=None, **options) -> EpisodeDataset:
    settings = {
        "fold": 0,
        "split": "train",
        "shots": 1,
        "transform": EvalTransform(41),
        "episodes": 40,
        "seed": 5,
        "min_area": 100,
    }
    return EpisodeDataset(source if source is not None else Listed(MIXED), **(settings | options))


def test_split_chooses_classes_and_images():
    source = Listed(MIXED, train=list(range(7)) + [10, 12], test=list(range(7, 14)) + [3, 5, 1, 2])
    train = episodes(source)
    assert train.classes == (3, 4)
    assert train.queries == [0, 3, 4, 5, 6, 10, 12]
    assert train.class_images == {3: [0, 3, 4, 10], 4: [5, 6, 12]}
    validation = episodes(source, split="validation")
    assert validation.classes == (3, 4)
    assert sorted(validation.queries) == [3, 5, 7, 10, 11, 12, 13]
    test = episodes(source, split="test")
    assert test.classes == (1, 2)
    assert sorted(test.class_images[1]) == [1, 7, 8]
    assert sorted(test.class_images[2]) == [2, 9]


def test_exclude_novel_looks_at_any_area():
    """Image 6 shows 5 pixels of novel class 2, image 0 many of novel class 1."""
    train = episodes(exclude_novel=True)
    assert train.queries == [3, 4, 5, 10, 11, 12]
    for i in range(len(train)):
        episode = train.draw(i)
        assert {episode.query, *episode.supports} <= {3, 4, 5, 10, 11, 12}
    for split in ("validation", "test"):
        kept = episodes(split=split, exclude_novel=True)
        assert kept.queries == episodes(split=split).queries


@pytest.mark.parametrize("min_area", [300, 300 / (40 * 50)])
def test_min_area_in_pixels_or_as_a_share(min_area):
    assert episodes(min_area=min_area).class_images == {3: [0, 3, 4, 7, 10, 11], 4: [5, 12]}
    assert episodes(min_area=200).class_images[4] == [5, 6, 12, 13]


def test_query_class_may_be_smaller_than_min_area():
    """Image 3 lists class 3 and shows 10 pixels of class 4: half its episodes ask for class 4."""
    train = episodes(episodes=1000)
    drawn = Counter(e.class_id for e in map(train.draw, range(1000)) if e.query == 3)
    assert drawn[3] > 20 and drawn[4] > 20
    supports = {s for e in map(train.draw, range(1000)) if e.class_id == 4 for s in e.supports}
    assert supports == {5, 6, 12, 13}


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_supports_are_distinct_and_never_the_query(shots):
    train = episodes(shots=shots, episodes=500)
    for i in range(500):
        episode = train.draw(i)
        assert len(set(episode.supports)) == shots
        assert episode.query not in episode.supports
        assert set(episode.supports) <= set(train.class_images[episode.class_id])


def test_supports_are_uniform():
    train = episodes(episodes=6000)
    counts = Counter(e.supports[0] for e in map(train.draw, range(6000)) if e.query == 4)
    others = [0, 3, 7, 10, 11]
    assert sorted(counts) == others
    assert min(counts.values()) > 0.7 * sum(counts.values()) / len(others)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_each_pass_is_a_fresh_order_of_the_list(split):
    data = episodes(split=split)
    n = len(data.queries)
    passes = [[data.draw(p * n + i).query for i in range(n)] for p in range(3)]
    assert all(sorted(one) == sorted(data.queries) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_items():
    data = episodes(Listed(MIXED * 2), split="test", shots=2, episodes=30)
    for i in range(30):
        item, episode = data[i], data.draw(i)
        assert item["index"] == i and item["class_id"] == episode.class_id
        assert item["query_name"] == f"image{episode.query}"
        assert item["support_names"] == [f"image{s}" for s in episode.supports]
        assert number(item["query_image"]) == episode.query
        assert [number(image) for image in item["support_images"]] == list(episode.supports)
        assert item["query_image"].shape == (3, 41, 41)
        assert item["support_images"].shape == (2, 3, 41, 41)
        assert item["support_masks"].shape == (2, 41, 41)
        assert item["query_mask"].dtype == item["support_masks"].dtype == torch.uint8
        assert item["query_size"].tolist() == [32, 40] and item["query_size"].dtype == torch.int64
        original = item["query_mask_original"]
        assert original.shape == (40, 50) and original.dtype == torch.int64
        area = data.source.class_areas(episode.query)[episode.class_id]
        assert (original == 1).sum() == area and (original == 255).sum() == 7
        assert original.unique().tolist() == [0, 1, 255]
        assert all((mask == 1).any() for mask in item["support_masks"])


def test_train_items_keep_foreground():
    data = episodes(transform=TrainTransform(25), episodes=60)
    for i in range(60):
        item = data[i]
        assert (item["query_mask"] == 1).any()
        assert (item["support_masks"] == 1).any()
        assert set(item["query_mask"].unique().tolist()) <= {0, 1, 255}
        assert "query_size" not in item and "query_mask_original" not in item


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("split", ["train", "test"])
def test_items_do_not_depend_on_workers(split):
    source = ShapesSource(size=65, train=120, test=120)
    transform = TrainTransform(65) if split == "train" else EvalTransform(65)
    options = {"split": split, "transform": transform, "shots": 2, "episodes": 12, "min_area": 50}

    def batches(workers: int) -> list:
        data = episodes(source, **options)
        return list(DataLoader(data, 3, num_workers=workers, collate_fn=collate_episodes))

    expected = batches(0)
    assert equal(batches(1), expected)
    assert equal(batches(4), expected)
    backwards = episodes(source, **options)
    items = [backwards[i] for i in reversed(range(12))][::-1]
    assert equal(items, [episodes(source, **options)[i] for i in range(12)])


def test_seed_changes_the_episodes():
    first, second, other = (
        [data.draw(i) for i in range(40)] for data in (episodes(), episodes(), episodes(seed=6))
    )
    assert first == second != other


def test_numbers_for_what_a_model_draws():
    """Of the seed and the episode alone: not of its photos, nor of the length of the data set."""
    numbers = [item["sampling"] for item in (episodes(seed=3)[i] for i in range(20))]
    assert all(n.dtype == torch.int64 and n.shape == () and n >= 0 for n in numbers)
    assert len({int(n) for n in numbers}) == 20
    assert sum(int(n) > 2**61 for n in numbers) > 8  # 63 bits, not fewer
    for other in (episodes(seed=3, shots=2), episodes(seed=3, split="test", episodes=9)):
        assert [int(other[i]["sampling"]) for i in range(8)] == [int(n) for n in numbers[:8]]
    assert all(int(episodes(seed=4)[i]["sampling"]) != int(numbers[i]) for i in range(3))
    batch = collate_episodes([episodes(seed=3)[i] for i in range(2)])
    assert batch["sampling"].tolist() == [int(n) for n in numbers[:2]]
    assert batch["query_padding"].shape == batch["query_mask"].shape


def test_longer_data_set_begins_alike():
    short, long = episodes(episodes=10), episodes(episodes=1000)
    assert [short.draw(i) for i in range(10)] == [long.draw(i) for i in range(10)]


def test_iteration_ends():
    data = episodes(episodes=3)
    assert len(data) == 3
    assert [item["index"] for item in data] == [0, 1, 2]
    with pytest.raises(IndexError, match="0 to 2, got 3"):
        data[3]


def test_collate():
    data = episodes(Listed(MIXED * 2), split="test", shots=2)
    batch = collate_episodes([data[i] for i in range(3)])
    assert batch["query_image"].shape == (3, 3, 41, 41)
    assert batch["support_masks"].shape == (3, 2, 41, 41)
    assert batch["query_size"].shape == (3, 2)
    assert batch["class_id"].tolist() == [data.draw(i).class_id for i in range(3)]
    assert batch["index"].tolist() == [0, 1, 2]
    assert isinstance(batch["query_name"], list) and len(batch["support_names"]) == 3
    assert isinstance(batch["query_mask_original"], list)


def test_unreadable_image_in_the_middle():
    source = Listed(MIXED)
    data = episodes(source)
    source.broken = {data.draw(7).supports[0]}
    with pytest.raises(
        ValueError, match=r"episode 7 \(train, seed 5\): image\d+\.jpg cannot be.*data.skip_unre"
    ):
        data[7]


@pytest.mark.parametrize(("split", "size"), [("train", 25), ("train", 57), ("test", 41)])
def test_base_mask_moves_with_the_query_mask(split, size):
    """Ids 2 and 4 are base here: labels 1 and 2, whatever the transform did."""
    source = Listed([{1: 300, 2: 200, 3: 150, 4: 120}] * 8)
    source.folds = ((1, 3), (2, 4))
    transform = TrainTransform(size, (0.6, 1.4)) if split == "train" else EvalTransform(size)
    data = episodes(source, split=split, transform=transform)
    assert data.base_classes == (2, 4)
    drawn = set()
    for i in range(len(data)):
        item = data[i]
        base, mask, position = (item[k] for k in ("query_base_mask", "query_mask", "base_class"))
        assert base.dtype == torch.uint8 and position.dtype == torch.int64
        assert base.shape == (size, size) and position.shape == ()
        assert torch.equal(base == 255, mask == 255)
        assert set(base.unique().tolist()) <= {0, 1, 2, 255} and ((base > 0) & (base < 255)).any()
        drawn.add(int(position))
        if split == "train":
            assert position == {2: 0, 4: 1}[item["class_id"]]
            assert torch.equal(mask == 1, base == position + 1)
        else:
            assert position == -1
            assert (base[mask == 1] == 0).all()
    assert drawn == ({0, 1} if split == "train" else {-1})
    batch = collate_episodes([data[i] for i in range(3)])
    assert batch["query_base_mask"].shape == (3, size, size)
    assert batch["base_class"].shape == (3,) and batch["base_class"].dtype == torch.int64


def test_no_base_mask_without_base_classes():
    source = Listed([{1: 300, 2: 200}] * 8)
    source.class_names, source.folds = {1: "ant", 2: "bee"}, ((1, 2),)
    item = episodes(source, split="test")[0]
    assert "query_base_mask" not in item and "base_class" not in item


def test_unreadable_episodes_are_replaced_when_asked():
    source = Listed(MIXED)
    data = episodes(source, skip_unreadable=True, episodes=20)
    whole = [data[i] for i in range(20)]
    assert all(item["unreadable"] == [] for item in whole)
    source.broken = {whole_index := data.draw(7).query}
    with pytest.warns(UserWarning, match=r"episode 7 .*cannot be decoded.*1 unreadable so far"):
        item = data[7]
    name = source.name(whole_index)
    assert len(item["unreadable"]) >= 1 and name in item["unreadable"][0]
    assert name not in {item["query_name"], *item["support_names"]} and item["index"] == 7
    with pytest.warns(UserWarning):
        assert equal(episodes(source, skip_unreadable=True, episodes=20)[7], item)
    for i in range(20):  # all others are as they were
        if not source.broken & {(episode := data.draw(i)).query, *episode.supports}:
            assert equal(data[i], whole[i])
    source.broken = set(range(14))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="9 episodes drawn in its pl"):
        data[3]


def test_unreadable_image_in_a_worker():
    source = Listed(MIXED)
    source.broken = set(range(14))
    loader = DataLoader(episodes(source), 2, num_workers=1, collate_fn=collate_episodes)
    with pytest.raises(ValueError, match=r"episode 0 .*cannot be decoded"):
        next(iter(loader))


def test_truncated_photo_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    for i in range(8):
        photo = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / f"JPEGImages/{i}.jpg")
        mask = np.full((24, 24), i % 4 + 1, dtype=np.uint8)
        Image.fromarray(mask).save(tmp_path / f"SegmentationClass/{i}.png")
    data = episodes(FolderSource(tmp_path, classes=list("abcd")), split="test")
    path = tmp_path / f"JPEGImages/{data.draw(2).query}.jpg"
    path.write_bytes(path.read_bytes()[:-150])
    with pytest.raises(ValueError, match=rf"episode 2 .*{path.name} cannot be decoded"):
        data[2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fold": 2}, ValueError, "fold: expected 0 to 1, .*got 2"),
        ({"fold": -1}, ValueError, "fold: expected a number from 0 on, got -1"),
        ({"fold": 1.0}, TypeError, "fold: expected an integer, got 1.0"),
        ({"shots": 0}, ValueError, "shots: expected a number from 1 on, got 0"),
        ({"shots": True}, TypeError, "shots: expected an integer, got True"),
        ({"episodes": 0}, ValueError, "episodes: expected a number from 1 on, got 0"),
        ({"seed": -3}, ValueError, "seed: expected a number from 0 on, got -3"),
        ({"split": "val"}, ValueError, "train, validation or test; got 'val'"),
        ({"min_area": 0}, ValueError, "min_area: .*got 0"),
        ({"min_area": float("nan")}, ValueError, "min_area: .*got nan"),
        ({"shots": 4}, ValueError, r"class 'dog' \(4\) has 4 train images .*4 shots need 5"),
        ({"shots": 2, "exclude_novel": True}, ValueError, "has 2 train.*min_area 100 and exclude_"),
        ({"min_area": 600}, ValueError, "min_area leaves no train image .*600 pixels"),
        ({"min_area": 0.9}, ValueError, "no base class covers 0.9 of the image in any of the 14"),
        ({"min_area": 600, "split": "test"}, ValueError, "no test image .*no novel class"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        episodes(**options)


def test_filters_that_leave_nothing():
    with pytest.raises(ValueError, match="exclude_novel leaves no training image in fold 0.*14"):
        episodes(Listed([{1: 1, 3: 300}] * 14), exclude_novel=True)
    with pytest.raises(ValueError, match="no image for the test split"):
        episodes(Listed(MIXED, test=[]), split="test")


def test_class_without_images():
    with pytest.raises(ValueError, match=r"class 'bee' \(2\) has 0 test images"):
        episodes(Listed([{1: 300}] * 5), split="test")


def test_small_classes_are_dropped_when_asked():
    """Four images of dog, eight of cat (two of them with the † filter)."""
    with pytest.warns(UserWarning, match="1 classes with fewer than 5 .* left out: dog 4"):
        data = episodes(shots=4, drop_small_classes=True, episodes=300)
    assert data.classes == (3,) and data.base_classes == (3, 4)
    assert data.queries == [0, 3, 4, 7, 10, 11]
    assert {data.draw(index).class_id for index in range(300)} == {3}
    item = data[0]
    assert item["support_masks"].shape[0] == 4 and item["base_class"] == 0
    with pytest.raises(ValueError, match=r"no base class in fold 0: .*\(cat 6, dog 4\)"):
        episodes(shots=7, drop_small_classes=True)
    whole = episodes(drop_small_classes=True)
    assert [whole.draw(i) for i in range(20)] == [episodes().draw(i) for i in range(20)]


def test_queries_in_the_order_of_the_list():
    data = episodes(split="test", shuffle=False, episodes=20)
    assert [data.draw(i).query for i in range(12)] == data.queries * 2
    config = DataConfig(source="shapes", size=65, min_area=0.01, shuffle_test=False)
    assert not build_episodes(config, "test", 4, 1).shuffle
    assert build_episodes(config, "train", 4, 1).shuffle


def test_supports_may_repeat_when_asked():
    data = episodes(shots=3, repeat_supports=True, episodes=600)
    drawn = [data.draw(i) for i in range(600)]
    assert all(e.query not in e.supports and len(e.supports) == 3 for e in drawn)
    assert all(set(e.supports) <= set(data.class_images[e.class_id]) for e in drawn)
    assert any(len(set(e.supports)) < 3 for e in drawn)


def test_hsnet_protocol():
    config = DataConfig(source="shapes", size=65, min_area=0.01, shots=2, protocol="hsnet")
    for split in ("train", "test"):
        data = build_episodes(config, split, 4, 1)
        assert isinstance(data.transform, SquareTransform) and data.repeat_supports
        assert data[0]["query_size"].tolist() == [65, 65]


def test_build_from_a_configuration(tmp_path):
    config = DataConfig(source="shapes", size=65, shots=2, min_area=0.01, exclude_novel=True)
    source = build_source(config)
    assert isinstance(source, ShapesSource) and source.image_size == 65
    train = build_episodes(config, "train", 4, 1, source)
    assert isinstance(train.transform, TrainTransform) and train.source is source
    assert train.transform.scale == config.scale and train.transform.rotate == config.rotate
    assert (train.shots, train.exclude_novel, len(train), train.seed) == (2, True, 4, 1)
    assert train[0]["support_images"].shape == (2, 3, 65, 65)
    test = build_episodes(config, "test", 4, 1, source)
    assert isinstance(test.transform, EvalTransform) and test.classes == (1, 2, 3, 4, 5)
    missing = DataConfig(source="folder", root=str(tmp_path / "none"), size=65)
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        build_source(missing)


def test_clothing(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = FolderSource(shared / "data/clothing")
    data = episodes(
        source, exclude_novel=True, min_area=0.01, transform=TrainTransform(225), episodes=4
    )
    # 196 photos show no novel class (counted independently), 187 of them a base class on 1 %.
    assert len(data.queries) == 187
    assert data.class_images.keys() == set(range(7, 25))
    assert len(data.class_images[13]) == 3
    for i in range(4):
        item = data[i]
        assert item["query_image"].shape == (3, 225, 225)
        assert item["query_image"].isfinite().all()
        assert (item["query_mask"] == 1).any()
    novel = episodes(source, split="test", min_area=0.01, transform=EvalTransform(225), episodes=2)
    item = novel[0]
    assert max(item["query_size"].tolist()) == 224
    assert max(item["query_mask_original"].shape) == 336
    with pytest.raises(ValueError, match=r"'hat' \(7\) has 5 train images .*5 shots need 6"):
        episodes(source, exclude_novel=True, min_area=0.01, shots=5)


class ListedByClass(Listed):
    """Lists as HSNet's: a pair of an image and a class a line."""

    def __init__(self, areas, train: list, test: list) -> None:
        super().__init__(areas, *(sorted({i for i, _ in pairs}) for pairs in (train, test)))
        self.listed = {"train": train, "test": test}

    def listed_classes(self, split: str) -> list[tuple[int, int]]:
        return self.listed[split]


# In the order of the lists, without the class 2 that image 6 shows: novel of fold 0 are 1 and 2.
TEST_PAIRS = [(7, 1), (2, 2), (0, 1), (9, 2), (8, 1)]
TRAIN_PAIRS = [(3, 4), (4, 3), (0, 3), (5, 4), (3, 3), (10, 3), (0, 1), (12, 4)]


def by_class() -> ListedByClass:
    areas = [dict(each) for each in MIXED]
    areas[9] = {2: 300}
    return ListedByClass(areas, TRAIN_PAIRS, TEST_PAIRS)


def test_pairs_of_a_list_are_asked_for_in_its_order():
    """Whatever they cover; again from the first after the last, as HSNet's test."""
    data = episodes(by_class(), split="test", draw_by="pair", shuffle=False, episodes=13)
    drawn = [data.draw(i) for i in range(13)]
    assert data.epoch == 5
    assert [(e.query, e.class_id) for e in drawn] == (TEST_PAIRS * 3)[:13]
    members = {1: {0, 7, 8}, 2: {2, 9}}
    assert {c: set(images) for c, images in data.class_images.items()} == members
    assert all(set(e.supports) <= members[e.class_id] - {e.query} for e in drawn)


def test_pairs_of_the_training_list_in_a_new_order_each_pass():
    data = episodes(by_class(), split="train", draw_by="pair", episodes=14)
    base = [pair for pair in TRAIN_PAIRS if pair[1] in (3, 4)]
    assert data.epoch == len(base) == 7
    passes = [[data.draw(i)[:2] for i in range(n, n + 7)] for n in (0, 7)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(base)
    assert passes[0] != passes[1]


def test_without_such_a_list_pairs_are_images_and_the_classes_they_are_listed_under():
    data = episodes(Listed(MIXED), split="train", draw_by="pair", shuffle=False, min_area=100)
    drawn = [data.draw(i) for i in range(data.epoch)]
    pairs = [(i, c) for i, each in enumerate(MIXED) for c in (3, 4) if each.get(c, 0) >= 100]
    assert [(e.query, e.class_id) for e in drawn] == pairs
    assert (3, 4) not in pairs and (3, 3) in pairs


def test_a_class_first_is_uniform_whatever_its_images():
    """HSNet's episodes of COCO: 12 images of one class, 2 of the other."""
    areas = [{1: 300}] * 12 + [{2: 300}] * 2
    data = episodes(Listed(areas), split="test", draw_by="class", episodes=2000)
    drawn = [data.draw(i) for i in range(2000)]
    counts = Counter(e.class_id for e in drawn)
    assert abs(counts[1] - 1000) < 4 * 22.4  # four standard deviations
    queries = Counter(e.query for e in drawn if e.class_id == 1)
    assert len(queries) == 12 and max(queries.values()) < 2 * min(queries.values())
    assert all(e.query in data.class_images[e.class_id] for e in drawn)
    by_image = episodes(Listed(areas), split="test", episodes=2000)
    assert Counter(by_image.draw(i).class_id for i in range(1400))[2] == 200


@pytest.mark.parametrize(
    ("source", "protocol", "draw_by"),
    [
        ("pascal", "hsnet", "pair"),
        ("fss1000", "hsnet", "pair"),
        ("coco", "hsnet", "class"),
        ("coco", "pfenet", "image"),
        ("pascal", "pfenet", "image"),
    ],
)
def test_a_protocol_draws_as_its_code(source, protocol, draw_by):
    lists = {"train_list": "a", "val_list": "b"} if source == "fss1000" else {}
    config = DataConfig(source=source, root="x", size=65, protocol=protocol, min_area=10, **lists)
    data = build_episodes(config, "test", 4, 1, Listed(MIXED))
    assert data.draw_by == draw_by and data.repeat_supports == (protocol == "hsnet")


def test_an_unknown_draw():
    with pytest.raises(ValueError, match="draw_by: expected image, pair or class; got 'photo'"):
        episodes(Listed(MIXED), draw_by="photo")
