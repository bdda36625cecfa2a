"""Σ beyond the diagonal as a layer computes with it, and the guard of its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svf_fast import svd
from svf_fast.layers.costs import gram_is_cheaper
from svf_fast.layers.values import CoreInUse, Seen, gathered
from svf_fast.ops.core import turned

if TYPE_CHECKING:
    from svf_fast.layers.factored import Factored


def adopt_parts(layer: Factored, S: Tensor, groups: int) -> None:
    """Register what trains of the layer's core besides S, with values for which Σ is diag(S)."""
    names = layer.core.parts
    for name, value in zip(names, layer.core.initial(S, groups), strict=True):
        layer.register_parameter(name, nn.Parameter(value))


def core_of(layer: Factored, S: Tensor, parts: Sequence[Tensor] | None = None) -> Tensor | None:
    """Compute Σ [G, R, R] for values S [G·R], detached; None where it is ``diag(S)``.

    parts: in the place of the layer's own.
    """
    if layer.core.is_diagonal:
        return None
    own = layer.parts if parts is None else parts
    return layer.core.matrix(S.detach(), [part.detach() for part in own])


def composed_of(layer: Factored, S: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what W is composed of beside V: U and S, or UΣ and ones."""
    return (layer.U, S) if core is None else (turned(layer.U, core), torch.ones_like(S))


def gathered_core(layer: Factored, S: Tensor) -> Tensor | None:
    """Compute Σ of sharded parameters, a collective; of others as :func:`core_of` does."""
    return core_of(layer, S, [gathered(part) for part in layer.parts])


def choose(
    layer: Factored, core: Tensor, lift: Tensor | None
) -> tuple[str, Tensor | None, CoreInUse]:
    """Choose the strategy for a core, the lift of its guarded directions, and invert it for these.

    ``lift``: of the values before, which is kept as long as it serves.
    """
    strategy = layer.strategy
    if strategy in ("auto", "gram"):
        inverse, lift = svd.lifted_inverse(core, lift, 8 if core.is_cuda else 1)
        guarded = 0 if lift is None else lift.shape[-1]
        if strategy == "gram" or gram_is_cheaper(layer, guarded):
            return "gram", lift, CoreInUse(core, inverse)
        strategy = "chain"
    return strategy, None, CoreInUse(core, None)


def follow(layer: Factored) -> None:
    """Compute with the present values of a core, and plan anew where its guard does not serve.

    On a GPU that waits for it once a change. What ``auto`` came to stays until ``refresh``.
    """
    if layer.is_captured or layer.values.are(layer.host_copy(), *layer.all_trained):
        return
    with layer.network.lock, torch.inference_mode(False), torch.no_grad():
        plan, values = layer.plan, layer.values
        if plan is None or values.are(now := layer.host_copy(), *layer.all_trained):
            return
        S = layer.present_S()
        core = core_of(layer, S)
        assert core is not None
        in_use = CoreInUse(core, None)
        if plan.strategy == "gram":
            strategy, lift, in_use = choose(layer, core, plan.tail)
            if strategy != plan.strategy or lift is not plan.tail:
                layer.plan = dataclasses.replace(plan, strategy=strategy, tail=lift, constants={})
        S_in_use = None if layer.trains == "S" else S
        values.moved(Seen(*layer.all_trained), now, S_in_use, in_use)


def in_graph(layer: Factored, S: Tensor) -> CoreInUse:
    """Compute Σ and its inverse where only shapes are there, or in a trace: it runs later.

    Then the lift is that of the plan, and the device asserts that it serves.

    Raises RuntimeError in a capture of a CUDA graph, where nothing can be inverted.
    """
    plan, core = layer.plan, core_of(layer, S)
    assert plan is not None and core is not None
    if plan.strategy != "gram" or not layer.learns:
        return CoreInUse(core, None)
    if not torch.compiler.is_compiling() and not layer.is_captured:
        return CoreInUse(core, core)  # shapes alone
    if layer.is_captured:
        raise RuntimeError(
            f"SVF layer with core={str(layer.core)!r}: expected no capture of a CUDA graph with "
            "strategy 'gram', whose gradient inverts Σ at every change; run eagerly, or use "
            "strategy='chain' for these layers"
        )
    inverse, holds = svd.inverse_with(core, plan.tail)
    torch._assert_async(
        holds,
        f"SVF layer with core={str(layer.core)!r} under torch.compile: Σ has moved so far that "
        "more directions need the exact gradient; call refresh() on the converted layers, or use "
        "strategy='chain'.",
    )
    return CoreInUse(core, inverse)
