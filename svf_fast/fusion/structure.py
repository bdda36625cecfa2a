"""Find what can be fused in a model, residual blocks and conv-BN-ReLU units, by structure.

A forward pass is read as a graph and followed from its output back to its input, so neither the
names of classes nor those of attributes matter.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from svf_fast.fusion.fused import Fused, hidden_name, original_class
from svf_fast.fusion.graph import (
    ForwardGraph,
    Misfit,
    ShallowTracer,
    hook_kind,
    is_conv,
    is_open,
    is_sequential,
)
from svf_fast.fusion.norm import FORWARDS, Norm, is_norm
from svf_fast.fusion.plain import plain_conv
from svf_fast.layers.conv2d import SVFConv2d, as_pair, explicit_padding
from svf_fast.layers.factored import Factored

_MULTIPLY = {operator.mul, torch.mul, "mul"}
_BATCH_NORM = inspect.signature(functional.batch_norm)
_OTHER_NORMS = (nn.BatchNorm1d, nn.BatchNorm3d)
_MOST_CONVS = 8  # a module with more of its own is no residual block
_SIZES = range(96, 104)  # of maps to try a block with: a stride of up to 8 divides one of them


@dataclass(frozen=True)
class StageNames:
    """A convolution, the batch norm after it and perhaps a ReLU; names relative to the container.

    ``relu`` may be the batch norm's own (timm's ``BatchNormAct2d``).
    """

    conv: str
    bn: str
    relu: bool


@dataclass(frozen=True)
class ResidualBlock:
    """``relu(stages(x) + shortcut(x))``: He et al., "Deep Residual Learning", 2016, figure 5.

    Attributes:
        name: in the model.
        stages: two (basic block) or three (bottleneck); the last has no ReLU before the sum.
        pre: pooling modules applied to x before the shortcut's convolution.
        shortcut: its convolution and batch norm, or None where it is x itself.
        relu: whether a ReLU follows the sum; without it the sum is what the block returns.
        gate: a module that weighs the map which the last of three convolutions reads by something
            made of it, as squeeze-and-excitation does (Hu et al. 2018); None without one.
    """

    name: str
    stages: tuple[StageNames, ...]
    pre: tuple[str, ...]
    shortcut: StageNames | None
    relu: bool = True
    gate: str | None = None

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the modules that it calls as they are."""
        return self.pre if self.gate is None else (*self.pre, self.gate)

    @property
    def convs(self) -> tuple[str, ...]:
        """Names in the model of all its convolutions."""
        stages = self.stages if self.shortcut is None else (*self.stages, self.shortcut)
        return tuple(_join(self.name, stage.conv) for stage in stages)


@dataclass(frozen=True)
class Unit:
    """Consecutive children conv, bn (, relu) of an ``nn.Sequential``.

    ``relu`` is the name of the child that is the ReLU; None without one, or if it is the batch
    norm's own.
    """

    container: str
    stage: StageNames
    relu: str | None


@dataclass(frozen=True)
class Chain:
    """A module of any class whose forward calls its parts one after the other.

    Attributes:
        name: in the model.
        steps: convolutions with the batch norm and perhaps ReLU after them, and names of modules.
    """

    name: str
    steps: tuple[StageNames | str, ...]

    @property
    def stages(self) -> tuple[StageNames, ...]:
        return tuple(step for step in self.steps if isinstance(step, StageNames))

    @property
    def convs(self) -> tuple[str, ...]:
        """Names in the model of the convolutions of its stages."""
        return tuple(_join(self.name, stage.conv) for stage in self.stages)


def find(
    model: nn.Module, within: Callable[[str], bool]
) -> tuple[list[ResidualBlock], list[Unit | Chain], dict[str, str]]:
    """Find a model's residual blocks, its conv-BN-ReLU units outside of these, and near misses.

    A block, chain or unit counts when ``within`` holds for the names of all its convolutions. What
    is used twice in the model is listed twice. A unit's children must be called by its
    ``nn.Sequential`` alone, which cannot be seen here. The model is not changed.

    Returns blocks, and units and chains, in the order of ``named_modules``, and for what looks like
    one but does not fit its name (a block's, or a unit's or chain's convolution) with the reason.
    """
    blocks: list[ResidualBlock] = []
    units: list[Unit | Chain] = []
    reasons: dict[str, str] = {}
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    examined: dict[nn.Module, ResidualBlock | str | None] = {}
    inside: str | None = None
    with torch.random.fork_rng(devices=[]):  # a traced forward may draw
        for name, module in model.named_modules(remove_duplicate=False):
            if inside is not None and name.startswith(inside):
                continue
            if isinstance(module, Fused) and not is_sequential(module):
                if module.is_whole:
                    inside = _join(name, "")
                continue
            verdict = None
            if _is_candidate(module) and any(within(conv) for conv in _convs(name, module)):
                if module not in examined:
                    examined[module] = _examine(module, places)
                verdict = examined[module]
            if isinstance(verdict, ResidualBlock):
                verdict = _place(replace(verdict, name=name), within)
            if isinstance(verdict, ResidualBlock):
                blocks.append(verdict)
                inside = _join(name, "")
                continue
            if verdict is not None:
                reasons[name] = verdict
            if is_sequential(module):
                units += _units(name, module, within, places, reasons)
            elif verdict is None:
                units += _chains(name, module, within, places, reasons)
    return blocks, units, reasons


def examine(module: nn.Module) -> ResidualBlock | str:
    """Return the residual block that a module is, without a name, or why it is none."""
    found = _examine(module, Counter(module.modules()))
    return "it has no sum of two maps" if found is None else found


def _place(block: ResidualBlock, within: Callable[[str], bool]) -> ResidualBlock | str | None:
    """Return the block if it is chosen, a reason if only in part, None if not at all."""
    chosen = sum(map(within, block.convs))
    if chosen == 0:
        return None
    if chosen < len(block.convs):
        return f"only {chosen} of its {len(block.convs)} convolutions are chosen"
    return block


def _join(container: str, name: str) -> str:
    return f"{container}.{name}" if container else name


def _convs(name: str, module: nn.Module) -> Iterator[str]:
    inner = module.named_modules(remove_duplicate=False)
    return (_join(name, conv) for conv, child in inner if is_conv(child))


def _own(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if is_open(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own(child)
        else:
            yield child


def _is_candidate(module: nn.Module) -> bool:
    """Tell whether convolutions and norms lie in a module directly, not in blocks inside of it."""
    if is_sequential(module) or is_conv(module) or is_norm(module):
        return False
    if getattr(type(module), "forward", nn.Module.forward) is nn.Module.forward:
        return False  # nn.ModuleList
    own = list(_own(module))
    norms = sum(map(is_norm, own))
    return (
        2 <= sum(map(is_conv, own)) <= _MOST_CONVS
        and norms >= 2
        and norms == sum(map(is_norm, module.modules()))
    )


def _examine(module: nn.Module, places: Counter[nn.Module]) -> ResidualBlock | str | None:
    """Return the block without its name, why it does not fit, or None if it is nothing like one."""
    try:
        graphs = [ForwardGraph(module, training) for training in (True, False)]
        if not any(graph.is_sum(node) for graph in graphs for node in graph.nodes):
            return None
        check_names(module)
        for name, inner in module.named_modules():
            check_call(name, inner, module, places)
        training, evaluation = map(_match, graphs)
        if training != evaluation:
            raise Misfit("its forward differs between training and evaluation")
        return training
    except Misfit as reason:
        return str(reason)


def _match(graph: ForwardGraph) -> ResidualBlock:
    if len(graph.inputs) != 1:
        arguments = ", ".join(str(node.target) for node in graph.inputs)
        raise Misfit(f"its forward takes {arguments or 'nothing'} instead of one tensor")
    if not isinstance(graph.output.args[0], fx.Node):
        raise Misfit("its forward returns something else than one tensor")
    end = graph.value(graph.output)
    relu = not graph.is_sum(end)
    if relu and not graph.is_relu(end):
        raise graph.misfit_at(end, "its last ReLU")
    total = graph.value(end) if relu else end
    if not graph.is_sum(total):
        raise graph.misfit_at(total, "its sum")
    operands = [graph.skip(node) for node in graph.operands(total, 2)]
    if graph.overwrites(total) and operands[0] in graph.inputs:
        raise Misfit("it writes its sum over its input")
    branches = [_branch(graph, node) for node in operands]
    (shortcut, pre, _), (stages, pools, gate) = sorted(branches, key=lambda way: len(way[0]))
    _check_stages(stages, pools)
    _check_shortcut(shortcut, pre)
    _check_shapes(graph, stages, pre, shortcut)
    _check_all_is_used(graph)
    _check_called_once([name for stage in stages + shortcut for name in (stage.conv, stage.bn)])
    return ResidualBlock("", stages, pre, shortcut[0] if shortcut else None, relu, gate)


def _branch(
    graph: ForwardGraph, node: fx.Node
) -> tuple[tuple[StageNames, ...], tuple[str, ...], str | None]:
    """Return the stages between the input and a node, the pooling before the first, and the gate.

    The gate stands before the last stage, with two others before it.
    """
    stages: list[StageNames] = []
    pools: list[str] = []
    gate = None
    while node not in graph.inputs:
        module = graph.module(node)
        if module is not None and _pools(module):
            pools.insert(0, str(node.target))
            node = graph.value(node)
        elif pools:
            raise Misfit(f"{pools[0]!r} pools after a convolution")
        elif len(stages) == 1 and gate is None and module is not None and _gates(module):
            gate = str(node.target)
            node = graph.value(node)
        else:
            stage, node = _stage(graph, node, "a ReLU" if stages else "a batch norm")
            stages.insert(0, stage)
    if gate is not None and len(stages) != 3:
        raise Misfit(f"{gate!r} stands in a path of {len(stages)} convolutions instead of 3")
    return tuple(stages), tuple(pools), gate


def _stage(graph: ForwardGraph, node: fx.Node, expected: str) -> tuple[StageNames, fx.Node]:
    """Return the stage that ends in a node, and the node it begins after."""
    relu = graph.is_relu(node)
    if relu:
        node, expected = graph.value(node), "a batch norm"
    norm = graph.module(node)
    if norm is None or not is_norm(norm):
        raise graph.misfit_at(node, expected)
    bn = str(node.target)
    relu |= _check_norm(bn, norm)
    node = graph.value(node)
    conv = graph.module(node)
    if conv is None or not is_conv(conv):
        raise graph.misfit_at(node, "a convolution")
    _check_conv(str(node.target), conv)
    return StageNames(str(node.target), bn, relu), graph.value(node)


def _gates(module: nn.Module) -> bool:
    """Tell whether a module returns its input times something, and so a map of the same shape."""
    if is_norm(module) or type(module).__module__.startswith("torch.nn."):
        return False
    try:
        graphs = [ForwardGraph(module, training) for training in (True, False)]
    except Misfit:
        return False
    return all(_is_weighted_input(graph) for graph in graphs)


def _is_weighted_input(graph: ForwardGraph) -> bool:
    end = graph.output.args[0]
    if len(graph.inputs) != 1 or not isinstance(end, fx.Node) or not graph.calls(end, _MULTIPLY):
        return False
    return graph.inputs[0] in end.args and len(end.all_input_nodes) == 2


def _pools(module: nn.Module) -> bool:
    return any(base.__module__ == "torch.nn.modules.pooling" for base in type(module).__mro__)


def _check_stages(stages: tuple[StageNames, ...], pools: tuple[str, ...]) -> None:
    if not 2 <= len(stages) <= 3:
        raise Misfit(f"its main path has {len(stages)} convolutions instead of 2 or 3")
    if pools:
        raise Misfit(f"{pools[0]!r} pools before its first convolution")
    for stage in stages[:-1]:
        if not stage.relu:
            raise Misfit(f"no ReLU follows {stage.bn!r}")
    if stages[-1].relu:
        raise Misfit(f"a ReLU stands between {stages[-1].bn!r} and the sum")


def _check_shortcut(stages: tuple[StageNames, ...], pools: tuple[str, ...]) -> None:
    if pools and not stages:
        raise Misfit("its shortcut pools")
    if len(stages) > 1:
        raise Misfit(f"its shortcut has {len(stages)} convolutions")
    if stages and stages[0].relu:
        raise Misfit("its shortcut has a ReLU")


def _check_shapes(
    graph: ForwardGraph,
    stages: tuple[StageNames, ...],
    pools: tuple[str, ...],
    shortcut: tuple[StageNames, ...],
) -> None:
    """Check that the sum is of maps of one shape: one that repeats a map is no residual block."""
    main, way = ([_plain(graph.modules[stage.conv]) for stage in s] for s in (stages, shortcut))
    for size in _SIZES:
        x: tuple[int, ...] = _weight_shape(main[0])[1] * main[0].groups, size, size
        try:
            pooled = _pooled(x, [graph.modules[name] for name in pools])
        except Exception:  # whatever a pooling of another library raises on a map without values
            return
        if functools.reduce(_convolved, main, x) == functools.reduce(_convolved, way, pooled):
            return
    raise Misfit("its sum is of maps of different shapes")


def _plain(conv: nn.Module) -> nn.Conv2d | SVFConv2d:
    return conv if isinstance(conv, SVFConv2d) else plain_conv(conv)


def _pooled(shape: tuple[int, ...], pools: list[nn.Module]) -> tuple[int, ...]:
    """Return the shape [C, H, W] of what pooling modules make of a map of that shape."""
    x = torch.empty(1, *shape, device="meta")
    for pool in pools:
        x = pool(x)
    return tuple(x.shape[1:])


def _convolved(shape: tuple[int, ...], conv: nn.Conv2d | SVFConv2d) -> tuple[int, ...]:
    """Return the shape [C, H, W] of what a convolution makes of a map of that shape."""
    left, right, top, bottom = explicit_padding(conv)
    channels, _, *kernel = _weight_shape(conv)
    sizes = (
        (size + pad - dilation * (side - 1) - 1) // stride + 1
        for size, pad, dilation, side, stride in zip(
            shape[1:],
            (top + bottom, left + right),
            as_pair(conv.dilation),
            kernel,
            as_pair(conv.stride),
            strict=True,
        )
    )
    return channels, *sizes


def _weight_shape(conv: nn.Conv2d | SVFConv2d) -> tuple[int, ...]:
    """Return [Co, Ci/G, kh, kw]."""
    if isinstance(conv, SVFConv2d):
        return len(conv.U), *conv.V.shape[1:]
    return tuple(conv.weight.shape)


def check_names(module: nn.Module) -> None:
    if not isinstance(module, Fused) and (name := hidden_name(module)):
        raise Misfit(f"it has an attribute {name!r} of its own, which a fused one needs; rename it")


def check_call(
    name: str, module: nn.Module, container: nn.Module, places: Counter[nn.Module]
) -> None:
    """Check that a call of the module does what its class says, and is the container's alone."""
    what = repr(name) if name else "it"
    if kind := hook_kind(module):
        raise Misfit(f"{what} has a {kind}")
    if "forward" in vars(module):
        raise Misfit(f"{what} has a forward of its own instead of its class's")
    own = is_conv(module) or is_norm(module) or isinstance(module, nn.Linear | Factored)
    if own and places[module] != places[container]:
        raise Misfit(f"{what} is used twice in the model")


def _check_conv(name: str, module: nn.Module) -> None:
    if not isinstance(module, SVFConv2d):
        try:
            module = plain_conv(module)
        except Misfit as reason:
            kind = type(module).__name__
            raise Misfit(f"{name!r} is of type {kind}, not an nn.Conv2d: {reason}") from None
    if module.padding_mode != "zeros":
        raise Misfit(f"{name!r} pads with {module.padding_mode!r} instead of zeros")
    left, right, top, bottom = explicit_padding(module)
    if left != right or top != bottom:
        raise Misfit(f"{name!r} pads one side more than the other")


def _check_norm(name: str, module: nn.Module) -> bool:
    """Tell whether the batch norm has a ReLU of its own; raises if it is no plain batch norm."""
    norm = Norm.of(module)
    if norm is None or isinstance(module, _OTHER_NORMS):
        raise Misfit(
            f"{name!r} is of type {original_class(module).__name__}, not a batch norm of maps"
        )
    if norm.mean is None or norm.var is None:
        raise Misfit(f"{name!r} keeps no running statistics")
    if not isinstance(module, _BatchNorm):
        return False  # of constants
    if type(module).forward in FORWARDS and not list(module.children()):
        return False
    try:
        return _ends_in_relu(module)
    except Misfit as reason:
        kind = original_class(module).__name__
        raise Misfit(f"{name!r} ({kind}) is more than a batch norm: {reason}") from None


def _ends_in_relu(norm: _BatchNorm) -> bool:
    """Tell whether a subclass is batch norm and ReLU; raises if it is not batch norm at all."""
    graph = ForwardGraph(norm, training=False)
    node = graph.value(graph.output)
    relu = graph.is_relu(node)
    if relu:
        node = graph.value(node)
    if not graph.calls(node, {functional.batch_norm}):
        raise Misfit(f"it calls {graph.label(node)}")
    bound = _BATCH_NORM.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    call = bound.arguments
    for name in ("running_mean", "running_var", "weight", "bias"):
        given = getattr(call[name], "target", None)  # an fx.Node, or None
        if given != (None if getattr(norm, name) is None else name):
            raise Misfit(f"it does not use its {name}")
    if call["input"] not in graph.inputs or call["training"] or call["eps"] != norm.eps:
        raise Misfit("it does not normalize its input by its own statistics")
    return relu


def _units(
    container: str,
    module: nn.Module,
    within: Callable[[str], bool],
    places: Counter[nn.Module],
    reasons: dict[str, str],
) -> Iterator[Unit]:
    children: list[tuple[str, Any]] = [*module._modules.items(), ("", None)]
    for i, ((conv, first), (bn, second)) in enumerate(pairwise(children)):
        name = _join(container, conv)
        if not (is_conv(first) and is_norm(second) and within(name)):
            continue
        relu, third = children[i + 2]
        try:
            check_names(module)
            check_call(conv, first, module, places)
            check_call(bn, second, module, places)
            _check_conv(conv, first)
            own = _check_norm(bn, second)
            if type(third) is nn.ReLU:
                check_call(relu, third, module, places)
                yield Unit(container, StageNames(conv, bn, True), relu)
            else:
                yield Unit(container, StageNames(conv, bn, own), None)
        except Misfit as reason:
            reasons[name] = str(reason)


def _chains(
    name: str,
    module: nn.Module,
    within: Callable[[str], bool],
    places: Counter[nn.Module],
    reasons: dict[str, str],
) -> Iterator[Chain]:
    """Yield the module if it is a chain with convolutions before batch norms; else note why not."""
    own = dict(_called_by(module))
    convs = [conv for conv, part in own.items() if is_conv(part) and within(_join(name, conv))]
    if not convs or not any(map(is_norm, own.values())):
        return
    others = (part for part in own.values() if not is_conv(part))
    if any(is_conv(inner) for part in others for inner in part.modules()):
        return  # a network, of which this is the stem
    try:
        graphs = [ForwardGraph(module, training, ShallowTracer) for training in (True, False)]
        convs = [conv for conv in convs if any(graph.precedes_norm(conv) for graph in graphs)]
        if not convs:
            return
        if isinstance(module, fx.GraphModule):
            raise Misfit("convert the network before it is traced")
        check_names(module)
        if kind := hook_kind(module):
            raise Misfit(f"it has a {kind}")
        training, evaluation = map(_match_chain, graphs)
        if training != evaluation:
            raise Misfit("it differs between training and evaluation")
        for part in (part for stage in training.stages for part in (stage.conv, stage.bn)):
            check_call(part, module.get_submodule(part), module, places)
        if len(convs) < len(training.stages):
            raise Misfit(f"only {len(convs)} of its {len(training.stages)} stages are chosen")
        yield replace(training, name=name)
    except Misfit as reason:
        where = f"{original_class(module).__name__}.forward calls it"
        reasons.update({_join(name, conv): f"{where}: {reason}" for conv in convs})


def _called_by(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a forward pass calls itself, by name: its children, and in lists."""
    if is_conv(module) or is_norm(module):
        return
    if not prefix and original_class(module).forward is nn.Module.forward:
        return
    for name, child in module.named_children():
        if getattr(type(child), "forward", nn.Module.forward) is nn.Module.forward:
            yield from _called_by(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _match_chain(graph: ForwardGraph) -> Chain:
    if len(graph.inputs) != 1 or not isinstance(graph.output.args[0], fx.Node):
        raise Misfit("it does not map one tensor to one")
    steps: list[StageNames | str] = []
    node = graph.value(graph.output)
    while node not in graph.inputs:
        before = graph.value(node) if graph.is_relu(node) else node
        if graph.conv_before(before):
            stage, node = _stage(graph, node, "a batch norm")
            steps.insert(0, stage)
        elif graph.module(node) is not None:
            steps.insert(0, str(node.target))
            node = graph.value(node)
        else:
            raise graph.misfit_at(node, "a module")
    _check_all_is_used(graph)
    chain = Chain("", tuple(steps))
    called = [step for step in steps if isinstance(step, str)]
    _check_called_once([*called, *(n for stage in chain.stages for n in (stage.conv, stage.bn))])
    return chain


def _check_all_is_used(graph: ForwardGraph) -> None:
    for node in graph.nodes:
        if node not in graph.seen and node.op != "get_attr":  # reading alone changes nothing
            raise Misfit(f"it also uses {graph.label(node)}")


def _check_called_once(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise Misfit(f"it calls {name!r} {count} times")
