"""Fields of configurations."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def free(default: Any, *between: str) -> Any:
    """Return the field of a setting that may differ between two runs, see `free_settings`."""
    return field(default=default, metadata={"free": between})
