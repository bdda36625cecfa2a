"""What the strategies of a layer multiply beyond the plain convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from svf_fast.ops.factors import reads_input

if TYPE_CHECKING:
    from svf_fast.layers.factored import Factored


def gram_is_cheaper(layer: Factored, guarded: int) -> bool:
    """Tell whether ``gram`` multiplies less than ``chain``, per group and position.

    Counted beyond the plain convolution's own multiplications. ``gram`` keeps a map that is
    kept already, or the smaller one: ``chain`` never saves memory.
    """
    geometry = layer.geometry
    shapes = layer.U.shape, layer.V.shape, geometry
    if layer.costs is None or layer.costs[0] != shapes:
        fan_in, fan_out = layer.V[0].numel(), len(layer.U) // geometry.groups
        weight_shape = torch.Size((len(layer.U), *layer.V.shape[1:], 1, 1)[:4])
        reads_x = reads_input(weight_shape, geometry, layer.reads_square)
        matrix = fan_in if reads_x else fan_out
        chain = 2 * layer.rank * (fan_in + fan_out) - 2 * fan_in * fan_out
        chain += 0 if layer.core.is_diagonal else layer.rank * fan_out  # dΣ from g and v
        layer.costs = shapes, matrix**2, fan_in + fan_out, chain
    _, gram, direction, chain = layer.costs
    return gram + guarded * direction <= chain
