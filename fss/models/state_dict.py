"""State dicts in files: as a backbone names its parameters, whatever the file wraps around them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import svf_fast
from svf_fast import Factors

# Where training code keeps a state dict in its file; of student and teacher the teacher is used.
_ENTRIES = ("state_dict", "model", "model_state_dict", "model_state", "network", "teacher", "net")
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
# Parameters that every ResNet, VGG or ViT has.
_MARKS = ("layer1.0.conv1.", "features.0.", "patch_embed.proj.")
# Of several encoders in a file, those that its method uses afterwards.
_ENCODERS = ("encoder_q.", "base_encoder.", "online_encoder.", "teacher.")
# Of the authors' SVF layer `SVD_Conv2d`.
_PARTS = (".conv_V.weight", ".conv_U.weight", ".conv_U.bias", ".vector_S", ".vector_S.0")


class StateDict(NamedTuple):
    """What a file has of a network.

    Attributes:
        values: tensors by the names of their parameters, without the prefix of a wrapper.
        stride_on: the convolution of a bottleneck that has the stride, if the file tells.
        factors: U, S and V of full rank by the name of their convolution, where the file has the
            authors' SVF layers; `values` has the weights that they compose to.
    """

    values: dict[str, Any]
    stride_on: str | None = None
    factors: Mapping[str, Factors] = MappingProxyType({})


def read_state_dict(path: Path, argument: str = "weights") -> StateDict:
    """Read the state dict in a `.safetensors`, `.pth` or `.pt` file.

    It may be at the top of the file or in an entry like `state_dict`, and have the prefix of a
    wrapper (`module.`, `_orig_mod.`). The authors' SVF layers are composed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or with SVF layers that lack a part.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: expected the path of an existing file, got {str(path)!r}; looked for "
            f"{path.absolute()}"
        )
    stride_on = None
    if path.suffix == ".safetensors":
        values, stride_on = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".ckpt", ".tar"):
        values = _unpack(read_torch(path), path)
    else:
        raise ValueError(f"{argument}: expected a .safetensors, .pth or .pt file, got {path}")
    values, factors = _compose(_unwrap(values), path)
    return StateDict(values, stride_on, factors)


def backbone_part(read: StateDict, path: str) -> StateDict:
    """Return the backbone's part of a state dict, without its prefix; all of it if it has none.

    It is a part in files of Lightning (`model.`), torchvision's segmentation networks and DINO
    (`backbone.`), and MoCo (`encoder_q.`).

    Raises:
        ValueError: several backbones, of which none is the one to take.
    """
    found = [name.partition(mark)[0] for mark in _MARKS for name in read.values if mark in name]
    prefixes = [each for each in dict.fromkeys(found) if each == "" or each.endswith(".")]
    if not prefixes or "" in prefixes:
        return read
    preferred = [each for each in prefixes if each.endswith(_ENCODERS)]
    if len(preferred or prefixes) > 1:
        raise ValueError(
            f"weights: expected one backbone in {path}, found {len(prefixes)}: "
            f"{', '.join(f'{each}*' for each in prefixes)}; save the state dict of one of them"
        )
    (prefix,) = preferred or prefixes

    def inner(whole: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): value
            for name, value in whole.items()
            if name.startswith(prefix)
        }

    return StateDict(inner(read.values), read.stride_on, inner(read.factors))


def read_torch(path: Path) -> Any:
    """Read what `torch.save` wrote into a file, if it is tensors and plain values only.

    Raises:
        ValueError: a file that cannot be read, or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {path} holds more than tensors, or is damaged, and is not loaded, because "
            "pickled objects can run code. If you trust it, load it with torch yourself and save "
            f"its state dict alone.\n{error}"
        ) from error
    except Exception as error:  # of damaged files torch.load raises whatever its readers do
        raise ValueError(
            f"weights: {path} is no complete torch file ({error}); fetch it again"
        ) from error


def differences(expected: dict[str, Tensor], state: dict[str, Any]) -> str:
    """List what is missing, unexpected, of another shape or not finite in a state dict.

    "" if nothing is.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [
        key for key, value in state.items() if key not in expected or not isinstance(value, Tensor)
    ]
    reshaped = [
        f"{key} (expected {list(value.shape)}, got {list(state[key].shape)})"
        for key, value in expected.items()
        if isinstance(state.get(key), Tensor) and state[key].shape != value.shape
    ]
    spoilt = [
        key
        for key, value in expected.items()
        if isinstance(state.get(key), Tensor) and not _is_finite(state[key].to(value.dtype))
    ]
    lists = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", reshaped),
        ("with NaN or infinity", spoilt),
    )
    return "".join(f"\n  {len(keys)} {what}: {_first(keys)}" for what, keys in lists if keys)


def _is_finite(x: Tensor) -> bool:
    return x.is_meta or bool(x.isfinite().all())


def _first(keys: list[str], count: int = 10) -> str:
    more = f", … ({len(keys) - count} more)" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            stride = (file.metadata() or {}).get("stride", "")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"weights: {path} is no complete safetensors file ({error}); fetch it again"
        ) from error
    word = stride.partition(" ")[0]
    return state, word if word in ("conv1", "conv2") else None


def _unpack(content: Any, path: Path) -> dict[str, Any]:
    """Find the state dict in what a file holds."""
    if isinstance(content, dict) and not any(isinstance(each, Tensor) for each in content.values()):
        inner = [content[name] for name in _ENTRIES if isinstance(content.get(name), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise ValueError(
            f"weights: expected a state dict in {path}, got an object of type "
            f"{type(content).__name__}"
        )
    return {str(key): value for key, value in content.items()}


def _unwrap(state: dict[str, Any]) -> dict[str, Any]:
    """Remove the prefixes of wrappers from the names."""
    bare = {}
    for name, value in state.items():
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        bare[name] = value
    return bare


def _compose(state: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Compose the weights of the authors' SVF layers; returns factors of full rank as well."""
    plain, factors, cut = {}, {}, []
    for key, value in state.items():
        layer = next((key.removesuffix(end) for end in _PARTS if key.endswith(end)), None)
        if layer is None:
            plain[key] = value
        elif key.endswith(_PARTS[0]):
            U, S, V = _factors(layer, state, path)
            plain[f"{layer}.weight"] = svf_fast.compose(U, S, V)
            if f"{layer}.conv_U.bias" in state:
                plain[f"{layer}.bias"] = state[f"{layer}.conv_U.bias"]
            full = min(len(U), V[0].numel())
            if len(S) == full:
                factors[layer] = Factors(U, S, V)
            else:
                cut.append(f"{layer} ({len(S)} of {full})")
        elif f"{layer}{_PARTS[0]}" not in state:
            raise ValueError(f"weights: {path} lacks {layer}{_PARTS[0]}, the V of an SVF layer")
    if cut:
        warnings.warn(
            f"weights: {path} has SVF layers with fewer singular values than their weights have: "
            f"{', '.join(cut)}. The authors' code rounds down to a multiple of 4. The weights are "
            "composed from what is there: the network computes what theirs does, which is not what "
            "the pretrained one did",
            stacklevel=4,
        )
    return plain, factors


def _factors(layer: str, state: dict[str, Any], path: Path) -> Factors:
    """Read U [Co, R], S [R] and V [R, Ci, kh, kw] of an SVF layer of the authors."""
    S = state.get(f"{layer}.vector_S", state.get(f"{layer}.vector_S.0"))
    U, V = (state.get(f"{layer}.{name}.weight") for name in ("conv_U", "conv_V"))
    if not all(isinstance(each, Tensor) for each in (U, S, V)):
        raise ValueError(
            f"weights: {path} lacks conv_U.weight or vector_S of the SVF layer {layer}"
        )
    factors = Factors(U.flatten(1), S.flatten(), V)
    U, S, V = factors
    if U.ndim != 2 or V.ndim != 4 or not U.shape[1] == len(S) == len(V) > 0:
        shapes = ", ".join(str(list(each.shape)) for each in factors)
        raise ValueError(
            f"weights: {path}: expected U [Co, R], S [R], V [R, Ci, kh, kw] for the SVF layer "
            f"{layer}, got {shapes}"
        )
    return factors
