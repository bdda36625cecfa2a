"""The conventions in which people keep masks, each read as what it means, or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter, features

from fss.data import FolderSource, Fss1000Source
from fss.data.masks import open_classes, open_object, read_object, voc_colors

SIZE = (60, 80)
OBJECT = np.zeros(SIZE, bool)
OBJECT[10:40, 10:50] = True  # 1200 pixels
SECOND = np.zeros(SIZE, bool)
SECOND[45:55, 10:50] = True
BORDER = cv2.dilate(OBJECT.astype(np.uint8), np.ones((3, 3), np.uint8)) > OBJECT
CORNER = np.zeros(SIZE, bool)
CORNER[:8, 60:] = True
VOC = np.stack([voc_colors() >> shift & 255 for shift in (16, 8, 0)], axis=1).astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gray(*parts: tuple[np.ndarray, int], dtype=np.uint8) -> np.ndarray:
    mask = np.zeros(SIZE, dtype)
    for where, value in parts:
        mask[where] = value
    return mask


def color(*parts: tuple[np.ndarray, tuple[int, ...]], channels: int = 3) -> np.ndarray:
    mask = np.zeros((*SIZE, channels), np.uint8)
    for where, value in parts:
        mask[where] = value
    return mask


def palette(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids).convert("P")
    image.putpalette(VOC.tobytes())
    return image


def saved(mask: np.ndarray | Image.Image, form: str, **options) -> Image.Image:
    stream = io.BytesIO()
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image.save(stream, form, **options)
    return Image.open(stream)


def test_the_colors_of_voc():
    assert VOC[[1, 8, 15, 255]].tolist() == [
        [128, 0, 0],
        [64, 0, 0],
        [192, 128, 128],
        [224] * 2 + [192],
    ]


@pytest.mark.parametrize("k", [1, 7, 15, 20, 80, 120])
@pytest.mark.parametrize("ignored", [BORDER, CORNER], ids=["border", "corner"])
def test_class_ids_with_255_ignored(tmp_path, k, ignored):
    ids = gray((OBJECT, k), (ignored, 255))
    Image.fromarray(ids).save(tmp_path / "a.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "b.png")
    Image.fromarray(np.dstack([ids] * 3)).save(tmp_path / "rgb.png")
    masks = [ids, ids.astype(np.int64), ids.astype(np.uint16), Image.fromarray(ids), ids[..., None]]
    for mask in [*masks, *map(str, sorted(tmp_path.iterdir()))]:
        found = read_object(mask)
        np.testing.assert_array_equal(found.pixels, OBJECT)
        assert found.convention == f"class id {k}, 255 ignored"
        np.testing.assert_array_equal(found.labels == 255, ids == 255)
        np.testing.assert_array_equal(found.labels == 1, found.pixels)


ONE = {
    "bool": (OBJECT, "true and false"),
    "0/1": (gray((OBJECT, 1)), "0 and 1"),
    "0/255": (gray((OBJECT, 255)), "0 and 255"),
    "0/65535": (gray((OBJECT, 65535), dtype=np.uint16), "0 and 65535"),
    "an id of 16 bits": (gray((OBJECT, 1000), dtype=np.uint16), "0 and 1000"),
    "16 bits and ignored": (
        gray((OBJECT, 300), (BORDER, 65535), dtype=np.uint16),
        "class id 300, 65535 ignored",
    ),
    "floating": (OBJECT * 0.8, "shares from 0 to 1, from 0.5 on"),
    "one bit": (Image.fromarray(OBJECT), "0 and 255"),
    "palette": (palette(gray((OBJECT, 8), (BORDER, 255))), "class id 8 of a palette, 255 ignored"),
    "palette, 127": (palette(gray((OBJECT, 127), (BORDER, 255))), "class id 127 of a palette"),
    "transparent": (color((OBJECT, (200, 0, 0, 255)), channels=4), "what is opaque"),
    "black on transparent": (color((OBJECT, (0, 0, 0, 255)), channels=4), "what is opaque"),
    "opaque": (
        np.dstack([color((OBJECT, (0, 0, 90))), np.full(SIZE, 255, np.uint8)]),
        "color 0,0,90",
    ),
    "half opaque": (np.dstack([color((OBJECT, (0, 0, 90))), np.full(SIZE, 99, np.uint8)]), "color"),
}


@pytest.mark.parametrize("kind", ONE)
def test_one_object(kind):
    mask, convention = ONE[kind]
    found = read_object(mask)
    np.testing.assert_array_equal(found.pixels, OBJECT)
    assert found.convention.startswith(convention)


@pytest.mark.parametrize("rgb", [*VOC[1:21].tolist(), [0, 0, 100], [1, 0, 0], [255, 255, 254]])
def test_one_color_whatever_its_brightness(tmp_path, rgb):
    plain, bordered = color((OBJECT, rgb)), color((OBJECT, rgb), (BORDER, (224, 224, 192)))
    Image.fromarray(bordered).save(tmp_path / "a.png")
    for mask in (plain, plain / 255, Image.fromarray(plain)):
        np.testing.assert_array_equal(read_object(mask).pixels, OBJECT)
    if max(rgb) < 64 and rgb not in VOC.tolist():
        return
    for mask in (bordered, tmp_path / "a.png"):
        found = read_object(mask)
        np.testing.assert_array_equal(found.pixels, OBJECT)
        assert "VOC's border ignored" in found.convention
        assert found.labels[~found.pixels].max() == 255


TWO = {
    "ids": gray((OBJECT, 3), (SECOND, 1)),
    "ids and ignored": gray((OBJECT, 3), (SECOND, 1), (BORDER, 255)),
    "ids of 16 bits": gray((OBJECT, 300), (SECOND, 500), dtype=np.uint16),
    "grays": gray((OBJECT, 200), (SECOND, 100)),
    "bright grays": gray((OBJECT, 200), (SECOND, 255)),
    "three grays": gray((OBJECT, 85), (SECOND, 170), (CORNER, 255)),
    "dark and bright of VOC": color((OBJECT, (64, 0, 0)), (SECOND, (192, 0, 0))),
    "greens of VOC": color((OBJECT, (0, 64, 0)), (SECOND, (0, 192, 0))),
    "bright colors": color((OBJECT, (255, 0, 0)), (SECOND, (0, 255, 0))),
    "a color and white": color((OBJECT, (255, 0, 0)), (SECOND, (255, 255, 255))),
    "a color on white": np.where(OBJECT[..., None], (255, 0, 0), 255).astype(np.uint8),
    "viridis": np.where(OBJECT[..., None], (253, 231, 36), (68, 1, 84)).astype(np.uint8),
    "palette": palette(gray((OBJECT, 8), (SECOND, 15))),
    "thin": gray((OBJECT, 200), (np.eye(*SIZE, 25, dtype=bool) & ~OBJECT, 100)),
    "compressed ids": saved(gray((OBJECT, 200), (SECOND, 100)), "JPEG", quality=90),
    "compressed colors": saved(color((OBJECT, (64, 0, 0)), (SECOND, (0, 128, 128))), "JPEG"),
    "a trimap": gray((BORDER, 128), (OBJECT, 255)),
    "a trimap of 127": gray((BORDER, 127), (OBJECT, 255)),
    "negative": gray((OBJECT, 1), (BORDER, -1), dtype=np.int16),
    "a photo": np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8),
}


@pytest.mark.parametrize("kind", TWO)
def test_several_objects_are_refused_with_their_values(kind):
    with pytest.raises(ValueError, match="m: expected one object .*, got .*mask_value=") as error:
        read_object(TWO[kind], "m")
    values = {"ids": "values 1, 3;", "greens of VOC": "values 0,64,0; 0,192,0;"}
    assert values.get(kind, "") in str(error.value)


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        ("ids", 3, OBJECT),
        ("ids", "1", SECOND),
        ("ids of 16 bits", 500, SECOND),
        ("palette", 15, SECOND),
        ("greens of VOC", (0, 192, 0), SECOND),
        ("greens of VOC", "0,64,0", OBJECT),
        ("dark and bright of VOC", 8, OBJECT),  # the class id of VOC's (64, 0, 0)
        ("viridis", "253,231,36", OBJECT),
        ("a trimap", 255, OBJECT),
        ("negative", 1, OBJECT),
    ],
)
def test_a_value_decides(kind, value, expected):
    np.testing.assert_array_equal(read_object(TWO[kind], value=value).pixels, expected)


@pytest.mark.parametrize(
    "mask, value, convention",
    [
        (TWO["ids and ignored"], 3, "the value 3, 255 ignored"),
        (palette(gray((OBJECT, 150), (SECOND, 15), (BORDER, 255))), 150, "the value 150, 255"),
        (color((OBJECT, VOC[8]), (SECOND, VOC[15]), (BORDER, (224, 224, 192))), 8, "class id 8"),
        (
            saved(
                color((OBJECT, VOC[8]), (SECOND, VOC[15]), (BORDER, (224, 224, 192))),
                "JPEG",
                quality=95,
                subsampling=0,
            ),
            "64,0,0",
            "the color 64,0,0, VOC's border ignored",
        ),
    ],
)
def test_what_is_ignored_stays_so_beside_the_value(mask, value, convention):
    found = read_object(mask, value=value)
    assert found.convention.startswith(convention) and "ignored" in found.convention
    assert (found.pixels & OBJECT).sum() > 0.95 * (found.pixels | OBJECT).sum()
    border = BORDER & ~OBJECT & ~SECOND
    assert (found.labels[border] == 255).mean() > 0.8
    assert not (found.labels[SECOND] == 255).any()


@pytest.mark.parametrize("mask, value", [(TWO["bright grays"], 200), (TWO["ids"], 1)])
def test_beside_grays_white_is_no_ignored_pixel(mask, value):
    assert read_object(mask, value=value).ignored is None


@pytest.mark.parametrize("value", [200, "100"])
def test_a_value_of_a_compressed_mask(value):
    expected = OBJECT if value == 200 else SECOND
    found = read_object(TWO["compressed ids"], value=value).pixels
    assert (found & expected).sum() > 0.95 * (found | expected).sum()


@pytest.mark.parametrize(
    "kind, value, message",
    [
        ("ids", 2, "mask_value: m has no 2, but 1, 3"),
        ("greens of VOC", "0,65,0", "has no 0,65,0, but 0,64,0; 0,192,0"),
        ("greens of VOC", 3, "has no 3, but"),
        ("ids", "red", "mask_value: expected a class id or gray.*got 'red'"),
        ("ids", (1, 2), "mask_value: expected"),
        ("ids", "300,0,0", "mask_value: expected"),
    ],
)
def test_a_value_that_is_not_there(kind, value, message):
    with pytest.raises(ValueError, match=message):
        read_object(TWO[kind], "m", value)


def lossy() -> list:
    masks = [gray((OBJECT, v)) for v in (100, 120, 200, 255)]
    masks += [color((OBJECT, c)) for c in ((128, 0, 0), (0, 0, 255), (0, 128, 64), (255, 255, 0))]
    masks.append(color((OBJECT, (64, 0, 128)), (BORDER, (224, 224, 192))))
    found = [saved(mask, "JPEG", quality=q) for mask in masks for q in (60, 75, 95)]
    if features.check("webp"):
        found += [saved(gray((OBJECT, 255)), "WEBP", quality=q) for q in (50, 80, 95)]
    return found


@pytest.mark.parametrize("index", range(len(lossy())))
def test_compression_leaves_no_traces(index):
    found = read_object(lossy()[index]).pixels
    assert (found & OBJECT).sum() > 0.95 * (found | OBJECT).sum()


@pytest.mark.parametrize("value", [100, 255, (200, 0, 0), (0, 0, 90)])
@pytest.mark.parametrize("radius", [0.7, 2])
def test_soft_edges_are_cut_at_half_of_the_object(value, radius):
    mask = gray((OBJECT, value)) if isinstance(value, int) else color((OBJECT, value))
    found = read_object(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius))).pixels
    assert (found & OBJECT).sum() > 0.97 * (found | OBJECT).sum()


def test_masks_of_real_data(shared):
    """Masks of VOC with one class, as ids, in colors, and compressed."""
    tried = 0
    for path in sorted((shared / "data/pascal/SegmentationClassAug").glob("*.png"))[:60]:
        ids = np.array(Image.open(path))
        classes = [c for c in np.unique(ids) if 0 < c < 255]
        if len(classes) > 1:
            with pytest.raises(ValueError, match="expected one object"):
                read_object(path)
            np.testing.assert_array_equal(
                read_object(path, value=int(classes[0])).pixels, ids == classes[0]
            )
            continue
        tried += 1
        for mask in (path, Image.fromarray(VOC[ids])):
            np.testing.assert_array_equal(read_object(mask).pixels, ids == classes[0])
    assert tried > 10


def folder(root: Path, masks: list[np.ndarray | Image.Image]) -> Path:
    for part in ("JPEGImages", "SegmentationClass"):
        (root / part).mkdir(parents=True)
    for number, mask in enumerate(masks):
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        Image.new("RGB", SIZE[::-1]).save(root / f"JPEGImages/{number}.jpg")
        image.save(root / f"SegmentationClass/{number}.png")
    (root / "classes.json").write_text(
        json.dumps({"classes": {"1": "a", "2": "b"}, "folds": [[1]]})
    )
    return root


@pytest.mark.parametrize("count", [1, 2, 4])
def test_masks_of_255_alone_are_an_error_of_the_scan(tmp_path, count):
    ids = [gray((OBJECT, 255))] * count + [gray((OBJECT, 1), (BORDER, 255))] * (4 - count)
    with pytest.raises(
        ValueError, match=r"0\.png has 1200 pixels of 255 \(ignored\) and no class"
    ) as e:
        FolderSource(folder(tmp_path / "f", ids))
    assert str(e.value).count("1200 pixels") == count


def test_class_ids_of_8_and_16_bits(tmp_path):
    ids = gray((OBJECT, 2), (BORDER, 255))
    masks = [ids, ids.astype(np.uint16), palette(ids), np.zeros(SIZE, np.uint8)]
    source = FolderSource(folder(tmp_path / "f", masks))
    assert [source.class_areas(i) for i in range(4)] == [{2: 1200}] * 3 + [{}]
    for i in range(3):
        np.testing.assert_array_equal(source.load(i)[1], ids)


@pytest.mark.parametrize(
    "mask, message",
    [
        (gray((OBJECT, 1000), dtype=np.uint16), r"up to 254, and 255 ignored, got 0 to 1000"),
        (color((OBJECT, (128, 0, 0))), r"got mode RGB and the colors 0,0,0; 128,0,0"),
        (Image.fromarray(OBJECT), "expected class ids in one channel.*got mode 1"),
    ],
)
def test_what_are_no_class_ids(tmp_path, mask, message):
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png.*{message}"):
        open_classes(tmp_path / "a.png")


WHITE = {
    "0/255": gray((OBJECT, 255)),
    "0/1": gray((OBJECT, 1)),
    "0/1, bits": Image.fromarray(OBJECT),
    "16 bits": gray((OBJECT, 65535), dtype=np.uint16),
    "red": color((OBJECT, (255, 0, 0))),
    "blue": color((OBJECT, (0, 0, 255))),
    "dark blue": color((OBJECT, (0, 0, 90))),
    "white": color((OBJECT, (255, 255, 255))),
    "red on transparent": color((OBJECT, (255, 0, 0, 255)), channels=4),
    "palette": palette(gray((OBJECT, 4))),
    "a few traces": gray((OBJECT, 255), (BORDER, 1), (CORNER, 127)),
    "soft": gray((OBJECT, 255), (BORDER, 100)),
}


NOT_BLACK = {
    "1 and 2": gray((OBJECT, 1), (BORDER, 2)),
    "ids": gray((OBJECT, 9), (BORDER, 100), (CORNER, 200)),
    "16-bit ids": gray((OBJECT, 40), (CORNER, 3000), dtype=np.uint16),
    "ids up to 250": gray((OBJECT, 60), (CORNER, 250)),
    "colors": color((OBJECT, (128, 0, 0)), (CORNER, (255, 0, 0))),
    "dim shares": (OBJECT * 0.1 + BORDER * 0.2).astype(np.float32),
}


@pytest.mark.parametrize("kind", NOT_BLACK)
def test_what_is_not_black_of_a_folder_of_classes(tmp_path, kind):
    mask = NOT_BLACK[kind]
    path = tmp_path / "1.tif"
    Image.fromarray(mask).save(path)
    expected = mask > 0 if mask.ndim == 2 else mask.any(2)
    np.testing.assert_array_equal(np.array(open_object(path)) == 1, expected)


@pytest.mark.parametrize("read", [open_object, open_classes, read_object])
@pytest.mark.parametrize("form", ["a.tif", "a.gif"])
def test_several_pages_are_refused(tmp_path, read, form):
    first, *others = (Image.fromarray(gray((part, 1))) for part in (OBJECT, BORDER, CORNER))
    first.save(tmp_path / form, save_all=True, append_images=others)
    with pytest.raises(ValueError, match=r"one page, got 3 \(pages 1, 2, 3\)"):
        read(tmp_path / form)
    first.save(tmp_path / form)
    read(tmp_path / form)


def test_a_smaller_copy_is_no_page(tmp_path):
    large = Image.fromarray(gray((OBJECT, 1)))
    small = large.resize((10, 8), 0)
    small.encoderinfo = {"tiffinfo": {254: 1}}
    large.save(tmp_path / "a.tif", save_all=True, append_images=[small])
    np.testing.assert_array_equal(read_object(tmp_path / "a.tif").pixels, OBJECT)


@pytest.mark.parametrize("kind", WHITE)
def test_the_one_object_of_a_folder_of_classes(tmp_path, kind):
    mask = WHITE[kind]
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name / "1.jpg")
        image.save(tmp_path / name / "1.png")
    (tmp_path / "trn.txt").write_text("cat\n")
    (tmp_path / "test.txt").write_text("dog\n")
    source = Fss1000Source(tmp_path, tmp_path / "trn.txt", tmp_path / "test.txt")
    assert source.class_areas(0) == {1: 1200}
    np.testing.assert_array_equal(source.load(0)[1] == 1, OBJECT)
    assert open_object(tmp_path / "cat/1.png").size == SIZE[::-1]
