"""The configurations of runs that take a second."""

from tests.fss.conftest import shapes_once, tiny

__all__ = ["shapes_once", "tiny"]
