"""Adapters: the singular values of a model alone, with the fingerprint of what they belong to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from svf_fast.files import save_atomically
from svf_fast.layers.factored import Factored, svf_layers

_FORMAT = "svf_fast adapter 1"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FILE_BYTES = 64 * 2**20  # a thousand times a ResNet-50's
_CARD_BYTES = 16 * 2**10
_SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """The singular values of every SVF layer of a model, kept apart from it.

    Several can be in memory, 50 KB each for a ResNet-50, and take turns in one converted model:
    :meth:`apply` copies S, nothing is decomposed again.

    Args:
        S: the singular values by layer, each [G·R], of a floating dtype.
        fingerprints: by layer, of the weight it was decomposed from: the first 16 bytes of a
            SHA-256, in hexadecimal digits.
        card: what there is to say about it, as plain JSON of at most 16 KiB. The keys are free;
            these are the ones that `fss` writes: ``backbone``, ``weights``, ``layers``, ``data``,
            ``fold``, ``shots``, ``model``, ``steps`` and ``metric`` (values by name).
        path: the file it was read from, for messages.

    Raises:
        TypeError: S or the card of another type.
        ValueError: no layer; values that are not finite, or of another dtype or shape; layers
            without a fingerprint; a card that is too large or no plain JSON.
    """

    S: Mapping[str, Tensor]
    fingerprints: Mapping[str, str]
    card: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        if not self.S:
            raise ValueError("expected the singular values of at least one layer, got none")
        for name, values in self.S.items():
            _check_values(name, values)
        if self.S.keys() != self.fingerprints.keys():
            raise ValueError(
                "fingerprints: expected one for each layer, which is not so for "
                f"{_listed(self.S.keys() ^ self.fingerprints.keys())}"
            )
        for name, digits in self.fingerprints.items():
            if not isinstance(digits, str) or not re.fullmatch("[0-9a-f]{32}", digits):
                raise ValueError(
                    f"fingerprint of {name!r}: expected 32 hexadecimal digits, got {digits!r:.50}"
                )
        object.__setattr__(self, "card", _plain_card(self.card))

    @classmethod
    def of(cls, model: nn.Module, card: Mapping[str, Any] | None = None) -> Adapter:
        """Take the present values of a converted model; before it trains, the pretrained ones.

        Raises ValueError when the model has no SVF layer, or values that are not finite.
        """
        layers = _converted(model)
        S = {name: layer.singular_values() for name, layer in layers.items()}
        return cls(S, _fingerprints(layers), {} if card is None else card)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Adapter:
        """Read a file of :func:`save_adapter`, which may be a stranger's; needs no model.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an adapter file, or one that is damaged, with its name.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"adapter: no such file: {path}")
        try:
            return cls(*_read(path), path)
        except SafetensorError as error:
            text = f"adapter {path}: not a readable safetensors file ({error})"
            raise ValueError(text) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"adapter {path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all: one ``<layer>.S`` each, and the card."""
        metadata = {
            "format": _FORMAT,
            "fingerprints": json.dumps(dict(self.fingerprints), sort_keys=True),
            "card": json.dumps(dict(self.card), ensure_ascii=False),
        }
        tensors = {f"{name}.S": values.contiguous() for name, values in self.S.items()}
        save_atomically(tensors, Path(path), metadata)

    def apply(self, model: nn.Module) -> nn.Module:
        """Set the S of every SVF layer of a converted model; returns the model.

        Nothing is changed unless all of it fits. Each weight is composed anew once, when the layer
        next runs.

        Raises ValueError when layers are missing or left over, shapes differ, or the frozen weights
        are not those of the adapter: another backbone, or other weights.
        """
        layers = _converted(model)
        self._check_names(set(layers))
        for name, layer in layers.items():
            if self.S[name].shape != layer.S.shape:
                raise ValueError(
                    f"{self._name}: {name}.S: expected {list(layer.S.shape)} singular values, got "
                    f"{list(self.S[name].shape)}"
                )
        other = _differing(self.fingerprints, _fingerprints(layers))
        if other:
            raise ValueError(
                f"{self._name}: trained on another backbone: the frozen weights of "
                f"{_listed(other)} of {len(layers)} layers differ in their fingerprint; load the "
                "weights the adapter was trained with, then convert"
            )
        for name, layer in layers.items():
            layer.assign(self.S[name])
        return model

    @property
    def backbone(self) -> str:
        """Fingerprint of all weights together: adapters of the same one fit the same models."""
        text = json.dumps(dict(self.fingerprints), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        count = sum(values.numel() for values in self.S.values())
        return f"Adapter({len(self.S)} layers, {count} values, backbone {self.backbone[:8]})"

    @property
    def _name(self) -> str:
        return "adapter" if self.path is None else f"adapter {self.path}"

    def _check_names(self, layers: set[str]) -> None:
        missing, unexpected = sorted(layers - self.S.keys()), sorted(self.S.keys() - layers)
        if not missing and not unexpected:
            return
        lines = [
            f"{self._name}: expected the {len(layers)} SVF layers of the model, got {len(self.S)}"
        ]
        if missing:
            lines.append(f"not in the file: {_listed(f'{name}.S' for name in missing)}")
        if unexpected:
            lines.append(f"not in the model: {_listed(f'{name}.S' for name in unexpected)}")
        raise ValueError("; ".join(lines) + ". Convert the model with the same `layers`.")


def save_adapter(
    model: nn.Module, path: str | os.PathLike, card: Mapping[str, Any] | None = None
) -> None:
    """Write the S of every SVF layer to a safetensors file: one ``<layer>.S`` each.

    For a ResNet-50 that is about 55 KB. The file also names, for each layer, a fingerprint of the
    weight it was decomposed from, and keeps the ``card`` of :class:`Adapter`: data, fold, metric
    and whatever else is worth knowing. Written whole or not at all.

    Raises ValueError when the model has no SVF layer or values that are not finite, ValueError or
    TypeError when the card is too large or no plain JSON.
    """
    Adapter.of(model, card).save(path)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Set the S of every SVF layer from a file of :func:`save_adapter`; returns the model.

    Nothing is changed unless all of it fits. To switch between several, or to look into one, keep
    what :meth:`Adapter.load` returns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file; layers missing or left over; other shapes; or the frozen
            weights are not those the adapter was trained on (another backbone, or other weights).
    """
    return Adapter.load(path).apply(model)


def interpolate_adapters(
    a: Adapter, b: Adapter, t: float, card: Mapping[str, Any] | None = None
) -> Adapter:
    """Return the adapter ``S = (1 - t)·S_a + t·S_b``: a at t = 0, b at t = 1; beyond, extrapolated.

    Args:
        card: of the result; by default what both cards agree on, without a ``metric``, and t as
            ``interpolated``.

    Raises:
        TypeError: a or b is no :class:`Adapter`, t no number.
        ValueError: other layers or another backbone in b than in a; t that is not finite.
    """
    for name, adapter in (("a", a), ("b", b)):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{name}: expected an Adapter, got {type(adapter).__name__}")
    if not isinstance(t, int | float) or isinstance(t, bool):
        raise TypeError(f"t: expected a number, got {t!r}")
    if not math.isfinite(t):
        raise ValueError(f"t: expected a finite number, got {t}")
    other = _differing(a.fingerprints, b.fingerprints)
    if other:
        raise ValueError(
            f"b: expected an adapter of the same backbone and layers as a, got one that differs in "
            f"{_listed(other)}"
        )
    S = {}
    for name, values in a.S.items():
        dtype = torch.promote_types(values.dtype, b.S[name].dtype)
        S[name] = torch.lerp(values.double(), b.S[name].double(), float(t)).to(dtype)
    if card is None:
        agreed = {key: value for key, value in a.card.items() if b.card.get(key) == value}
        agreed.pop("metric", None)
        card = {**agreed, "interpolated": t}
    return Adapter(S, dict(a.fingerprints), card)


def _converted(model: nn.Module) -> dict[str, Factored]:
    layers = svf_layers(model)
    if not layers:
        raise ValueError("model: expected SVF layers, found none; call svf_fast.convert")
    return layers


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    size = path.stat().st_size
    if size > _FILE_BYTES:
        raise ValueError(
            f"expected at most {_FILE_BYTES} bytes, got {size}: no adapter is so large"
        )
    S = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"expected format {_FORMAT!r}, got {metadata.get('format')!r:.50}; "
                "adapters are written by svf_fast.save_adapter"
            )
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            if not key.endswith(".S") or not key.isprintable():
                raise ValueError(f"expected names of layers and '.S', got {key!r:.50}")
            if part.get_dtype() not in _DTYPES or len(part.get_shape()) != 1:
                raise ValueError(
                    f"{key}: expected [R] in one of {', '.join(_DTYPES)}, got "
                    f"{part.get_shape()} in {part.get_dtype()}"
                )
            S[key.removesuffix(".S")] = file.get_tensor(key).clone()  # the file may change
    return S, _object(metadata, "fingerprints"), _object(metadata, "card", "{}")


def _object(metadata: dict[str, str], key: str, default: str = "") -> dict[str, Any]:
    """Return a JSON object in the metadata."""
    try:
        found = json.loads(metadata.get(key, default))
    except ValueError as error:
        raise ValueError(f"{key}: expected JSON in the metadata, got other ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{key}: expected a JSON object, got {type(found).__name__}")
    return found


def _check_values(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}.S: expected a tensor, got {type(values).__name__}")
    if values.dim() != 1 or not values.numel() or values.dtype not in _DTYPES.values():
        raise ValueError(
            f"{name}.S: expected [R] in one of {', '.join(_DTYPES)}, got {list(values.shape)} in "
            f"{values.dtype}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{name}.S: expected finite values, got NaN or Inf: training diverged")


def _plain_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that is plain JSON."""
    if not isinstance(card, Mapping):
        raise TypeError(f"card: expected a dict, got {type(card).__name__}")
    try:
        text = json.dumps(dict(card), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"card: expected plain JSON, got other ({error})") from error
    if size > _CARD_BYTES:
        raise ValueError(f"card: expected at most {_CARD_BYTES} bytes of JSON, got {size}")
    return json.loads(text)


def _fingerprints(layers: dict[str, Factored]) -> dict[str, str]:
    stacked = torch.stack([layer.fingerprint for layer in layers.values()])  # one copy from a GPU
    return {name: bytes(row).hex() for name, row in zip(layers, stacked.tolist(), strict=True)}


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
