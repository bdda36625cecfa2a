from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fss.data import images
from fss.segment.pictures import overlay, read_mask, read_picture

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def test_arrays_images_and_files_are_the_same_picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    for picture in (RGB, Image.fromarray(RGB), path, str(path), RGB / np.float32(255)):
        np.testing.assert_array_equal(read_picture(picture), RGB)


@pytest.mark.parametrize(
    "picture",
    [GREY, GREY[..., None], GREY.astype(np.uint16) * 257, Image.fromarray(GREY)],
    ids=["HW", "HW1", "16 bit", "L"],
)
def test_grey_becomes_rgb(picture):
    np.testing.assert_array_equal(read_picture(picture), np.stack([GREY] * 3, axis=2))


def test_sixteen_bit_files_keep_their_range(tmp_path):
    """Pillow's own conversion cuts all above 255 off."""
    for suffix in ("png", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
        np.testing.assert_array_equal(read_picture(path)[..., 1], GREY)


def test_transparent_pixels_lie_on_white(tmp_path):
    rgba = np.dstack([RGB, np.full(GREY.shape, 255, np.uint8)])
    rgba[:4, :, 3] = 0
    rgba[4:6, :, 3] = 128
    expected = RGB.copy()
    expected[:4] = 255
    expected[4:6] = np.rint(RGB[4:6] * (128 / 255) + 255 * (127 / 255))
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    for picture in (rgba, path):
        np.testing.assert_array_equal(read_picture(picture), expected)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    image.save(tmp_path / "plain.png")
    expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(read_picture(tmp_path / "plain.png"), expected)
    index = int(np.array(image)[0, 0])
    image.save(tmp_path / "clear.png", transparency=index)
    clear = np.array(image) == index
    found = read_picture(tmp_path / "clear.png")
    assert (found[clear] == 255).all()
    np.testing.assert_array_equal(found[~clear], expected[~clear])


def test_photos_are_turned_upright(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of what is stored is the photo's right side
    Image.fromarray(RGB).save(path, exif=exif)
    np.testing.assert_array_equal(read_picture(path), np.rot90(RGB, -1))


def test_of_several_frames_the_first(tmp_path):
    frames = [Image.fromarray(np.full((5, 6), value, np.uint8)) for value in (200, 10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "a.gif") == 200).all()


@pytest.mark.parametrize(
    "picture, error, message",
    [
        (3, TypeError, "path, a PIL image or a numpy array, got int"),
        (RGB.astype(np.int64), TypeError, "got int64"),
        (RGB.astype(np.float32), ValueError, "divide 8-bit values by 255"),
        (np.full((3, 3), np.nan), ValueError, "from 0 to 1"),
        (np.zeros((3, 0, 3), np.uint8), ValueError, r"got \[3, 0, 3\]"),
        (np.zeros((3, 5, 5), np.uint8), ValueError, r"expected \[H, W\]"),
        ("nowhere/a.png", FileNotFoundError, "nowhere"),
    ],
)
def test_what_is_no_picture(picture, error, message):
    with pytest.raises(error, match=message):
        read_picture(picture)


def test_damaged_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    for name, content in (
        ("text.jpg", b"no picture"),
        ("empty.png", b""),
        ("cut.png", whole.read_bytes()[:4000]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_picture(tmp_path / name)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 90)
    Image.fromarray(RGB).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.png.*million pixels, got 7×13"):
        read_picture(tmp_path / "large.png")


def test_an_overlay_colours_the_mask_and_its_border():
    grey = np.full((20, 30, 3), 100, np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:25] = True
    mask[0, 0] = True
    result = np.array(overlay(grey, mask, "#FF0000", 0.5))
    assert (result[~mask] == 100).all()
    assert result[10, 15].tolist() == [178, 50, 50]
    assert result[5, 12].tolist() == result[0, 0].tolist() == [255, 0, 0]
    everything = np.array(overlay(grey, np.ones_like(mask)))
    assert len(np.unique(everything.reshape(-1, 3), axis=0)) == 1  # no border at the edge


SIZE = (9, 12)
MASK = np.zeros(SIZE, dtype=bool)
MASK[2:5, 3:9] = True


def voc(ids: np.ndarray) -> Image.Image:
    """A mask of class ids with Pascal VOC's palette."""
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [224, 224, 192] * 252)
    return image


def turned(image: Image.Image, path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK.astype(np.uint8),
        MASK.astype(np.uint8) * 255,
        MASK.astype(np.int64) * 7,
        MASK.astype(np.uint16) * 40000,
        MASK * 0.9,
        MASK[..., None],
        np.dstack([MASK * np.uint8(255)] * 3),
        np.dstack([np.full((*SIZE, 3), 9, np.uint8), MASK * np.uint8(255)]),
        Image.fromarray(MASK),
        Image.fromarray(MASK * np.uint8(255)),
        Image.fromarray(MASK * np.uint8(1)),
        voc(np.where(MASK, 2, 0)),
        voc(np.where(MASK, 255, 0)),
        (3, 2, 9, 5),
        np.array([3, 2, 9, 5]),
        [(3, 2), (9, 2), (9, 5), (3, 5)],
        [(3, 2), (3, 5), (9, 5), (9, 2), (3, 2)],
        (2.6, 1.9, 9.4, 5.2),
    ],
)
def test_one_mask_in_every_form(mask, tmp_path):
    np.testing.assert_array_equal(read_mask(mask, SIZE), MASK)
    if isinstance(mask, Image.Image):
        mask.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask(str(tmp_path / "mask.png"), SIZE), MASK)


def test_soft_edges_are_cut_at_half():
    soft = np.where(MASK, 255, 0).astype(np.uint8)
    soft[2], soft[4] = np.where(MASK[2], 130, 20), np.where(MASK[4], 110, 0)
    expected = MASK.copy()
    expected[4] = False
    np.testing.assert_array_equal(read_mask(soft, SIZE), expected)
    palette = Image.fromarray(soft).quantize(8)
    np.testing.assert_array_equal(read_mask(palette, SIZE), expected)


def test_the_border_that_voc_ignores_is_background():
    ids = np.where(MASK, 3, 0)
    ids[1] = 255
    np.testing.assert_array_equal(read_mask(voc(ids), SIZE), MASK)


def test_a_black_and_white_palette_the_other_way_round():
    image = Image.fromarray(np.where(MASK, 0, 1).astype(np.uint8), mode="P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(read_mask(image, SIZE), MASK)


def test_a_polygon_by_the_even_odd_rule():
    """A triangle, and a square with a square hole that one line leads to and back."""
    y, x = np.mgrid[:9, :12] + 0.5
    np.testing.assert_array_equal(read_mask([(0, 0), (9, 9), (0, 9)], SIZE), x < y)
    ring = [(1, 1), (8, 1), (8, 8), (1, 8), (1, 1), (3, 3), (3, 6), (6, 6), (6, 3), (3, 3)]
    expected = np.zeros(SIZE, bool)
    expected[1:8, 1:8] = True
    expected[3:6, 3:6] = False
    np.testing.assert_array_equal(read_mask(ring, SIZE), expected)


def test_a_mask_lies_on_the_upright_picture(tmp_path):
    """A file of a mask that is stored turned is turned, as its picture is."""
    stored = Image.fromarray(np.rot90(MASK * np.uint8(255)))
    np.testing.assert_array_equal(read_mask(turned(stored, tmp_path / "m.png"), SIZE), MASK)
    with pytest.raises(ValueError, match="expected 9×12.*got 12×9: one of them is turned"):
        read_mask(stored, SIZE)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (np.zeros(SIZE, bool), ValueError, "empty mask"),
        (np.ones((5, 5), bool), ValueError, "expected 9×12 pixels.*got 5×5: a mask has the size"),
        (np.ones((1, *SIZE, 1)), ValueError, r"got \[1, 9, 12, 1\]"),
        (np.where(MASK, 3, 1), ValueError, "values 1, 3; of a mask of class ids take one class"),
        (voc(np.where(MASK, 3, 1)), ValueError, "values 1, 3"),
        (voc(np.where(MASK, 3, 1)).convert("RGB"), ValueError, "expected one object"),
        (-1 * MASK.astype(int) + np.eye(*SIZE, dtype=int), ValueError, "expected one object"),
        (MASK * 1j, TypeError, "got complex128"),
        (MASK * 255.0, ValueError, "divide 8-bit values by 255"),
        ((3, 2, 3, 5), ValueError, "x0 < x1"),
        ((3, 2, 13, 5), ValueError, r"x from 0 to 12 and y from 0 to 9 \(pixels\), got \(13, 5\)"),
        ([(0, 0), (5, -1), (5, 5)], ValueError, r"polygon reaches outside.*got \(5, -1\)"),
        ([(0, 0), (5, float("nan")), (5, 5)], ValueError, "polygon reaches outside"),
        ([(2.1, 2.1), (2.2, 2.1), (2.2, 2.2)], ValueError, "empty mask"),
        ((0.2, 0.3, 0.8, 0.9), ValueError, "box are from 0 to 1: shares.*its width, 12.*height, 9"),
        ((0, 0, 1, 1), ValueError, "from 0 to 1: shares of the picture"),
        (np.array([0.5, 0.5, 0.2, 0.2]), ValueError, "YOLO's x and y are the center"),
        ([(0.1, 0.1), (0.9, 0.1), (0.9, 0.9)], ValueError, "polygon are from 0 to 1: shares"),
        ((6, 5, 4, 3), ValueError, r"width and height as in COCO\? give \(6, 5, 10, 8\)"),
        ((3, 5, 4, 2), ValueError, r"as in COCO\? give \(3, 5, 7, 7\)"),
        ((9, 8, 4, 3), ValueError, "x0 < x1 and y0 < y1, got"),
        ((20, 30, 40, 50), ValueError, r"box reaches outside of its picture.*got \(20, 30\)"),
        ((2, 3, 9, 12), ValueError, r"reaches outside.*are these \(y, x\)\? expected x first"),
        ([(1, 1), (1, 11), (8, 11)], ValueError, r"polygon reaches outside.*are these \(y, x\)"),
        ([(0, 0), (5, 5)], TypeError, "at least three points"),
        ([(0, 0), (5,), (5, 5)], TypeError, "polygon"),
        ([], TypeError, "polygon"),
        (None, TypeError, "got None"),
        ("nowhere/mask.png", FileNotFoundError, "nowhere"),
    ],
)
def test_what_is_no_mask(mask, error, message):
    with pytest.raises(error, match=message):
        read_mask(mask, SIZE)
