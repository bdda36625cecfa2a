from __future__ import annotations

import json
import pickle
import time

import numpy as np
import pytest

from fss.data import ShapesSource, Source
from fss.data.shapes import FEW_SHOT_CLASSES, PRETRAINING_CLASSES
from fss.data.shapes.silhouettes import blob
from fss.data.shapes.textures import TEXTURES


@pytest.fixture(scope="module")
def source() -> ShapesSource:
    return ShapesSource(size=97, seed=3, train=30, test=20)


def test_is_a_source(source):
    assert isinstance(source, Source)
    assert len(source) == 50
    assert source.indices("train") == list(range(30))
    assert source.indices("test") == list(range(30, 50))
    assert source.size(7) == (97, 97)
    assert source.name(7) == "shapes-00007"


def test_classes_and_folds(source):
    assert list(source.class_names) == list(range(1, 21))
    assert len(set(source.class_names.values())) == 20
    assert source.folds == tuple(tuple(range(5 * k + 1, 5 * k + 6)) for k in range(4))


def test_pretraining_never_sees_a_few_shot_class():
    few_shot = {shape.silhouette for shape in FEW_SHOT_CLASSES}
    pretraining = {shape.silhouette for shape in PRETRAINING_CLASSES}
    assert len(few_shot) == len(FEW_SHOT_CLASSES) == 20
    assert len(pretraining) == len(PRETRAINING_CLASSES) >= 12
    assert not few_shot & pretraining


def test_a_fold_mixes_textures(source):
    for fold in source.folds:
        kinds = {FEW_SHOT_CLASSES[class_id - 1].texture for class_id in fold}
        assert len(kinds) >= 4


def test_image_is_a_function_of_seed_and_index(source):
    image, mask = source.load(4)
    again = ShapesSource(size=97, seed=3, train=30, test=20)
    again.load(9)
    for copy in (again, pickle.loads(pickle.dumps(source))):
        other, other_mask = copy.load(4)
        assert np.array_equal(image, other) and np.array_equal(mask, other_mask)
    assert not np.array_equal(image, source.load(5)[0])
    assert not np.array_equal(image, ShapesSource(size=97, seed=4).load(4)[0])


def test_more_images_do_not_change_the_first():
    small, large = ShapesSource(train=5, test=5), ShapesSource(train=50, test=5)
    assert np.array_equal(small.load(7)[0], large.load(7)[0])


def test_image_and_mask(source):
    shown = set()
    for i in range(30):
        image, mask = source.load(i)
        assert image.shape == (97, 97, 3) and image.dtype == np.uint8
        assert mask.shape == (97, 97) and mask.dtype == np.uint8
        assert mask.max() <= 20
        assert image.std() > 10
        ids, areas = np.unique(mask[mask > 0], return_counts=True)
        assert source.class_areas(i) == dict(zip(ids.tolist(), areas.tolist()))
        assert 1 <= len(ids) <= 4
        shown |= set(ids.tolist())
    assert len(shown) > 15


def test_colour_does_not_tell_the_class():
    """The mean colors of a class's objects spread as widely as those of all objects."""
    source = ShapesSource(size=65, train=400, test=1)
    colors = {class_id: [] for class_id in source.class_names}
    for i in range(400):
        image, mask = source.load(i)
        for class_id in source.class_areas(i):
            colors[class_id].append(image[mask == class_id].mean(0))
    everything = np.concatenate([np.array(values) for values in colors.values()])
    within = np.mean([np.var(values, axis=0).mean() for values in colors.values()])
    assert within > 0.9 * everything.var(axis=0).mean()


@pytest.mark.parametrize(
    "silhouette",
    [blob, *(shape.silhouette for shape in (*FEW_SHOT_CLASSES, *PRETRAINING_CLASSES))],
    ids=lambda silhouette: silhouette.__name__,
)
def test_silhouette_fits_its_square(silhouette):
    rng = np.random.default_rng(0)
    draws = [silhouette(rng) for _ in range(20)]
    for parts in draws:
        outline = np.concatenate([points for points, filled in parts if filled])
        assert np.abs(outline).max() <= 1.35
        assert np.ptp(outline, axis=0).max() >= 1.0
    first, second = (np.concatenate([points for points, _ in parts]) for parts in draws[:2])
    assert first.shape != second.shape or not np.array_equal(first, second)


@pytest.mark.parametrize("texture", TEXTURES, ids=lambda texture: texture.__name__)
@pytest.mark.parametrize("shape", [(97, 61), (1, 1), (2, 40)])
def test_texture_is_a_blend(texture, shape):
    field = texture(np.random.default_rng(0), *shape, 9.0)
    assert field.shape == shape and field.dtype == np.float32
    assert field.min() >= 0 and field.max() <= 1
    if shape == (97, 61):
        assert field.std() > 0.1


def test_objects_radius_and_clutter():
    single = ShapesSource(
        97, train=20, test=1, classes=PRETRAINING_CLASSES, objects=(1, 1), radius=(0.4, 0.4),
        clutter=0,
    )  # fmt: skip
    assert all(len(single.class_areas(i)) == 1 for i in range(20))
    areas = [sum(single.class_areas(i).values()) for i in range(20)]
    assert np.mean(areas) > 0.1 * 97 * 97


def test_rendering_takes_milliseconds():
    """5 ms on a free core; the bound only catches a rendering that got slower by far."""
    source = ShapesSource()
    source.load(0)
    start = time.process_time()
    for i in range(1, 21):
        source.load(i)
    assert (time.process_time() - start) / 20 < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16}, "size: expected a number from 32 on, got 16"),
        ({"seed": -1}, "seed: .*got -1"),
        ({"train": 0}, "train: expected a number from 1 on, got 0"),
        ({"classes": ()}, "at least one class"),
        ({"objects": (3, 2)}, r"fewest first; got \(3, 2\)"),
        ({"radius": (0.3, 0.1)}, r"smallest first; got \(0.3, 0.1\)"),
        ({"clutter": -1}, "clutter: .*got -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesSource(**options)


def test_image_out_of_range(source):
    with pytest.raises(IndexError, match="0 to 49, got 50"):
        source.load(50)


def test_embedded_weights_are_shipped_with_their_origin(root):
    safetensors = pytest.importorskip("safetensors")
    path = root / "fss/weights/shapes_resnet18.safetensors"
    assert path.stat().st_size <= 4 * 2**20
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        names = list(file.keys())
    assert "pretrain --out" in metadata["command"]
    assert json.loads(metadata["classes"]) == [shape.name for shape in PRETRAINING_CLASSES]
    assert not any(name.startswith(("fc.", "last.", "middle.")) for name in names)
    assert "layer4.1.bn2.running_var" in names
