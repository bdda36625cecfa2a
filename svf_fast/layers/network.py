"""What the SVF layers of a network do together on a GPU: follow S, and compose W in one launch."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svf_fast.layers.log_scale import scale_together
from svf_fast.layers.values import Made, Seen
from svf_fast.ops import maps
from svf_fast.ops.compose import Entry, compose_all, compose_table
from svf_fast.ops.guard import guards_hold
from svf_fast.ops.program import Programs, runs_programs
from svf_fast.svd import GUARD_LIMIT

if TYPE_CHECKING:
    from svf_fast.layers.factored import Factored


class Network:
    """SVF layers that are used together. A layer of its own is a network of one.

    Held by its layers, and holds none of them alive. Layers that are copied together, by
    ``copy.deepcopy`` or pickle, become a network of their own.

    Attributes:
        composed: whether W is there for the CUDA graph that is being captured.
        lock: for threads that plan and compose for the same layers.
    """

    def __init__(self) -> None:
        self._layers: list[weakref.ref[Factored]] = []
        self._arrivals: dict[torch.device, _Arrival] = {}
        self._made: dict[Hashable, tuple[tuple, Any]] = {}
        self.composed = False
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Network], tuple]:
        return Network, ()

    def join(self, layer: Factored) -> None:
        """Take a layer in, which leaves the network it was in."""
        former = layer.__dict__.get("network")
        if former is not None:
            former._layers = [ref for ref in former._layers if ref() not in (None, layer)]
        layer.network = self
        self._layers.append(weakref.ref(layer))

    def layers(self, device: torch.device) -> list[Factored]:
        """Return those on a device that are alive, in the order they came.

        Without those with a core beyond the diagonal: each of these follows its own values.
        """
        alive = (ref() for ref in self._layers)
        found = (x for x in alive if x is not None and x.S.device == device)
        return [x for x in found if x.core.is_diagonal]

    def follow(self, device: torch.device, moved: bool) -> None:
        """Plan for the values of S that have come from a GPU; with ``moved`` send for new ones.

        Does not synchronize: the guarded directions follow a change of S or two behind. An
        optimizer step moves S by far less than the guard's margin.
        """
        arrival = self._arrivals.get(device)
        taken = [] if arrival is None else arrival.taken()
        for layer, S in taken:
            if layer.plan is not None and layer.S.numel() == S.numel():
                layer.plan_for(S.to(layer.S.dtype))
        if not moved and not (arrival is not None and taken and arrival.owed):
            return
        layers = self.layers(device)
        self.moved([x for x in layers if not x.values.seen.holds(x.trained)])
        if arrival is None:
            arrival = self._arrivals[device] = _Arrival()
        arrival.start(layers)

    def moved(self, layers: list[Factored]) -> None:
        """Let layers of one device compute with the present values of what trains."""
        for layer in layers:
            S = layer.values.S_in_use
            if S is not None and not S.is_cuda:  # else in its place
                S = layer.present_S()
            layer.values.moved(Seen(layer.trained), layer.host_copy(), S)
        scale_together([layer for layer in layers if layer.trained.is_cuda])

    def forget(self) -> None:
        """Leave values unread that are on their way from a GPU: others have been set since."""
        self._arrivals.clear()

    def to_compose(self, dtype: torch.dtype, device: torch.device) -> list[Factored]:
        """Return the layers on a GPU whose W was asked for in a dtype and is missing."""
        found = self.layers(device)
        return [x for x in found if dtype not in x.values.made and x.composes(dtype)]

    def compose(self, layers: list[Factored], dtype: torch.dtype) -> None:
        """Make W of some layers on one GPU, scaled where it was asked for so, in one launch."""
        entries = [layer.entry(dtype) for layer in layers]
        table, programs = self._together(entries, dtype)

        def run() -> tuple[list[Tensor | None], None]:
            return compose_all(entries, dtype, table), None

        def read() -> list[Tensor | None]:
            return [table, *(x for entry in entries for x in entry if isinstance(x, Tensor))]

        made, _ = programs.run(None, run, [], read) if runs_programs() else run()
        for layer, entry, weight, scaled in zip(
            layers, entries, made[::2], made[1::2], strict=True
        ):
            assert weight is not None
            layer.values.made[dtype] = Made(entry.scale, False, weight, scaled)

    def prepare(self) -> None:
        """Send GPUs what :meth:`compose_captured` needs: nothing can be sent during a capture."""
        for device in self._devices():
            if guarded := self._guarded(device):
                self._guards(guarded)
            for dtype, layers in self._in_use(device):
                self._together([layer.entry(dtype) for layer in layers], dtype)

    def compose_captured(self, device: torch.device) -> None:
        """Put W of all layers in use into a CUDA graph, and the test that their guards suffice."""
        self._forget_made(device)  # of values before the capture
        scale_together([layer for layer in self.layers(device) if layer.trained.requires_grad])
        if guarded := self._guarded(device):
            S = torch.cat([layer.S_in_use.detach() for layer in guarded])
            assert_guarded(S, *self._guards(guarded))
        for dtype, layers in self._in_use(device):
            self.compose(layers, dtype)
        self.composed = True

    def end_capture(self, device: torch.device) -> None:
        """Forget W of the graph, which has values only when that runs."""
        self.composed = False
        self._forget_made(device)

    def _forget_made(self, device: torch.device) -> None:
        """Drop W of all layers that train: it is made anew when it is asked for."""
        for layer in self.layers(device):
            if layer.trained.requires_grad:
                layer.values.made.clear()

    def _devices(self) -> set[torch.device]:
        alive = (ref() for ref in self._layers)
        return {x.S.device for x in alive if x is not None and maps.on_gpu(x.S)}

    def _in_use(self, device: torch.device) -> list[tuple[torch.dtype, list[Factored]]]:
        """Group the layers that train by the dtype that their W was asked for in."""
        layers = [layer for layer in self.layers(device) if layer.trained.requires_grad]
        dtypes = dict.fromkeys(dtype for layer in layers for dtype in layer.values.scales)
        found = ((dtype, [x for x in layers if x.composes(dtype)]) for dtype in dtypes)
        return [(dtype, composing) for dtype, composing in found if composing]

    def _guarded(self, device: torch.device) -> list[Factored]:
        """Return the layers that divide by values of S."""
        layers = [layer for layer in self.layers(device) if layer.trained.requires_grad]
        return [x for x in layers if x.plan is not None and x.plan.strategy == "gram"]

    def _guards(self, layers: list[Factored]) -> tuple[Tensor, Tensor]:
        """Return ``guarded`` and ``layers`` of :func:`svf_fast.ops.guard.guards_hold`."""

        def make() -> tuple[Tensor, Tensor]:
            starts = itertools.accumulate((x.S.numel() for x in layers), initial=0)
            groups = [*(x.geometry.groups for x in layers), 0]
            rows = torch.tensor(list(zip(starts, groups, strict=True)), dtype=torch.int64)
            guarded = torch.cat([layer.guarded_mask() for layer in layers])
            made = guarded, _sent(rows, guarded.device)
            # so that its kernel is loaded before a capture
            S = torch.cat([layer.S_in_use.detach() for layer in layers])
            guards_hold(S, *made, 2 * GUARD_LIMIT)
            return made

        plans = tuple(layer.plan for layer in layers)
        return self._kept(("guards", layers[0].S.device), plans, make)

    def _together(self, entries: list[Entry], dtype: torch.dtype) -> tuple[Tensor, Programs]:
        """Return the table of the operands' addresses, and programs; anew when one has moved."""
        operands = [x for U, S, V, _, scale in entries for x in (U, S, V, scale)]
        pointers = tuple(0 if x is None else x.data_ptr() for x in operands)

        def make() -> tuple[Tensor, Programs]:
            return _sent(compose_table(entries, dtype), entries[0].U.device), Programs()

        return self._kept((dtype, len(entries), pointers[0]), pointers, make)

    def _kept(self, at: Hashable, key: tuple, make: Callable[[], Any]) -> Any:
        """Return what was made for a key, or make it now and drop that of an older key."""
        found = self._made.get(at)
        if found is not None and found[0] == key:
            return found[1]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "svf_fast.composed: expected a step run eagerly and svf_fast.follow(model) called "
                "before the capture of a CUDA graph, got layers that were not; what W is composed "
                "from cannot be sent to the GPU during the capture"
            )
        if len(self._made) > 2 * len(self._layers) + 8:  # of parts that are no longer asked for
            self._made.clear()
        made = make()
        self._made[at] = key, made
        return made


def assert_guarded(S: Tensor, guarded: Tensor, layers: Tensor) -> None:
    """Stop, when the device comes to it, where guarded directions no longer suffice.

    Arguments as of :func:`svf_fast.ops.guard.guards_hold`.
    """
    torch._assert_async(
        guards_hold(S, guarded, layers, 2 * GUARD_LIMIT).all(),
        "SVF layer under torch.compile or in a CUDA graph: S has moved so far that more "
        "directions need the exact gradient; call refresh() on the converted layers and "
        "capture the graph again, or use strategy='chain'.",
    )


def _sent(x: Tensor, device: torch.device) -> Tensor:
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class _Arrival:
    """Values of S on their way from a GPU to the host, those of all layers in one copy."""

    def __init__(self) -> None:
        self._parts: list[tuple[weakref.ref[Factored], int]] = []
        self._values: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self.owed = False  # whether values have been asked for while others were on their way

    def start(self, layers: list[Factored]) -> None:
        """Send for the values of S; while others are on their way, once the host has read those."""
        self.owed = self._event is not None
        if self.owed:
            return
        sent = torch.cat([layer.S_in_use.detach().float() for layer in layers])
        if self._values is None or self._values.numel() != sent.numel():
            self._values = torch.empty(sent.shape, pin_memory=True)
        self._parts = [(weakref.ref(layer), layer.S.numel()) for layer in layers]
        self._values.copy_(sent, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(sent.device))

    def taken(self) -> list[tuple[Factored, Tensor]]:
        """Return the layers with their values, once these have arrived."""
        if self._event is None or self._values is None or not self._event.query():
            return []
        self._event = None
        parts = self._values.split([count for _, count in self._parts])
        layers = [ref() for ref, _ in self._parts]
        return [(x, S) for x, S in zip(layers, parts, strict=True) if x is not None]
