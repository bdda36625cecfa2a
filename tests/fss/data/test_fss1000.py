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


# FSS-1000 as it is published, and other folders of classes


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """Three classes of four images of 32×40 pixels, the object on 280 of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for name in ("cat", "dog", "hen"):
        for i in range(1, 5):
            write(root / name / f"{i}.jpg", root / name / f"{i}.png")
    (root / "trn.txt").write_text("cat\nhen\n")
    (root / "test.txt").write_text("dog\n")
    return root


def write(photo: Path, mask: Path | None, scale: int = 1) -> None:
    photo.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    if mask is not None:
        white = np.zeros((32, 40), np.uint8)
        white[:7] = 255
        Image.fromarray(white.repeat(scale, 0).repeat(scale, 1)).convert("RGB").save(mask)


def read(root: Path, **options: bool) -> Fss1000Source:
    return Fss1000Source(root, root / "trn.txt", root / "test.txt", **options)


@pytest.mark.parametrize("ending", ["JPG", "jpeg", "JPEG", "jfif", "webp", "bmp", "tif"])
def test_photos_of_any_ending(small, ending):
    write(small / f"cat/5.{ending}", small / "cat/5.png")
    (small / "cat/1.png").rename(small / "cat/1.PNG")
    source = read(small)
    assert len(source) == 13 and len(source.indices("train")) == 9
    assert source.name(4) == "cat/5" and source.class_areas(4) == {1: 280}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("cat/2.jpeg", r"Of the name of another photo: cat/2\.jpeg"),
        ("cat/2.JPG", r"Of the name of another photo: cat/2\.jpg|cat/2\.JPG"),
        ("cat/9.png", r"Masks without a photo: cat/9\.png"),
        ("cat/9.cr2", r"Not read: cat/9\.cr2"),
    ],
)
def test_files_that_are_left_out_are_named(small, file, reason):
    write(small / "x.png", None)
    (small / "x.png").rename(small / file)
    with pytest.warns(
        UserWarning, match=rf"12 photos are taken, 1 files are left out\. ({reason})"
    ):
        assert len(read(small)) == 12


def test_masks_of_other_sizes(small):
    for name, scale in (("cat/1", 2), ("dog/3", 3), ("hen/4", 4)):
        write(small / f"{name}.jpg", small / f"{name}.png", scale)
    for _ in range(2):  # also from the cache
        with pytest.warns(UserWarning, match="3 of 12 masks have another size .* cat/1.*dog/3"):
            source = read(small)
        assert len(source) == 12
    for index in range(12):
        image, mask = source.load(index)
        assert image.shape == (32, 40, 3) and mask.shape == (32, 40)
        assert np.count_nonzero(mask) == 280 == sum(source.class_areas(index).values())
    with pytest.warns(
        UserWarning, match=r"9 of 12 photos are taken, 3 are left out.*cat/1\.png is 64"
    ):
        source = read(small, skip_unreadable=True)
    assert len(source.indices("train")) == 6 and len(source.indices("test")) == 3
    assert {source.name(i)[:3]: list(source.class_areas(i)) for i in range(9)} == {
        "cat": [1],
        "dog": [2],
        "hen": [3],
    }


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_a_photo_in_the_place_of_a_mask(small, skip_unreadable):
    write(small / "cat/3.png", None)
    with pytest.warns(
        UserWarning, match=r"11 of 12 photos are taken.*cat/3\.png is a photo in col"
    ):
        source = read(small, skip_unreadable=skip_unreadable)
    assert [source.name(i) for i in source.indices("train")][:3] == ["cat/1", "cat/2", "cat/4"]
    assert source.class_areas(3) == {3: 280}  # of the first hen


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 0, 255), (1, 1, 1), (90, 200, 30)])
def test_soft_masks_in_one_color_are_no_photos(small, color):
    for mask in small.glob("*/*.png"):
        soft = Image.open(mask).convert("L").resize((80, 64), 2).resize((40, 32), 2)
        shares = np.array(soft)[..., None] / 255
        Image.fromarray(np.rint(shares * color).astype(np.uint8)).save(mask)
    source = read(small)
    assert len(source) == 12 and all(sum(source.class_areas(i).values()) for i in range(12))


def test_a_class_without_photos(small):
    for photo in (small / "hen").glob("*.jpg"):
        photo.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"hen has no photo: expected NAME.jpg.*found 1\.png"
    ):
        read(small)


def test_one_damaged_photo(small):
    (small / "dog/2.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dog/2\.jpg cannot be decoded"):
        read(small)
    with pytest.warns(UserWarning, match=r"11 of 12 photos are taken, 1 are left out.*dog/2\.jpg"):
        assert len(read(small, skip_unreadable=True).indices("test")) == 3
