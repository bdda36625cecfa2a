"""The embedded data set: textured objects over cluttered backgrounds, rendered from a seed."""

from __future__ import annotations

from fss.data.shapes.source import (
    FEW_SHOT_CLASSES,
    PRETRAINING_CLASSES,
    ShapeClass,
    ShapesSource,
)

__all__ = ["FEW_SHOT_CLASSES", "PRETRAINING_CLASSES", "ShapeClass", "ShapesSource"]
