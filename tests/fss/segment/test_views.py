from __future__ import annotations

import numpy as np
import pytest
import torch

from fss.data import EvalTransform, SquareTransform
from fss.segment import views as views_module
from fss.segment.views import Scene, SupportViews, surely_background

SIZE = 49


def corner_of(size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[-side:, -side:] = 1
    return image, mask


@pytest.mark.parametrize("make", [EvalTransform, SquareTransform])
@pytest.mark.parametrize("size, side", [((400, 300), 1), ((48, 48), 5), ((20, 90), 19)])
def test_views_show_object_and_background(make, size, side):
    """Also of an object of a pixel in a corner, and of a picture that is almost all object."""
    views = SupportViews([corner_of(size, side)], make(65), SIZE)
    for images, masks, episodes in [views.sample() for _ in range(8)] + [views.held_out()]:
        assert images.shape == (4, 3, SIZE, SIZE) and masks.shape == (4, SIZE, SIZE)
        assert masks.unique().tolist() in ([0, 1], [0, 1, 255])
        assert (masks == 1).flatten(1).any(1).all() and (masks == 0).flatten(1).any(1).all()
        assert episodes == ((0, (1,)), (1, (2,)), (2, (3,)), (3, (0,)))


@pytest.mark.parametrize("make", [EvalTransform, SquareTransform])
def test_views_are_as_large_as_the_network_sees_pictures(make):
    """A circle of a quarter of the side has an eighth of a picture's 257 pixels as its radius."""
    y, x = np.mgrid[:400, :400]
    mask = ((y - 200) ** 2 + (x - 200) ** 2 < 50**2).astype(np.uint8)
    image = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    for count, most in ((1, 2.0), (2, 2**0.5)):
        views = SupportViews([(image, mask)] * count, make(257), 129)
        found = [views.sample().masks for _ in range(6)] + [views.held_out().masks]
        areas = (torch.cat(found) == 1).sum((1, 2)) / (np.pi * (257 / 8) ** 2)
        assert areas.max() < 1.1 * most**2 and areas.min() > 0.9 / most**2
        assert areas.max() > 1.3 and areas.min() < 0.8


@pytest.mark.parametrize("make", [EvalTransform, SquareTransform])
def test_a_pixel_of_background_is_not_lost(make):
    """Nor one of the object: scaling takes every twentieth pixel."""
    for value in (0, 1):
        image, mask = corner_of((1000, 1000), 0)
        mask[:] = 1 - value
        mask[501, 501] = value
        views = SupportViews([(image, mask)], make(65), SIZE)
        for _, masks, _ in (views.sample(), views.held_out()):
            assert (masks == 0).flatten(1).any(1).all() and (masks == 1).flatten(1).any(1).all()


@pytest.mark.parametrize("make", [EvalTransform, SquareTransform])
@pytest.mark.parametrize("share", [0.8, 0.95, 0.9999])
def test_no_view_of_a_large_object_is_measured_and_trained_on(make, share):
    """Few crops of it show background: then it is the whole picture, each time in another way."""
    noise = np.random.default_rng(0)
    side = round(200 * share**0.5)
    examples = []
    for _ in range(3):
        mask = np.zeros((200, 200), np.uint8)
        mask[:side, :side] = 1
        mask[-1, -1] = 0
        examples.append((noise.integers(0, 255, (200, 200, 3), np.uint8), mask))
    views = SupportViews(examples, make(129), SIZE)
    trained = [image for each in views._pool for image, _ in each]
    seen = {image.numpy().tobytes() for image in trained}
    assert len(seen) == len(trained) == 15
    held_out = views.held_out()
    assert not [image for image in held_out.images if image.numpy().tobytes() in seen]
    for value in (0, 1):
        assert (held_out.masks == value).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "supports: expected at least one, got none"),
        ([corner_of((20, 20), 20)], "support mask: expected some background"),
        (
            [corner_of((20, 20), 5), (corner_of((20, 20), 5)[0], np.zeros((20, 20), np.uint8))],
            "support mask 2: expected a pixel of the object",
        ),
    ],
)
def test_supports_without_object_or_background(examples, message):
    with pytest.raises(ValueError, match=message):
        SupportViews(examples, EvalTransform(65), SIZE)


def test_large_photos_are_scaled_once(monkeypatch):
    """Not a photo whose object would be lost."""
    sizes = []
    warped = views_module._warped
    monkeypatch.setattr(
        "fss.segment.views._warped",
        lambda pixels, mask, *more: sizes.append(mask.shape) or warped(pixels, mask, *more),
    )
    image, mask = corner_of((1600, 1200), 500)
    scene = Scene(image[:, :400], mask[:, :400] == 0)
    SupportViews([(image, mask)], EvalTransform(65), SIZE, scenes=[scene])
    assert set(sizes) == {(130, 98), (130, 32)}
    sizes.clear()
    SupportViews([corner_of((1600, 1200), 1)], EvalTransform(65), SIZE)
    assert set(sizes) == {(1600, 1200)}


def colors_of(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Makes supports with a square each, every one in a color of its own."""
    mask = np.zeros((40, 40), np.uint8)
    mask[10:25, 12:30] = 1
    values = range(20, 240, 220 // count)
    return [(np.full((40, 40, 3), value, np.uint8), mask) for value in values[:count]]


def numbers_of(views) -> list[float]:
    """Returns the color of each view."""
    return [round(float(i[0][m != 255].mean()), 3) for i, m in zip(views.images, views.masks)]


def test_each_support_is_the_query_of_all_others(monkeypatch):
    monkeypatch.setattr("fss.segment.views._recolored", lambda pixels, strength, rng: pixels)
    views = SupportViews(colors_of(3), EvalTransform(SIZE), SIZE)
    for each in [views.sample() for _ in range(9)] + [views.held_out()]:
        numbers = numbers_of(each)
        assert len(set(numbers)) == 3 and [query for query, _ in each.episodes] == [0, 1, 2]
        assert [supports for _, supports in each.episodes] == [(1, 2), (0, 2), (0, 1)]
    # of two supports two views each
    each = SupportViews(colors_of(2), EvalTransform(SIZE), SIZE).sample()
    numbers = numbers_of(each)
    assert len(numbers) == 4
    for query, supports in each.episodes:
        assert len(supports) == 2 and numbers[query] not in [numbers[s] for s in supports]
    # of many, some
    each = SupportViews(colors_of(9), EvalTransform(SIZE), SIZE).sample()
    assert len(each.images) == 5 == len(each.episodes)
    # of up to ten all are measured, of more as many
    for count in (9, 10, 11):
        each = SupportViews(colors_of(count), EvalTransform(SIZE), SIZE).held_out()
        assert len(set(numbers_of(each))) == min(count, 10) == len(each.episodes)


def test_episodes_that_are_computed_one_by_one():
    views = SupportViews(colors_of(3), EvalTransform(SIZE), SIZE, together=False)
    assert [len(supports) for _, supports in views.sample().episodes] == [2]
    assert [len(supports) for _, supports in views.held_out().episodes] == [2, 2, 2]
    assert len({views.sample().episodes for _ in range(20)}) > 3
    # a fixed number of supports is reached by repeating them
    views = SupportViews(colors_of(3), EvalTransform(SIZE), SIZE, 5, False)
    assert [len(supports) for _, supports in views.sample().episodes] == [5]
    views = SupportViews(colors_of(1), EvalTransform(SIZE), SIZE, 5, False)
    assert [len(supports) for _, supports in views.sample().episodes] == [1]


def normalized(value: int) -> torch.Tensor:
    image = np.full((SIZE, SIZE, 3), value, np.uint8)
    return EvalTransform(SIZE)(image, np.zeros((SIZE, SIZE), np.uint8)).image[:, 0, 0]


@pytest.mark.parametrize("make", [EvalTransform, SquareTransform])
@pytest.mark.parametrize("count", [1, 2])
def test_objects_are_pasted_into_pictures_without_a_mask(make, count, monkeypatch):
    """Objects are white, supports gray, scenes black, with a left half that may be the object."""
    monkeypatch.setattr("fss.segment.views._recolored", lambda pixels, strength, rng: pixels)
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 20:60] = 1
    image = np.where(mask[..., None] == 1, np.uint8(255), np.uint8(100)).repeat(3, 2)
    background = np.arange(90)[None] >= np.full(70, 45)[:, None]
    scene = Scene(np.zeros((70, 90, 3), np.uint8), background)
    views = SupportViews([(image, mask)] * count, make(SIZE), SIZE, scenes=[scene])
    white, gray, black = (normalized(value)[:, None] for value in (255, 100, 0))
    rounds = [views.sample() for _ in range(6)]
    own = 1 if count == 1 else 4
    for images, masks, episodes in [*rounds, views.held_out()]:
        held_out = len(images) == 6 and count == 1
        first = 4 if held_out else own
        assert len(images) == first + (3 if count == 1 and not held_out else 2)
        # with one support all queries of a step are such
        queries = [query for query, _ in episodes]
        assert queries == list(range(own if count == 1 and not held_out else 0, len(images)))
        for image_ in images[:first]:
            assert torch.isclose(image_, gray[..., None]).all(0).float().mean() > 0.1
        for image_, mask_ in zip(images[first:], masks[first:]):
            inside = image_[:, mask_ == 1]  # a blur and warping mix colors along the edge
            assert torch.isclose(inside, white, atol=0.5).all(0).float().mean() > 0.5
            outside = image_[:, mask_ == 0]
            assert torch.isclose(outside, black, atol=0.5).all(0).float().mean() > 0.8
            assert (mask_ == 255).any()
        for _, supports in episodes[first:] if own > 1 else episodes[-2:]:
            assert all(number < first for number in supports)
            assert len(supports) == (1 if count == 1 else 2)
    assert len({float(each.images.sum()) for each in rounds}) > 4


def test_what_is_surely_background():
    probability = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    mask = probability > 0.5
    found = surely_background(probability, mask)
    assert found.sum() == 7 and found.ravel()[:7].all()
    assert not surely_background(probability, np.ones((4, 5), bool)).any()
    np.testing.assert_array_equal(surely_background(np.zeros((4, 5)), mask), ~mask)  # all alike
