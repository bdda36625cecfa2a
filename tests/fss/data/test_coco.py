from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from fss.config import DataConfig
from fss.data import CocoSource, Source, build_episodes
from fss.data.coco import CLASSES, JSON_IDS
from fss.data.prepare.counts import verify


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copy(shared, tmp_path):
    """A copy of the 200 images that may be damaged, in HSNet's place."""
    folder = tmp_path / "COCO2014"
    shutil.copytree(shared / "data/coco200", folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return folder


def test_classes_and_folds():
    assert len(CLASSES) == len(set(CLASSES)) == len(JSON_IDS) == 80
    assert (CLASSES[0], CLASSES[45], CLASSES[79]) == ("person", "bowl", "toothbrush")
    assert (JSON_IDS[45], JSON_IDS[79]) == (51, 90)


def test_real_images(shared):
    source = CocoSource(shared / "data/coco200")
    assert isinstance(source, Source)
    assert len(source) == 200
    assert len(source.indices("train")) == len(source.indices("test")) == 100
    assert source.name(source.indices("test")[0]).startswith("COCO_val2014_")
    assert source.folds[1] == tuple(range(2, 81, 4))
    panet = CocoSource(shared / "data/coco200", "panet")
    assert panet.folds[1] == tuple(range(21, 41))
    assert all(len(set(sum(s.folds, ()))) == 80 for s in (source, panet))
    image, mask = source.load(0)
    assert image.shape == (*mask.shape, 3) and mask.dtype == np.uint8
    lines, passed = verify(source)
    assert not passed and "82081 and 40137" in lines[1]
    assert verify(panet).lines[-1] == "no numbers are published for this variant"


@pytest.mark.parametrize("split", ["train", "test"])
def test_episodes_of_real_images(shared, split):
    """A hundred images per split: many of the 80 classes have too few of them."""
    config = DataConfig(
        "coco", str(shared / "data/coco200"), size=65, exclude_novel=False, drop_small_classes=True
    )
    with pytest.warns(UserWarning, match="are left out: "):
        data = build_episodes(config, split, 6, 0)
    assert data.classes == tuple(c for c in data.classes if (c % 4 == 1) == (split == "test"))
    assert len(data.classes) >= 4 and len(data.base_classes) == 60
    for item in (data[i] for i in range(6)):
        label = item["base_class"] + 1
        if split == "train":
            assert ((item["query_base_mask"] == label) == (item["query_mask"] == 1)).all()
            assert data.base_classes[label - 1] == item["class_id"]
        else:
            assert label == 0 and (item["query_base_mask"][item["query_mask"] == 1] == 0).all()


@pytest.mark.parametrize("name", ["val2014", "annotations/train2014", "annotations/val2014"])
def test_incomplete(copy, name):
    shutil.rmtree(copy / name)
    with pytest.raises(FileNotFoundError, match=rf"incomplete: train2014/ exi.*{name}/ does not"):
        CocoSource(copy.parent)


def test_missing_files(copy):
    lost = sorted((copy / "val2014").iterdir())[3]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 100 images are missing.*{lost.name}"):
        CocoSource(copy.parent)
    for mask in (copy / "annotations/val2014").iterdir():
        mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \.png mask; `fss data prepare coco`"):
        CocoSource(copy)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (JSON_IDS, r"class id \d+ .*the json's ids have gaps"),
        (np.roll(np.arange(1, 81), 1), "wrong class ids in 31 of 31 known masks.*39 mIoU"),
        (sorted(range(1, 81), key=lambda c: CLASSES[c - 1]), r"wrong class ids in \d+ of 31 known"),
    ],
)
def test_wrong_class_map(copy, ids, message):
    table = np.arange(256, dtype=np.uint8)
    table[1:81] = ids
    for path in (copy / "annotations").rglob("*.png"):
        Image.fromarray(table[np.array(Image.open(path))]).save(path, compress_level=1)
    with pytest.raises(ValueError, match=message):
        CocoSource(copy)


def test_list_files(copy, tmp_path):
    for split in ("train2014", "val2014"):
        names = sorted(path.stem for path in (copy / split).iterdir())[:5]
        lines = (
            f"../data/MSCOCO2014/{split}/{n}.jpg ../data/MSCOCO2014/annotations/{split}/{n}.png\n"
            for n in names
        )
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    lists = (tmp_path / "train2014.txt", tmp_path / "val2014.txt")
    source = CocoSource(copy, "fwb", *lists)
    assert [len(source.indices(split)) for split in ("train", "test")] == [5, 5]
    with pytest.raises(ValueError, match="expected both or none"):
        CocoSource(copy, train_list=lists[0])
    with pytest.raises(ValueError, match="fwb or panet, got 'x'"):
        CocoSource(copy, "x")
