"""Adapters: the singular values of a model alone, with the fingerprint of what they belong to.

Names are without wrappers (torch.compile, DistributedDataParallel): see :func:`plain_names`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from svf_fast.convert import candidates, check_factors, convert
from svf_fast.files import ADAPTER_FORMAT, FLOATS, plain_json, read_adapter, save_atomically
from svf_fast.fusion.plain import plain_layers
from svf_fast.layers import fingerprint
from svf_fast.layers.core_values import CoreValues, directions
from svf_fast.layers.factored import Factored, svf_layers
from svf_fast.layers.log_scale import out_of_reach
from svf_fast.layers.names import Place, places, plain_names, within
from svf_fast.svd import Factors, check_weight

_CARD_BYTES = 16 * 2**10
_SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """The singular values of every SVF layer of a model, kept apart from it.

    Several can be in memory, 50 KB each for a ResNet-50, and take turns in one converted model:
    :meth:`apply` copies S, nothing is decomposed again. S is what a layer computes with: S·exp(s')
    where s' trains, so an adapter does not tell which of the two did. Of layers with a core it has
    all of Σ.

    Args:
        S: the singular values by layer, each [G·R], of a floating dtype.
        fingerprints: by layer, of the weight it was decomposed from, in hexadecimal digits: a hash,
            and what tells how far another weight is from it; and of the basis that S is of, where
            that is not the one of :func:`svf_fast.decompose`.
        card: what there is to say about it, as plain JSON of at most 16 KiB. The keys are free;
            these are the ones that `fss` writes: ``backbone``, ``weights``, ``layers``, ``data``,
            ``fold``, ``shots``, ``model``, ``steps`` and ``metric`` (values by name).
        path: the file it was read from, for messages.
        also: parameters and buffers that go with it, of a trained head for example, by name.
        cores: by layer, what of Σ stands beside S where it is more than diag(S).

    Raises:
        TypeError: S, ``also`` or the card of another type.
        ValueError: no layer; values that are not finite, or of another dtype or shape; layers
            without a fingerprint; a card that is too large or no plain JSON.
    """

    S: Mapping[str, Tensor]
    fingerprints: Mapping[str, str]
    card: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    also: Mapping[str, Tensor] = field(default_factory=dict)
    cores: Mapping[str, CoreValues] = field(default_factory=dict)

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
            if not isinstance(digits, str) or not re.fullmatch(fingerprint.PATTERN, digits):
                raise ValueError(
                    f"fingerprint of {name!r}: expected 32 hexadecimal digits, got "
                    f"{digits!r:.50} (100 with distances, 168 with a basis)"
                )
        for name, values in self.also.items():
            _check_finite(name, values)
        for name, core in self.cores.items():
            if name not in self.S:
                raise ValueError(f"cores: expected names of its layers, got {name!r}")
            if problem := core.problem(len(self.S[name])):
                raise ValueError(f"{name}: {problem}")
        object.__setattr__(self, "card", plain_json("card", self.card, _CARD_BYTES))

    @classmethod
    def of(
        cls, model: nn.Module, card: Mapping[str, Any] | None = None, also: Sequence[str] = ()
    ) -> Adapter:
        """Take the present values of a converted model; before it trains, the pretrained ones.

        ``also``: names of modules, parameters or buffers that go with S, as in ``convert``.

        Raises ValueError when the model has no SVF layer, values that are not finite, or nothing of
        a name in ``also``.
        """
        layers = _converted(model)
        if not layers:
            raise ValueError("model: expected SVF layers, found none; call svf_fast.convert")
        S = {name: layer.singular_values() for name, layer in layers.items()}
        digits = fingerprint.as_texts([layer.fingerprint for layer in layers.values()])
        fingerprints = dict(zip(S, digits, strict=True))
        taken = {name: CoreValues.of(layer) for name, layer in layers.items()}
        cores = {name: core for name, core in taken.items() if core is not None}
        card = {} if card is None else card
        return cls(S, fingerprints, card, None, _chosen(model, also), cores)

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
            S, fingerprints, card, also, found = read_adapter(path)
            cores = {name: CoreValues.read(text, parts) for name, (text, parts) in found.items()}
            return cls(S, fingerprints, card, path, also, cores)
        except SafetensorError as error:
            text = f"adapter {path}: not a readable safetensors file ({error})"
            raise ValueError(text) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"adapter {path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all: ``<layer>.S``, ``also`` and the card.

        Of layers with a core also ``<layer>.off_diagonal``, or ``core_A`` and ``core_B``, and
        ``<layer>.directions``, which tells the signs of U and V that they are in.
        """
        metadata = {
            "format": ADAPTER_FORMAT,
            "fingerprints": json.dumps(dict(self.fingerprints), sort_keys=True),
            "card": json.dumps(dict(self.card), ensure_ascii=False),
        }
        tensors = {f"{name}.S": values.contiguous() for name, values in self.S.items()}
        if self.cores:
            metadata["cores"] = json.dumps(
                {name: str(own.core) for name, own in self.cores.items()}
            )
            tensors |= {
                f"{name}.{part}": values.contiguous()
                for name, own in self.cores.items()
                for part, values in own.tensors.items()
            }
        if self.also:
            metadata["also"] = json.dumps(sorted(self.also))
            tensors |= {name: values.contiguous() for name, values in self.also.items()}
        save_atomically(tensors, Path(path), metadata)

    def convert(self, model: nn.Module, **options: Any) -> nn.Module:
        """Convert the layers of a plain model that this adapter has values for; returns the model.

        S stays as pretrained. A model that is converted already stays as it is, if the adapter fits
        it. ``options``: those of :func:`svf_fast.convert` except ``layers``; without ``core`` that
        of the adapter.

        Raises ValueError as :meth:`apply` does, before anything is converted.
        """
        self._prepare(model, options)
        return model

    def apply(self, model: nn.Module, **options: Any) -> nn.Module:
        """Set the S of every SVF layer of a model, and what goes ``also``; returns the model.

        A plain model is converted first, see :meth:`convert`. The model, or the one that the
        adapter was taken of, may be in wrappers, or part of a larger one. Nothing is changed unless
        all of it fits. Each weight is composed anew once, when the layer next runs. Where s' of
        S·exp(s') trains, it becomes log(S / pretrained S): exact to rounding.

        Raises ValueError when layers are missing or left over, shapes differ, the frozen weights
        are not those of the adapter, to rounding: another backbone, or other weights; when they
        were decomposed into other directions; when the adapter fits several parts of the model; of
        another core; or where s' trains and no s' gives a value of it. The last, and other
        directions than those of a core, show once a plain model is converted. One with S alone fits
        every core: Σ becomes diag(S).
        """
        place = self._prepare(model, options)
        layers = _converted(model)
        if problem := out_of_reach(self.S, {name: layers[place(name)] for name in self.S}):
            raise ValueError(f"{self._name}: {problem}")
        for name in self.cores:
            if problem := self._core_problem(name, layers[place(name)]):
                raise ValueError(f"{self._name}: {problem}")
        for name, values in self.S.items():
            layer, core = layers[place(name)], self.cores.get(name)
            if core is None:
                layer.assign(values)
            else:
                there = directions(layer.U, layer.geometry.groups)
                layer.assign(values, core.turned_for(there))
        tensors = _tensors(model) if self.also else {}
        with torch.no_grad():
            for name, values in self.also.items():
                tensors[place(name)].copy_(values)
        return model

    @property
    def backbone(self) -> str:
        """Fingerprint of all weights together: adapters of the same one fit the same models."""
        hashes = {name: fingerprint.hash_of(text) for name, text in self.fingerprints.items()}
        text = json.dumps(hashes, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        parts = [part for core in self.cores.values() for part in core.parts.values()]
        count = sum(values.numel() for values in [*self.S.values(), *parts])
        also = f", also {len(self.also)} tensors" if self.also else ""
        return f"Adapter({len(self.S)} layers, {count} values, backbone {self.backbone[:8]}{also})"

    @property
    def _name(self) -> str:
        return "adapter" if self.path is None else f"adapter {self.path}"

    def _prepare(self, model: nn.Module, options: dict[str, Any]) -> Place:
        """Convert a model if it is not; returns where in it the layers of the adapter are."""
        layers = _converted(model)
        if layers:
            return self._place(model, layers, {}, exact=True)
        names = plain_names(model)
        found = candidates(model, None)
        computed, _ = plain_layers(layer for _, layer in found)
        there = {name: computed[layer] for name, layer in found if layer in computed}
        factors: Mapping[str, Factors] = options.get("factors") or {}
        check_factors(factors, there)
        known: dict[nn.Module, Factors] = {there[name]: own for name, own in factors.items()}
        plain = {names[name]: layer for name, layer in there.items()}
        place = self._place(model, plain, known, exact=False)
        cores = {str(own.core) for own in self.cores.values()}
        if len(cores) > 1:
            raise ValueError(
                f"{self._name}: expected one core, to convert a plain model with, got "
                f"{', '.join(sorted(cores))}; convert its layers first"
            )
        options = {"core": next(iter(cores), "diag"), **options}
        if cores and str(options["core"]) not in cores:
            raise ValueError(f"{self._name}: {_other_core(cores.pop(), options['core'])}")
        chosen = {id(plain[place(name)]) for name in self.S}
        wanted = [name for name, layer in plain.items() if id(layer) in chosen]  # all its names
        convert(model, [escape(name) for name in wanted], **options)
        return place

    def _place(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        known: Mapping[nn.Module, Factors],
        exact: bool,
    ) -> Place:
        """Find the layers of the adapter among those of a model: all of them if ``exact``."""
        problems: list[str] = []
        fitting: dict[frozenset[nn.Module], Place] = {}
        for place in places(list(self.S), list(layers), exact):
            if any(_changes(place) > _changes(nearer) for nearer in fitting.values()):
                break
            problem = self._problem(model, layers, known, place)
            if not problem:
                fitting.setdefault(frozenset(layers[place(name)] for name in self.S), place)
            elif not (place.remove and place.add):
                problems.append(problem)
        if len(fitting) > 1:
            parts = [place.add.rstrip(".") for place in fitting.values()]
            raise ValueError(
                f"{self._name}: expected one network that it fits, got a model with "
                f"{len(parts)}: {' and '.join(map(repr, parts))}; pass the one that is meant, such "
                f"as model.get_submodule({max(parts)!r})"
            )
        if not fitting:
            raise ValueError(f"{self._name}: {(problems or [self._other_names(layers, exact)])[0]}")
        return next(iter(fitting.values()))

    def _problem(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        known: Mapping[nn.Module, Factors],
        place: Place,
    ) -> str:
        """Tell why the adapter does not fit layers of its names; empty if it does."""
        own = {name: layers[place(name)] for name in self.S}
        for name, layer in own.items():
            if len(self.S[name]) != (count := _count(layer)):
                return (
                    f"{name}.S: expected {[count]} singular values, got {list(self.S[name].shape)}:"
                    " trained on another backbone; load the one that the adapter was trained on"
                )
        prints = [_fingerprint(layer, known.get(layer)) for layer in own.values()]
        if any(each.is_meta for each in prints):
            return "expected a model with values, got one on meta: load its weights first"
        there_are = dict(zip(own, fingerprint.as_texts(prints), strict=True))
        others = _distant(self.fingerprints, there_are)
        if others:
            return (
                f"trained on another backbone: the frozen weights of {_listed(others)} of "
                f"{len(own)} layers differ {_how_far(others.values())}; load the weights the "
                "adapter was trained with, then convert"
            )
        turned = _turned(self.fingerprints, there_are)
        if turned:
            return (
                f"trained in another basis: {_listed(turned)} of {len(own)} layers have the "
                "weights of the adapter, decomposed into other directions, or in another order; "
                "convert with the factors= of the training, or without if it had none"
            )
        for name in self.cores:
            if problem := self._core_problem(name, own[name]):
                return problem
        tensors = _tensors(model) if self.also else {}
        for name, values in self.also.items():
            there = tensors.get(place(name))
            if there is None:
                return f"{name}: expected in the model, which has no parameter or buffer called so"
            if there.shape != values.shape:
                return (
                    f"{name}: expected {list(there.shape)} as in the model, got "
                    f"{list(values.shape)}; build the model with the layer that was trained"
                )
        return ""

    def _core_problem(self, name: str, layer: nn.Module) -> str:
        """Tell why the core of a layer does not fit; empty if it does, or shows later."""
        own = self.cores[name]
        if not isinstance(layer, Factored):
            return ""
        if layer.core != own.core:
            return f"{name}: {_other_core(own.core, layer.core)}"
        if own.turned_for(directions(layer.U, layer.geometry.groups)) is None:
            return (
                f"{name}: expected the directions U and V that Σ was trained in, got others, as "
                "near or equal singular values have them from one machine to another; convert with "
                "the factors= of the training"
            )
        return ""

    def _other_names(self, layers: Mapping[str, nn.Module], exact: bool) -> str:
        missing = sorted(layers.keys() - self.S.keys())
        unexpected = sorted(self.S.keys() - layers.keys())
        if not exact:
            return (
                f"expected the network that it was trained on, got one that has no convolution "
                f"{unexpected[0]!r}, and no linear layer ({len(unexpected)} of {len(self.S)} "
                "layers are unknown)"
            )
        lines = [f"expected the {len(layers)} SVF layers of the model, got {len(self.S)}"]
        if missing:
            lines.append(f"not in the file: {_listed(f'{name}.S' for name in missing)}")
        if unexpected:
            lines.append(f"not in the model: {_listed(f'{name}.S' for name in unexpected)}")
        return (
            "; ".join(lines) + ". Convert the model with the same `layers`, or pass the plain "
            "model: the adapter converts it."
        )


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    card: Mapping[str, Any] | None = None,
    also: Sequence[str] = (),
) -> None:
    """Write the S of every SVF layer, as it computes with it, to a file: one ``<layer>.S`` each.

    For a ResNet-50 that is about 60 KB. The file also names, for each layer, a fingerprint of the
    weight it was decomposed from, and keeps the ``card`` of :class:`Adapter`: data, fold, metric
    and whatever else is worth knowing. Names are without those of wrappers. Written whole or not at
    all.

    Args:
        also: names of modules, parameters or buffers that go with it, as in ``convert``: a trained
            head, for example ``("fc",)``.

    Raises ValueError when the model has no SVF layer, values that are not finite or nothing of a
    name in ``also``, ValueError or TypeError when the card is too large or no plain JSON.
    """
    Adapter.of(model, card, also).save(path)


def load_adapter(model: nn.Module, path: str | os.PathLike, **options: Any) -> nn.Module:
    """Set the S of every SVF layer, and what goes with it, from a file; returns the model.

    A plain model is converted first, just the layers that the file of :func:`save_adapter` has
    values for. The model, or the one that was saved, may be in wrappers, or part of a larger one.
    Nothing is changed unless all of it fits. To switch between several, or to look into one, keep
    what :meth:`Adapter.load` returns.

    Args:
        options: of :func:`svf_fast.convert`, except ``layers``, for a model that is not converted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file; layers missing or left over; other shapes; or the frozen
            weights are, beyond rounding, not those the adapter was trained on.
    """
    return Adapter.load(path).apply(model, **options)


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
    other: Iterable[str] = (
        a.S.keys() ^ b.S.keys()
        or _distant(a.fingerprints, b.fingerprints)
        or _turned(a.fingerprints, b.fingerprints)
    )
    if other:
        raise ValueError(
            f"b: expected an adapter of the same backbone, basis and layers as a, got one that "
            f"differs in {_listed(sorted(other))}"
        )
    shapes = [{name: values.shape for name, values in x.also.items()} for x in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"b: expected one with the same tensors besides S as a, got "
            f"{_listed(shapes[1]) or 'none'} for {_listed(shapes[0]) or 'none'}"
        )
    cores: dict[str, CoreValues] = {}
    for name in a.cores.keys() | b.cores.keys():
        own, theirs = a.cores.get(name), b.cores.get(name)
        mixed = own.mixed(theirs, float(t)) if own is not None and theirs is not None else None
        if mixed is None:
            cores_of = [str(x.cores[name].core) if name in x.cores else "diag" for x in (a, b)]
            raise ValueError(
                f"b: expected the core of a, {cores_of[0]!r}, in the same directions, and no "
                f"'lowrank:r', of which a mixture has rank 2r, got {cores_of[1]!r} in {name}"
            )
        cores[name] = mixed
    S = {name: _mixed(values, b.S[name], float(t)) for name, values in a.S.items()}
    also = {name: _mixed(values, b.also[name], float(t)) for name, values in a.also.items()}
    if card is None:
        agreed = {key: value for key, value in a.card.items() if b.card.get(key) == value}
        agreed.pop("metric", None)
        card = {**agreed, "interpolated": t}
    # one of an older version is without distances
    fingerprints = {
        name: max(text, b.fingerprints[name], key=len) for name, text in a.fingerprints.items()
    }
    return Adapter(S, fingerprints, card, None, also, cores)


def _mixed(a: Tensor, b: Tensor, t: float) -> Tensor:
    if not a.is_floating_point():
        return a
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.lerp(a.double(), b.double(), t).to(dtype)


def _converted(model: nn.Module) -> dict[str, Factored]:
    """Return the SVF layers of a model by their plain names."""
    layers, names = svf_layers(model), plain_names(model)
    return {names[name]: layer for name, layer in layers.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and kept buffers by their plain names, without those of SVF layers."""
    names = plain_names(model)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Factored):
            continue
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        own = {**module._parameters, **{key: module._buffers[key] for key in kept}}
        prefix = f"{names[name]}.".lstrip(".")
        found |= {prefix + key: tensor for key, tensor in own.items() if tensor is not None}
    return found


def _chosen(model: nn.Module, also: Sequence[str]) -> dict[str, Tensor]:
    """Copy what lies in the names of ``also``."""
    also = (also,) if isinstance(also, str) else tuple(also)
    tensors = _tensors(model) if also else {}
    for pattern in also:
        chosen = within((pattern,))
        if not any(map(chosen, tensors)):
            raise ValueError(
                f"also: expected names of modules or parameters besides SVF layers, got "
                f"{pattern!r}, which has none in this {type(model).__name__}"
            )
    chosen = within(also)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if chosen(name)}


def _other_core(own: object, there: object) -> str:
    return (
        f"expected a model with core={str(own)!r}, as the adapter has it, got one with "
        f"core={str(there)!r}; convert it with the core of the training"
    )


def _count(layer: nn.Module) -> int:
    """Return how many singular values a layer has, or will have when it is converted."""
    if isinstance(layer, Factored):
        return layer.S.numel()
    weight, groups = layer.get_parameter("weight"), getattr(layer, "groups", 1)
    return groups * min(len(weight) // groups, weight[0].numel())


def _fingerprint(layer: nn.Module, known: Factors | None) -> Tensor:
    """Return the fingerprint of a layer; of a plain one as it is converted, with known factors."""
    if isinstance(layer, Factored):
        return layer.fingerprint
    weight = layer.get_parameter("weight")
    check_weight(weight)
    if known is not None:
        return fingerprint.of_factors(known, weight, getattr(layer, "groups", 1))
    return fingerprint.fingerprint(weight)


def _check_values(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}.S: expected a tensor, got {type(values).__name__}")
    if values.dim() != 1 or not values.numel() or values.dtype not in FLOATS.values():
        raise ValueError(
            f"{name}.S: expected [R] in one of {', '.join(FLOATS)}, got {list(values.shape)} in "
            f"{values.dtype}"
        )
    _check_finite(f"{name}.S", values)


def _check_finite(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if not values.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or Inf: training diverged")


def _distant(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, float]:
    """Return how far the weights of the same layers are apart, where that is beyond rounding."""
    apart = {name: fingerprint.distance(a[name], b[name]) for name in a}
    return {name: far for name, far in apart.items() if not far <= fingerprint.ROUNDING}


def _turned(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Name the layers whose S is of another basis in b than in a."""
    apart = {name: fingerprint.basis_distance(a[name], b[name]) for name in a}
    return [name for name, far in apart.items() if not far <= fingerprint.ROUNDING]


def _changes(place: Place) -> int:
    """Count how many prefixes change from one model to the other."""
    return bool(place.remove) + bool(place.add)


def _how_far(distances: Iterable[float]) -> str:
    far = max(distances)
    if math.isfinite(far):
        return f"by up to {far:.0%} (rounding: less than {fingerprint.ROUNDING:.0%})"
    return (
        "in their fingerprint, which an older version wrote, without how far; if they are the same "
        "but in another dtype, convert and load in the dtype of the training, then model.to(dtype)"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
