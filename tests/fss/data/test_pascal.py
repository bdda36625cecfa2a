from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fss.config import DataConfig
from fss.data import EpisodeDataset, EvalTransform, PascalSource, Source, build_source
from fss.data.pascal import build_lists
from fss.data.prepare.counts import Counts, verify

# name: areas of each class; images are 60×80
TRAIN = {
    "2007_a": {1: 3000},
    "2008_b": {6: 2048, 7: 300},
    "2008_c": {6: 2047, 8: 2500},
    "2009_d": {9: 2500, 2: 4},
    "2009_e": {7: 2100},
    "2010_f": {6: 2300},
    "2010_g": {7: 2300, 8: 2100},
    "2010_h": {9: 2048},
    "2010_i": {9: 2200},
}
VAL = {"2007_v": {1: 2100}, "2007_w": {1: 2048, 2: 2047}, "2008_x": {6: 2100}, "2008_y": {2: 3000}}
VAL |= {"2009_z": {2: 2100}}
SBD = ["2008_b", "2009_d", "2009_e", "2010_f", "2010_g"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(folder: Path, lists: bool = True) -> Path:
    for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Main", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for name, areas in (TRAIN | VAL).items():
        Image.new("RGB", (80, 60)).save(folder / f"JPEGImages/{name}.jpg")
        mask, start = np.zeros(60 * 80, dtype=np.uint8), 0
        for class_id, area in areas.items():
            mask[start : start + area] = class_id
            start += area
        mask[-5:] = 255
        Image.fromarray(mask.reshape(60, 80)).save(folder / f"SegmentationClassAug/{name}.png")
    if lists:
        segmentation = sorted(set(TRAIN) - set(SBD)) + ["2009_e"]
        (folder / "ImageSets/Main/train.txt").write_text("\n".join([*SBD, "2011_no_mask"]))
        (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(segmentation) + "\n")
        (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(VAL) + "\n")
    return folder


def names(source, split: str) -> list[str]:
    return [source.name(i) for i in source.indices(split)]


@pytest.mark.parametrize(
    "place", ["VOCdevkit2012/VOC2012", "VOC2012", "VOCdevkit/VOC2012", "elsewhere"]
)
def test_layouts(tmp_path, place):
    make(tmp_path / place)
    source = PascalSource(tmp_path / place if place == "elsewhere" else tmp_path)
    assert isinstance(source, Source)
    assert source.root == tmp_path / place
    assert names(source, "train") == [*SBD, "2007_a", "2008_c", "2010_h", "2010_i"]
    assert names(source, "test") == list(VAL)
    assert source.folds[1] == (6, 7, 8, 9, 10) and source.class_names[20] == "tvmonitor"
    image, mask = source.load(0)
    assert image.shape == (60, 80, 3) and np.count_nonzero(mask == 6) == 2048
    assert source.class_areas(0) == TRAIN["2008_b"]


def listed(source, **options) -> set[str]:
    settings = {"fold": 0, "split": "train", "shots": 1, "episodes": 1, "min_area": 2048}
    source.class_names = {c: source.class_names[c] for c in (1, 2, 6, 7, 8, 9)}
    source.folds = ((1, 2), (6, 7))
    data = EpisodeDataset(source, transform=EvalTransform(9), **(settings | options))
    return {source.name(i) for i in data.queries}


def test_rules_of_the_lists(tmp_path):
    """2048 pixels count and 2047 do not; the † filter looks at classes of any area."""
    source = PascalSource(make(tmp_path))
    unfiltered = set(TRAIN) - {"2007_a"}
    assert listed(source) == unfiltered
    assert listed(source, exclude_novel=True) == unfiltered - {"2009_d"}
    assert listed(source, split="test") == {"2007_v", "2007_w", "2008_y", "2009_z"}
    data = EpisodeDataset(source, 0, "train", 1, EvalTransform(9), 2000, 0, 2048)
    queries = {data.draw(i).query for i in range(2000) if data.draw(i).class_id == 6}
    assert "2008_c" in {source.name(i) for i in queries}  # shows class 6 on 2047 pixels


def test_list_files_with_a_prefix(tmp_path):
    folder = make(tmp_path / "VOC2012", lists=False)
    for prefix in ("", "../data/VOCdevkit2012/VOC2012/", "/srv/photos/VOC2012/"):
        for split, chosen in (("train", ["2008_b", "2009_d"]), ("val", ["2007_v"])):
            lines = (
                f"{prefix}JPEGImages/{n}.jpg {prefix}SegmentationClassAug/{n}.png\n" for n in chosen
            )
            (tmp_path / f"{split}.txt").write_text("".join(lines))
        source = PascalSource(tmp_path, tmp_path / "train.txt", tmp_path / "val.txt")
        assert names(source, "train") == ["2008_b", "2009_d"]
        assert names(source, "test") == ["2007_v"]
    (tmp_path / "train.txt").write_text("2008_b\n2010_f\n")  # names alone
    source = PascalSource(folder, tmp_path / "train.txt", tmp_path / "val.txt")
    assert names(source, "train") == ["2008_b", "2010_f"]
    config = DataConfig(
        "pascal", str(folder), str(tmp_path / "train.txt"), str(tmp_path / "val.txt")
    )
    assert names(build_source(config), "train") == ["2008_b", "2010_f"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "2008_b\n2008_nothing\n",
            FileNotFoundError,
            "1 of 2 images are missing.*2008_no",
        ),
        ("a b c\n", ValueError, "line 1: expected `image mask`, got 'a b c'"),
        ("2008_b\n\n2008_b\n", ValueError, "line 3: .*listed twice"),
        ("\n", ValueError, "is empty"),
    ],
)
def test_bad_list_files(tmp_path, text, error, message):
    make(tmp_path / "VOC2012")
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(error, match=message):
        PascalSource(tmp_path, path, path)
    with pytest.raises(ValueError, match="expected both or none"):
        PascalSource(tmp_path, path)


def test_incomplete(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected JPEGImages/ .*found in it: nothing"):
        (tmp_path / "empty").mkdir()
        PascalSource(tmp_path / "empty")
    folder = make(tmp_path / "VOC2012")
    for name in ("2009_d", "2010_f"):
        (folder / f"JPEGImages/{name}.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"2 of 9 images are missing.*2009_d\.jpg.*incomplete"
    ):
        PascalSource(tmp_path)
    (folder / "SegmentationClassAug").rename(folder / "SegmentationClass")
    with pytest.raises(FileNotFoundError, match=r"incomplete.*SegmentationClassAug/ does not"):
        PascalSource(tmp_path)


def test_no_lists(tmp_path):
    make(tmp_path / "VOC2012", lists=False)
    with pytest.raises(FileNotFoundError, match=r"Main/train\.txt.*data\.train_list"):
        PascalSource(tmp_path)


def test_wrong_class_id(tmp_path):
    folder = make(tmp_path)
    Image.new("L", (80, 60), 21).save(folder / "SegmentationClassAug/2008_b.png")
    with pytest.raises(ValueError, match=r"2008_b\.png: class id 21 \(4800 pixels\).*ids 1 to 20"):
        PascalSource(folder)


def test_validation_images_are_never_trained_on(tmp_path):
    folder = make(tmp_path)
    (folder / "ImageSets/Main/train.txt").write_text("2008_b\n2008_x\n")
    train, val = build_lists(folder, set(TRAIN | VAL))
    assert not set(train) & set(val) and "2008_x" not in train


def test_verify(tmp_path):
    source = PascalSource(make(tmp_path))
    lines, passed = verify(source)
    assert not passed and "5953 and 1449" in lines[1] and "not compared" in lines[1]
    listed(source)  # two folds of few classes
    source.folds = source.folds[:1]
    source.published = Counts((9, 5), test=(4,), train_excluding_novel=(7,), train=(8,))
    assert verify(source).passed
    source.published = Counts((9, 5), test=(4,), train_excluding_novel=(8,), train=(8,))
    lines, passed = verify(source)
    assert not passed
    assert any(line.startswith("train, † filter") and "WRONG by -1" in line for line in lines)


def test_published_counts():
    assert PascalSource.published.files == (5953, 1449)
    assert PascalSource.published.train_excluding_novel[0] == 4208
