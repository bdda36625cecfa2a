"""A module's forward pass as a graph (``torch.fx``) that can be followed from output to input."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from svf_fast.fusion.fused import Fused, original_class
from svf_fast.fusion.norm import is_norm
from svf_fast.layers.conv2d import SVFConv2d

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELU = {functional.relu, torch.relu, torch.relu_, "relu", "relu_"}
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Misfit(Exception):
    """Why a module does not fit, in plain words."""


def is_conv(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Conv2d, SVFConv2d))


def is_sequential(module: nn.Module) -> bool:
    """Tell whether a module calls its children in turn, or computes what that would."""
    own = getattr(original_class(module), "forward", None)
    return own is nn.Sequential.forward and "forward" not in vars(module)


def is_open(module: nn.Module) -> bool:
    """Tell whether a trace looks into it: an ``nn.Sequential``, or a convolution with its norm."""
    if is_sequential(module):
        return True
    if is_conv(module) or is_norm(module):
        return False
    inner = list(module.modules())
    return sum(map(is_conv, inner)) == 1 and any(map(is_norm, inner))


def hook_kind(module: nn.Module) -> str | None:
    """Return the kind of a hook that a call of the module runs, if it has any."""
    kinds = ("forward_hook", "forward_pre_hook", "backward_hook", "backward_pre_hook")
    return next((k.replace("_", " ") for k in kinds if getattr(module, f"_{k}s")), None)


class ForwardGraph:
    """The forward pass of a module in training or evaluation; the module is left as it was.

    Modules are its leaves, but those that the ``tracer`` opens. A node that ``operands`` or
    ``value`` went through counts as ``seen``.

    Raises Misfit when the forward pass cannot be traced, keeps something on the module, or switches
    autocast or gradients, which a graph does not show.
    """

    def __init__(self, module: nn.Module, training: bool, tracer: type[Tracer] | None = None):
        tracer = tracer or Tracer
        self.modules = dict(module.named_modules())
        # a switch that changes nothing where gradients are on and autocast is off does where not
        graph, other = (_traced(module, training, tracer, differ) for differ in (False, True))
        if str(graph) != str(other):
            raise Misfit("its forward depends on autocast or on whether gradients are on")
        self.nodes = list(graph.nodes)
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.output = self.nodes[-1]
        self.seen = {self.output, *self.inputs}

    def value(self, node: fx.Node) -> fx.Node:
        """Return what a node of one operand works on, past the modules that are the identity."""
        return self.skip(self.operands(node, 1)[0])

    def skip(self, node: fx.Node) -> fx.Node:
        """Skip modules that are the identity."""
        while (module := self.module(node)) is not None and does_nothing(module):
            node = self.operands(node, 1)[0]
        return node

    def operands(self, node: fx.Node, count: int) -> list[fx.Node]:
        """Return the tensors that a node works on, ``count`` of them."""
        operands = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
        unusual = "alpha" in node.kwargs or "out" in node.kwargs
        if node.op == "call_module":  # a fused pass calls it with the operands alone
            unusual |= bool(node.kwargs) or len(node.args) != count
        if len(operands) != count or unusual:
            raise Misfit(f"it calls {self.label(node)} in an unusual way")
        if len(node.users) > 1:
            raise Misfit(f"the output of {self.label(node)} is used more than once")
        self.seen.add(node)
        return operands

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, None where it calls a function or a method."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def conv_before(self, node: fx.Node) -> str:
        """Name the convolution of which a node normalizes the output, "" if it does not."""
        if not is_norm(self.module(node)) or len(node.all_input_nodes) != 1:
            return ""
        node = node.all_input_nodes[0]
        while (module := self.module(node)) is not None and does_nothing(module):
            node = node.all_input_nodes[0]
        return str(node.target) if is_conv(self.module(node)) else ""

    def precedes_norm(self, conv: str) -> bool:
        """Tell whether a norm gets what a convolution returns."""
        return any(self.conv_before(node) == conv for node in self.nodes)

    def calls(self, node: fx.Node, targets: set) -> bool:
        """Tell whether a node calls one of these functions, or methods by name."""
        return node.op in ("call_function", "call_method") and node.target in targets

    def is_sum(self, node: fx.Node) -> bool:
        return self.calls(node, _ADD)

    def is_relu(self, node: fx.Node) -> bool:
        return type(self.module(node)) is nn.ReLU or self.calls(node, _RELU)

    def overwrites(self, node: fx.Node) -> bool:
        """Tell whether a sum is written over its first operand."""
        return node.target in (operator.iadd, "add_")

    def misfit_at(self, node: fx.Node, expected: str) -> Misfit:
        """Return the misfit of a node that is not what was expected."""
        module = self.module(node)
        if type(module).__module__ == "torch.nn.modules.activation":
            return Misfit(f"uses {type(module).__name__} instead of ReLU")
        probability = getattr(module, "drop_prob", getattr(module, "p", 0))
        if isinstance(probability, float) and probability > 0:
            return Misfit(f"{self.label(node)} is active")
        return Misfit(f"{self.label(node)} stands where {expected} would fit")

    def label(self, node: fx.Node) -> str:
        """Describe a node in plain words."""
        if node.op == "call_module":
            module = self.module(node)
            assert module is not None
            return f"{node.target!r} ({original_class(module).__name__})"
        if node in self.inputs:
            return "its input"
        if node.op == "get_attr":
            return f"the attribute {node.target!r}"
        return getattr(node.target, "__name__", str(node.target))


class _Switches(NamedTuple):
    """What holds for all operations of a thread; by name as a reason calls it."""

    inference_mode: bool
    gradients: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> _Switches:
        autocast = tuple(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
        )
        return cls(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast)

    def switched(self, since: _Switches) -> str:
        """Name the first that is not as it was, "" if all are."""
        changed = (name for name in self._fields if getattr(self, name) != getattr(since, name))
        return next(changed, "").replace("_", " ")


@contextmanager
def _switched(differ: bool) -> Iterator[None]:
    """Run the body with gradients and without autocast, or without them, in inference and autocast.

    Whatever the body leaves switched is put back.
    """
    before = _Switches.now().autocast
    with torch.inference_mode(differ), torch.set_grad_enabled(not differ):
        try:
            for device in _AUTOCAST_DEVICES:
                torch.set_autocast_enabled(device, differ)
            yield
        finally:
            for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, before, strict=True):
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.clear_autocast_cache()


def _traced(module: nn.Module, training: bool, kind: type[Tracer], differ: bool) -> fx.Graph:
    with _switched(differ), _restored(module, training, kind):
        tracer = kind()
        try:
            graph = tracer.trace(module)
        except Exception as error:  # whatever a forward raises when it meets a proxy
            text = str(error) or type(error).__name__
            raise Misfit(f"its forward cannot be traced ({text.splitlines()[0]})") from error
    if tracer.switched:
        raise Misfit(f"its forward switches {tracer.switched}")
    return graph


class Tracer(fx.Tracer):
    """Looks into a module that `opens` holds for."""

    proxy_buffer_attributes = True  # else a forward that writes to a buffer writes to it here

    def __init__(self) -> None:
        super().__init__()
        self._switches = _Switches.now()
        self.switched = ""

    @staticmethod
    def opens(module: nn.Module) -> bool:
        """Tell whether a module's own calls are looked at, not its call alone."""
        return is_open(module)

    def create_node(self, *args, **options) -> fx.Node:
        self.switched = self.switched or _Switches.now().switched(self._switches)
        return super().create_node(*args, **options)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not self.opens(module) or hook_kind(module) is not None

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if isinstance(m, Fused):
            forward = partial(m.original.forward, m)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)


class ShallowTracer(Tracer):
    """Looks into no module."""

    @staticmethod
    def opens(module: nn.Module) -> bool:
        return False


class Proxy(fx.Proxy):
    """Tells ``a += b`` from ``a + b``: only the first overwrites a."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


@contextmanager
def _restored(module: nn.Module, training: bool, tracer: type[Tracer]) -> Iterator[None]:
    """Run the body in the given mode; put back every attribute that it may have set."""
    traced = [inner for inner in module.modules() if inner is module or tracer.opens(inner)]
    before = [dict(vars(inner)) for inner in traced]
    held = [
        (key, value, copy.copy(value))
        for attributes in before
        for key, value in attributes.items()
        if isinstance(value, (list, dict, set))
    ]
    stored = []
    try:
        for inner in traced:
            inner.training = training
        yield
        for inner, attributes in zip(traced, before, strict=True):
            now = {**vars(inner), "training": attributes["training"]}
            stored += [key for key in now if now[key] is not attributes.get(key, now)]
    finally:
        for inner, attributes in zip(traced, before, strict=True):
            vars(inner).clear()
            vars(inner).update(attributes)
        for key, value, content in held:
            held_now, held_then = _elements(value), _elements(content)
            if len(held_now) != len(held_then) or any(map(operator.is_not, held_now, held_then)):
                stored.append(key)
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
    if stored:
        raise Misfit(f"its forward stores {stored[0]!r} on the module")


def _elements(of: list | dict | set) -> list:
    return list(of.values()) if isinstance(of, dict) else list(of)


def does_nothing(module: nn.Module, training: bool = True) -> bool:
    """Tell whether its output is its input, by default in training too."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p == 0 or not training
    if type(module) is nn.Identity:
        return True
    if (
        type(module).__module__.startswith("torch.nn")
        or next(module.parameters(), None) is not None
    ):
        return False
    try:
        graph = ForwardGraph(module, training)
    except Misfit:
        return False
    idle = all(node.op in ("placeholder", "get_attr", "output") for node in graph.nodes)
    return idle and [graph.output.args[0]] == graph.inputs
