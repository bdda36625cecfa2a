"""Convert a pretrained model to SVF layers in place, and back."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from svf_fast.budget import fit, parse_bytes
from svf_fast.files import save_atomically
from svf_fast.fusion.blocks import (
    FusedChain,
    FusedSequential,
    ResidualUnit,
    SVFBasicBlock,
    SVFBottleneck,
    SVFConvBNAct,
)
from svf_fast.fusion.fused import Fused, restore
from svf_fast.fusion.norm import StaysFrozen, is_frozen, keep_frozen
from svf_fast.fusion.plain import plain_layers
from svf_fast.fusion.structure import Chain, Unit, find
from svf_fast.fusion.tokens import find_transformers, layers_of
from svf_fast.fusion.transformer import SVFTransformerBlock
from svf_fast.layers.conv2d import SVFConv2d
from svf_fast.layers.factored import Factored, check_module, svf_layers
from svf_fast.layers.linear import SVFLinear
from svf_fast.layers.log_scale import check_trains
from svf_fast.layers.names import plain_names, within
from svf_fast.layers.network import Network
from svf_fast.layers.values import gathered
from svf_fast.ops.core import Core
from svf_fast.svd import Factors, are_of, decompose, has_memory


def svf_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield what trains of a model's converted layers: S or log_scale, a vector each.

    With a core the parameters that it has besides follow it: off_diagonal, or core_A and core_B.
    For rates relative to the size of S there is :func:`svf_parameter_groups`.
    """
    for layer in svf_layers(model).values():
        yield from layer.all_trained


def svf_parameter_groups(
    model: nn.Module, lr: float, optimizer: str = "adam"
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer for what `svf_parameters` yields, with relative rates.

    One ``lr`` then serves layers of every size: it is the change of S relative to S. A layer whose
    S trains gets a group of its own, with its mean |S| of this moment:

    - ``"adam"``, for steps as large as their rate whatever the gradient (Adam, AdamW, RMSprop):
      ``lr · mean|S|``;
    - ``"sgd"``, for steps proportional to the gradient: ``lr · mean|S|²``.

    A step of ``log_scale`` is relative to S already: these share one group, with ``lr`` itself.
    What a core has besides changes Σ as S does and goes at the rate of its S, ``core_A`` at one
    by its own mean. What AdamW decays S by goes with the rate of its group, and pulls S to 0,
    log_scale to the pretrained S.

    Raises TypeError when ``lr`` is no number; ValueError when it is negative or not finite, for
    another ``optimizer``, a model without SVF layers, and an S of zeros or without values (meta).
    """
    powers = {"adam": 1, "sgd": 2}
    if not isinstance(lr, int | float) or isinstance(lr, bool):
        raise TypeError(f"lr: expected a number, got {lr!r}")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr: expected a finite number of at least 0, got {lr}")
    if optimizer not in powers:
        raise ValueError(f"optimizer: expected one of {', '.join(powers)}, got {optimizer!r}")
    layers = svf_layers(model)
    if not layers:
        raise ValueError("model: expected SVF layers, found none; call svf_fast.convert")
    factors = [layer.trained for layer in layers.values() if layer.trains == "log_scale"]
    groups: list[dict[str, Any]] = [{"params": factors, "lr": lr}] if factors else []
    power = powers[optimizer]
    for name, layer in layers.items():
        relative = {"S": layer.S} if layer.trains == "S" else {}
        relative |= dict(zip(layer.core.parts, layer.parts, strict=True))
        if not relative:
            continue
        A = relative.pop("core_A", None)
        if A is not None:
            rate = lr * _size(f"{name}.core_A", A) ** power
            groups.append({"params": [A], "lr": rate})
        rate = lr * _size(f"{name}.S", layer.S, layer.singular_values) ** power
        groups.append({"params": [*relative.values()], "lr": rate})
    return groups


def _size(name: str, x: Tensor, values: Callable[[], Tensor] | None = None) -> float:
    """Return the mean of |x|, or of the values that stand for it."""
    if x.is_meta:
        raise ValueError(f"{name}: expected values, got none on meta: load weights first")
    size = float((gathered(x).detach() if values is None else values()).abs().mean())
    if not 0 < size < math.inf:
        raise ValueError(
            f"{name}: expected finite values that are not all 0, got a mean of {size}; give it a "
            "group of its own, with a rate of its own"
        )
    return size


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
    keep_norms_frozen: bool = True,
    trains: str = "S",
    keep: str = "exact",
    core: str | Core = "diag",
) -> nn.Module:
    """Replace the convolutions and linear layers of a pretrained model by SVF layers, in place.

    Of a converted layer only S trains, or a factor of it; a layer that is not converted stays as it
    is, so freeze what should not train (``model.requires_grad_(False)``) before. The network
    computes what it computed before, to rounding. ``nn.Conv2d`` and ``nn.Linear`` are converted,
    and subclasses that compute a convolution with a weight of their parameters, as with weight
    standardization, which is then part of what is decomposed. A warning counts those that are left:
    others use their weight in their own way, or a hook computes it (pruning, weight norm). Hooks
    are kept. A layer used twice is converted once; layers that share their weight get an S each,
    with a warning.
    Of a model on the meta device the factors have no values either: load them with ``to_empty`` and
    ``load_state_dict``.

    Args:
        layers: names of modules as ``named_modules`` gives them, with ``*`` as a wildcard and
            without those of wrappers (``_orig_mod``, ``module``); what lies in them is converted.
            None converts the whole model.
        strategy: see :class:`svf_fast.SVFConv2d`.
        fuse: run residual blocks and conv-BN-ReLU sequences of converted convolutions as one
            autograd node each, wherever their batch norms are frozen (evaluation mode), and
            transformer blocks of converted linear layers as two (:class:`SVFTransformerBlock`).
            They are found by what their forward computes, whatever their classes and names.
        cache: folder where decompositions are kept and found again by the hash of their weight.
        progress: show a bar when it takes more than two seconds.
        memory_budget: most that autograd may keep of one forward pass, like ``"1.5GiB"`` or an
            integer of bytes, as :func:`svf_fast.memory_report` counts it: weights and what lives
            within the step are not in it. The fastest plan that fits is set: fused blocks compute
            their second convolution, or the first layer of their MLP, twice where that is needed,
            or, with ``keep="auto"``, keep in 8 bits.
        input_shape: of the forward pass that the budget is for.
        dtype: of the activations in it, for a run under autocast.
        factors: U, S and V by the name of their layer, where they are known already, from a state
            dict for one. They are taken in the place of the layer's weight, and for the pretrained
            weight: adapters fit what they compose, in the basis that they are in. Where S is one
            that was trained, load the state dict after, whose fingerprints are the true ones.
        keep_norms_frozen: batch norms of the model that are frozen now, in evaluation mode and
            without a parameter that trains, stay in evaluation mode when ``model.train()`` is
            called, until one of their parameters trains: their class gets a ``train`` of its own.
            A warning tells of others in fused blocks, which take these apart. False lets all
            follow the mode. ``SyncBatchNorm.convert_sync_batchnorm`` makes new modules: call it
            before.
        trains: what of the converted layers trains: S, or with ``"log_scale"`` s' of S·exp(s'), at
            the same saved bytes; see :class:`svf_fast.SVFConv2d`.
        keep: ``"exact"``, or ``"int8"``: fused blocks and units keep in 8 bits what the gradients
            of S alone are computed from, a third of the bytes in float32 and six tenths in 16
            bits. Outputs and the gradients that other layers get stay as they are, to the bit; the
            gradients of S are off by a few thousandths, a thirtieth of what bfloat16 does to them.
            Of a transformer block it is the last layer's output alone, with ``gram``. ``"auto"``:
            where that is the cheapest way into ``memory_budget``. What is not fused keeps all.
        core: what trains beside S, at the same saved bytes: ``"band:k"``, ``"block:b"`` or
            ``"lowrank:r"`` of Σ in ``W = U Σ Vᵀ``; see :class:`svf_fast.SVFConv2d`.

    Returns the model.

    Raises ValueError when a name in ``layers`` fits no module, nothing is there to convert, the
    model is in a wrapper that has taken its parameters already (DistributedDataParallel), or no
    plan fits the budget, with the smallest that does (:class:`svf_fast.budget.BudgetError`). Then
    the model is as it was.
    """
    if (memory_budget is None) != (input_shape is None):
        missing = "input_shape" if input_shape is None else "memory_budget"
        raise ValueError(
            f"{missing}: expected with the other of memory_budget and input_shape, got None"
        )
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    check_trains(trains)
    _check_keep(keep, fuse, budget)
    core = Core.of(core)
    if isinstance(layers, str):
        layers = (layers,)
    check_module(model)
    if isinstance(model, nn.Conv2d | nn.Linear):
        raise ValueError(
            "model: expected a module that contains layers, got a single layer, which cannot be "
            "replaced in place; use SVFConv2d.from_conv or SVFLinear.from_linear"
        )
    selected = candidates(model, layers)
    plain, left = plain_layers(layer for _, layer in selected)
    chosen = [(name, layer) for name, layer in selected if layer in plain]
    _check_wrappers(model, chosen)
    if not chosen:
        converted = len(svf_layers(model))
        hint = f"{converted} layers are SVF layers already" if converted else "it has none at all"
        hint = "; ".join(left) or hint
        where = "the model" if layers is None else f"layers={list(layers)}"
        raise ValueError(
            f"{where}: expected nn.Conv2d or nn.Linear layers to convert, found none ({hint})"
        )
    known = dict(factors or {})
    check_factors(known, {name: plain[layer] for name, layer in chosen})
    if left:
        warnings.warn(f"svf_fast.convert: left as they are: {'; '.join(left)}", stacklevel=2)
    _warn_of_ties(model, chosen)
    planned: dict[nn.Conv2d | nn.Linear, tuple[str, Factors | None]] = {}
    for name, layer in chosen:
        # gram keeps its output, which the next module may overwrite
        inplace = strategy == "auto" and _feeds_inplace(model, name)
        planned.setdefault(plain[layer], ("chain" if inplace else strategy, known.get(name)))
    made = _factored(planned, cache, progress, trains, core)
    replaced = {layer: made[plain[layer]] for _, layer in chosen}
    for layer, factored in replaced.items():
        if _makes_its_weight(layer, plain[layer]):
            factored.weight_made_by = type(layer).__name__
        _move_hooks(layer, factored)
    for name, layer in chosen:
        model.set_submodule(name, replaced[layer])
    network = Network()
    for factored in svf_layers(model).values():
        network.join(factored)
    undo = _fuse(model, layers) if fuse else []
    if keep == "int8":
        undo = _keep_int8(model, layers) + undo
    _warn_of_training_parts(model)
    if keep_norms_frozen:
        _warn_of_training_norms(model)
        undo += keep_frozen(model)
    if budget is not None and input_shape is not None:
        try:
            fit(model, budget, input_shape, dtype, keep)
        except Exception:
            for each in undo:
                each()
            for name, layer in chosen:
                _move_hooks(replaced[layer], layer)
                model.set_submodule(name, layer)
            raise
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace the SVF layers of a model by plain ones with the composed weights, in place.

    The inverse of :func:`convert`: the state dict has the original's keys and shapes again, and
    loads into the original class. A subclass of ``nn.Conv2d`` comes back as the plain convolution
    that it computed, and a weight that layers shared as one for each. Returns the model.

    Not so with weight standardization and the like: there the merged weight is the standardized
    one. Its state dict is for a network of plain ``nn.Conv2d``. Into the original class it may load
    without an error, and be standardized once more: that computes something else. A warning counts
    such layers.

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
        elif isinstance(module, StaysFrozen):
            restore(module)
    _warn_of_made_weights(model)
    merged: dict[Factored, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Factored):
            if layer not in merged:
                merged[layer] = layer.merged()
                _move_hooks(layer, merged[layer])
            model.set_submodule(name, merged[layer])
    return model


def candidates(
    model: nn.Module, layers: Sequence[str] | None
) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """Return the layers that `convert` replaces if it can, by every name that they have.

    Raises ValueError for a name in `layers` that fits no module.
    """
    names = plain_names(model)
    known = {name for pair in names.items() for name in pair if name}
    for pattern in layers or ():
        if not any(fnmatchcase(name, pattern) for name in known):
            top = dict.fromkeys(name for name in names.values() if name and "." not in name)
            raise ValueError(
                f"layers: expected names of modules, got {pattern!r}, which fits none of this "
                f"{type(model).__name__}; at its top are {', '.join(top) or 'no modules'}"
            )

    chosen = _chosen(model, layers)
    return [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Conv2d | nn.Linear) and chosen(name)
    ]


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> Callable[[str], bool]:
    """Return a test whether the module of a name lies in one of `layers`."""
    names, lies_within = plain_names(model), within(layers)
    return lambda name: lies_within(names[name]) or lies_within(name)


# by name: torch.distributed takes long to import
_OWNERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


def _check_wrappers(model: nn.Module, chosen: list[tuple[str, nn.Conv2d | nn.Linear]]) -> None:
    for outer, module in model.named_modules():
        kind, prefix = type(module).__name__, f"{outer}." if outer else ""
        if kind in _OWNERS and any(name.startswith(prefix) for name, _ in chosen):
            raise ValueError(
                f"model: expected one that is not yet in {kind}, which synchronizes the parameters "
                f"it was built with and would leave S out; convert the model, then wrap it"
            )


def _fuse(model: nn.Module, layers: Sequence[str] | None) -> list[Callable[[], object]]:
    """Fuse what lies in `layers`, with what was converted before; returns what undoes it."""
    chosen = _chosen(model, layers)

    def factored(name: str) -> bool:
        return chosen(name) or isinstance(model.get_submodule(name), Factored)

    undo: list[Callable[[], object]] = []
    blocks, units, _ = find(model, factored)
    for found in blocks:
        module = model.get_submodule(found.name)
        if not isinstance(module, Fused) and any(map(chosen, found.convs)):
            kind = SVFBottleneck if len(found.stages) == 3 else SVFBasicBlock
            undo.append(kind.adopt(module, found).unfuse)
    for chain in (unit for unit in units if isinstance(unit, Chain)):
        if any(map(chosen, chain.convs)):
            undo.append(FusedChain.adopt(model.get_submodule(chain.name), chain).unfuse)
    for name, modes in find_transformers(model, factored)[0].items():
        module = model.get_submodule(name)
        if not isinstance(module, Fused) and any(map(chosen, layers_of(name, modes))):
            undo.append(SVFTransformerBlock.adopt(module, modes).unfuse)
    sequences = (unit for unit in units if isinstance(unit, Unit))
    for container, group in groupby(sequences, lambda unit: unit.container):
        module = model.get_submodule(container)
        prefix = f"{container}." if container else ""
        new = tuple(unit for unit in group if chosen(prefix + unit.stage.conv))
        if new:
            undo.append(FusedSequential.adopt(module, new))
    return undo


def _check_keep(keep: str, fuse: bool, budget: int | None) -> None:
    if keep not in ("exact", "int8", "auto"):
        raise ValueError(f"keep: expected 'exact', 'int8' or 'auto', got {keep!r}")
    if keep != "exact" and not fuse:
        raise ValueError(
            f"keep: expected 'exact' with fuse=False, got {keep!r}: only fused blocks keep in 8 "
            "bits, because a layer alone keeps a map that its batch norm keeps anyway"
        )
    if keep == "auto" and budget is None:
        raise ValueError(
            "keep: expected a memory_budget with 'auto', which keeps in 8 bits what a budget asks "
            "for; use 'int8' to keep all fused blocks so"
        )


def _keep_int8(model: nn.Module, layers: Sequence[str] | None) -> list[Callable[[], object]]:
    """Let what is fused of `layers` keep in 8 bits; returns what undoes it."""
    chosen = _chosen(model, layers)
    undo: list[Callable[[], object]] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        convs: Iterable[str] = ("conv",) if isinstance(module, SVFConvBNAct) else ()
        if isinstance(module, Fused) and module.takes_int8:
            convs = module.fused_convs()
        if any(chosen(prefix + conv) for conv in convs):
            undo.append(partial(setattr, module, "keeps_int8", module.keeps_int8))
            module.keeps_int8 = True
    if not undo:
        warnings.warn(
            "svf_fast.convert: keep='int8': nothing that was converted keeps 8 bits, which fused "
            "residual blocks and conv-BN-ReLU units do, and transformer blocks with the strategy "
            "'gram'; svf_fast.memory_report says what is fused",
            stacklevel=3,
        )
    return undo


def _warn_of_ties(model: nn.Module, chosen: list[tuple[str, nn.Conv2d | nn.Linear]]) -> None:
    """Warn of weights that something else in the model shares with a layer that is converted."""
    converted = {layer.weight: name for name, layer in chosen}
    holders: dict[Tensor, dict[nn.Module, str]] = {weight: {} for weight in converted}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in holders:
                holders[parameter][module] = f"{name}.{key}".lstrip(".")
    ties = [" and ".join(names.values()) for names in holders.values() if len(names) > 1]
    if ties:
        warnings.warn(
            f"svf_fast.convert: {'; '.join(ties)} are one weight, and will be so no longer: each "
            "SVF layer trains an S of its own, and svf_fast.merge gives each a weight of its own",
            stacklevel=3,
        )


def _makes_its_weight(layer: nn.Conv2d | nn.Linear, plain: nn.Conv2d | nn.Linear) -> bool:
    """Tell whether a layer convolves with something else than its parameter; no on meta."""
    return (
        plain is not layer
        and has_memory(plain.weight)
        and not torch.equal(layer.weight, plain.weight)
    )


def _warn_of_made_weights(model: nn.Module) -> None:
    made = Counter(layer.weight_made_by for layer in svf_layers(model).values())
    made.pop("", None)
    if made:
        kinds = ", ".join(f"{count} {kind}" for kind, count in made.most_common())
        warnings.warn(
            f"svf_fast.merge: {kinds}: merged to plain convolutions with the weights that these "
            "layers made of their parameters (weight standardization). Keep the merged model, or "
            "load its state dict into one with nn.Conv2d there; the original class would make its "
            "weights anew of these, and compute something else",
            stacklevel=3,
        )


def _warn_of_training_norms(model: nn.Module) -> None:
    norms = {
        module.get_submodule(stage.bn)
        for module in model.modules()
        if isinstance(module, ResidualUnit | FusedChain | FusedSequential)
        for stage in module.fused_stages()
    }
    training = sum(isinstance(norm, _BatchNorm) and not is_frozen(norm) for norm in norms)
    if training:
        warnings.warn(
            f"svf_fast.convert: {training} of the {len(norms)} batch norms in fused blocks are not "
            "frozen: these blocks run layer by layer and keep more for the backward pass. Call "
            "model.eval().requires_grad_(False) before the conversion; if batch norms are to "
            "train, pass keep_norms_frozen=False",
            stacklevel=3,
        )


def _warn_of_training_parts(model: nn.Module) -> None:
    """Warn of transformer blocks that run layer by layer because something else trains."""
    blocks = [module for module in model.modules() if isinstance(module, SVFTransformerBlock)]
    parts = [list(block.frozen_parts().values()) for block in blocks]
    training = sum(any(part.requires_grad for part in each) for each in parts)
    if training:
        warnings.warn(
            f"svf_fast.convert: of {training} of the {len(blocks)} transformer blocks layer norms, "
            "scales or biases train: these run layer by layer and keep more for the backward pass. "
            "Call model.requires_grad_(False) before the conversion, if these are to stay",
            stacklevel=3,
        )


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


def _factored(
    planned: Mapping[nn.Conv2d | nn.Linear, tuple[str, Factors | None]],
    cache: str | os.PathLike | None,
    progress: bool,
    trains: str,
    core: Core,
) -> dict[nn.Conv2d | nn.Linear, Factored]:
    """Return the SVF layer of each layer, given its strategy and factors if known.

    They are made side by side, a thread each. One decomposition is thousands of short parallel
    regions, whose threads all wait for one that another process has pushed aside; side by side, no
    thread waits.
    """

    def build(layer: nn.Conv2d | nn.Linear) -> Factored:
        strategy, known = planned[layer]
        factors = known or _factors(layer, cache)
        if isinstance(layer, nn.Conv2d):
            return SVFConv2d.from_conv(layer, strategy, factors, trains, core)
        return SVFLinear.from_linear(layer, strategy, factors, trains, core)

    def built(made: Iterable[Factored]) -> dict[nn.Conv2d | nn.Linear, Factored]:
        bar = tqdm(made, "decomposing", len(planned), unit="layer", delay=2, disable=not progress)
        return dict(zip(planned, bar, strict=True))

    if not all(has_memory(layer.weight) and layer.weight.is_cpu for layer in planned):
        return built(map(build, planned))  # a GPU has its own threads, and fakes are for one thread
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that begin from now on
    try:
        with ThreadPoolExecutor(threads) as pool:
            return built(pool.map(build, planned))
    finally:
        torch.set_num_threads(threads)


def _factors(layer: nn.Conv2d | nn.Linear, cache: str | os.PathLike | None) -> Factors:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if cache is None or not has_memory(layer.weight):
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


def check_factors(
    factors: Mapping[str, Factors], layers: Mapping[str, nn.Conv2d | nn.Linear]
) -> None:
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
    shapes = _shapes(weight, groups)
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtypes = [weight.dtype, wide, weight.dtype]
    if [tuple(f.shape) for f in factors] != shapes or [f.dtype for f in factors] != dtypes:
        raise ValueError("factors of another weight")
    if not are_of(weight, factors, groups):
        raise ValueError("damaged factors")
    return factors
