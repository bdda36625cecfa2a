"""Files that are written completely or not at all, and adapters read that may be a stranger's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

ADAPTER_FORMAT = "svf_fast adapter 1"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FILE_BYTES = 64 * 2**20  # a thousand times a ResNet-50's

AdapterFile = tuple[
    dict[str, Tensor],
    dict[str, str],
    dict[str, Any],
    dict[str, Tensor],
    dict[str, tuple[object, dict[str, Tensor]]],
]


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


def read_adapter(path: Path) -> AdapterFile:
    """Return S by layer, fingerprints, card, tensors besides, and by layer core and its tensors.

    Raises ValueError or SafetensorError for a file that is no adapter, or a damaged one; what the
    tensors of a core are is not looked at.
    """
    _check_size(path)
    S, also = {}, {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != ADAPTER_FORMAT:
            raise ValueError(
                f"expected format {ADAPTER_FORMAT!r}, got {metadata.get('format')!r:.50}; "
                "adapters are written by svf_fast.save_adapter"
            )
        extra = _metadata_json(metadata, "also", list, "[]")
        texts = _metadata_json(metadata, "cores", dict, "{}")
        cores: dict[str, tuple[object, dict[str, Tensor]]] = {
            name: (text, {}) for name, text in texts.items()
        }
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            layer, _, last = key.rpartition(".")
            of_core = layer in cores and last != "S"
            if not key.isprintable() or not (key in extra or last == "S" or of_core):
                raise ValueError(f"expected names of layers and '.S', got {key!r:.50}")
            if key in extra:
                also[key] = file.get_tensor(key).clone()
                continue
            if part.get_dtype() not in FLOATS or (last == "S" and len(part.get_shape()) != 1):
                raise ValueError(
                    f"{key}: expected [R] in one of {', '.join(FLOATS)}, got "
                    f"{part.get_shape()} in {part.get_dtype()}"
                )
            values = file.get_tensor(key).clone()  # the file may change
            if of_core:
                cores[layer][1][last] = values
            else:
                S[layer] = values
    if len(also) != len(extra):
        raise ValueError(f"also: expected the {len(extra)} tensors it names, got {len(also)}")
    fingerprints = _metadata_json(metadata, "fingerprints", dict)
    return S, fingerprints, _metadata_json(metadata, "card", dict, "{}"), also, cores


def _check_size(path: Path) -> None:
    """Refuse a file that is too large, before it is read, unless it says to hold more than S."""
    size = path.stat().st_size
    if size <= _FILE_BYTES:
        return
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError:
        metadata = {}
    if not {"also", "cores"} & metadata.keys():
        raise ValueError(
            f"expected at most {_FILE_BYTES} bytes, got {size}: no adapter is so large"
        )


def _metadata_json(metadata: dict[str, str], key: str, kind: type, default: str = "") -> Any:
    """Return a JSON object or list in the metadata of a safetensors file."""
    try:
        found = json.loads(metadata.get(key, default))
    except ValueError as error:
        raise ValueError(f"{key}: expected JSON in the metadata, got other ({error})") from error
    if not isinstance(found, kind):
        expected = "object" if kind is dict else "list"
        raise ValueError(f"{key}: expected a JSON {expected}, got {type(found).__name__}")
    return found


def plain_json(name: str, card: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Return a copy that is plain JSON, of at most so many bytes."""
    if not isinstance(card, Mapping):
        raise TypeError(f"{name}: expected a dict, got {type(card).__name__}")
    try:
        text = json.dumps(dict(card), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: expected plain JSON, got other ({error})") from error
    if size > most:
        raise ValueError(f"{name}: expected at most {most} bytes of JSON, got {size}")
    return json.loads(text)
