from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from fss.data import MEAN, STD, EvalTransform, SquareTransform, TrainTransform
from fss.data import transforms as transforms_module


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc_mask(height: int, width: int, radius: int = 12, centre: tuple[int, int] = (20, 20)):
    y, x = np.ogrid[:height, :width]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def still(size: int, **options) -> TrainTransform:
    return TrainTransform(size, **({"scale": (1.0, 1.0), "rotate": 0.0} | options))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((100, 100), (472, 472)),
        ((336, 222), (472, 312)),  # 222·473/336 = 312.5
        ((222, 336), (312, 472)),
        ((1000, 3), (472, 8)),  # never narrower than a cell of the network
        ((473, 473), (472, 472)),
    ],
)
def test_eval_size(shape, expected):
    sample = EvalTransform(473)(photo(*shape), np.zeros(shape, dtype=np.uint8))
    assert sample.size == expected
    assert sample.image.shape == (3, 473, 473)
    assert sample.mask.shape == (473, 473)
    assert sample.image.dtype == torch.float32
    assert sample.mask.dtype == torch.uint8


def test_eval_pastes_top_left_on_black():
    image, mask = photo(40, 30), disc_mask(40, 30, 8)
    sample = EvalTransform(81)(image, mask)
    height, width = sample.size
    assert (height, width) == (80, 56)
    pixels = cv2.resize(image.astype(np.float32), (width, height))
    expected = torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))
    torch.testing.assert_close(sample.image[:, :height, :width], expected, rtol=1e-4, atol=1e-4)
    black = torch.from_numpy(-MEAN / STD)[:, None]
    torch.testing.assert_close(sample.image[:, height:].flatten(1), black.expand(3, 81))
    torch.testing.assert_close(
        sample.image[:, :, width:].flatten(1), black.expand(3, 81 * (81 - width))
    )
    small = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(sample.mask[:height, :width], small)
    assert (sample.mask[height:] == 255).all() and (sample.mask[:, width:] == 255).all()


def test_square_is_a_plain_resize():
    image, mask = photo(40, 30), disc_mask(40, 30, 8)
    sample = SquareTransform(81)(image, mask)
    pixels = cv2.resize(image.astype(np.float32), (81, 81))
    expected = torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))
    torch.testing.assert_close(sample.image, expected, rtol=1e-4, atol=1e-4)
    small = cv2.resize(mask, (81, 81), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(sample.mask, small) and sample.size == (81, 81)


def test_padding_is_what_was_added_not_what_is_ignored():
    """Where no pixel of the photo is ignored, padding is what is ignored in its mask."""
    image, mask = photo(40, 30), np.zeros((40, 30), dtype=np.uint8)
    boundary = mask.copy()
    boundary[18:22] = 255
    transforms = (EvalTransform(81), SquareTransform(81), TrainTransform(49, (0.9, 1.1), 10.0))
    turned = 0
    for transform in transforms:
        for seed in range(12):
            plain, marked = (
                transform(image, each, np.random.default_rng(seed)) for each in (mask, boundary)
            )
            assert plain.padding.dtype == torch.bool
            assert torch.equal(plain.padding, plain.mask == 255)
            assert torch.equal(marked.padding, plain.padding)
            assert (marked.mask == 255).sum() > marked.padding.sum()
            rows = plain.padding.sum(1)
            turned += isinstance(transform, TrainTransform) and len(rows.unique()) > 2
    assert turned > 2  # a straight photo leaves bars only
    assert not SquareTransform(81)(image, boundary).padding.any()


def test_an_object_that_would_be_lost_is_not_turned():
    mask = np.zeros((50, 50), dtype=np.uint8)
    mask[0, 0] = 1  # in the corner, which turning cuts off
    transform = TrainTransform(50, (1.0, 1.0), 10.0)
    for seed in range(20):
        sample = transform(photo(50, 50), mask, np.random.default_rng(seed))
        assert (sample.mask == 1).any()
        assert torch.equal(sample.padding, sample.mask == 255)


def test_train_output_and_fill():
    image, mask = photo(20, 24), disc_mask(20, 24, 5, (10, 12))
    sample = still(41)(image, mask, np.random.default_rng(0))
    assert sample.size is None
    assert sample.image.shape == (3, 41, 41) and sample.image.dtype == torch.float32
    assert sample.mask.dtype == torch.uint8
    padding = sample.mask == 255
    assert padding.sum() == 41 * 41 - 20 * 24
    # The mean, which is 0 once normalised; one pixel inwards the blur mixes.
    torch.testing.assert_close(sample.image[:, 0], torch.zeros(3, 41), atol=1e-5, rtol=0)
    assert sample.mask[10:30, 8:32].eq(1).sum() == mask.sum()


def test_train_rotation_fills_mean_and_ignore():
    transform = TrainTransform(65, scale=(1.0, 1.0), rotate=10.0)
    image = np.full((65, 65, 3), 255, dtype=np.uint8)
    mask = np.zeros((65, 65), dtype=np.uint8)
    ignored = [
        int((transform(image, mask, np.random.default_rng(seed)).mask == 255).sum())
        for seed in range(40)
    ]
    turned = sum(count > 0 for count in ignored)
    assert 10 <= turned <= 30  # half of the images
    sample = next(
        sample
        for seed in range(40)
        if ((sample := transform(image, mask, np.random.default_rng(seed))).mask == 255).sum() > 150
    )
    assert (sample.image[:, sample.mask == 255].abs() < 0.5).float().mean() > 0.5
    assert sample.image[:, sample.mask == 0].median() > 2


def test_flip_and_blur_apply_to_half():
    image, mask = photo(33, 33), np.zeros((33, 33), dtype=np.uint8)
    mask[:, :5] = 1
    plain = (image / np.float32(255) - MEAN) / STD
    flipped, sharp = 0, 0
    for seed in range(60):
        sample = still(33)(image, mask, np.random.default_rng(seed))
        turned = bool(sample.mask[0, -1] == 1)
        flipped += turned
        expected = plain[:, ::-1] if turned else plain
        sharp += np.allclose(sample.image.numpy().transpose(1, 2, 0), expected, atol=1e-4)
    assert 15 <= flipped <= 45
    assert 15 <= sharp <= 45


@pytest.mark.parametrize("seed", range(30))
def test_image_and_mask_move_together(seed):
    mask = disc_mask(90, 110, 18, (40, 60))
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    sample = TrainTransform(65, scale=(0.8, 1.25))(image, mask, np.random.default_rng(seed))
    bright = sample.image.mean(0) > float(((0.5 - MEAN) / STD).mean())
    known = sample.mask != 255
    union = ((bright | (sample.mask == 1)) & known).sum()
    assert ((bright & (sample.mask == 1)) & known).sum() >= 0.85 * union


@pytest.mark.parametrize("seed", range(30))
def test_crop_never_loses_the_foreground(seed):
    """A small object in a photo of nine crops: 30 tries may miss it, the result may not."""
    mask = disc_mask(200, 200, 10, (30 + 4 * seed, 170 - 3 * seed))
    sample = still(65)(photo(200, 200), mask, np.random.default_rng(seed))
    assert (sample.mask == 1).any()


def test_crop_reaches_85_percent_where_it_can():
    """100 of 120 pixels: every fourth crop or so keeps a disc in the middle, 30 tries find one."""
    mask = disc_mask(120, 120, 40, (60, 60))
    for seed in range(20):
        sample = still(97)(photo(120, 120), mask, np.random.default_rng(seed))
        assert (sample.mask == 1).sum() >= 0.85 * mask.sum()


@pytest.mark.parametrize("seed", range(20))
def test_foreground_of_one_pixel_is_never_lost(seed):
    mask = np.zeros((300, 300), dtype=np.uint8)
    mask[11 * seed + 5, 290 - 9 * seed] = 1
    transform = TrainTransform(33, scale=(0.5, 0.6))
    sample = transform(photo(300, 300), mask, np.random.default_rng(seed))
    assert (sample.mask == 1).any()


def test_foreground_larger_than_the_crop(monkeypatch):
    tries = []
    count = np.count_nonzero
    monkeypatch.setattr(
        transforms_module.np, "count_nonzero", lambda array: tries.append(1) or count(array)
    )
    mask = np.ones((200, 200), dtype=np.uint8)
    sample = still(65)(photo(200, 200), mask, np.random.default_rng(0))
    assert (sample.mask == 1).all()
    assert len(tries) == 1 + 30  # bounded


@pytest.mark.parametrize("transform", [TrainTransform(33), EvalTransform(33)])
def test_same_generator_same_sample(transform):
    image, mask = photo(50, 40), disc_mask(50, 40)
    first, second = (transform(image, mask, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.mask, second.mask)


def test_inputs_stay_as_they_are():
    image, mask = photo(50, 40), disc_mask(50, 40)
    kept = image.copy(), mask.copy()
    TrainTransform(33)(image, mask, np.random.default_rng(0))
    EvalTransform(33)(image, mask)
    assert np.array_equal(image, kept[0]) and np.array_equal(mask, kept[1])


@pytest.mark.parametrize("transform", [TrainTransform(33), EvalTransform(33)])
@pytest.mark.parametrize(
    ("image", "mask", "error", "message"),
    [
        (photo(9, 9).astype(np.float32), np.zeros((9, 9), np.uint8), TypeError, "uint8, got float"),
        (photo(9, 9).tolist(), np.zeros((9, 9), np.uint8), TypeError, "image: .* got list"),
        (photo(9, 9), np.zeros((9, 9), np.int64), TypeError, "mask: .*uint16, got int64"),
        (
            photo(9, 9),
            np.zeros((9, 9, 1), np.uint8),
            ValueError,
            r"mask: .*\[H, W\], got \[9, 9, 1",
        ),
        (photo(9, 9), np.zeros((9, 8), np.uint8), ValueError, r"\[9, 9, 3\].*got \[9, 8\]"),
        (np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9), np.uint8), ValueError, r"\[9, 9, 4\]"),
        (photo(9, 0), np.zeros((9, 0), np.uint8), ValueError, r"image: .*got \[9, 0, 3\]"),
    ],
)
def test_bad_input(transform, image, mask, error, message):
    with pytest.raises(error, match=message):
        transform(image, mask, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainTransform(8), "size: expected a number from 9 on, got 8"),
        (lambda: EvalTransform(1), "got 1"),
        (lambda: TrainTransform(33, scale=(1.2, 0.8)), "smallest first"),
        (lambda: TrainTransform(33, rotate=-1), "0 to 180 degrees, got -1"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
