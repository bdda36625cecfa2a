from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fss.config import DataConfig
from fss.data import EpisodeDataset, Fss1000Source, Source, TrainTransform, build_source


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """260 classes of 3 images of 32×40 pixels; the object covers 40·(5 + i) pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = [f"c{k:03d}" for k in range(260)]
    photo, masks = tmp_path / "photo.jpg", []
    Image.new("RGB", (40, 32), (9, 99, 199)).save(photo)
    for i in range(3):
        mask = np.zeros((32, 40), dtype=np.uint8)
        mask[: 5 + i] = 255
        masks.append(tmp_path / f"{i}.png")
        Image.fromarray(mask).convert("RGB").save(masks[-1])
    for name in names:
        folder = tmp_path / "FSS-1000" / name
        folder.mkdir(parents=True)
        for i, mask in enumerate(masks):
            (folder / f"{i}.jpg").hardlink_to(photo)
            (folder / f"{i}.png").hardlink_to(mask)
    (tmp_path / "trn.txt").write_text("\n".join(names[:100]))
    (tmp_path / "test.txt").write_text("\n".join(names[200:]) + "\n")
    return tmp_path


def test_reads_class_folders(root):
    config = DataConfig(
        "fss1000", str(root), str(root / "trn.txt"), str(root / "test.txt"), size=33, min_area=1
    )
    source = build_source(config)
    assert isinstance(source, Fss1000Source) and isinstance(source, Source)
    assert len(source) == 3 * 160 and len(source.class_names) == 160
    assert len(source.indices("train")) == 300 and len(source.indices("test")) == 180
    assert source.name(source.indices("test")[-1]) == "c259/2"
    assert 255 not in source.class_names and source.class_names[261] == "c259"
    assert source.class_names[254] == "c253" and source.class_names[256] == "c254"
    assert source.class_areas(len(source) - 1) == {261: 280}
    image, mask = source.load(len(source) - 1)
    assert image.shape == (32, 40, 3) and mask.dtype == np.uint16
    assert np.count_nonzero(mask == 261) == 280 and np.count_nonzero(mask) == 280
    again = Fss1000Source(root / "FSS-1000", root / "trn.txt", root / "test.txt")
    assert again.class_areas(0) == source.class_areas(0) == {1: 200}


@pytest.mark.parametrize("split", ["train", "test"])
def test_episodes(root, split):
    source = Fss1000Source(root, root / "trn.txt", root / "test.txt")
    data = EpisodeDataset(source, 0, split, 2, TrainTransform(33), 30, min_area=1)
    for item in (data[i] for i in range(30)):
        assert set(item["query_mask"].unique().tolist()) <= {0, 1, 255}
        assert (item["query_mask"] == 1).any() and (item["support_masks"] == 1).any()
        if split == "train":
            label = item["base_class"] + 1
            assert ((item["query_base_mask"] == label) == (item["query_mask"] == 1)).all()
        else:
            assert item["base_class"] == -1
            assert set(item["query_base_mask"].unique().tolist()) <= {0, 255}


def test_bad_input(root):
    trn, test = root / "trn.txt", root / "test.txt"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Fss1000Source(root / "nowhere", trn, test)
    with pytest.raises(ValueError, match=r"100 classes, 'c000' first, are in .*trn\.txt too"):
        Fss1000Source(root, trn, trn)
    (root / "FSS-1000/c205/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 180 masks are missing.*c205/1\.png"):
        Fss1000Source(root, trn, test)
    test.write_text("c240\nz\n")
    with pytest.raises(FileNotFoundError, match=r"test\.txt: 1 of 2 classes have no folder.*'z'"):
        Fss1000Source(root, trn, test)
    test.write_text("\n")
    with pytest.raises(ValueError, match=r"test\.txt: .*empty"):
        Fss1000Source(root, trn, test)
    with pytest.raises(ValueError, match=r'data\.train_list: "fss1000" needs'):
        DataConfig("fss1000", str(root))


def test_a_name_without_a_source_is_an_error():
    """Not some other source: what happens to a data set whose line in `build_source` is missing."""
    config = DataConfig(source="shapes")
    config.source = "voc"
    with pytest.raises(ValueError, match="data.source: 'voc' has no source"):
        build_source(config)
