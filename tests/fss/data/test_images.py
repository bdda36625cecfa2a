"""One reader of images: training, evaluation, report and prediction see the same pixels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, features

from fss.data import FolderSource, Fss1000Source
from fss.data.images import ENDINGS, FORMATS, OTHER_ENDINGS, read_picture
from fss.segment.pictures import read_picture as read_own

RAMP = np.linspace(0, 1, 40 * 60).reshape(40, 60)
COLORS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def palette() -> Image.Image:
    image = Image.fromarray((RAMP > 0.5).astype(np.uint8)).convert("P")
    image.putpalette([0, 90, 0, 200, 30, 30] + [0] * 762)
    return image


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# of each: the picture, its ending, and what to save it with
PHOTOS = {
    "rgb": (Image.fromarray(COLORS), ".jpg", {}),
    "gray": (Image.fromarray(COLORS[..., 0]), ".jpg", {}),
    "gray, 16 bits": (Image.fromarray((RAMP * 65535).astype(np.uint16)), ".png", {}),
    "gray, 32 bits": (Image.fromarray((RAMP * 65535).astype(np.int32)), ".tif", {}),
    "floating": (Image.fromarray(RAMP.astype(np.float32)), ".tif", {}),
    "alpha": (Image.fromarray(np.dstack([COLORS, COLORS[..., :1]])), ".png", {}),
    "gray and alpha": (Image.fromarray(COLORS[..., 0]).convert("LA"), ".png", {}),
    "palette": (palette(), ".png", {}),
    "transparent palette": (palette(), ".png", {"transparency": 0}),
    "one bit": (Image.fromarray(RAMP > 0.5), ".png", {}),
    "CMYK": (Image.fromarray(COLORS).convert("CMYK"), ".jpg", {}),
    "turned": (Image.fromarray(COLORS), ".jpg", {"exif": turned()}),
    "turned, 16 bits": (
        Image.fromarray((RAMP * 65535).astype(np.uint16)),
        ".png",
        {"exif": turned()},
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_of(root: Path, kind: str) -> FolderSource:
    image, ending, options = PHOTOS[kind]
    for part in ("JPEGImages", "SegmentationClass"):
        (root / part).mkdir(parents=True)
    image.save(root / f"JPEGImages/a{ending}", **options)
    mask = np.ones(read_own(root / f"JPEGImages/a{ending}").shape[:2], np.uint8)
    Image.fromarray(mask).save(root / "SegmentationClass/a.png")
    classes = {"classes": {"1": "object"}, "folds": [[1]]}
    (root / "classes.json").write_text(json.dumps(classes))
    return root


@pytest.mark.parametrize("kind", [k for k, (_, ending, _) in PHOTOS.items() if ending != ".tif"])
def test_training_and_prediction_read_the_same_pixels(tmp_path, kind):
    source = FolderSource(folder_of(tmp_path, kind))
    loaded, _ = source.load(0)
    path = next((tmp_path / "JPEGImages").iterdir())
    np.testing.assert_array_equal(loaded, read_own(path))
    with Image.open(path) as image:
        np.testing.assert_array_equal(loaded, read_own(image))


@pytest.mark.parametrize("kind", PHOTOS)
def test_what_the_pixels_are(tmp_path, kind):
    image, ending, options = PHOTOS[kind]
    path = tmp_path / f"a{ending}"
    image.save(path, **options)
    found = read_picture(path)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    ramp = np.rint(RAMP * 255)[..., None].repeat(3, 2)
    if kind in ("gray, 16 bits", "gray, 32 bits", "floating"):
        assert np.abs(found - ramp).max() <= 1 and abs(found.mean() - 127.5) < 0.5
    elif kind == "turned, 16 bits":
        assert np.abs(found - np.rot90(ramp, -1)).max() <= 1
    elif kind == "turned":
        assert found.shape == (60, 40, 3)
    elif kind == "transparent palette":
        assert (found[RAMP <= 0.5] == 255).all() and (found[RAMP > 0.5] == (200, 30, 30)).all()
    elif kind == "palette":
        assert (found[RAMP <= 0.5] == (0, 90, 0)).all()
    elif kind == "alpha":
        share = COLORS[..., :1] / 255
        assert np.abs(found - (COLORS * share + 255 * (1 - share))).max() <= 1
    else:
        with Image.open(path) as file:
            np.testing.assert_array_equal(found, np.array(file.convert("RGB")))


def test_plain_photos_are_what_pillow_decodes(shared):
    for path in sorted((shared / "data/pascal/JPEGImages").glob("*.jpg"))[:10]:
        with Image.open(path) as file:
            np.testing.assert_array_equal(read_picture(path), np.array(file))


def test_a_mask_is_turned_as_its_file_says(tmp_path):
    """The photo and the mask of FSS-1000's layout and of a folder, both stored turned."""
    ids = np.zeros((40, 60), np.uint8)
    ids[:10] = 1
    root = folder_of(tmp_path / "folder", "turned")
    Image.fromarray(ids).save(root / "SegmentationClass/a.png", exif=turned())
    _, mask = FolderSource(root).load(0)
    np.testing.assert_array_equal(mask, np.rot90(ids, -1))
    for name in ("cat", "dog"):
        (tmp_path / "fss" / name).mkdir(parents=True)
        PHOTOS["turned"][0].save(tmp_path / f"fss/{name}/1.jpg", exif=turned())
        Image.fromarray(ids * 255).save(tmp_path / f"fss/{name}/1.png", exif=turned())
    (tmp_path / "trn.txt").write_text("cat")
    (tmp_path / "test.txt").write_text("dog")
    source = Fss1000Source(tmp_path / "fss", tmp_path / "trn.txt", tmp_path / "test.txt")
    np.testing.assert_array_equal(source.load(0)[1], np.rot90(ids, -1))


NAMES = [
    ("a.JPG", None),
    ("a.jfif", None),
    ("a.webp", "webp"),
    ("a.bmp", None),
    ("a.tif", None),
    ("a.ppm", None),
    ("a.jp2", "jpg_2000"),
    ("a.avif", "avif"),
]


@pytest.mark.parametrize("name, feature", NAMES)
def test_formats_that_can_be_read(tmp_path, name, feature):
    if feature and not features.check(feature):
        pytest.skip(f"Pillow is built without {feature}")
    smooth = np.dstack([np.rint(RAMP * 255).astype(np.uint8)] * 3)
    Image.fromarray(smooth).save(tmp_path / name, **({"quality": 95} if "j" not in name else {}))
    assert np.abs(read_picture(tmp_path / name).astype(int) - smooth).mean() < 4
    assert Path(name).suffix.lower() in ENDINGS


def test_heic(tmp_path):
    pytest.importorskip("pillow_heif")
    smooth = np.dstack([np.rint(RAMP * 255).astype(np.uint8)] * 3)
    Image.fromarray(smooth).save(tmp_path / "a.heic", quality=95)
    assert np.abs(read_picture(tmp_path / "a.heic").astype(int) - smooth).mean() < 4
    assert ".heic" in ENDINGS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif|cannot be decoded"),
        ("a.jxl", b"\xff\x0a", "expected JPEG, PNG.*convert the file to JPEG or PNG"),
        ("a.psd", b"8BPS", "expected JPEG, PNG.*convert the file"),
        ("a.txt", b"none", "expected JPEG, PNG.*replace the file"),
    ],
)
def test_other_formats_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_picture(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_raw_photo_is_not_taken_for_its_preview(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a.NEF")  # TIFF inside, with a small preview first
    with pytest.raises(ValueError, match=r"a\.NEF cannot be decoded.*convert the file"):
        read_picture(tmp_path / "a.NEF")


def test_every_ending_is_either_read_or_named():
    assert not set(ENDINGS) & set(OTHER_ENDINGS)
    assert {".heic", ".avif", ".jp2", ".webp", ".dng"} <= {*ENDINGS, *OTHER_ENDINGS}
    installed = importlib.util.find_spec("pillow_heif") is not None
    assert ("HEIF" in FORMATS) == installed == (".heic" in ENDINGS)


@pytest.mark.parametrize("values", [[-5, 9], [0, 70000]])
def test_integers_of_no_known_range(tmp_path, values):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif cannot.*got {values[0]} to {values[1]}"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 3), ("float64", 1), ("float32", 4)])
def test_the_cause_of_a_tiff_that_is_not_read(tmp_path, dtype, channels):
    shape = (8, 9, channels) if channels > 1 else (8, 9)
    cv2.imwrite(str(tmp_path / "a.tif"), np.zeros(shape, dtype))
    cause = rf"a TIFF of {channels} channels of {dtype[-2:]}-bit floating values; expected 8"
    with pytest.raises(ValueError, match=cause):
        read_picture(tmp_path / "a.tif")
