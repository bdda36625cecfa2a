"""The embedded data set: textured objects over cluttered backgrounds, rendered from a seed.

A class has a silhouette and, mostly, a kind of texture; colors, texture scale, pose and light are
random for each object. Twenty classes serve few-shot learning in four folds of five.
Twenty others, `PRETRAINING_CLASSES`, train the shipped backbone, so it never saw a few-shot class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fss.config.checks import check_at_least
from fss.data.shapes import silhouettes, textures
from fss.data.shapes.silhouettes import Parts, Silhouette
from fss.data.shapes.textures import TEXTURES, Texture

Rng = np.random.Generator
Image = NDArray[np.uint8]


class ShapeClass(NamedTuple):
    """A class: its outline and the texture that most of its objects have."""

    silhouette: Silhouette
    texture: Texture

    @property
    def name(self) -> str:
        return self.silhouette.__name__.replace("_", "-")


FEW_SHOT_CLASSES = (
    ShapeClass(silhouettes.star, textures.stripes),
    ShapeClass(silhouettes.gear, textures.grain),
    ShapeClass(silhouettes.arrow, textures.dots),
    ShapeClass(silhouettes.crescent, textures.patches),
    ShapeClass(silhouettes.key, textures.checks),
    ShapeClass(silhouettes.cross, textures.waves),
    ShapeClass(silhouettes.leaf, textures.mesh),
    ShapeClass(silhouettes.ring, textures.gradient),
    ShapeClass(silhouettes.heart, textures.bricks),
    ShapeClass(silhouettes.bolt, textures.clouds),
    ShapeClass(silhouettes.house, textures.rings),
    ShapeClass(silhouettes.fish, textures.checks),
    ShapeClass(silhouettes.letter_e, textures.stripes),
    ShapeClass(silhouettes.bottle, textures.patches),
    ShapeClass(silhouettes.hourglass, textures.grain),
    ShapeClass(silhouettes.umbrella, textures.gradient),
    ShapeClass(silhouettes.flower, textures.dots),
    ShapeClass(silhouettes.letter_h, textures.bricks),
    ShapeClass(silhouettes.mug, textures.waves),
    ShapeClass(silhouettes.tree, textures.mesh),
)

PRETRAINING_CLASSES = (
    ShapeClass(silhouettes.triangle, textures.dots),
    ShapeClass(silhouettes.square, textures.clouds),
    ShapeClass(silhouettes.hexagon, textures.waves),
    ShapeClass(silhouettes.disc, textures.stripes),
    ShapeClass(silhouettes.pill, textures.bricks),
    ShapeClass(silhouettes.letter_t, textures.patches),
    ShapeClass(silhouettes.letter_l, textures.checks),
    ShapeClass(silhouettes.letter_z, textures.gradient),
    ShapeClass(silhouettes.letter_u, textures.mesh),
    ShapeClass(silhouettes.half_disc, textures.grain),
    ShapeClass(silhouettes.drop, textures.rings),
    ShapeClass(silhouettes.kite, textures.patches),
    ShapeClass(silhouettes.comb, textures.stripes),
    ShapeClass(silhouettes.stairs, textures.dots),
    ShapeClass(silhouettes.pie, textures.checks),
    ShapeClass(silhouettes.frame, textures.waves),
    ShapeClass(silhouettes.crown, textures.gradient),
    ShapeClass(silhouettes.mushroom, textures.mesh),
    ShapeClass(silhouettes.chevron, textures.grain),
    ShapeClass(silhouettes.dumbbell, textures.bricks),
)

_TYPICAL_TEXTURE = 0.85  # share of the objects with the texture of their class

# Streams of random numbers of one image: where things are, and how they look.
_LAYOUT, _APPEARANCE = 0, 1


class Placed(NamedTuple):
    """An object in the image: its class id (0: clutter), its radius and its parts in pixels."""

    class_id: int
    radius: float
    parts: Parts


class ShapesSource:
    """Rendered images; image i is a pure function of (seed, i).

    Args:
        size: side of the square images, pixels.
        seed: from 0.
        train: number of training images.
        test: number of test images, other than the training images.
        classes: the classes, with ids from 1; four folds when their number is a multiple of 4,
            else none.
        objects: fewest and most objects per image.
        radius: smallest and largest radius of an object, as a share of the size.
        clutter: most shapes of no class per image.

    Raises:
        ValueError: a size below 32, no images, a negative number, or a bad range.
    """

    def __init__(
        self,
        size: int = 161,
        seed: int = 0,
        train: int = 2000,
        test: int = 1000,
        classes: Sequence[ShapeClass] = FEW_SHOT_CLASSES,
        objects: tuple[int, int] = (2, 4),
        radius: tuple[float, float] = (0.14, 0.3),
        clutter: int = 3,
    ) -> None:
        for name, value, lowest in (
            ("size", size, 32),
            ("seed", seed, 0),
            ("train", train, 1),
            ("test", test, 1),
            ("clutter", clutter, 0),
        ):
            check_at_least(name, value, lowest)
        if not classes:
            raise ValueError("classes: expected at least one class, got none")
        if not 1 <= objects[0] <= objects[1]:
            raise ValueError(f"objects: expected 1 or more, fewest first; got {objects}")
        if not 0 < radius[0] <= radius[1]:
            raise ValueError(f"radius: expected shares above 0, smallest first; got {radius}")
        self.image_size, self.seed = size, seed
        self.objects, self.radius, self.clutter = objects, radius, clutter
        self.classes = tuple(classes)
        self.class_names = {c: shape.name for c, shape in enumerate(self.classes, start=1)}
        ids, part = list(self.class_names), len(self.classes) // 4
        self.folds = (
            () if len(ids) % 4 else tuple(tuple(ids[k * part : (k + 1) * part]) for k in range(4))
        )
        self._counts = {"train": train, "test": test}
        self._areas: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def name(self, index: int) -> str:
        return f"shapes-{index:05d}"

    def size(self, index: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    def indices(self, split: Literal["train", "test"]) -> list[int]:
        train = self._counts["train"]
        return list(range(train)) if split == "train" else list(range(train, len(self)))

    def class_areas(self, index: int) -> dict[int, int]:
        if index not in self._areas:
            mask = self._mask(self._layout(index))
            ids, areas = np.unique(mask[mask > 0], return_counts=True)
            self._areas[index] = dict(zip(ids.tolist(), areas.tolist(), strict=True))
        return self._areas[index]

    def load(self, index: int) -> tuple[Image, Image]:
        placed, rng = self._layout(index), self._rng(_APPEARANCE, index)
        canvas = _background(rng, self.image_size)
        for item in placed:
            texture = TEXTURES[rng.integers(len(TEXTURES))]
            if item.class_id and rng.random() < _TYPICAL_TEXTURE:
                texture = self.classes[item.class_id - 1].texture
            _paint(rng, canvas, item, texture)
        return _expose(rng, canvas), self._mask(placed)

    def _layout(self, index: int) -> list[Placed]:
        """Place clutter first, then the objects, from the back to the front."""
        if not 0 <= index < len(self):
            raise IndexError(f"image: expected 0 to {len(self) - 1}, got {index}")
        rng = self._rng(_LAYOUT, index)
        blobs = int(rng.integers(min(self.clutter, 1), self.clutter + 1))
        placed = [
            self._place(rng, 0, silhouettes.blob(rng), rng.uniform(-0.1, 1.1, 2))
            for _ in range(blobs)
        ]
        for center in _centers(rng, int(rng.integers(self.objects[0], self.objects[1] + 1))):
            class_id = int(rng.integers(len(self.classes))) + 1
            outline = self.classes[class_id - 1].silhouette(rng)
            placed.append(self._place(rng, class_id, outline, center))
        return placed

    def _place(
        self, rng: Rng, class_id: int, outline: Parts, center: NDArray[np.float64]
    ) -> Placed:
        """Turn, stretch and tilt an outline and move it to `center` of the unit square."""
        radius = rng.uniform(*self.radius) * self.image_size
        angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.25)
        tilt = rng.uniform(-0.25, 0.25, 2)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        linear = np.diag([stretch, 1 / stretch]) @ rotation * radius
        parts = [
            ((points / (1 + points @ tilt)[:, None]) @ linear + center * self.image_size, filled)
            for points, filled in outline
        ]
        return Placed(class_id, radius, parts)

    def _mask(self, placed: list[Placed]) -> Image:
        mask = np.zeros((self.image_size, self.image_size), dtype=np.uint8)
        for item in placed:
            if item.class_id:
                mask[_coverage(item.parts, mask.shape) > 127] = item.class_id
        return mask

    def _rng(self, stream: int, index: int) -> Rng:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, index)))


def _centers(rng: Rng, count: int) -> NDArray[np.float64]:
    """Sample centers [count, 2] in the unit square: the most spread of eight random sets."""
    sets = rng.uniform(0.18, 0.82, (8, count, 2))
    gaps = np.linalg.norm(sets[:, :, None] - sets[:, None], axis=-1) + 2 * np.eye(count)
    return sets[gaps.min(axis=(1, 2)).argmax()]


def _coverage(parts: Parts, shape: tuple[int, ...]) -> Image:
    """Return how much of each pixel the object covers, 0 to 255."""
    alpha = np.zeros(shape[:2], dtype=np.uint8)
    for points, filled in parts:
        fixed = np.round(points * 16).astype(np.int32)
        cv2.fillPoly(alpha, [fixed], 255 if filled else 0, cv2.LINE_AA, shift=4)
    return alpha


def _colors(rng: Rng) -> NDArray[np.float32]:
    """Sample two colors [2, 3] that differ enough to show a texture."""
    first, second = rng.uniform(20, 235, (2, 3))
    contrast = second - first
    length = max(float(np.linalg.norm(contrast)), 1.0)
    second = first + contrast * max(1.0, 90 / length)
    return np.stack([first, second]).astype(np.float32)


def _fill(
    rng: Rng, texture: Texture, height: int, width: int, period: float
) -> NDArray[np.float32]:
    first, second = _colors(rng)
    blend = np.stack([second - first, first], axis=1)
    return cv2.transform(texture(rng, height, width, period), blend)


def _paint(rng: Rng, canvas: NDArray[np.float32], placed: Placed, texture: Texture) -> None:
    """Blend a textured and shaded object into the canvas."""
    size = canvas.shape[0]
    corners = np.concatenate([points for points, _ in placed.parts])
    left, top = np.clip(np.floor(corners.min(0)).astype(int) - 1, 0, size)
    right, bottom = np.clip(np.ceil(corners.max(0)).astype(int) + 2, 0, size)
    if right <= left or bottom <= top:
        return
    window = np.s_[top:bottom, left:right]
    height, width = bottom - top, right - left
    parts = [(points - [left, top], filled) for points, filled in placed.parts]
    alpha = _coverage(parts, (height, width))[..., None] / np.float32(255)
    pixels = _fill(rng, texture, height, width, rng.uniform(0.25, 0.45) * placed.radius)
    light = rng.uniform(0, 0.5) * (textures.gradient(rng, height, width, 1.0) - 0.5) + 1
    canvas[window] += alpha * (pixels * light[..., None] - canvas[window])


def _background(rng: Rng, size: int) -> NDArray[np.float32]:
    """Paint a texture with large repeats, clouds and scribbles."""
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    canvas = _fill(rng, texture, size, size, rng.uniform(0.06, 0.3) * size)
    share = rng.uniform(0.4, 0.9)
    canvas += share * (_fill(rng, textures.clouds, size, size, 0.3 * size) - canvas)
    for _ in range(rng.integers(2, 7)):
        color = rng.uniform(0, 255, 3).tolist()
        thickness = int(rng.integers(1, max(2, size // 40) + 1))
        if rng.random() < 0.5:
            points = rng.uniform(0, size, (int(rng.integers(2, 5)), 2)).astype(np.int32)
            cv2.polylines(canvas, [points], rng.random() < 0.3, color, thickness)
        else:
            center, axes = rng.integers(0, size, 2).tolist(), rng.integers(2, size // 4, 2).tolist()
            cv2.ellipse(canvas, center, axes, rng.uniform(0, 180), 0, rng.uniform(90, 360), color,
                        thickness)  # fmt: skip
    return canvas


def _expose(rng: Rng, canvas: NDArray[np.float32]) -> Image:
    """Change contrast and brightness, sometimes blur, and add sensor noise."""
    canvas = (canvas - 128) * rng.uniform(0.7, 1.1) + 128 + rng.uniform(-25, 25)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (3, 3), 0)
    canvas += rng.uniform(6, 30) * (rng.random(canvas.shape, dtype=np.float32) - 0.5)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
