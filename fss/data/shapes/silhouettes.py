"""Outlines of the procedural objects, in a square of side 2 around the origin, y downwards.

A silhouette is a list of parts in drawing order: a polygon [N, 2] and whether it adds to the object
or cuts a hole. Each draw varies the proportions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Parts = list[tuple[Points, bool]]
Rng = np.random.Generator


def _polar(angles: Points, radii: Points | float) -> Points:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)


def _turn(count: int, start: float = -np.pi / 2) -> Points:
    return start + np.arange(count) * (2 * np.pi / count)


def _disc(x: float, y: float, radius: float, squash: float = 1.0) -> Points:
    return _polar(_turn(36), radius) * [1, squash] + [x, y]


def _arc(x: float, y: float, radius: float, start: float, end: float) -> Points:
    return _polar(np.linspace(start, end, 24), radius) + [x, y]


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _solid(*polygons: Points) -> Parts:
    return [(polygon, True) for polygon in polygons]


def _polygon(*points: tuple[float, float]) -> Parts:
    return _solid(np.array(points))


def star(rng: Rng) -> Parts:
    inner = rng.uniform(0.38, 0.5)
    return _solid(_polar(_turn(10), np.tile([1.0, inner], 5)))


def gear(rng: Rng) -> Parts:
    teeth, depth = int(rng.integers(8, 12)), rng.uniform(0.7, 0.78)
    angles = _turn(4 * teeth)
    wheel = _polar(angles, np.tile([1.0, 1.0, depth, depth], teeth))
    return [(wheel, True), (_disc(0, 0, rng.uniform(0.22, 0.34)), False)]


def arrow(rng: Rng) -> Parts:
    shaft, neck = rng.uniform(0.16, 0.26), rng.uniform(-0.05, 0.2)
    return _polygon(
        (-1, -shaft),
        (neck, -shaft),
        (neck, -0.65),
        (1, 0),
        (neck, 0.65),
        (neck, shaft),
        (-1, shaft),
    )


def crescent(rng: Rng) -> Parts:
    shift = rng.uniform(0.38, 0.5)
    return [(_disc(0, 0, 0.95), True), (_disc(shift, 0, rng.uniform(0.72, 0.8)), False)]


def key(rng: Rng) -> Parts:
    head, thin = rng.uniform(0.36, 0.44), rng.uniform(0.1, 0.14)
    return [
        (_disc(-0.58, 0, head), True),
        (_disc(-0.58, 0, head * 0.5), False),
        (_box(-0.25, -thin, 1, thin), True),
        (_box(0.45, 0, 0.62, 0.42), True),
        (_box(0.8, 0, 0.98, rng.uniform(0.34, 0.5)), True),
    ]


def cross(rng: Rng) -> Parts:
    arm = rng.uniform(0.24, 0.36)
    return _solid(_box(-1, -arm, 1, arm), _box(-arm, -1, arm, 1))


def leaf(rng: Rng) -> Parts:
    t = np.linspace(-1, 1, 24)
    width = rng.uniform(0.42, 0.56) * (1 - t**2) * (1 - 0.35 * t)
    blade = np.concatenate([np.stack([t, width], -1), np.stack([t, -width], -1)[::-1]])
    return _solid(blade * [0.8, 1] + [0.2, 0], _box(-1, -0.06, -0.4, 0.06))


def ring(rng: Rng) -> Parts:
    return [(_disc(0, 0, 0.95), True), (_disc(0, 0, rng.uniform(0.52, 0.66)), False)]


def heart(rng: Rng) -> Parts:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15
    return _solid(np.stack([x * rng.uniform(0.9, 1.05), y], -1))


def bolt(rng: Rng) -> Parts:
    waist = rng.uniform(0.06, 0.18)
    return _polygon(
        (0.3, -1), (-0.6, waist), (-0.08, waist), (-0.35, 1), (0.6, -waist), (0.1, -waist)
    )


def house(rng: Rng) -> Parts:
    eaves, wall = rng.uniform(-0.25, -0.1), rng.uniform(0.62, 0.75)
    return [
        (np.array([(0, -1), (1, eaves), (-1, eaves)], dtype=float), True),
        (_box(-wall, eaves - 0.02, wall, 0.9), True),
        (_box(-0.18, 0.35, 0.2, 0.95), False),
    ]


def fish(rng: Rng) -> Parts:
    tail = rng.uniform(0.45, 0.6)
    return [
        (_disc(0.25, 0, 0.72, rng.uniform(0.55, 0.68)), True),
        (np.array([(-0.3, 0), (-1, -tail), (-0.8, 0), (-1, tail)]), True),
        (_disc(0.62, -0.1, 0.08), False),
    ]


def letter_e(rng: Rng) -> Parts:
    bar, middle = rng.uniform(0.3, 0.38), rng.uniform(0.4, 0.65)
    return _solid(
        _box(-0.65, -0.95, -0.65 + bar + 0.05, 0.95),
        _box(-0.65, -0.95, 0.7, -0.95 + bar),
        _box(-0.65, -bar / 2, middle, bar / 2),
        _box(-0.65, 0.95 - bar, 0.7, 0.95),
    )


def bottle(rng: Rng) -> Parts:
    neck, shoulder = rng.uniform(0.13, 0.2), rng.uniform(-0.35, -0.15)
    body = rng.uniform(0.36, 0.46)
    return _polygon(
        (-neck, -1), (neck, -1), (neck, shoulder - 0.2), (body, shoulder + 0.1), (body, 1),
        (-body, 1), (-body, shoulder + 0.1), (-neck, shoulder - 0.2),
    )  # fmt: skip


def hourglass(rng: Rng) -> Parts:
    waist = rng.uniform(0.08, 0.18)
    return _polygon(
        (-0.75, -0.95), (0.75, -0.95), (0.7, -0.7), (waist, 0), (0.7, 0.7), (0.75, 0.95),
        (-0.75, 0.95), (-0.7, 0.7), (-waist, 0), (-0.7, -0.7),
    )  # fmt: skip


def umbrella(rng: Rng) -> Parts:
    thin, crook = rng.uniform(0.07, 0.1), rng.uniform(0.2, 0.26)
    dome = _arc(0, 0, 1, np.pi, 2 * np.pi)
    hook = np.concatenate(
        [
            _arc(-crook, 0.7, crook + thin, 0, np.pi),
            _arc(-crook, 0.7, crook - thin, np.pi, 0),
        ]
    )
    return [
        (dome, True),
        (_disc(-0.66, 0.02, 0.33, 0.45), False),
        (_disc(0, 0.02, 0.32, 0.45), False),
        (_disc(0.66, 0.02, 0.33, 0.45), False),
        (_box(-thin, -0.2, thin, 0.72), True),
        (hook, True),
    ]


def flower(rng: Rng) -> Parts:
    petals = int(rng.integers(5, 8))
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radii = 0.72 + rng.uniform(0.2, 0.27) * np.cos(petals * angles)
    return [(_polar(angles, radii), True), (_disc(0, 0, rng.uniform(0.14, 0.22)), False)]


def letter_h(rng: Rng) -> Parts:
    leg, bar = rng.uniform(0.3, 0.38), rng.uniform(0.14, 0.2)
    return _solid(
        _box(-0.75, -0.95, -0.75 + leg, 0.95),
        _box(0.75 - leg, -0.95, 0.75, 0.95),
        _box(-0.7, -bar, 0.7, bar),
    )


def mug(rng: Rng) -> Parts:
    grip = rng.uniform(0.42, 0.52)
    return [
        (_disc(0.42, 0, grip), True),
        (_disc(0.42, 0, grip - 0.2), False),
        (_box(-0.85, -0.8, 0.42, rng.uniform(0.75, 0.95)), True),
    ]


def tree(rng: Rng) -> Parts:
    trunk, low = rng.uniform(0.1, 0.18), rng.uniform(0.62, 0.75)
    crown = [(0, -1, 0.45, -0.35), (0, -0.6, 0.6, 0.1), (0, -0.2, 0.75, low)]
    parts = [np.array([(x, top), (half, base), (-half, base)]) for x, top, half, base in crown]
    return _solid(*parts, _box(-trunk, 0.6, trunk, 1))


def triangle(rng: Rng) -> Parts:
    return _polygon((rng.uniform(-0.3, 0.3), -0.95), (0.95, 0.75), (-0.95, 0.75))


def square(rng: Rng) -> Parts:
    half = rng.uniform(0.6, 0.85)
    return _solid(_box(-half, -0.8, half, 0.8))


def hexagon(rng: Rng) -> Parts:
    return _solid(_polar(_turn(6), rng.uniform(0.9, 1.0)))


def disc(rng: Rng) -> Parts:
    return _solid(_disc(0, 0, 0.9, rng.uniform(0.75, 1)))


def pill(rng: Rng) -> Parts:
    thick = rng.uniform(0.28, 0.42)
    ends = (
        _arc(1 - thick, 0, thick, -np.pi / 2, np.pi / 2),
        _arc(thick - 1, 0, thick, np.pi / 2, 3 * np.pi / 2),
    )
    return _solid(np.concatenate(ends))


def letter_t(rng: Rng) -> Parts:
    bar = rng.uniform(0.18, 0.26)
    return _solid(_box(-0.85, -0.95, 0.85, -0.95 + 2 * bar), _box(-bar, -0.9, bar, 0.95))


def letter_l(rng: Rng) -> Parts:
    bar = rng.uniform(0.38, 0.5)
    return _solid(_box(-0.65, -0.95, -0.65 + bar, 0.95), _box(-0.65, 0.95 - bar, 0.75, 0.95))


def letter_z(rng: Rng) -> Parts:
    bar = rng.uniform(0.34, 0.42)
    return _polygon(
        (-0.8, -0.95), (0.8, -0.95), (0.8, -0.95 + bar), (-0.2, 0.95 - bar), (0.8, 0.95 - bar),
        (0.8, 0.95), (-0.8, 0.95), (-0.8, 0.95 - bar), (0.2, -0.95 + bar), (-0.8, -0.95 + bar),
    )  # fmt: skip


def letter_u(rng: Rng) -> Parts:
    leg = rng.uniform(0.32, 0.4)
    return [
        (_box(-0.75, -0.95, 0.75, 0.25), True),
        (_disc(0, 0.2, 0.75), True),
        (_box(-0.75 + leg, -1, 0.75 - leg, 0.2), False),
        (_disc(0, 0.2, 0.75 - leg), False),
    ]


def half_disc(rng: Rng) -> Parts:
    return _solid(_arc(0, -0.4, rng.uniform(0.9, 1.0), 0, np.pi))


def drop(rng: Rng) -> Parts:
    round_ = rng.uniform(0.5, 0.6)
    return _solid(
        _disc(0, 0.4, round_), np.array([(0, -1), (0.87 * round_, 0.15), (-0.87 * round_, 0.15)])
    )


def kite(rng: Rng) -> Parts:
    wide, high = rng.uniform(0.5, 0.65), rng.uniform(-0.45, -0.25)
    return _polygon((0, -1), (wide, high), (0, 1), (-wide, high))


def comb(rng: Rng) -> Parts:
    back, tooth = rng.uniform(-0.4, -0.2), rng.uniform(0.11, 0.16)
    teeth = [_box(x - tooth, back - 0.1, x + tooth, 0.75) for x in np.linspace(-0.84, 0.84, 4)]
    return _solid(_box(-0.97, -0.75, 0.97, back), *teeth)


def stairs(rng: Rng) -> Parts:
    step = rng.uniform(0.4, 0.55)
    return _polygon(
        (-0.9, 0.9), (-0.9, 0.9 - step), (-0.3, 0.9 - step), (-0.3, 0.9 - 2 * step),
        (0.3, 0.9 - 2 * step), (0.3, 0.9 - 3 * step), (0.9, 0.9 - 3 * step), (0.9, 0.9),
    )  # fmt: skip


def pie(rng: Rng) -> Parts:
    gap = rng.uniform(0.4, 0.7)
    return _solid(np.concatenate([_arc(0, 0, 0.95, gap, 2 * np.pi - gap), [[0, 0]]]))


def frame(rng: Rng) -> Parts:
    bar = rng.uniform(0.24, 0.34)
    return [
        (_box(-0.9, -0.75, 0.9, 0.75), True),
        (_box(-0.9 + bar, -0.75 + bar, 0.9 - bar, 0.75 - bar), False),
    ]


def crown(rng: Rng) -> Parts:
    notch = rng.uniform(0.05, 0.2)
    return _polygon(
        (-0.95, 0.75), (-0.95, -0.6), (-0.45, notch), (0, -0.8), (0.45, notch), (0.95, -0.6),
        (0.95, 0.75),
    )  # fmt: skip


def mushroom(rng: Rng) -> Parts:
    stem = rng.uniform(0.2, 0.32)
    return _solid(_arc(0, 0.05, 0.95, np.pi, 2 * np.pi), _box(-stem, 0, stem, 0.9))


def chevron(rng: Rng) -> Parts:
    depth, thick = rng.uniform(0.5, 0.7), rng.uniform(0.4, 0.5)
    return _polygon(
        (-0.9, -0.6), (0, -0.6 + depth), (0.9, -0.6), (0.9, -0.6 + thick),
        (0, -0.6 + depth + thick), (-0.9, -0.6 + thick),
    )  # fmt: skip


def dumbbell(rng: Rng) -> Parts:
    weight, bar = rng.uniform(0.36, 0.44), rng.uniform(0.12, 0.18)
    return _solid(_disc(-0.58, 0, weight), _disc(0.58, 0, weight), _box(-0.6, -bar, 0.6, bar))


def blob(rng: Rng) -> Parts:
    """Draw a smooth random outline of no class: clutter."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = np.full(40, 0.75)
    for frequency in (2, 3, 5):
        radii += rng.uniform(0, 0.35 / frequency) * np.cos(
            frequency * angles + rng.uniform(0, 2 * np.pi)
        )
    return _solid(_polar(angles, radii))


Silhouette = Callable[[Rng], Parts]
