"""The backbone of a segmenter: as it came, with the values of an adapter, or tuned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import svf_fast
from fss.config import RegimeConfig
from fss.models import (
    FewShotModel,
    Matching,
    apply_regime,
    convert_backbone,
    leaves_adapter,
)
from fss.processes import lay_out

_STRATEGY = "chain"
"""Of layers that are decomposed for an adapter: the one that suits tuning, see `TUNABLE`."""


class Backbones:
    """Exchanges what the backbone of a model computes, and always finds back.

    Where singular values alone change, they do so in the backbone itself, which is decomposed once.
    Anything else is trained in a copy of it, which takes its place: one more backbone in memory.

    Args:
        model: frozen, in evaluation mode.
        device: of the model.
    """

    def __init__(self, model: FewShotModel | Matching, device: torch.device) -> None:
        self.model, self.device = model, device
        self._was_plain = not _svf_layers(model.backbone)
        self._own: svf_fast.Adapter | None = None  # the values that the backbone came with
        self._start: svf_fast.Adapter | None = None  # those that were set since
        self._untuned: Any = None  # the backbone, while a copy is in its place

    def set(self, adapter: svf_fast.Adapter | None) -> None:
        """Set singular values; None for those that the backbone came with. Undoes any tuning.

        Raises:
            ValueError: an adapter of another backbone; then nothing is changed.
        """
        backbone = self.model.backbone if self._untuned is None else self._untuned
        if adapter is not None:
            self._decompose_for(adapter, backbone)
            self._completed(adapter).apply(backbone)
        elif self._own is not None:
            self._own.apply(backbone)
        self._start = adapter
        self._drop_copy()

    def put_back(self) -> None:
        """Undo tuning: the values are again those that the backbone came with, or that were set."""
        self._drop_copy()
        self.model.requires_grad_(False)
        values = self._own if self._start is None else self._completed(self._start)
        if values is not None:
            values.apply(self.model.backbone)

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Put back what was there before, tuned or not, if what is done within raises anything."""
        backbone = self.model.backbone if self._untuned is None else self._untuned
        tuned = None if self._untuned is None else self.model.backbone
        values = svf_fast.Adapter.of(backbone) if _svf_layers(backbone) else None
        try:
            yield
        except BaseException:
            self._drop_copy()
            self.model.requires_grad_(False).zero_grad()
            before = self._own if values is None else self._completed(values)
            if before is not None:
                before.apply(backbone)
            if tuned is not None:
                self._untuned, self.model.backbone = backbone, tuned
            raise

    def train(self, regime: RegimeConfig, progress: bool = True) -> None:
        """Let what the regime says train in the untuned backbone; the model stays as it is else.

        Args:
            regime: what trains.
            progress: show a bar where decomposing takes seconds.

        Raises:
            ValueError: layers that the backbone does not have, or without what the regime trains.
        """
        self.put_back()
        layers: dict[str, svf_fast.SVFConv2d] = {}
        if leaves_adapter(regime):
            layers = self._decomposed(regime, progress)
            if regime.name == "svf" or all(x.trains == "log_scale" for x in layers.values()):
                for name, layer in layers.items():
                    own = str(layer.core)
                    if regime.core not in ("diag", own) and layer.rank > 1:
                        raise ValueError(
                            f"what: expected core={own!r}, which {name} of this run has, or "
                            f"'diag', which trains S alone; got {regime.core!r}"
                        )
                for layer in layers.values():
                    trained = (layer.trained,) if regime.core == "diag" else layer.all_trained
                    for parameter in trained:
                        parameter.requires_grad_(True)
                return
        elif regime.name == "adapter":
            own = [n for n, child in self.model.backbone.named_children() if _has_adapter(child)]
            if set(own) & set(regime.layers) or (own and regime.layers == ("all",)):
                raise ValueError(
                    f"what: {', '.join(own)} of this run have adapters, which new ones would "
                    "replace; tune something else, or other layers"
                )
        known = _svf_layers(self.model.backbone)
        cored = [name for name, layer in known.items() if str(layer.core) != "diag"]
        if cored and regime.name == "svf_scale":
            raise ValueError(
                f"what: expected a backbone of which S alone was trained for {regime.name}, got "
                f"core={str(known[cored[0]].core)!r} in {cored[0]}; tune svf"
            )
        known = {name: layer for name, layer in known.items() if name not in cored}
        factors = {
            name: svf_fast.Factors(layer.U, layer.S_in_use, layer.V)
            for name, layer in known.items()
        }
        self._untuned = self.model.backbone
        copied = copy.deepcopy(self._untuned)
        self.model.backbone = svf_fast.merge(copied) if _svf_layers(copied) else copied
        try:
            if layers:  # those that have singular values, no others
                chosen = {name: factors[name] for name in layers}
                options = {"strategy": regime.strategy, "progress": progress}
                convert_backbone(self.model.backbone, layers, regime, factors=chosen, **options)
            else:
                svf = regime.name in ("svf", "svf_scale")
                apply_regime(self.model, regime, factors if factors and svf else None, progress)
        except ValueError as error:
            raise ValueError(f"what: {error}") from error
        lay_out(self.model.backbone.to(self.device).eval(), self.device)

    def keep(
        self, regime: RegimeConfig, changed: bool, card: dict[str, Any]
    ) -> svf_fast.Adapter | None:
        """Freeze what `train` let train; return its singular values if these alone trained.

        Args:
            regime: the one of `train`.
            changed: whether anything is better than untuned, else that is put back.
            card: of the adapter.
        """
        self.model.requires_grad_(False)
        if not leaves_adapter(regime):
            if not changed:
                self.put_back()
            return None
        adapter = svf_fast.Adapter.of(self.model.backbone, card)
        if self._untuned is not None:  # S·exp(s') of a copy: in the basis of the backbone
            known = svf_fast.Adapter.of(self._untuned)
            values = {**known.S, **adapter.S}
            adapter = dataclasses.replace(known, S=values, card=card)
            adapter.apply(self._untuned)
            self._drop_copy()
        return adapter

    def _drop_copy(self) -> None:
        if self._untuned is not None:
            self.model.backbone, self._untuned = self._untuned, None

    def _completed(self, adapter: svf_fast.Adapter) -> svf_fast.Adapter:
        """Add the layers that the adapter leaves as they came, of a backbone that was plain."""
        own = self._own
        if own is None or not self._was_plain or not adapter.S.keys() < own.S.keys():
            return adapter
        fingerprints = {**own.fingerprints, **adapter.fingerprints}
        return dataclasses.replace(
            adapter,
            S={**own.S, **adapter.S},
            fingerprints=fingerprints,
            cores={**own.cores, **adapter.cores},
        )

    def _decompose_for(self, adapter: svf_fast.Adapter, backbone: nn.Module) -> None:
        """Decompose the layers of an adapter that are still plain; the values stay."""
        there = {name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
        missing = sorted(adapter.S.keys() & there - _svf_layers(backbone).keys())
        if self._was_plain and not _svf_layers(backbone):
            with self._decomposing(backbone):
                adapter.convert(backbone, strategy=_STRATEGY)
        elif self._was_plain and missing:
            with self._decomposing(backbone):
                svf_fast.convert(backbone, missing, strategy=_STRATEGY)
        if self._own is None:
            self._own = svf_fast.Adapter.of(backbone)

    @contextmanager
    def _decomposing(self, backbone: nn.Module) -> Iterator[None]:
        """Note what more is decomposed within, of a backbone that was plain; the values stay.

        Also if it is stopped in the middle.
        """
        present = None
        if self._own is not None:
            present = svf_fast.Adapter.of(backbone)
            self._own.apply(backbone)
        try:
            yield
        finally:
            lay_out(backbone, self.device).requires_grad_(False)
            if _svf_layers(backbone):
                self._own = svf_fast.Adapter.of(backbone)
            if present is not None:
                self._completed(present).apply(backbone)

    def _decomposed(self, regime: RegimeConfig, progress: bool) -> dict[str, svf_fast.SVFConv2d]:
        """Return the SVF layers that the regime is about, decomposing what is not yet."""
        backbone = self.model.backbone
        children = [name for name, _ in backbone.named_children()]
        chosen = children if regime.layers == ("all",) else list(regime.layers)
        unknown = [name for name in chosen if name not in children]
        if unknown:
            raise ValueError(
                f"what: expected layers of the backbone, which are {', '.join(children)}; got "
                f"{', '.join(map(repr, unknown))}"
            )

        def fits(name: str, kernel: tuple[int, ...]) -> bool:
            sizes = ("all", "x".join(map(str, kernel)))
            return name.split(".")[0] in chosen and regime.kernel in sizes

        plain = {
            name.split(".")[0]
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Conv2d) and fits(name, module.kernel_size)
        }
        if self._was_plain and plain:
            layers = tuple(name for name in chosen if name in plain)
            settings = {"name": "svf", "factors": None, "layers": layers}
            with self._decomposing(backbone):
                apply_regime(self.model, dataclasses.replace(regime, **settings), None, progress)
        there = _svf_layers(backbone)
        found = {name: x for name, x in there.items() if fits(name, x.kernel_size)}
        if not found:
            where = sorted({name.split(".")[0] for name in there})
            raise ValueError(
                f"what: expected layers with singular values to train, {', '.join(regime.layers)} "
                f"of this run has none; they are in {', '.join(where) or 'no layer'}"
            )
        if self._own is None:
            self._own = svf_fast.Adapter.of(backbone)
        return found


@contextmanager
def remembering(backbone: nn.Module) -> Iterator[None]:
    """Compute the layers up to layer 2 once for each image within, where nothing in them trains.

    Images are told apart by their bytes. Does nothing where one of these layers trains, or takes
    statistics of its batch. May be nested.
    """
    early = [m for name, m in backbone.named_children() if name not in ("layer3", "layer4")]
    modules = [m for child in early for m in child.modules()]
    trains = any(p.requires_grad for child in early for p in child.parameters())
    if trains or any(isinstance(m, nn.BatchNorm2d) and m.training for m in modules):
        yield
        return
    compute, known = backbone.early, {}
    outer = vars(backbone).get("early")

    def recall(images: Tensor) -> Tensor:
        keys = [image.cpu().numpy().tobytes() for image in images]
        new = {key: n for n, key in enumerate(keys) if key not in known}
        if new:
            with torch.no_grad():
                maps = compute(images[list(new.values())])
            known.update(zip(new, maps.split(1), strict=True))
        return torch.cat([known[key] for key in keys])  # in the memory format of the maps

    backbone.early = recall
    try:
        yield
    finally:
        if outer is None:
            del backbone.early
        else:
            backbone.early = outer


def _svf_layers(backbone: nn.Module) -> dict[str, svf_fast.SVFConv2d]:
    return {n: m for n, m in backbone.named_modules() if isinstance(m, svf_fast.SVFConv2d)}


def _has_adapter(stage: nn.Module) -> bool:
    return "adapter" in dict(stage.named_children())
