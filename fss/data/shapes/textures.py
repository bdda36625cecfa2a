"""Procedural textures: fields [H, W] in [0, 1] that blend two colors.

`period` is the length of a repeat in pixels; direction and phase are random.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Rng = np.random.Generator


def _axes(rng: Rng, height: int, width: int, period: float) -> tuple[Field, Field]:
    """Return two orthogonal coordinates in radians, 2π per period, in a random direction."""
    y, x = np.ogrid[:height, :width]
    angle, scale = rng.uniform(0, np.pi), 2 * np.pi / period
    across, along = rng.uniform(0, 2 * np.pi, 2)
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    u = (cosine * x + sine * y + across).astype(np.float32)
    v = (cosine * y - sine * x + along).astype(np.float32)
    return u, v


def _sharpen(wave: Field, threshold: float, gain: float) -> Field:
    return np.clip((wave - threshold) * gain + 0.5, 0, 1)


def stripes(rng: Rng, height: int, width: int, period: float) -> Field:
    u, _ = _axes(rng, height, width, period)
    return _sharpen(np.sin(u), rng.uniform(-0.4, 0.4), 1.5)


def waves(rng: Rng, height: int, width: int, period: float) -> Field:
    u, v = _axes(rng, height, width, period)
    return _sharpen(np.sin(u + rng.uniform(1.0, 1.8) * np.sin(v * 0.6)), 0, 1.5)


def checks(rng: Rng, height: int, width: int, period: float) -> Field:
    u, v = _axes(rng, height, width, period * 1.4)
    return _sharpen(np.sin(u) * np.sin(v), 0, 4)


def dots(rng: Rng, height: int, width: int, period: float) -> Field:
    u, v = _axes(rng, height, width, period * 1.2)
    return _sharpen(np.cos(u) + np.cos(v), rng.uniform(0.3, 0.9), 2)


def mesh(rng: Rng, height: int, width: int, period: float) -> Field:
    u, v = _axes(rng, height, width, period * 1.2)
    return _sharpen(np.maximum(np.cos(u), np.cos(v)), rng.uniform(0.6, 0.8), 3)


def bricks(rng: Rng, height: int, width: int, period: float) -> Field:
    u, v = _axes(rng, height, width, period * 1.3)
    shift = np.floor(v / np.pi) % 2 * np.float32(np.pi)
    joints = np.maximum(np.cos(2 * v), np.cos(u + shift))
    return _sharpen(joints, rng.uniform(0.75, 0.85), 4)


def rings(rng: Rng, height: int, width: int, period: float) -> Field:
    y, x = np.ogrid[:height, :width]
    center_y, center_x = rng.uniform(0.2, 0.8, 2) * (height, width)
    distance = np.hypot(y - center_y, x - center_x).astype(np.float32)
    return _sharpen(np.sin(distance * (2 * np.pi / period)), 0, 1.5)


def grain(rng: Rng, height: int, width: int, period: float) -> Field:
    cell = max(1, round(period / 5))
    noise = rng.random((-(-height // cell), -(-width // cell)), dtype=np.float32)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST)


def clouds(rng: Rng, height: int, width: int, period: float) -> Field:
    field = np.zeros((height, width), dtype=np.float32)
    for octave in (0.5, 1.0, 2.0):
        cells = (max(2, round(width / period / octave)), max(2, round(height / period / octave)))
        noise = rng.random(cells[::-1], dtype=np.float32)
        field += octave * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip((field / 3.5 - 0.5) * 2 + 0.5, 0, 1)


def patches(rng: Rng, height: int, width: int, period: float) -> Field:
    return _sharpen(clouds(rng, height, width, period * 0.7), 0.5, 8)


def gradient(rng: Rng, height: int, width: int, period: float) -> Field:
    u, _ = _axes(rng, height, width, 1.0)
    return (u - u.min()) / max(float(np.ptp(u)), 1e-6)


Texture = Callable[[Rng, int, int, float], Field]

TEXTURES: tuple[Texture, ...] = (
    stripes, waves, checks, dots, mesh, bricks, rings, grain, clouds, patches, gradient,
)  # fmt: skip
