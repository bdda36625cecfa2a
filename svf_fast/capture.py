"""Converted models in CUDA graphs: when a graph still holds, and W composed once for all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator

from torch import nn

from svf_fast.fusion.fused import Fused
from svf_fast.layers.factored import Factored, check_module, svf_layers
from svf_fast.layers.network import Network


def follow(model: nn.Module) -> Hashable:
    """Follow a model's S without waiting for a GPU; return a key of what a CUDA graph depends on.

    Call it before the graph is captured and before each replay. When the key differs from that of
    the capture, capture again: S has moved so far that more directions need their exact gradient,
    or something other than the values of a trained S was written to or replaced. The key never
    changes for a model without SVF layers and batch norms.
    """
    check_module(model)
    found: list[Hashable] = []
    networks: set[Network] = set()
    for module in model.modules():
        if isinstance(module, Factored):
            plan = module.current_plan()
            addresses = [x.data_ptr() for x in module.all_trained]
            found += (plan, *addresses, module.learns, module.geometry)
            if not module.learns:  # then W is a constant of the graph
                found.append(module.values.seen)
            networks.add(module.network)
        elif isinstance(module, Fused):
            found.append(module.constants_key())
    for network in networks:
        network.prepare()
    return tuple(found)


@contextlib.contextmanager
def composed(model: nn.Module) -> Iterator[None]:
    """Compose W of all SVF layers once, and check their guards, in a capture of a CUDA graph.

    The body of a capture goes into it, forward and backward pass. Each replay then begins with one
    launch that composes every W from the S of that moment, and with one that asserts that the
    guarded directions still suffice; without this each layer does both for itself. Before the
    capture a step must have run eagerly, and :func:`follow` after S last changed. Does nothing
    outside a capture and for models without SVF layers on a GPU.

    Raises RuntimeError when a layer has not been called or followed before.
    """
    layers = [layer for layer in svf_layers(model).values() if layer.is_captured]
    networks = {(layer.network, layer.S.device) for layer in layers}
    try:
        for network, device in networks:
            network.compose_captured(device)
        yield
    finally:
        for network, device in networks:
            network.end_capture(device)
