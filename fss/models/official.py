"""Checkpoints of the methods' authors, by a map from their parameters' names to ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fss.models.pspnet import PSPNet
from fss.models.state_dict import StateDict, differences, read_state_dict, read_torch
from fss.models.vgg import VGG

# Beginnings of our names and of theirs, of a deep stem in the code that comes from semseg.
_STEM = {
    "backbone.conv1.": "layer0.0.",
    "backbone.bn1.": "layer0.1.",
    "backbone.conv2.": "layer0.3.",
    "backbone.bn2.": "layer0.4.",
    "backbone.conv3.": "layer0.6.",
    "backbone.bn3.": "layer0.7.",
}

# Of the PSPNet that CWT's authors train, whose last convolution stands alone.
_BOTTLENECK = {
    "base_learner.pool.": "ppm.",
    "base_learner.classifier.4.": "classifier.",
    "base_learner.classifier.": "bottleneck.",
}
# The last convolution of a PSPNet: of `fss train-base`, of BAM's authors and of CWT's.
_OUTPUTS = ("base_learner.classifier.4.", "cls.4.", "classifier.")


def load_official(model: nn.Module, path: str) -> None:
    """Load the authors' checkpoint of a method, or BAM's PSPNet, all of it or nothing.

    Their SVF layers are composed: the network computes what theirs does. Of those with full rank
    `backbone.factors` keeps U, S and V, from which `apply_regime` goes on.

    Args:
        model: a few-shot model that has `official_names`, or a `PSPNet`, of the same backbone
            (the authors' ResNets mostly have a deep stem), fold and, for BAM, number of shots.
        path: a `.pth` file with a state dict, at the top or under `state_dict`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read or does not fit; the message lists what does not.
        TypeError: another model.
    """
    if not getattr(model, "official_names", None):
        raise TypeError(
            f"model: expected one whose authors have published a checkpoint, got "
            f"{type(model).__name__}"
        )
    read = read_state_dict(Path(path).expanduser(), "model.official")
    _load(model, read, path)


def load_base_learner(
    model: nn.Module, path: str, base_classes: Mapping[int, str] | None = None
) -> None:
    """Load backbone and base learner from `fss train-base`, or the PSPNet of a method's authors.

    Args:
        model: a BAM, or another model with a `base_learner`, of the same backbone and fold. One
            without base classes (CWT's) does without the last convolution.
        path: the folder of a `fss train-base` run, or a checkpoint file.
        base_classes: names of the fold's base classes by id, with which those of a `fss
            train-base` run must agree; the authors' files do not tell theirs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read or does not fit; the message lists what does not. A
            base learner of another fold.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "base.pt"
    read = read_state_dict(file, "model.base_weights")
    state = read.values
    pspnet = nn.Module()
    theirs = any(key.startswith("bottleneck.") for key in state)
    pspnet.official_names = _BOTTLENECK if theirs else PSPNet.official_names
    pspnet.backbone, pspnet.base_learner = model.backbone, model.base_learner
    if "base_learner.classifier.4.weight" not in pspnet.state_dict():
        state = {key: value for key, value in state.items() if not key.startswith(_OUTPUTS)}
        read = read._replace(values=state)
    if any(key.startswith("base_learner.") for key in state):
        _check_classes(read_torch(file).get("classes"), base_classes, path)
        own = pspnet.state_dict()
        _raise(differences(_counted(own), _counted(state)), path)
        pspnet.load_state_dict(state, strict=False)
    else:
        _load(pspnet, read, path)


def official_keys(model: nn.Module) -> dict[str, str]:
    """Map each key of a model's state dict to the authors' name.

    The model's `official_names` has the beginnings of our names and of theirs, of which the first
    that fits counts. Without one for "backbone.", the backbone's names are those of semseg.
    """
    return {key: _official(key, model) for key in model.state_dict()}


def _load(model: nn.Module, read: StateDict, path: str) -> None:
    state, own, names = read.values, model.state_dict(), official_keys(model)
    if not any(name.startswith("encoder.") for name in names.values()):
        state = _without_encoder(state, path)
    unused, shapes = (getattr(model, name, ()) for name in ("official_unused", "official_shapes"))
    state = {key: value for key, value in state.items() if not key.startswith(tuple(unused))}
    expected = {
        names[key]: value.reshape(shapes[key]) if key in shapes else value
        for key, value in own.items()
    }
    _raise(differences(_counted(expected), _counted(state)), path)
    loaded = {
        key: state[name].reshape(own[key].shape) for key, name in names.items() if name in state
    }
    model.load_state_dict(loaded, strict=False)
    backbone = model.get_submodule("backbone")
    layers = {key.removesuffix(".weight"): names[key].removesuffix(".weight") for key in own}
    backbone.factors = {
        ours.removeprefix("backbone."): read.factors[theirs]
        for ours, theirs in layers.items()
        if theirs in read.factors
    }


def _check_classes(
    stored: Mapping[int, str] | None, wanted: Mapping[int, str] | None, path: str
) -> None:
    if stored is None or wanted is None or dict(stored) == dict(wanted):
        return
    unlike = [f"{name} ({c})" for c, name in stored.items() if wanted.get(c) != name]
    lacking = [f"{name} ({c})" for c, name in wanted.items() if stored.get(c) != name]
    raise ValueError(
        f"model.base_weights: {path} is of another fold or data set: it learnt "
        f"{', '.join(unlike) or 'nothing more'}, which are no base classes here, and not "
        f"{', '.join(lacking) or 'less'}; train a base learner for this fold"
    )


def _raise(report: str, path: str) -> None:
    if report:
        raise ValueError(
            f"weights: {path} does not fit the model.{report}\n  Compare backbone, stem (the "
            "authors' ResNets have stem=deep), channels, fold and shots with those of the file"
        )


def _counted(state: dict[str, Any]) -> dict[str, Any]:
    """Drop the batch norms' counters, which old files lack and nothing reads."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _without_encoder(state: dict[str, Any], path: str) -> dict[str, Any]:
    """Drop the copies `encoder.n` of PSPNet's layers `layern`."""
    kept = {}
    for key, value in state.items():
        if not key.startswith("encoder."):
            kept[key] = value
            continue
        twin = state.get("layer" + key.removeprefix("encoder."))
        if not isinstance(twin, Tensor) or not torch.equal(twin, value):
            raise ValueError(
                f"weights: {path} does not fit the model: {key} is not the same as "
                f"{'layer' + key.removeprefix('encoder.')}, as it is in the authors' files"
            )
    return kept


def _official(key: str, model: Any) -> str:
    names = model.official_names
    if key.startswith("backbone.") and "backbone." not in names:
        return _official_backbone(key, model.get_submodule("backbone"))
    key = _renamed(key, names)
    first, found, rest = key.partition(".reduce.")  # of pyramid pooling
    if not found:
        return key
    # their sequence begins with the pooling
    n, index, last = rest.split(".", 2)
    return f"{first}.features.{n}.{int(index) + 1}.{last}"


def _official_backbone(key: str, backbone: nn.Module) -> str:
    if isinstance(backbone, VGG):
        _, layer, index, rest = key.split(".", 3)
        return f"{layer}.{int(index) - backbone.cuts[int(layer[-1])]}.{rest}"
    return _renamed(key, {**_STEM, "backbone.": ""})


def _renamed(key: str, prefixes: Mapping[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise KeyError(key)
