"""Subclasses of nn.Conv2d and nn.Linear as the plain layers that they compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from svf_fast.fusion.graph import ForwardGraph, Misfit
from svf_fast.layers.conv2d import as_pair

# the arguments of functional.conv2d and functional.pad in order, with their defaults
_CONV2D: dict[str, Any] = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
}
_PAD: dict[str, Any] = {"input": None, "pad": (), "mode": "constant", "value": None}


def plain_layers(
    layers: Iterable[nn.Module],
) -> tuple[dict[nn.Module, nn.Conv2d | nn.Linear], list[str]]:
    """Find the plain layers that compute what convolutions and linear layers do now.

    Returns them by layer, and of those without one number, class and reason, the most first.
    """
    found: dict[nn.Module, nn.Conv2d | nn.Linear] = {}
    without: Counter[tuple[str, str]] = Counter()
    for layer in dict.fromkeys(layers):
        try:
            is_conv = isinstance(layer, nn.Conv2d)
            found[layer] = plain_conv(layer) if is_conv else plain_linear(layer)
        except Misfit as reason:
            without[type(layer).__name__, str(reason)] += 1
    texts = [f"{count} {kind}: {reason}" for (kind, reason), count in without.most_common()]
    return found, texts


@torch.no_grad()
def plain_conv(layer: nn.Module) -> nn.Conv2d:
    """Return the plain convolution that computes what an ``nn.Conv2d`` does now.

    That is itself where its forward is that of its base. Else its forward is read as a graph: a
    convolution of its input, padded perhaps by fixed numbers, with a weight made of parameters
    alone, as in weight standardization, is one with the weight of this moment.

    Raises Misfit, why it computes something else.
    """
    assert isinstance(layer, nn.Conv2d)
    if _is_base(layer, nn.Conv2d, ("forward", "_conv_forward")):
        return layer
    call, evaluation = (_Reader(layer, training).call() for training in (True, False))
    if not call.agrees(evaluation):
        raise Misfit("its forward differs between training and evaluation")
    return call.conv(layer)


def plain_linear(layer: nn.Module) -> nn.Linear:
    """Return an ``nn.Linear`` that computes as such; raises Misfit if it does not."""
    assert isinstance(layer, nn.Linear)
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise Misfit("nn.MultiheadAttention uses its weight itself")
    if not _is_base(layer, nn.Linear, ("forward",)):
        raise Misfit("it has a forward of its own")
    return layer


def _is_base(layer: nn.Module, base: type[nn.Module], names: tuple[str, ...]) -> bool:
    """Tell whether a layer computes as its base does; raises Misfit where that cannot be seen."""
    if isinstance(layer, LazyModuleMixin):
        raise Misfit("it has no weight yet, run the model once")
    if "weight" not in layer._parameters or hasattr(layer, "parametrizations"):
        raise Misfit("a hook or parametrization computes its weight")
    for name in names:
        if name in vars(layer):
            raise Misfit(f"it has a {name} of its own instead of its class's")
    return all(getattr(type(layer), name) is getattr(base, name) for name in names)


class _Call(NamedTuple):
    """A convolution as a forward pass calls it."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pad: tuple[int, ...]  # before its own, left, right, top, bottom; empty without
    mode: str  # of that

    def agrees(self, other: _Call) -> bool:
        tensors = zip(self[:2], other[:2], strict=True)
        same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in tensors)
        return same and self[2:] == other[2:]

    def conv(self, layer: nn.Conv2d) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` that computes this, as trainable as the layer."""
        out_channels, inner, height, width = self.weight.shape
        conv = nn.Conv2d(
            inner * self.groups,
            out_channels,
            (height, width),
            groups=self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        trains = layer.weight.requires_grad
        conv.weight = nn.Parameter(self.weight.detach().clone(), trains)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), trains)
        conv.stride, conv.padding, conv.dilation = self.stride, self.padding, self.dilation
        if self.pad:
            if isinstance(self.padding, str) or (self.mode != "constant" and any(self.padding)):
                raise Misfit("it pads twice")
            top, left = self.padding
            sides = [a + b for a, b in zip(self.pad, (left, left, top, top), strict=True)]
            conv.padding = (sides[2], sides[0])
            if self.mode != "constant" or sides[0] != sides[1] or sides[2] != sides[3]:
                # as nn.Conv2d pads in modes other than "zeros"
                conv.padding_mode = self.mode  # type: ignore[assignment]
                conv._reversed_padding_repeated_twice = sides
        return conv.train(layer.training)


class _Reader:
    """Reads the forward pass of a subclass of ``nn.Conv2d`` as a call of a convolution."""

    def __init__(self, layer: nn.Conv2d, training: bool) -> None:
        self.layer, self.graph = layer, ForwardGraph(layer, training)
        self.used = {self.graph.output, *self.graph.inputs}

    def call(self) -> _Call:
        graph, node = self.graph, self.graph.output.args[0]
        if len(graph.inputs) != 1 or not isinstance(node, fx.Node):
            raise Misfit("its forward does not map one tensor to one")
        if not graph.calls(node, {functional.conv2d}):
            raise Misfit(f"its forward ends with {graph.label(node)}, not with a convolution")
        self.used.add(node)
        given = {**_CONV2D, **dict(zip(_CONV2D, node.args, strict=False)), **node.kwargs}
        weight, bias = self.value(given["weight"]), self.value(given["bias"])
        pad, mode = self.padding(given["input"])
        stride, padding, dilation, groups = (
            self.number(given[name]) for name in ("stride", "padding", "dilation", "groups")
        )
        self.check_unused()
        padding = padding if isinstance(padding, str) else as_pair(padding)
        return _Call(weight, bias, as_pair(stride), padding, as_pair(dilation), groups, pad, mode)

    def padding(self, node: fx.Node) -> tuple[tuple[int, ...], str]:
        """Return how the input is padded before the convolution gets it, and in which mode."""
        graph = self.graph
        node = graph.skip(node)
        if node in graph.inputs:
            return (), "constant"
        module = graph.module(node)
        if isinstance(module, nn.ZeroPad2d):
            pad, mode, value = module.padding, "constant", 0.0
        elif graph.calls(node, {functional.pad}):
            given = {**_PAD, **dict(zip(_PAD, node.args, strict=False)), **node.kwargs}
            pad, mode, value = (self.number(given[name]) for name in ("pad", "mode", "value"))
        else:
            raise Misfit(f"its forward convolves what {graph.label(node)} returns")
        self.used.add(node)
        if len(pad) != 4 or value or graph.skip(node.all_input_nodes[0]) not in graph.inputs:
            raise Misfit(f"it calls {graph.label(node)} in an unusual way")
        return tuple(pad), mode

    def number(self, value: Any) -> Any:
        """Return what is no tensor; it does not depend on the input."""
        if any(isinstance(each, fx.Node) for each in (value if _is_many(value) else (value,))):
            raise Misfit("its geometry depends on its input")
        return value

    def value(self, node: Any) -> Any:
        """Compute what a node stands for, from parameters alone."""
        if not isinstance(node, fx.Node):
            return node
        self.used.add(node)
        if node in self.graph.inputs:
            raise Misfit("its weight depends on its input")
        if node.op == "get_attr":
            if node.target not in dict(self.layer.named_parameters()):
                raise Misfit(f"its weight depends on {node.target!r}, which is no parameter")
            return self.layer.get_parameter(str(node.target))
        if node.op == "call_module":
            raise Misfit(f"its weight passes {self.graph.label(node)}")
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def check_unused(self) -> None:
        """Check that nothing happens aside, like a write to the weight."""
        for node in reversed(self.graph.nodes):
            asserts = node.target is torch._assert
            if asserts or any(user in self.used for user in node.users):
                self.used.add(node)
            elif node not in self.used and node.op != "get_attr":
                raise Misfit(f"its forward also uses {self.graph.label(node)}")


def _is_many(value: object) -> bool:
    return isinstance(value, (tuple, list))
