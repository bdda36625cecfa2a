"""Checkpoints of the authors of PFENet and BAM, by a map from their parameters' names to ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fss.models.bam import BAM
from fss.models.pfenet import PFENet
from fss.models.pspnet import PSPNet
from fss.models.state_dict import StateDict, differences, read_state_dict, read_torch
from fss.models.vgg import CUTS, VGG

# Beginnings of our names and of theirs; the first that fits counts.
_STEM = {
    "backbone.conv1.": "layer0.0.",
    "backbone.bn1.": "layer0.1.",
    "backbone.conv2.": "layer0.3.",
    "backbone.bn2.": "layer0.4.",
    "backbone.conv3.": "layer0.6.",
    "backbone.bn3.": "layer0.7.",
}
_PFENET = {
    "query_reduce.": "down_query.",
    "support_reduce.": "down_supp.",
    "enrich.merge.": "init_merge.",
    "enrich.alpha.": "alpha_conv.",
    "enrich.beta.": "beta_conv.",
    "enrich.classifiers.": "inner_cls.",
    "enrich.project.": "res1.",
    "residual.": "res2.",
    "classifier.": "cls.",
}
_BAM = {
    "query_reduce.": "down_query.",
    "support_reduce.": "down_supp.",
    "merge.": "init_merge.",
    "aspp.pooled.": "ASPP_meta.layer6_0.0.",
    "aspp.pointwise.": "ASPP_meta.layer6_1.0.",
    "aspp.atrous.0.": "ASPP_meta.layer6_2.0.",
    "aspp.atrous.1.": "ASPP_meta.layer6_3.0.",
    "aspp.atrous.2.": "ASPP_meta.layer6_4.0.",
    "project.": "res1_meta.",
    "residual.": "res2_meta.",
    "classifier.": "cls_meta.",
    "distance_merge.": "gram_merge.",
    "base_merge.": "cls_merge.",
    "shot_weights.layers.": "kshot_rw.",
}
_WEIGHTED_SUMS = ("distance_merge.weight", "base_merge.weight")
_BASE_LEARNER = {"pool.": "ppm.", "classifier.": "cls."}
_BASE_LEARNER_OF_BAM = {"pool.": "learner_base.0.", "classifier.": "learner_base.1."}


def load_official(model: nn.Module, path: str) -> None:
    """Load the authors' checkpoint of PFENet, BAM or BAM's PSPNet, all of it or nothing.

    Their SVF layers are composed: the network computes what theirs does. Of those with full rank
    `backbone.factors` keeps U, S and V, from which `apply_regime` goes on.

    Args:
        model: a `PFENet`, `BAM` or `PSPNet` of the same backbone (the authors' ResNets have a deep
            stem), fold and, for BAM, number of shots.
        path: a `.pth` file with a state dict, at the top or under `state_dict`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read or does not fit; the message lists what does not.
        TypeError: another model.
    """
    if not isinstance(model, (PFENet, BAM, PSPNet)):
        raise TypeError(f"model: expected PFENet, BAM or PSPNet, got {type(model).__name__}")
    read = read_state_dict(Path(path).expanduser(), "model.official")
    _load(model, read, path)


def load_base_learner(
    model: nn.Module, path: str, base_classes: Mapping[int, str] | None = None
) -> None:
    """Load backbone and base learner of BAM from `fss train-base`, or the authors' PSPNet.

    Args:
        model: a BAM, or another model with a `base_learner`, of the same backbone and fold.
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
    pspnet.backbone, pspnet.base_learner = model.backbone, model.base_learner
    if any(key.startswith("base_learner.") for key in state):
        _check_classes(read_torch(file).get("classes"), base_classes, path)
        own = pspnet.state_dict()
        _raise(differences(_counted(own), _counted(state)), path)
        pspnet.load_state_dict(state, strict=False)
    else:
        _load(pspnet, read, path)


def official_keys(model: nn.Module) -> dict[str, str]:
    """Map each key of a model's state dict to the authors' name."""
    return {key: _official(key, model) for key in model.state_dict()}


def _load(model: nn.Module, read: StateDict, path: str) -> None:
    state, own = _without_encoder(read.values, path), model.state_dict()
    names = official_keys(model)
    expected = {names[key]: _as_theirs(key, value) for key, value in own.items()}
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


def _as_theirs(key: str, value: Tensor) -> Tensor:
    """Shape a value as the authors have it: our two weights of a sum are a 1×1 convolution."""
    return value.reshape(1, 2, 1, 1) if key in _WEIGHTED_SUMS else value


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


def _official(key: str, model: nn.Module) -> str:
    if key.startswith("backbone."):
        return _official_backbone(key, model.get_submodule("backbone"))
    if key.startswith("base_learner."):
        renamed = _BASE_LEARNER_OF_BAM if isinstance(model, BAM) else _BASE_LEARNER
        key = _renamed(key.removeprefix("base_learner."), renamed)
        first, found, rest = key.partition(".reduce.")
        if not found:
            return key
        # their sequence begins with the pooling
        n, index, last = rest.split(".", 2)
        return f"{first.removesuffix('.')}.features.{n}.{int(index) + 1}.{last}"
    return _renamed(key, _PFENET if isinstance(model, PFENet) else _BAM)


def _official_backbone(key: str, backbone: nn.Module) -> str:
    if isinstance(backbone, VGG):
        _, layer, index, rest = key.split(".", 3)
        return f"{layer}.{int(index) - CUTS[int(layer[-1])]}.{rest}"
    return _renamed(key, {**_STEM, "backbone.": ""})


def _renamed(key: str, prefixes: dict[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise KeyError(key)
