"""Exact gradients: compared with the official chain's in float64, whole and block by block."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.race.levels import Inputs, Level, Settings, autocast, trained

# The rule of the tests: twice the error of the official chain, plus what sums of products round.
FACTOR = 2.0
ROUNDINGS = {"float64": 64.0, "float32": 8.0, "bfloat16": 1.5, "float16": 1.5}
TENSOR_CORE_ROUNDINGS = 32.0  # float32 on a GPU: three TF32 products stand for one
LIMIT = 0.5  # of what is allowed to the whole: gradients of zeros have the error 1
UNIT_LIMIT = 0.4  # and to a block: one gradient of five that is zero has the error 0.45
WHOLE = "all"


def step(level: Level, network: nn.Module, inputs: Inputs, name: str, settings: Settings) -> None:
    """Run forward and backward, on a GPU without waiting; gradients end in ``.grad``."""
    with autocast(settings):
        y = level.forward(network, inputs, name)
    y.backward(None if inputs.grad_y is None else inputs.grad_y.to(y.dtype))


def renew(network: nn.Module, inputs: Inputs) -> None:
    """Leave what an optimizer step leaves: no gradients, trained parameters written to."""
    for parameter in trained(network).values():
        parameter.grad = None
        with torch.no_grad():
            parameter.mul_(1.0)
    for argument in inputs.arguments:
        argument.grad = None


def gradients(
    level: Level, network: nn.Module, inputs: Inputs, name: str, settings: Settings
) -> dict[str, Tensor]:
    """Return the gradients of parameters and arguments by name, in float64."""
    renew(network, inputs)
    step(level, network, inputs, name, settings)
    found = {key: parameter.grad for key, parameter in trained(network).items()}
    found |= {f"argument {n}": a.grad for n, a in enumerate(inputs.arguments)}
    found = {key: grad.double() for key, grad in found.items() if grad is not None}
    renew(network, inputs)
    return found


def relative_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the root mean square of |found - truth| / |truth| over what both have."""
    common = found.keys() & truth.keys()
    errors = [
        ((found[key].reshape_as(truth[key]) - truth[key]).norm() / truth[key].norm()).item()
        for key in common
    ]
    return statistics.fmean(error**2 for error in errors) ** 0.5 if errors else float("nan")


class Tap(NamedTuple):
    """What went into a unit of the network and the gradient that came to its output."""

    x: Tensor
    grad_y: Tensor


class Truth(NamedTuple):
    """Of one seed: the gradients of the official chain in float64 by unit, and the units' taps."""

    seed: int
    gradients: dict[str, dict[str, Tensor]]
    taps: dict[str, Tap]


class Judge:
    """Tells exact rows by the official chain, which it keeps in float64 and as it is.

    A whole network's error in 16 bits says little where many layers amplify it. There each unit of
    the network, a block, is judged alone as well: on the input and the gradient that the chain in
    float64 has there, rounded to 16 bits. What is allowed to the whole is asked for only as long as
    a gradient of zeros would fail; where a level has no blocks it is never more than `LIMIT`. A
    peer that rounds what it keeps is held to what the chain's error is in `Peer.judged_in`.

    Args:
        level, group: what is raced.
        official: the paper's layers, on the device of the race.
    """

    def __init__(self, level: Level, group: str, official: nn.Module) -> None:
        self._level, self._group = level, group
        self._chain, self._exact = official, copy.deepcopy(official).double()

    def judge(
        self,
        networks: dict[str, nn.Module],
        settings: Settings,
        seeds: Sequence[int],
        reported: Callable[[str], contextlib.AbstractContextManager],
        rows: dict[str, dict[str, Any]],
    ) -> set[str]:
        """Return the peers of which the whole and each unit are near enough for one of the seeds.

        Args:
            networks: by peer.
            settings: of the inputs.
            seeds: of the inputs: a ReLU at rounding may flip in one of them.
            reported: context in which a peer runs, which takes its errors and notes why it cannot.
            rows: by peer: get `error`, of the whole, and `block_error`, the largest of a unit.
        """
        level = self._level
        units = {name: self._units(level.peers[name].compiled, settings) for name in networks}
        truths = [self._truth(seed, settings, set().union(*units.values())) for seed in seeds]
        rules = {name: level.peers[name].judged_in or settings.dtype for name in networks}
        by_dtype = {
            dtype: self._allowed(truths, dataclasses.replace(settings, dtype=dtype))
            for dtype in set(rules.values())
        }
        allows = {name: by_dtype[dtype] for name, dtype in rules.items()}
        waiting = {name: {WHOLE, *units[name]} & allows[name].keys() for name in networks}
        for truth in truths:
            for name in [name for name in waiting if waiting[name]]:
                errors: dict[str, float] = {}
                with reported(name):
                    errors = self._errors(networks[name], name, truth, waiting[name], settings)
                if not errors:
                    del waiting[name]
                    continue
                rows[name]["error"] = errors[WHOLE]
                if of_units := [error for key, error in errors.items() if key != WHOLE]:
                    rows[name]["block_error"] = max(of_units)
                waiting[name] -= {key for key, e in errors.items() if e <= allows[name].get(key, 0)}
        return {name for name in waiting if not waiting[name]}

    def _units(self, compiled: bool, settings: Settings) -> list[str]:
        if getattr(torch, settings.dtype).itemsize > 2:
            return []
        return self._level.units(self._chain, compiled)

    def _truth(self, seed: int, settings: Settings, units: set[str]) -> Truth:
        level, exact = self._level, dataclasses.replace(settings, dtype="float64")
        inputs = level.inputs(exact, self._group, seed)
        with _tapped(self._exact, units, getattr(torch, settings.dtype)) as taps:
            found = {WHOLE: gradients(level, self._exact, inputs, "official", exact)}
        for name, tap in taps.items():
            found[name] = _unit_gradients(self._exact.get_submodule(name), tap, exact)
        return Truth(seed, found, taps)

    def _allowed(self, truths: list[Truth], settings: Settings) -> dict[str, float]:
        """Return the error allowed to each unit, from the seed in which no ReLU flipped."""
        errors: dict[str, list[float]] = {}
        for truth in truths:
            own = self._errors(self._chain, "official", truth, truth.gradients.keys(), settings)
            for key, error in own.items():
                errors.setdefault(key, []).append(error)
        allowed = {key: FACTOR * min(e) + _floor(settings) for key, e in errors.items()}
        if len(allowed) > 1 and allowed[WHOLE] > LIMIT:
            del allowed[WHOLE]
        limits = {key: LIMIT if key == WHOLE else UNIT_LIMIT for key in allowed}
        return {key: min(value, limits[key]) for key, value in allowed.items()}

    def _errors(
        self,
        network: nn.Module,
        name: str,
        truth: Truth,
        units: Collection[str],
        settings: Settings,
    ) -> dict[str, float]:
        """Return the errors of the whole and of these units; missing gradients of S raise."""
        level = self._level
        inputs = level.inputs(settings, self._group, truth.seed)
        found = {WHOLE: gradients(level, network, inputs, name, settings)}
        for unit in truth.taps.keys() & set(units):
            found[unit] = _unit_gradients(network.get_submodule(unit), truth.taps[unit], settings)
        if level.peers[name].trains == "S":
            for key, own in found.items():
                if missing := truth.gradients[key].keys() - own.keys():
                    raise RuntimeError(f"no gradient for {', '.join(sorted(missing))}")
        return {key: relative_error(own, truth.gradients[key]) for key, own in found.items()}


def _floor(settings: Settings) -> float:
    """Return what sums of products may round."""
    tensor_cores = torch.device(settings.device).type == "cuda" and settings.dtype == "float32"
    roundings = TENSOR_CORE_ROUNDINGS if tensor_cores else ROUNDINGS[settings.dtype]
    return roundings * torch.finfo(getattr(torch, settings.dtype)).eps


@contextlib.contextmanager
def _tapped(network: nn.Module, units: set[str], dtype: torch.dtype) -> Iterator[dict[str, Tap]]:
    """Yield a dict that a forward and backward pass fills with a tap of each unit.

    A unit that no gradient reaches has none; of one that is called again, one call counts.
    """
    taps: dict[str, Tap] = {}
    handles = []
    for name in units:

        def keep(module: nn.Module, arguments: tuple, y: Tensor, name: str = name) -> None:
            x = arguments[0].detach().to(dtype)
            if y.requires_grad:
                y.register_hook(lambda grad: taps.setdefault(name, Tap(x, grad.to(dtype))) and None)

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _unit_gradients(unit: nn.Module, tap: Tap, settings: Settings) -> dict[str, Tensor]:
    """Return the gradients of a unit's parameters and input by name, in float64."""
    dtype = getattr(torch, settings.dtype)
    x = tap.x.detach().to(dtype, copy=True).requires_grad_()
    inputs = Inputs((x,))
    renew(unit, inputs)
    with autocast(settings):
        y = unit(x)
    y.backward(tap.grad_y.to(y.dtype, copy=True))
    found = {key: parameter.grad for key, parameter in trained(unit).items()} | {"input": x.grad}
    found = {key: grad.double() for key, grad in found.items() if grad is not None}
    renew(unit, inputs)
    return found
