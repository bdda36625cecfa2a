from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fss.data import EpisodeDataset, EvalTransform, FolderSource, Source
from fss.data import scan as scan_module

NAMES = {"1": "cat", "2": "dog", "3": "hen", "4": "cow"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fss"


@pytest.fixture
def root(tmp_path) -> Path:
    """Eight photos of 20×30 pixels; photo i shows class i % 4 + 1 on 5 + i pixels."""
    folder = tmp_path / "photos"
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for i in range(8):
        pixels = np.full((20, 30, 3), (10 * i, 100, 200), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/p{i}.jpg", quality=95)
        mask = np.zeros((20, 30), dtype=np.uint8)
        mask[0, : 5 + i] = i % 4 + 1
        mask[1, :3] = 255
        Image.fromarray(mask).save(folder / f"SegmentationClass/p{i}.png")
    (folder / "classes.json").write_text(json.dumps({"classes": NAMES}))
    return folder


def write_mask(root: Path, name: str, mask: np.ndarray, mode: str | None = None) -> Path:
    path = root / f"SegmentationClass/{name}.png"
    image = Image.fromarray(mask)
    (image.convert(mode) if mode else image).save(path)
    return path


def write_lists(root: Path, train: str | None, val: str | None) -> None:
    folder = root / "ImageSets/Segmentation"
    folder.mkdir(parents=True)
    for name, text in (("train", train), ("val", val)):
        if text is not None:
            (folder / f"{name}.txt").write_text(text)


def test_reads_the_layout(root):
    source = FolderSource(root)
    assert isinstance(source, Source)
    assert len(source) == 8
    assert [source.name(i) for i in range(3)] == ["p0", "p1", "p2"]
    assert source.class_names == {1: "cat", 2: "dog", 3: "hen", 4: "cow"}
    assert source.folds == ((1,), (2,), (3,), (4,))
    assert source.indices("train") == source.indices("test") == list(range(8))
    assert source.size(0) == (20, 30)
    assert [source.class_areas(i) for i in (0, 5)] == [{1: 5}, {2: 10}]
    image, mask = source.load(5)
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8
    assert np.abs(image.mean((0, 1)) - [50, 100, 200]).max() < 4  # RGB, not BGR
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 2, 255}


def test_palette_masks_and_png_images(root):
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:5] = 3
    picture = Image.fromarray(mask).convert("L")
    picture = Image.frombytes("P", (30, 20), picture.tobytes())
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9] * 64)
    picture.save(root / "SegmentationClass/q.png")
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(root / "JPEGImages/q.PNG")
    source = FolderSource(root)
    image, loaded = source.load(8)
    assert np.array_equal(loaded, mask)
    assert source.class_areas(8) == {3: 60}
    assert image.shape == (20, 30, 3) and (image == 77).all()  # grey becomes RGB


def test_exif_orientation_is_applied(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(root / "JPEGImages/p0.jpg", exif=exif)
    assert FolderSource(root).load(0)[0].shape == (20, 30, 3)


def test_lists_choose_the_images(root):
    write_lists(root, "p3\np1\n\n", "p5\np1\n")
    (root / "SegmentationClass/p0.png").unlink()  # not listed, so no mask is needed
    source = FolderSource(root)
    assert [source.name(i) for i in range(len(source))] == ["p1", "p3", "p5"]
    assert [source.name(i) for i in source.indices("train")] == ["p3", "p1"]
    assert [source.name(i) for i in source.indices("test")] == ["p5", "p1"]


def test_classes_and_folds_as_arguments(root):
    (root / "classes.json").unlink()
    source = FolderSource(root, classes=["a", "b", "c", "d", "e"], folds=[[1, 5], [2]])
    assert source.class_names == {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}
    assert source.folds == ((1, 5), (2,))


def test_folds_in_the_class_file(root):
    (root / "classes.json").write_text(json.dumps({"classes": NAMES, "folds": [[4, 1], [2, 3]]}))
    assert FolderSource(root).folds == ((4, 1), (2, 3))


def count_inspections(monkeypatch) -> list[Path]:
    seen: list[Path] = []
    inspect = scan_module.inspect

    def counting(image, mask, *others):
        seen.append(mask)
        return inspect(image, mask, *others)

    monkeypatch.setattr(scan_module, "inspect", counting)
    return seen


def test_scan_is_cached_until_a_mask_changes(root, cache, monkeypatch):
    seen = count_inspections(monkeypatch)
    first = FolderSource(root)
    assert len(seen) == 8
    second = FolderSource(root)
    assert len(seen) == 8
    assert [second.class_areas(i) for i in range(8)] == [first.class_areas(i) for i in range(8)]
    assert second.size(0) == (20, 30)
    write_mask(root, "p0", np.full((20, 30), 4, dtype=np.uint8))
    assert FolderSource(root).class_areas(0) == {4: 600}
    assert len(seen) == 16
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_same_size_and_content_length_but_newer(root, monkeypatch):
    seen = count_inspections(monkeypatch)
    FolderSource(root)
    mask = root / "SegmentationClass/p0.png"
    os.utime(mask, ns=(1, 1))
    FolderSource(root)
    assert len(seen) == 16


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: json.dumps({"fingerprint": json.loads(text)["fingerprint"], "records": [[]]}),
        lambda text: json.dumps({**json.loads(text), "records": json.loads(text)["records"][:3]}),
    ],
)
def test_broken_cache_is_rebuilt(root, cache, monkeypatch, damage):
    areas = FolderSource(root).class_areas(3)
    (file,) = cache.iterdir()
    good = file.read_text()
    file.write_text(damage(good))
    seen = count_inspections(monkeypatch)
    assert FolderSource(root).class_areas(3) == areas
    assert len(seen) == 8
    assert file.read_text() == good


def test_cache_that_cannot_be_written(root, tmp_path, monkeypatch):
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        assert FolderSource(root).class_areas(0) == {1: 5}


def test_failed_write_leaves_the_old_cache(root, cache, monkeypatch):
    FolderSource(root)
    (file,) = cache.iterdir()
    before = file.read_text()
    os.utime(root / "SegmentationClass/p0.png", ns=(1, 1))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.warns(UserWarning, match="disk full"):
        FolderSource(root)
    assert list(cache.iterdir()) == [file] and file.read_text() == before


def test_scan_does_not_warn(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FolderSource(root)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected .*JPEGImages"):
        FolderSource(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["JPEGImages", "SegmentationClass"])
def test_missing_folder(root, name):
    (root / name).rename(root / "other")
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        FolderSource(root)


def test_no_images(root):
    for path in (root / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages has no \.jpg"):
        FolderSource(root)


def test_image_without_mask(root):
    (root / "SegmentationClass/p3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"p3\.jpg has no mask.*p3\.png \(1 of 8"):
        FolderSource(root)


def test_mask_of_another_size(root):
    write_mask(root, "p2", np.zeros((20, 31), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"p2\.png is 20×31 .*p2\.jpg 20×30"):
        FolderSource(root)


def test_image_that_changed_its_size_after_the_scan(root):
    source = FolderSource(root)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "JPEGImages/p2.jpg")
    with pytest.raises(ValueError, match=r"20×30.*9×9"):
        source.load(2)


def test_unknown_class_id(root):
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[:2] = 9
    write_mask(root, "p6", mask)
    for _ in range(2):  # also when the areas come from the cache
        with pytest.raises(ValueError, match=r"p6\.png: class id 9 \(60 pixels\).*ids 1 to 4"):
            FolderSource(root)


@pytest.mark.parametrize(("mode", "name"), [("RGB", "RGB"), ("1", "1")])
def test_mask_with_colors(root, mode, name):
    write_mask(root, "p1", np.zeros((20, 30), dtype=np.uint8), mode)
    with pytest.raises(ValueError, match=rf"p1\.png: expected class ids.*got mode {name}"):
        FolderSource(root)


def test_truncated_photo(root):
    path = root / "JPEGImages/p4.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    source = FolderSource(root)  # the header is whole
    source.load(3)
    with pytest.raises(ValueError, match=r"p4\.jpg cannot be decoded.*replace the file"):
        source.load(4)


@pytest.mark.parametrize("content", [b"", b"no photo at all"])
@pytest.mark.parametrize("file", ["JPEGImages/p4.jpg", "SegmentationClass/p4.png"])
def test_unreadable_file(root, file, content):
    (root / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} cannot be decoded"):
        FolderSource(root)


def test_all_damaged_files_are_counted(root):
    for name in ("p1", "p4", "p6"):
        (root / f"SegmentationClass/{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)3 images cannot be used:.*p1\.png.*p4.*p6\.png"):
        FolderSource(root)


def test_truncated_mask(root):
    path = root / "SegmentationClass/p4.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"p4\.png cannot be decoded"):
        FolderSource(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_forbidden_file(root):
    path = root / "SegmentationClass/p4.png"
    path.chmod(0)
    with pytest.raises(ValueError, match=r"p4\.png cannot be decoded.*ermission"):
        FolderSource(root)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_two_images_of_one_name(root):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "JPEGImages/p1.png")
    with pytest.raises(ValueError, match="same stem"):
        FolderSource(root)


def test_no_class_list(root):
    (root / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.json does not exist; write"):
        FolderSource(root)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"classes": 3}', '{"classes": {"x": "cat"}}'])
def test_bad_class_file(root, text):
    (root / "classes.json").write_text(text)
    with pytest.raises((ValueError, TypeError), match=r"classes\.json.*expected"):
        FolderSource(root)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": ["a", "b", "c", "d", "e"]}, ValueError, "5 classes cannot be split into four"),
        ({"classes": {0: "a", 1: "b"}}, ValueError, "from 1 to 254, got 0"),
        ({"classes": {255: "a"}}, ValueError, "from 1 to 254, got 255"),
        ({"classes": []}, ValueError, "at least one class"),
        ({"classes": "cat"}, TypeError, "got 'cat'"),
        ({"folds": [[1], [9]]}, ValueError, r"in fold 1, got \(9,\)"),
        ({"folds": [[1, 1]]}, ValueError, "different class ids"),
        ({"folds": [[]]}, ValueError, r"fold 0, got \(\)"),
        ({"folds": 3}, TypeError, "list of class ids per fold, got 3"),
    ],
)
def test_bad_classes_and_folds(root, options, error, message):
    with pytest.raises(error, match=message):
        FolderSource(root, **options)


@pytest.mark.parametrize(
    ("train", "val", "error", "message"),
    [
        ("p1\n", None, FileNotFoundError, r"val\.txt does not exist, train\.txt does"),
        ("p1\n", "p2\nq9\n", FileNotFoundError, r"val\.txt, line 2: 'q9' is no image"),
        ("\n", "p2\n", ValueError, r"train\.txt: .*empty"),
    ],
)
def test_bad_lists(root, train, val, error, message):
    write_lists(root, train, val)
    with pytest.raises(error, match=message):
        FolderSource(root)


@pytest.mark.parametrize("ending", ["JPG", "jpeg", "webp", "bmp", "tif", "jfif"])
def test_photos_of_any_ending(root, ending):
    Image.new("RGB", (30, 20)).save(root / "new.png")
    pixels = Image.open(root / "new.png")
    pixels.save(root / f"JPEGImages/q.{ending}")
    write_mask(root, "q", np.ones((20, 30), np.uint8))
    assert FolderSource(root).name(8) == "q"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("JPEGImages/q.cr2", r"Not read: JPEGImages/q\.cr2"),
        ("JPEGImages/more/q.jpg", r"Not read: JPEGImages/more"),
        ("SegmentationClass/q.npy", r"Not read: SegmentationClass/q\.npy"),
        ("SegmentationClass/q.png", r"Without a photo: SegmentationClass/q\.png"),
    ],
)
def test_files_that_are_left_out_are_named(root, file, reason):
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_bytes(b"something")
    with pytest.warns(UserWarning, match=rf"8 photos are taken, 1 files are left out\. {reason}"):
        assert len(FolderSource(root)) == 8


@pytest.mark.parametrize("name", [".DS_Store", "._p0.jpg", "Thumbs.db"])
def test_files_of_the_system_are_not(root, name):
    (root / "JPEGImages" / name).write_bytes(b"something")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(FolderSource(root)) == 8


def test_unreadable_photos_are_left_out_when_asked(root, monkeypatch):
    write_lists(root, "p0\np1\np2\n", "p2\np5\np3\n")
    (root / "JPEGImages/p1.jpg").write_bytes(b"")
    write_mask(root, "p2", np.zeros((20, 31), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"(?s)2 images cannot be used.*p1\.jpg.*p2\.png is 20×31"):
        FolderSource(root)
    seen = count_inspections(monkeypatch)
    for _ in range(2):  # the damaged ones are tried again each time
        with pytest.warns(UserWarning, match=r"3 of 5 photos are taken, 2 are left out.*p1\.jpg"):
            source = FolderSource(root, skip_unreadable=True)
        assert [source.name(i) for i in source.indices("train")] == ["p0"]
        assert [source.name(i) for i in source.indices("test")] == ["p5", "p3"]
        assert source.class_areas(source.indices("test")[0]) == {2: 10}
    assert len(seen) == 2 * 2
    for path in (root / "JPEGImages").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="5 images cannot be used"):
        FolderSource(root, skip_unreadable=True)


@pytest.mark.parametrize(
    ("photos", "masks", "command"),
    [
        ("images", "masks", "fss data import {0}/images {0}/masks {0}-fss"),
        ("my photos", "labels", "fss data import '{0}/my photos' {0}/labels {0}-fss"),
        ("img", "SegmentationClass", "fss data import {0}/img {0}/SegmentationClass {0}-fss"),
        ("a", "b", "fss data import {0} {0} {0}-fss"),
        ("JPEGImages/sub", "SegmentationClass/sub", "import {0}/JPEGImages {0}/SegmentationClass"),
    ],
)
def test_another_layout_is_told_how_to_import_it(root, photos, masks, command):
    for old, new in (("JPEGImages", photos), ("SegmentationClass", masks)):
        moved = (root / old).rename(root / "moved")
        (root / new).parent.mkdir(exist_ok=True)
        moved.rename(root / new)
    with pytest.raises(FileNotFoundError) as caught:
        FolderSource(root)
    assert command.format(root) in str(caught.value)


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((20, 30, 3), np.uint8),
        np.full((20, 30), 255, np.uint8),
        np.full((20, 30), 300, np.uint16),
        np.zeros((40, 60), np.uint8),
    ],
)
def test_masks_of_another_kind_are_told_how_to_import_them(root, mask):
    write_mask(root, "p1", mask)
    with pytest.raises(ValueError, match=r"p1\.png") as caught:
        FolderSource(root)
    assert f"fss data import {root}/JPEGImages {root}/SegmentationClass NEW" in str(caught.value)


def test_one_class(root):
    for i in range(8):
        write_mask(root, f"p{i}", np.ones((20, 30), np.uint8))
    with pytest.raises(ValueError, match="one class cannot be both novel and a base class"):
        FolderSource(root, classes=["cat"])
    source = FolderSource(root, classes=["cat"], folds=[[1]])
    options = {"min_area": 1, "transform": EvalTransform(9)}
    assert len(EpisodeDataset(source, 0, "test", 1, episodes=3, **options)) == 3
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="fold 0 has no base class: of 1 classes, 1 are novel"):
            EpisodeDataset(source, 0, split, 1, episodes=3, **options)


def test_clothing(shared):
    source = FolderSource(shared / "data/clothing")
    assert len(source) == 1004
    assert len(source.class_names) == 24
    assert source.folds == tuple(tuple(range(6 * k + 1, 6 * k + 7)) for k in range(4))
    counts = json.loads((shared / "data/clothing/classes.json").read_text())["images_at_1pct"]
    for class_id, name in source.class_names.items():
        covered = [
            source.class_areas(i).get(class_id, 0) / np.prod(source.size(i)) for i in range(1004)
        ]
        assert sum(share >= 0.01 for share in covered) == counts[name]
    image, mask = source.load(17)
    assert image.shape == (*mask.shape, 3) == (*source.size(17), 3)
    ids, areas = np.unique(mask[(mask > 0) & (mask < 255)], return_counts=True)
    assert source.class_areas(17) == dict(zip(ids.tolist(), areas.tolist()))
