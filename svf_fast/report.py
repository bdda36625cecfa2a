"""What each SVF layer keeps for the backward pass and computes, predicted from shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

from svf_fast.convert import svf_layers
from svf_fast.nn.conv2d import SVFConv2d
from svf_fast.nn.factored import Factored
from svf_fast.ops.svf_conv2d import reads_input

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One SVF layer: bytes it keeps for the backward pass, and FLOPs of forward and backward.

    ``reference_…`` is the same of the paper's three layers. Of all its calls in one forward pass.
    """

    name: str
    strategy: str
    guarded: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    saved_bytes: int
    reference_bytes: int
    flops: int
    reference_flops: int


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The SVF layers of a model in the order of their first call; ``print`` shows it as a table."""

    layers: tuple[LayerReport, ...]
    factor_bytes: int  # U, S, V and the composed weights: resident, whatever the input

    @property
    def saved_bytes(self) -> int:
        return sum(layer.saved_bytes for layer in self.layers)

    @property
    def reference_bytes(self) -> int:
        return sum(layer.reference_bytes for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def reference_flops(self) -> int:
        return sum(layer.reference_flops for layer in self.layers)

    def __str__(self) -> str:
        width = max(len("layer"), len("total"), *(len(layer.name) for layer in self.layers))
        head = (
            f"{'layer':<{width}}  {'strategy':<9}  {'output':<20}  {'saved MiB':>9}  "
            f"{'reference':>9}  {'GFLOP':>8}  {'reference':>9}"
        )
        lines = [head, "-" * len(head)]
        for layer in self.layers:
            strategy = layer.strategy + (f"+{layer.guarded}" if layer.guarded else "")
            shape = "×".join(map(str, layer.output_shape))
            lines.append(_row(width, layer.name, strategy, shape, layer))
        lines += ["-" * len(head), _row(width, "total", "", "", self)]
        lines.append(f"resident factors and composed weights: {self.factor_bytes / _MIB:.1f} MiB")
        return "\n".join(lines)


def _row(width: int, name: str, strategy: str, shape: str, of: LayerReport | MemoryReport) -> str:
    saved, reference = of.saved_bytes / _MIB, of.reference_bytes / _MIB
    return (
        f"{name:<{width}}  {strategy:<9}  {shape:<20}  {saved:>9.2f}  {reference:>9.2f}  "
        f"{of.flops / 1e9:>8.2f}  {of.reference_flops / 1e9:>9.2f}"
    )


def memory_report(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None
) -> MemoryReport:
    """Predict what the SVF layers keep for the backward pass of one input of ``input_shape``.

    The model runs once on shapes alone (meta tensors): no memory, no arithmetic. Counted is what
    each layer itself keeps, its input taken to need a gradient; that ``gram``'s output or
    ``fold``'s input may be the very storage a neighbour keeps too is not deducted. ``dtype``
    is that of the activations, by default that of the factors: name it for a run under autocast.

    Raises ValueError when the model has no SVF layer or none of them is called.
    """
    layers = svf_layers(model)
    if not layers:
        raise ValueError("model: expected SVF layers to report on, found none; was it converted?")
    strategies = {name: (layer.strategy_in_use, layer.guarded) for name, layer in layers.items()}
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    handles = []
    for name, layer in layers.items():

        def record(_, inputs, output, name=name):
            calls.setdefault(name, []).append((tuple(inputs[0].shape), tuple(output.shape)))

        handles.append(layer.register_forward_hook(record))
    try:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        first = next(iter(layers.values()))
        x = torch.empty(tuple(input_shape), device="meta", dtype=first.U.dtype)
        with torch.no_grad():
            functional_call(model, meta, (x,))
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.refresh()
    if not calls:
        raise ValueError("model: expected a forward pass through its SVF layers, none was called")
    reports = tuple(
        _report(name, layers[name], *strategies[name], shapes, dtype or layers[name].U.dtype)
        for name, shapes in calls.items()
    )
    return MemoryReport(reports, sum(_resident(layer) for layer in layers.values()))


def _report(name, layer: Factored, strategy, guarded, shapes, dtype) -> LayerReport:
    totals = [0, 0, 0, 0]
    for input_shape, output_shape in shapes:
        own = _cost(layer, strategy, guarded, input_shape, output_shape)
        cost = own + _cost(layer, "reference", 0, input_shape, output_shape)
        totals = [total + part for total, part in zip(totals, cost, strict=True)]
    elements, flops, reference_elements, reference_flops = totals
    return LayerReport(
        name,
        strategy,
        guarded,
        shapes[0][0],
        shapes[0][1],
        elements * dtype.itemsize,
        reference_elements * dtype.itemsize,
        flops,
        reference_flops,
    )


def _cost(layer: Factored, strategy, guarded, input_shape, output_shape) -> tuple[int, int]:
    """Elements kept and FLOPs of forward, dx and dS, of one call."""
    geometry = layer._geometry()
    groups, rank, out_channels = geometry.groups, layer.rank, len(layer.U)
    fan_in = layer.V[0].numel()
    y = math.prod(output_shape)
    positions = y // out_channels
    x = _kept_input(layer, input_shape)
    v = positions * groups * rank
    weight = 2 * positions * out_channels * fan_in
    factored = 2 * positions * groups * rank * (fan_in + out_channels // groups)
    if strategy == "reference":
        return x + 2 * v, 2 * factored
    if strategy == "chain":
        return v, 2 * factored
    if strategy == "fold":
        return x, 3 * weight
    tail = 2 * positions * groups * guarded * (fan_in + out_channels // groups)
    weight_shape = torch.Size((out_channels, *layer.V.shape[1:], 1, 1)[:4])
    if reads_input(weight_shape, geometry):
        channels = fan_in * groups
        return positions * channels, 2 * weight + 2 * positions * channels * fan_in + tail
    gram = 2 * positions * out_channels * (out_channels // groups)
    return y + positions * groups * guarded, 2 * weight + gram + tail


def _kept_input(layer: Factored, shape: tuple[int, ...]) -> int:
    """Elements of x as the convolution sees it: padded where the padding is a pass of its own."""
    if isinstance(layer, SVFConv2d) and layer._geometry().padding == (0, 0):
        left, right, top, bottom = layer._explicit_padding
        *outer, height, width = shape
        return math.prod(outer) * (height + top + bottom) * (width + left + right)
    return math.prod(shape)


def _resident(layer: Factored) -> int:
    tensors = [layer.U, layer.V, layer.S]
    weight = layer.U.shape[0] * layer.V[0].numel() if layer.strategy_in_use != "reference" else 0
    if layer.strategy_in_use == "chain":
        weight = 0
    return sum(t.numel() * t.element_size() for t in tensors) + weight * layer.U.element_size()
