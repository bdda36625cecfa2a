"""What a model keeps for the backward pass and computes, predicted from shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from svf_fast.fusion.blocks import ResidualUnit
from svf_fast.fusion.fused import Fused
from svf_fast.fusion.norm import is_norm
from svf_fast.fusion.plain import plain_layers
from svf_fast.fusion.structure import find
from svf_fast.fusion.tokens import find_transformers
from svf_fast.fusion.transformer import SVFTransformerBlock
from svf_fast.layers.factored import Factored, svf_layers
from svf_fast.ops.factors import reads_input

_MIB = 2**20
_OTHER = "other layers"
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d)


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """A fused unit, an SVF layer outside of one, or all other layers together.

    Attributes:
        name: of the module.
        layers: names of the SVF layers in it.
        strategy: of these layers, and the number of guarded directions where there are any.
        note: why what could be fused is not, or that it recomputes or keeps 8 bits.
        output_shape: of its first call; empty for the other layers.
        saved_bytes: what autograd keeps in its forward passes; a tensor that several keep counts
            for the first.
        reference_bytes: the same with the paper's three layers instead of each SVF layer.
        flops, reference_flops: of the SVF layers in it, forward and backward.
    """

    name: str
    layers: tuple[str, ...]
    strategy: str
    note: str
    output_shape: tuple[int, ...]
    saved_bytes: int
    reference_bytes: int
    flops: int
    reference_flops: int


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What a model keeps, in the order of the first calls; ``print`` shows it as a table.

    Attributes:
        units: see :class:`UnitReport`.
        factor_bytes: U, S, V and what is made of them, the composed weights first: resident,
            whatever the input.
        shapes: input and output shape of every call of each SVF layer.
        left: convolutions and linear layers that cannot be converted, by reason with their number.
    """

    units: tuple[UnitReport, ...]
    factor_bytes: int
    shapes: dict[str, list[tuple[torch.Size, torch.Size]]]
    left: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> int:
        """All that autograd keeps, parameters and buffers left out."""
        return sum(unit.saved_bytes for unit in self.units)

    @property
    def reference_bytes(self) -> int:
        return sum(unit.reference_bytes for unit in self.units)

    @property
    def flops(self) -> int:
        return sum(unit.flops for unit in self.units)

    @property
    def reference_flops(self) -> int:
        return sum(unit.reference_flops for unit in self.units)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "strategy", "output", "saved MiB", "reference", "GFLOP", "reference", "note")
        ]
        for unit in self.units:
            output = "×".join(map(str, unit.output_shape))
            name = unit.name or "(the model)"
            rows.append((name, unit.strategy, output, *_numbers(unit), unit.note))
        rows.append(("total", "", "", *_numbers(self), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(8)]
        lines = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 2, 7) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        lines.append(f"resident factors and composed weights: {self.factor_bytes / _MIB:.1f} MiB")
        lines += [f"not converted: {text}" for text in self.left]
        return "\n".join(lines)


def _numbers(of: UnitReport | MemoryReport) -> tuple[str, ...]:
    sizes = (of.saved_bytes / _MIB, of.reference_bytes / _MIB)
    return (
        *(f"{size:.2f}" for size in sizes),
        *(f"{count / 1e9:.2f}" for count in (of.flops, of.reference_flops)),
    )


def memory_report(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None
) -> MemoryReport:
    """Predict what a model keeps for the backward pass of one input of ``input_shape``.

    The model runs twice on shapes alone (fake tensors), as it is and with the paper's layers: no
    memory, no arithmetic. Counted is every storage that autograd keeps, once, as
    ``saved_tensors_hooks`` sees them; parameters and buffers are ignored. What needs a gradient is
    what needs one now, and batch norms are in the mode they are in. ``dtype`` names the dtype of a
    run under autocast; without it the model runs in the dtype of its factors.

    Raises ValueError when the model has no SVF layer, none of them is called, it is sharded, or on
    the meta device.
    """
    layers = svf_layers(model)
    if not layers:
        raise ValueError("model: expected SVF layers to report on, found none; was it converted?")
    for name, layer in layers.items():
        if hasattr(layer.trained, "full_tensor"):
            raise ValueError(
                f"model: expected whole parameters, got {name}.{layer.trains} sharded; ask for "
                "the report before the model is sharded (fully_shard)"
            )
        if layer.U.is_meta:
            raise ValueError(
                f"model: expected values, on which strategies depend, got {name} on the meta "
                "device; call to_empty and load a state dict before"
            )
        layer.strategy_in_use  # noqa: B018  plans from the present values, which fakes have not
    units = _units(model)
    shapes: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
    saved, outputs = _run(model, input_shape, dtype, units)
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.as_reference())
        normed: dict[str, str] = {}
        reference, _ = _run(model, input_shape, dtype, units, shapes, normed)
    if not shapes:
        raise ValueError("model: expected a forward pass through its SVF layers, none was called")
    reports = [
        _report(name, unit, layers, shapes, outputs.get(name, ()))
        for name, unit in units.items()
        if name in outputs
    ]
    reports.append(UnitReport(_OTHER, (), "", "", (), 0, 0, 0, 0))
    notes = find(model, lambda _: True)[2] | find_transformers(model, lambda _: True)[1]
    folding = _folding(model)
    return MemoryReport(
        tuple(
            dataclasses.replace(
                report,
                saved_bytes=saved.get(report.name, 0),
                reference_bytes=reference.get(report.name, 0),
                note=report.note or _note(report.name, notes, normed),
            )
            for report in reports
        ),
        sum(_resident(layer, layer in folding) for layer in layers.values()),
        shapes,
        tuple(plain_layers(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))[1]),
    )


def _units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the fused modules, and the SVF layers outside of these, by name.

    A fused sequence or chain runs its units alone; blocks and layers beside them are listed by
    themselves.
    """
    units: dict[str, nn.Module] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if name not in inside and isinstance(module, Fused | Factored):
            units[name] = module
            inside |= {f"{name}.{inner}" if name else inner for inner in _run_by(module)}
    return units


def _run_by(unit: nn.Module) -> set[str]:
    """Name the modules in a unit that it runs; of a fused sequence or chain only what is fused."""
    if isinstance(unit, Fused) and not unit.is_whole:
        return set(unit.fused_convs())
    return {name for name, _ in unit.named_modules() if name}


def _note(name: str, notes: dict[str, str], normed: dict[str, str]) -> str:
    """Tell why a layer, or the block that it lies in, could not be fused with its batch norm."""
    around = [key for key in notes if not key or f"{name}.".startswith(f"{key}.")]
    if around:
        return f"not fused: {notes[max(around, key=len)]}"
    return f"not fused: {normed[name]}" if name in normed else ""


def _follows(name: str, norm: nn.Module) -> str:
    """Tell why a layer is not fused with the norm that gets its output."""
    if is_norm(norm):
        return (
            f"{name} follows, but not in an nn.Sequential, a residual block or a module that calls "
            "such layers alone"
        )
    return (
        f"{name} ({type(norm).__name__}) follows, which computes its statistics from each map; "
        "only those of a frozen batch norm are constants"
    )


def _is_view_of(x: Tensor, y: Tensor) -> bool:
    """Tell whether x is y, or all of it in another order of its dimensions."""
    return x is y or (x._base is y and x.numel() == y.numel())


class _SavedBytes:
    """Counts what autograd saves, by the unit whose forward pass is running."""

    def __init__(self, state: dict[str, Tensor]):
        self.bytes: dict[str, int] = {}
        self.running = [_OTHER]
        self._seen = {tensor.untyped_storage()._cdata: tensor for tensor in state.values()}

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # kept alive, so that no address returns
            name = self.running[-1]
            self.bytes[name] = self.bytes.get(name, 0) + storage.nbytes()
        return tensor


def _run(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None,
    units: dict[str, nn.Module],
    shapes: dict[str, list[tuple[torch.Size, torch.Size]]] | None = None,
    normed: dict[str, str] | None = None,
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Return kept bytes and output shape per unit.

    Fills `shapes`, and `normed` with why a norm that gets a layer's output is not fused with it;
    then none may run fused.
    """
    layers = svf_layers(model)
    device, own = next((layer.U.device, layer.U.dtype) for layer in layers.values())
    handles = []
    outputs: dict[str, tuple[int, ...]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # each module once: functional_call would not put back what it sets at a second place
        state: dict[str, Any] = {
            f"{prefix}.{name}" if prefix else name: mode.from_tensor(tensor)
            for prefix, module in model.named_modules()
            for name, tensor in (
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            )
        }
        kept = _SavedBytes(state)

        def enter(name):
            return lambda *_: kept.running.append(name)

        def leave(name):
            def hook(_, inputs, output):
                kept.running.pop()
                outputs.setdefault(name, tuple(output.shape))

            return hook

        returned: list[tuple[Tensor, str]] = []

        def record(shapes, name):
            def hook(_, inputs, output):
                shapes.setdefault(name, []).append((inputs[0].shape, output.shape))
                returned.append((output, name))

            return hook

        def receive(normed, norm):
            def hook(module, inputs):
                same = (name for output, name in returned if _is_view_of(inputs[0], output))
                normed.update((name, _follows(norm, module)) for name in same)

            return hook

        for name, unit in units.items():
            handles.append(unit.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(unit.register_forward_hook(leave(name)))
        if shapes is not None:
            for name, layer in layers.items():
                handles.append(layer.register_forward_hook(record(shapes, name)))
            for name, module in model.named_modules():
                if is_norm(module) or isinstance(module, _OTHER_NORMS):
                    handles.append(module.register_forward_pre_hook(receive(normed, name)))
        try:
            x = torch.empty(tuple(input_shape), device=device, dtype=own)
            autocast = torch.autocast(device.type, dtype or own, enabled=dtype not in (None, own))
            hooks = saved_tensors_hooks(kept.count, lambda tensor: tensor)
            with torch.enable_grad(), autocast, hooks:
                functional_call(model, state, (x,), tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()
    return kept.bytes, outputs


def _report(
    name: str,
    unit: nn.Module,
    layers: dict[str, Factored],
    shapes: dict[str, list[tuple[torch.Size, torch.Size]]],
    output_shape: tuple[int, ...],
) -> UnitReport:
    prefix = f"{name}." if name else ""
    names = {name, *(prefix + inner for inner in _run_by(unit))}
    inner = {inside: layer for inside, layer in layers.items() if inside in names}
    note = ""
    if isinstance(unit, ResidualUnit | SVFTransformerBlock) and unit.recompute:
        note = f"computes {unit.recomputed} again"
    flops = reference_flops = 0
    for inside, layer in inner.items():
        for _, shape in shapes.get(inside, ()):
            flops += _flops(layer, layer.strategy_in_use, layer.guarded, shape)
            reference_flops += _flops(layer, "reference", 0, shape)
            flops += _flops_again(unit, inside.removeprefix(prefix), layer, shape)
    if isinstance(unit, Fused) and unit.keeps_int8:
        note = ", ".join(filter(None, (note, "keeps 8 bits")))
    if isinstance(unit, Fused) and (reason := unit.unfused_reason()):
        note = f"not fused: {reason}"
    strategy = "/".join(dict.fromkeys(layer.strategy_in_use for layer in inner.values()))
    guarded = sum(layer.guarded for layer in inner.values())
    return UnitReport(
        name,
        tuple(inner),
        strategy + (f"+{guarded}" if guarded else ""),
        note,
        output_shape,
        0,
        0,
        flops,
        reference_flops,
    )


def _flops_again(unit: nn.Module, name: str, layer: Factored, output_shape: torch.Size) -> int:
    """Count the FLOPs of what a unit computes a second time of a layer in the backward pass."""
    if not isinstance(unit, ResidualUnit | SVFTransformerBlock) or unit.unfused_reason():
        return 0
    chain = layer.strategy_in_use == "chain"
    fan_in, out_channels = layer.V[0].numel(), len(layer.U)
    positions = math.prod(output_shape) // out_channels
    of_V = 2 * positions * layer.geometry.groups * layer.rank * fan_in
    if name in unit.run_again:
        of_U = 2 * positions * layer.rank * out_channels
        return of_V + of_U if chain else 2 * positions * out_channels * fan_in
    directions = unit.directions_again if isinstance(unit, SVFTransformerBlock) else ()
    return of_V if chain and name in directions else 0


def _flops(layer: Factored, strategy: str, guarded: int, output_shape: torch.Size) -> int:
    """Count the FLOPs of forward, dx and dS of one call."""
    geometry = layer.geometry
    groups, rank, out_channels = geometry.groups, layer.rank, len(layer.U)
    fan_in = layer.V[0].numel()
    positions = math.prod(output_shape) // out_channels
    weight = 2 * positions * out_channels * fan_in
    if strategy in ("reference", "chain"):
        chain = 4 * positions * groups * rank * (fan_in + out_channels // groups)
        if layer.core.is_diagonal:
            return chain
        # z to Σz, back, and dΣ of both; or dΣ of z and dL/dy
        return chain + 2 * positions * rank * (
            3 * groups * rank if strategy == "reference" else out_channels
        )
    if strategy == "fold":
        return 3 * weight
    tail = 2 * positions * groups * guarded * (fan_in + out_channels // groups)
    if _reads_input(layer):
        return 2 * weight + 2 * positions * fan_in * groups * fan_in + tail
    return 2 * weight + 2 * positions * out_channels * (out_channels // groups) + tail


def _resident(layer: Factored, folds: bool) -> int:
    """Count the bytes of factors and what is made of them, with `folds` also scaled by a norm."""
    tensors = [layer.U, layer.V, layer.S, *layer.parts]
    if layer.log_scale is not None:
        tensors += [layer.log_scale, layer.S_in_use]
    if layer.values.core is not None:
        tensors += [x for x in layer.values.core if x is not None]
    size, strategy = layer.U.element_size(), layer.strategy_in_use
    factors = sum(t.numel() * t.element_size() for t in tensors)
    if strategy == "reference":
        return factors
    made = layer.U.numel() if strategy == "chain" else layer.U.shape[0] * layer.V[0].numel()
    constants = layer.U.numel() if strategy == "chain" else 0  # Uᵀ as a weight
    if folds and strategy != "chain":
        made *= 2
        reads_x = _reads_input(layer) and strategy == "gram"
        constants = 0 if reads_x else layer.U.numel()
    return factors + (made + constants) * size


def _folding(model: nn.Module) -> set[Factored]:
    """Return the layers whose gradient comes without their batch norm's scale."""
    layers = (
        module.get_submodule(name)
        for module in model.modules()
        if isinstance(module, Fused)
        for name, folds in module.fused_convs().items()
        if folds
    )
    return {layer for layer in layers if isinstance(layer, Factored)}


def _reads_input(layer: Factored) -> bool:
    shape = torch.Size((len(layer.U), *layer.V.shape[1:], 1, 1)[:4])
    return reads_input(shape, layer.geometry, layer.reads_square)
