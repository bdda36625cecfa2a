from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fss.segment.masks import read_mask

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
        ([(0.1, 0.1), (0.2, 0.1), (0.2, 0.2)], ValueError, "empty mask"),
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
