"""Files that are written completely or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path

from safetensors.torch import save


def save_atomically(tensors: dict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that a reader sees all of it or none.

    Raises OSError when the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not by tempfile or save_file, whose files nobody else may read
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(save(tensors, metadata))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
