"""Convert a pretrained model to SVF layers in place, and back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from svf_fast.budget import fit, parse_bytes
from svf_fast.files import save_atomically
from svf_fast.fusion.blocks import FusedSequential, SVFBasicBlock, SVFBottleneck
from svf_fast.fusion.fused import Fused
from svf_fast.fusion.structure import find
from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.layers.factored import Factored, check_module, svf_layers
from svf_fast.layers.linear import SVFLinear
from svf_fast.layers.network import Network
from svf_fast.svd import Factors, compose, decompose


def svf_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield the trainable singular values of a model, one vector per converted layer."""
    for layer in svf_layers(model).values():
        yield layer.S


def convert(
    model: nn.Module,
    layers: Sequence[str] | None = ("layer2", "layer3", "layer4"),
    strategy: str = "auto",
    fuse: bool = True,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
    memory_budget: str | int | None = None,
    input_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """Replace the convolutions and linear layers of a pretrained model by SVF layers, in place.

    Of a converted layer only S trains; a layer that is not converted stays as it is, so freeze what
    should not train (``model.requires_grad_(False)``) before. The network computes what it computed
    before, to rounding. ``nn.Conv2d`` and ``nn.Linear`` are converted, their subclasses and those
    whose weight a hook computes (pruning, weight norm) are not: these may use their weight in their
    own way. Hooks are kept. A layer used twice is converted once; two layers that share their
    weight get an S each.

    Args:
        layers: names of modules as ``named_modules`` gives them, with ``*`` as a wildcard; what
            lies in them is converted. None converts the whole model.
        strategy: see :class:`svf_fast.SVFConv2d`.
        fuse: run residual blocks and conv-BN-ReLU sequences of converted convolutions as one
            autograd node each, wherever their batch norms are frozen (evaluation mode). They are
            found by what their forward computes, whatever their classes and names.
        cache: folder where decompositions are kept and found again by the hash of their weight.
        progress: show a bar when it takes more than two seconds.
        memory_budget: most that autograd may keep of one forward pass, like ``"1.5GiB"`` or an
            integer of bytes, as :func:`svf_fast.memory_report` counts it: weights and what lives
            within the step are not in it. The fastest plan that fits is set: fused blocks compute
            their second convolution twice where that is needed.
        input_shape: of the forward pass that the budget is for.
        dtype: of the activations in it, for a run under autocast.
        factors: U, S and V by the name of their layer, where they are known already, from a state
            dict for one. They are taken in the place of the layer's weight, which is not looked at.

    Returns the model.

    Raises ValueError when a name in ``layers`` fits no module, nothing is there to convert, or no
    plan fits the budget, with the smallest that does (:class:`svf_fast.budget.BudgetError`). Then
    the model is as it was.
    """
    if (memory_budget is None) != (input_shape is None):
        missing = "input_shape" if input_shape is None else "memory_budget"
        raise ValueError(
            f"{missing}: expected with the other of memory_budget and input_shape, got None"
        )
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    if isinstance(layers, str):
        layers = (layers,)
    check_module(model)
    if type(model) in (nn.Conv2d, nn.Linear):
        raise ValueError(
            "model: expected a module that contains layers, got a single layer, which cannot be "
            "replaced in place; use SVFConv2d.from_conv or SVFLinear.from_linear"
        )
    chosen = _select(model, layers)
    if not chosen:
        converted = len(svf_layers(model))
        hint = f"{converted} layers are SVF layers already" if converted else "it has none at all"
        where = "the model" if layers is None else f"layers={list(layers)}"
        raise ValueError(
            f"{where}: expected nn.Conv2d or nn.Linear layers to convert, found none ({hint})"
        )
    known = dict(factors or {})
    _check_factors(known, dict(chosen))
    replaced: dict[nn.Module, Factored] = {}
    for name, layer in tqdm(chosen, "decomposing", unit="layer", delay=2, disable=not progress):
        if layer not in replaced:
            found = known.get(name) or _factors(layer, cache)
            kind = strategy
            if strategy == "auto" and _feeds_inplace(model, name):
                kind = "chain"  # gram keeps its output, which the next module overwrites
            if isinstance(layer, nn.Conv2d):
                replaced[layer] = SVFConv2d.from_conv(layer, kind, found)
            else:
                replaced[layer] = SVFLinear.from_linear(layer, kind, found)
            _move_hooks(layer, replaced[layer])
        model.set_submodule(name, replaced[layer])
    network = Network()
    for factored in svf_layers(model).values():
        network.join(factored)
    undo = _fuse(model, _within(layers)) if fuse else []
    if budget is not None and input_shape is not None:
        try:
            fit(model, budget, input_shape, dtype)
        except Exception:
            for unfuse in undo:
                unfuse()
            for name, layer in chosen:
                _move_hooks(replaced[layer], layer)
                model.set_submodule(name, layer)
            raise
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace the SVF layers of a model by plain ones with the composed weights, in place.

    The inverse of :func:`convert`: the state dict has the original's keys and shapes again, and
    loads into the original class. Returns the model.

    For ONNX merge first: a converted model goes through ``torch.export``, but with operators of
    svf_fast in its graph, which ``torch.onnx`` has no translation for.

    Raises ValueError when the model has no SVF layer.
    """
    if isinstance(model, Factored):
        raise ValueError(
            "model: expected a module that contains SVF layers, got a single layer, which cannot "
            "be replaced in place; use its merged()"
        )
    if not svf_layers(model):
        raise ValueError("model: expected SVF layers to merge, found none; was it converted?")
    for module in list(model.modules()):
        if isinstance(module, Fused):
            module.unfuse()
    plain: dict[Factored, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Factored):
            if layer not in plain:
                plain[layer] = layer.merged()
                _move_hooks(layer, plain[layer])
            model.set_submodule(name, plain[layer])
    return model


def _select(
    model: nn.Module, layers: Sequence[str] | None
) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in layers or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            top = [name for name, _ in model.named_children()]
            raise ValueError(
                f"layers: expected names of modules, got {pattern!r}, which fits none of this "
                f"{type(model).__name__}; at its top are {', '.join(top) or 'no modules'}"
            )

    within = _within(layers)
    return [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in (nn.Conv2d, nn.Linear)
        and "weight" in module._parameters  # else a hook computes it
        and within(name)
    ]


def _within(layers: Sequence[str] | None) -> Callable[[str], bool]:
    """Return a test whether the module of a name lies in one of `layers`."""
    patterns = ["*"] if layers is None else list(layers)

    def within(name: str) -> bool:
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)

    return within


def _fuse(model: nn.Module, within: Callable[[str], bool]) -> list[Callable[[], object]]:
    """Fuse what lies within, with what was converted before; returns what undoes it."""

    def factored(name: str) -> bool:
        return within(name) or isinstance(model.get_submodule(name), SVFConv2d)

    undo: list[Callable[[], object]] = []
    blocks, units, _ = find(model, factored)
    for found in blocks:
        module = model.get_submodule(found.name)
        if not isinstance(module, Fused) and any(map(within, found.convs)):
            kind = SVFBottleneck if len(found.stages) == 3 else SVFBasicBlock
            undo.append(kind.adopt(module, found).unfuse)
    for container, group in groupby(units, lambda unit: unit.container):
        module = model.get_submodule(container)
        prefix = f"{container}." if container else ""
        new = tuple(unit for unit in group if within(prefix + unit.stage.conv))
        if new:
            undo.append(FusedSequential.adopt(module, new))
    return undo


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give the source's hooks to the target; their handles still remove them."""
    for name, value in vars(source).items():
        if name.startswith(("_forward_", "_backward_")) or name == "_is_full_backward_hook":
            vars(target)[name] = value


def _feeds_inplace(model: nn.Module, name: str) -> bool:
    """Tell whether the next module of the same nn.Sequential overwrites this one's output."""
    parent, _, own = name.rpartition(".")
    container = model.get_submodule(parent)
    if not isinstance(container, nn.Sequential):
        return False
    children = dict(container.named_children())
    following = list(children)[list(children).index(own) + 1 :] if own in children else []
    return bool(following) and getattr(children[following[0]], "inplace", False) is True


def _factors(layer: nn.Conv2d | nn.Linear, cache: str | os.PathLike | None) -> Factors:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if cache is None:
        return decompose(layer.weight, groups)
    weight = layer.weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} {groups}".encode())
    digest.update(weight.flatten().view(torch.uint8).numpy().data)
    path = Path(cache).expanduser() / f"{digest.hexdigest()[:32]}.safetensors"
    try:
        kept = load_file(path, device=str(layer.weight.device))
        return _checked(Factors(kept["U"], kept["S"], kept["V"]), layer.weight.detach(), groups)
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        factors = decompose(layer.weight, groups)
        save_atomically({k: v.cpu() for k, v in factors._asdict().items()}, path)
        return factors


def _check_factors(factors: dict[str, Factors], layers: dict[str, nn.Conv2d | nn.Linear]) -> None:
    """Check that factors have the names and the shapes of layers to convert."""
    for name, known in factors.items():
        if name not in layers:
            raise ValueError(f"factors: expected names of layers to convert, got {name!r}")
        layer = layers[name]
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        expected, got = _shapes(layer.weight, groups), [tuple(each.shape) for each in known]
        if got != expected:
            raise ValueError(
                f"factors: expected U, S, V of shapes {expected} for {name!r}, got {got}"
            )


def _shapes(weight: Tensor, groups: int) -> list[tuple[int, ...]]:
    """List the shapes of the U, S and V of a weight."""
    rank = min(weight.shape[0] // groups, weight[0].numel())
    return [(weight.shape[0], rank), (groups * rank,), (groups * rank, *weight.shape[1:])]


def _checked(factors: Factors, weight: Tensor, groups: int) -> Factors:
    """Return the factors; ValueError unless they are those of the weight, to rounding."""
    shapes, dtypes = _shapes(weight, groups), {each.dtype for each in factors}
    if [tuple(each.shape) for each in factors] != shapes or dtypes != {weight.dtype}:
        raise ValueError("factors of another weight")
    wide = torch.promote_types(weight.dtype, torch.float32)
    allowed = 4 * torch.finfo(weight.dtype).eps + 64 * torch.finfo(wide).eps
    error = compose(*factors, groups).sub_(weight).norm()
    if not error <= allowed * weight.to(wide).norm():
        raise ValueError("damaged factors")
    return factors
