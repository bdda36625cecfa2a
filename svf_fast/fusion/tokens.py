"""Find pre-norm transformer blocks in a model by what their forward passes compute.

A forward pass is read as a graph, as of residual blocks. What lies between the queries and the
layer after the attention may be anything: it is kept as a list of steps, and run as it was read.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from svf_fast.fusion.fused import Fused, original_class
from svf_fast.fusion.graph import (
    ForwardGraph,
    Misfit,
    Proxy,
    Tracer,
    does_nothing,
    hook_kind,
    is_conv,
    is_sequential,
)
from svf_fast.fusion.structure import check_call, check_names
from svf_fast.layers.linear import SVFLinear

_MUL = {operator.mul, torch.mul, "mul", "mul_"}
_LAYER_NORM = inspect.signature(functional.layer_norm)
_SHAPES = {"shape", "ndim"}
_SIZES = {"size", "dim"}
_NUMBERS = _SIZES | {"numel", "nelement", "ndimension", "stride", "item", "tolist", "get_device"}
_FACTS = _SHAPES | {"dtype", "device", "layout", "is_cuda", "requires_grad", "itemsize", "nbytes"}
_FEWEST, _MOST = 4, 8  # linear layers of a block: queries to fc2, with what an attention may have


class Ref(int):
    """The number of a value in a list of steps."""


@dataclass(frozen=True)
class Step:
    """An operation: its kind and target as ``torch.fx`` has them; values among the arguments.

    frees: numbers of the values that no later step reads.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class TransformerBlock:
    """``m = x + scale1 ⊙ proj(attention(queries(norm1(x))))``, then
    ``m + scale2 ⊙ fc2(gelu(fc1(norm2(m))))``; names relative to the block.

    Vaswani et al., "Attention Is All You Need", 2017, with the norms first.

    Attributes:
        attention: from value 0, what ``queries`` returns, and value 1, of the shape of x, to what
            ``proj`` reads, which is the last.
        gelu: "none", or "tanh" for the approximation.
        scale1, scale2: names of frozen vectors (LayerScale), "" where there are none.
    """

    norm1: str
    queries: str
    attention: tuple[Step, ...]
    proj: str
    scale1: str
    norm2: str
    fc1: str
    gelu: str
    fc2: str
    scale2: str

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its linear layers."""
        return self.queries, self.proj, self.fc1, self.fc2

    @property
    def norms(self) -> tuple[str, str]:
        return self.norm1, self.norm2


Modes = dict[bool, TransformerBlock | str]
"""What a forward pass is in training and in evaluation: a block, or why it is none."""


def fitting(modes: Modes) -> TransformerBlock | None:
    """Return the block that a module is in one of its modes, None if in none."""
    return next((each for each in modes.values() if isinstance(each, TransformerBlock)), None)


def layers_of(name: str, modes: Modes) -> list[str]:
    """Return the names in the model of a block's linear layers; of none if it is no block."""
    block = fitting(modes)
    prefix = f"{name}." if name else ""
    return [] if block is None else [prefix + layer for layer in block.layers]


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, SVFLinear))


def find_transformers(
    model: nn.Module, within: Callable[[str], bool]
) -> tuple[dict[str, Modes], dict[str, str]]:
    """Find a model's transformer blocks, and what looks like one but does not fit, with the reason.

    A block counts when ``within`` holds for the names of all its linear layers. The model is not
    changed.
    """
    found: dict[str, Modes] = {}
    reasons: dict[str, str] = {}
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    examined: dict[nn.Module, Modes | None] = {}
    inside: str | None = None
    with torch.random.fork_rng(devices=[]):  # a traced forward may draw
        for name, module in model.named_modules(remove_duplicate=False):
            if inside is not None and name.startswith(inside):
                continue
            prefix = f"{name}." if name else ""
            if isinstance(module, Fused):
                inside = prefix if module.is_whole else inside
                continue
            if not _is_candidate(module):
                continue
            inner = (prefix + part for part, each in module.named_modules() if is_linear(each))
            if not any(map(within, inner)):
                continue
            if module not in examined:
                examined[module] = _examine(module, places)
            modes = examined[module]
            if modes is None:
                continue
            reason = _reason(name, modes, within)
            if reason is None:
                found[name] = modes
                inside = prefix
            elif reason:
                reasons[name] = reason
    return found, reasons


def _reason(name: str, modes: Modes, within: Callable[[str], bool]) -> str | None:
    """Return why a block does not count, "" if it is not chosen at all, None if it counts."""
    layers = layers_of(name, modes)
    chosen = sum(map(within, layers))
    if not layers:
        return str(modes[False])
    if chosen == len(layers):
        return None
    return f"only {chosen} of its {len(layers)} linear layers are chosen" if chosen else ""


def _is_candidate(module: nn.Module) -> bool:
    """Tell whether a module has about as many linear layers and norms as a block, and is called."""
    if is_sequential(module) or is_linear(module) or is_conv(module):
        return False
    if getattr(original_class(module), "forward", nn.Module.forward) is nn.Module.forward:
        return False  # nn.ModuleList
    inner = list(module.modules())
    norms = sum(isinstance(each, nn.LayerNorm) for each in inner)
    linear = sum(map(is_linear, inner))
    return norms >= 2 and _FEWEST <= linear <= _MOST and not any(map(is_conv, inner))


def _examine(module: nn.Module, places: Counter[nn.Module]) -> Modes | None:
    """Return what a module is in both modes, None if it is nothing like a block in either."""
    modes: Modes = {}
    for training in (False, True):
        try:
            graph = TokenGraph(module, training)
            if not graph.sums:
                return None
            check_names(module)
            for name, inner in module.named_modules():
                check_call(name, inner, module, places)
            modes[training] = graph.block()
        except Misfit as reason:
            modes[training] = str(reason)
    return modes


class _TokenProxy(Proxy):
    """Stands for the tokens; a forward that asks is told that it is a tensor."""

    _is_param = _is_buffer = False  # asked by isinstance of nn.Parameter and nn.Buffer

    @property
    def __class__(self):
        return Tensor

    @__class__.setter
    def __class__(self, value):
        raise TypeError("the class of a proxy stays")


class _TokenTracer(Tracer):
    """Traces a forward of its first argument, all others as by default."""

    @staticmethod
    def opens(module: nn.Module) -> bool:
        if is_sequential(module):
            return True
        drops = getattr(module, "drop_prob", None)
        if is_linear(module) or (isinstance(drops, float) and drops > 0):
            return False
        return not type(module).__module__.startswith("torch.nn")

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        names = list(inspect.signature(root_fn).parameters)
        if len(names) < 2:
            raise Misfit("its forward takes nothing")
        return root_fn, [self.root, self.create_proxy("placeholder", names[1], (), {})]

    def create_arg(self, a):
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        # what takes a number in C would read one that says it is a tensor as memory of a tensor
        return fx.Proxy(node, self) if _is_number(node) else _TokenProxy(node, self)

    def trace(self, *args, **kwargs) -> fx.Graph:
        with contextlib.ExitStack() as stack:
            for name in ("tensor", "as_tensor", "asarray"):  # which ask no proxy
                makes = _refusing_proxies(getattr(torch, name))
                stack.enter_context(mock.patch.object(torch, name, makes))
            return super().trace(*args, **kwargs)


class TokenGraph(ForwardGraph):
    """The forward pass of a block, followed from its output; without what does nothing.

    Raises Misfit as :class:`ForwardGraph` does.
    """

    def __init__(self, module: nn.Module, training: bool):
        super().__init__(module, training, _TokenTracer)
        for node in list(self.nodes):
            inner = self.module(node)
            if inner is not None and hook_kind(inner) is None and does_nothing(inner, training):
                self._remove(node, self.operands(node, 1)[0])
        for node in reversed(self.nodes):  # sizes that nobody reads
            if not node.users and _reads_shape(node):
                self._remove(node)
        self.sums = [node for node in self.nodes if self.is_sum(node)]

    def operands(self, node: fx.Node, count: int) -> list[fx.Node]:
        """Return the values that a node works on, ``count`` of them, each of one dtype."""
        nodes = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
        if len(nodes) != count or "alpha" in node.kwargs or "out" in node.kwargs:
            raise Misfit(f"it calls {self.label(node)} in an unusual way")
        self.seen.add(node)
        return nodes

    def block(self) -> TransformerBlock:
        """Return the block that it computes; raises Misfit if it is none."""
        if not isinstance(self.output.args[0], fx.Node):
            raise Misfit("its forward returns something else than one tensor")
        middle, node = self._split(self.output.args[0], "its last sum")
        scale2, node = self._scale(node)
        fc2, node = self._linear(node, "its last linear layer")
        gelu, node = self._gelu(node)
        fc1, node = self._linear(node, "the linear layer before GELU")
        norm2, before = self._norm(node)
        if before is not middle:
            raise Misfit(f"{norm2!r} does not get what its branch is added to")
        x, node = self._split(middle, "the sum after its attention")
        if x not in self.inputs:
            raise Misfit(f"{self.label(x)} stands where its input would fit")
        scale1, node = self._scale(node)
        proj, end = self._linear(node, "the linear layer after the attention")
        norm1, queries, attention = self._attention(x, middle, end)
        for node in self.nodes:
            if node not in self.seen and node.op != "get_attr":  # reading alone changes nothing
                raise Misfit(f"it also uses {self.label(node)}")
        block = TransformerBlock(
            norm1, queries, attention, proj, scale1, norm2, fc1, gelu, fc2, scale2
        )
        if len({*block.layers}) < len(block.layers):
            raise Misfit("it calls a linear layer twice")
        width = self.modules[queries].in_features
        for name in (proj, fc2):
            if self.modules[name].out_features != width:
                raise Misfit(f"{name!r} returns other channels than its input has")
        return block

    def _remove(self, node: fx.Node, instead: fx.Node | None = None) -> None:
        if instead is not None:
            node.replace_all_uses_with(instead)
        node.graph.erase_node(node)
        self.nodes.remove(node)

    def _alone(self, node: fx.Node) -> None:
        """Check that a value is used once; that its shape is read does not count."""
        if sum(not _reads_shape(user) for user in node.users) != 1:
            raise Misfit(f"the output of {self.label(node)} is used more than once")

    def _split(self, node: fx.Node, expected: str) -> tuple[fx.Node, fx.Node]:
        """Return what a sum adds its branch to, and the branch."""
        if not self.is_sum(node):
            raise self.misfit_at(node, expected)
        if self.overwrites(node):
            raise Misfit("it writes a sum over its operand")

        def is_kept(operand: fx.Node) -> tuple[int, bool]:
            return len(operand.users), self.is_sum(operand) or operand in self.inputs

        branch, kept = sorted(self.operands(node, 2), key=is_kept)
        self._alone(branch)
        return kept, branch

    def _scale(self, node: fx.Node) -> tuple[str, fx.Node]:
        """Return the name of the vector that a node multiplies by, "" if it does not."""
        if not self.calls(node, _MUL):
            return "", node
        operands = self.operands(node, 2)
        named = [each for each in operands if each.op == "get_attr"]
        if len(named) != 1:
            raise Misfit("it multiplies two maps")
        name = str(named[0].target)
        value = self._tensor(name)
        if value.dim() != 1:
            raise Misfit(f"it multiplies by {name!r} of shape {list(value.shape)}, not a vector")
        (branch,) = (each for each in operands if each is not named[0])
        self._alone(branch)
        return name, branch

    def _tensor(self, name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        return getattr(self.modules[owner], own)

    def _linear(self, node: fx.Node, expected: str) -> tuple[str, fx.Node]:
        """Return the name of the linear layer that a node calls, and what that reads."""
        if not is_linear(self.module(node)):
            raise self.misfit_at(node, expected)
        name = str(node.target)
        module = self.modules[name]
        kind = original_class(module)
        if kind.forward not in (nn.Linear.forward, SVFLinear.forward) or node.kwargs:
            raise Misfit(f"{name!r} ({kind.__name__}) is more than a linear layer")
        (read,) = self.operands(node, 1)
        self._alone(read)
        return name, read

    def _gelu(self, node: fx.Node) -> tuple[str, fx.Node]:
        """Return how the GELU is computed that a node calls, and what it reads."""
        module = self.module(node)
        if type(module) is nn.GELU:
            form = module.approximate
        elif self.calls(node, {functional.gelu}):
            form = str(node.kwargs.get("approximate", "none"))
        else:
            raise self._no_gelu(node)
        (read,) = self.operands(node, 1)
        self._alone(read)
        return form, read

    def _no_gelu(self, node: fx.Node) -> Misfit:
        module = self.module(node)
        if type(module).__module__ == "torch.nn.modules.activation":
            return Misfit(f"uses {type(module).__name__} instead of GELU")
        return self.misfit_at(node, "its GELU")

    def _norm(self, node: fx.Node) -> tuple[str, fx.Node]:
        """Return the name of the layer norm that a node computes, and what it normalizes."""
        module = self.module(node)
        if type(module) is nn.LayerNorm:
            name, (read,) = str(node.target), self.operands(node, 1)
        elif self.calls(node, {functional.layer_norm}):
            name, read = self._called_norm(node)
        else:
            raise self.misfit_at(node, "a layer norm")
        norm = self.modules[name]
        self._alone(node)
        if len(norm.normalized_shape) != 1:
            raise Misfit(f"{name!r} normalizes over {list(norm.normalized_shape)}, not channels")
        return name, read

    def _called_norm(self, node: fx.Node) -> tuple[str, fx.Node]:
        """Return the same of a subclass that calls ``functional.layer_norm`` itself."""
        bound = _LAYER_NORM.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        call = bound.arguments
        weight, bias = (getattr(call[key], "target", "") for key in ("weight", "bias"))
        name = str(weight).rpartition(".")[0]
        norm = self.modules.get(name)
        wanted = [f"{name}.weight", "" if getattr(norm, "bias", None) is None else f"{name}.bias"]
        if not isinstance(norm, nn.LayerNorm) or [weight, bias] != wanted:
            raise Misfit("it calls layer_norm with other tensors than those of an nn.LayerNorm")
        if call["eps"] != norm.eps or tuple(call["normalized_shape"]) != norm.normalized_shape:
            raise Misfit(f"{name!r} normalizes otherwise than its attributes say")
        self.seen.add(node)
        return name, call["input"]

    def _attention(
        self, x: fx.Node, middle: fx.Node, end: fx.Node
    ) -> tuple[str, str, tuple[Step, ...]]:
        """Return norm1, the layer of the queries, and the steps from its output to ``end``."""
        users = [user for user in x.users if user is not middle and not _reads_shape(user)]
        if len(users) != 1:
            raise Misfit("its input is used by more than its first norm and sum")
        normalized = users[0]
        norm1, read = self._norm(normalized)
        if read is not x:
            raise Misfit(f"{norm1!r} does not normalize its input")
        (call,) = (user for user in normalized.users if not _reads_shape(user))
        queries, read = self._linear(call, "the linear layer of its queries")
        if read is not normalized:
            raise Misfit(f"{queries!r} does not read what {norm1!r} returns")
        numbers: dict[fx.Node, Ref] = {call: Ref(0), x: Ref(1), normalized: Ref(1)}
        steps = list(_before(end, numbers, self.nodes))
        used = {node: at for at, step in enumerate(steps) for node in step.all_input_nodes}
        made = []
        for at, node in enumerate(steps):
            if not _reads_shape(node) and {x, normalized} & {*node.all_input_nodes}:
                raise Misfit(f"{self.label(node)} of its attention reads more than {queries!r}")
            self.seen.add(node)
            numbers[node] = Ref(at + 2)
            args, kwargs = (_numbered(each, numbers) for each in (node.args, node.kwargs))
            frees = {numbers[n] for n, last in used.items() if last == at and n is not end}
            made.append(Step(node.op, node.target, args, kwargs, tuple(sorted(frees - {1}))))
        if not made:
            raise Misfit(f"nothing lies between {queries!r} and the next linear layer")
        return norm1, queries, tuple(made)


def _before(end: fx.Node, begin: dict[fx.Node, Ref], order: list[fx.Node]) -> Iterator[fx.Node]:
    """Yield what ``end`` follows from in order, itself the last, but for what it begins with."""
    wanted, found = [end], set()
    while wanted:
        node = wanted.pop()
        if node not in found and node not in begin:
            found.add(node)
            wanted += node.all_input_nodes
    return (node for node in order if node in found)


def _numbered(argument: Any, numbers: dict[fx.Node, Ref]) -> Any:
    """Return an argument of a node with the numbers of the nodes in it, in plain containers."""
    if isinstance(argument, fx.Node):
        return numbers[argument]
    if isinstance(argument, dict):
        return {key: _numbered(each, numbers) for key, each in argument.items()}
    if isinstance(argument, slice):
        parts = argument.start, argument.stop, argument.step
        return slice(*(_numbered(each, numbers) for each in parts))
    if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
        kind = list if isinstance(argument, list) else tuple
        return kind(_numbered(each, numbers) for each in argument)
    return argument


def _refusing_proxies(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if issubclass(type(data), fx.Proxy):
            raise Misfit("it makes a tensor of its input's values")
        return make(data, *args, **kwargs)

    return called


def _is_number(node: fx.Node) -> bool:
    """Tell whether a node is a size, a dtype or a device, or is computed of such."""
    if node.op == "call_method" and node.target in _NUMBERS:
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _FACTS
    made_of = node.all_input_nodes
    plain = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    return plain and bool(made_of) and all(map(_is_number, made_of))


def _reads_shape(node: fx.Node) -> bool:
    """Tell whether a node reads the shape of a value, or a number of one."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPES
    read = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(read, fx.Node) and _reads_shape(read)
