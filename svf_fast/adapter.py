"""Adapter files: the trained singular values alone, with the fingerprint of what they belong to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from svf_fast.convert import save_atomically
from svf_fast.nn.factored import svf_layers

_FORMAT = "svf_fast adapter 1"
_SHOWN = 5


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the S of every SVF layer to a safetensors file: one ``<layer>.S`` each.

    For a ResNet-50 that is about 50 KB. The file also names, for each layer, a fingerprint of the
    weight it was decomposed from. Written whole or not at all.

    Raises ValueError when the model has no SVF layer.
    """
    layers = svf_layers(model)
    if not layers:
        raise ValueError("model: expected SVF layers to save, found none; call svf_fast.convert")
    tensors = {f"{name}.S": layer.S.detach().cpu().contiguous() for name, layer in layers.items()}
    fingerprints = {name: _hex(layer.fingerprint) for name, layer in layers.items()}
    metadata = {"format": _FORMAT, "fingerprints": json.dumps(fingerprints, sort_keys=True)}
    save_atomically(tensors, Path(path), metadata)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Set the S of every SVF layer from a file of :func:`save_adapter`; returns the model.

    Nothing is changed unless all of it fits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file; layers missing or left over; other shapes; or the frozen
            weights are not those the adapter was trained on (another backbone, or other weights).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"adapter: no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"adapter {path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"adapter {path}: expected format {_FORMAT!r}, got {metadata.get('format')!r}; "
            "adapters are written by svf_fast.save_adapter"
        )
    layers = svf_layers(model)
    _compare_names(path, {f"{name}.S" for name in layers}, set(values))
    fingerprints = json.loads(metadata["fingerprints"])
    for name, layer in layers.items():
        if values[f"{name}.S"].shape != layer.S.shape:
            raise ValueError(
                f"adapter {path}: {name}.S: expected {list(layer.S.shape)} singular values, "
                f"got {list(values[f'{name}.S'].shape)}"
            )
    other = [n for n, layer in layers.items() if fingerprints.get(n) != _hex(layer.fingerprint)]
    if other:
        raise ValueError(
            f"adapter {path}: trained on another backbone: the frozen weights of "
            f"{_listed(other)} of {len(layers)} layers differ in their fingerprint; load the "
            "weights the adapter was trained with, then convert"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.S.copy_(values[f"{name}.S"])
            layer.refresh()
    return model


def _compare_names(path: Path, expected: set[str], got: set[str]) -> None:
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if not missing and not unexpected:
        return
    lines = [
        f"adapter {path}: expected the {len(expected)} SVF layers of the model, got {len(got)}"
    ]
    if missing:
        lines.append(f"not in the file: {_listed(missing)}")
    if unexpected:
        lines.append(f"not in the model: {_listed(unexpected)}")
    raise ValueError("; ".join(lines) + ". Convert the model with the same `layers`.")


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hex(fingerprint: torch.Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()
