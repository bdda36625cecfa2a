"""A pre-norm transformer block of SVF layers as two autograd nodes around its attention."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from svf_fast.fusion.changes import changed, hooked, remember, replaced
from svf_fast.fusion.fused import Fused, recast
from svf_fast.fusion.reading import read
from svf_fast.fusion.tokens import Modes, Ref, Step, TransformerBlock, fitting
from svf_fast.layers.linear import SVFLinear
from svf_fast.ops.transformer import Linear, Norm, Rest, after_attention, normalized_linear


class SVFTransformerBlock(Fused):
    """A pre-norm transformer block (ViT, DeiT, DINOv2) of four SVF linear layers.

    ``m = x + scale1 ⊙ proj(attention(queries(norm1(x))))``, then
    ``m + scale2 ⊙ fc2(gelu(fc1(norm2(m))))``, with frozen layer norms and scales. What lies between
    the queries and ``proj`` runs as its own forward had it, with torch's attention or another; what
    is before and after is an autograd node each. With the strategy ``gram`` and queries, keys and
    values of C channels each, the block keeps 10 C numbers per token and those of the attention's
    softmax, as with frozen weights: x, the queries, keys and values (3), what the attention
    returns, the input of GELU (4) and the output of fc2.

    Where it does not fit, because a layer norm or a bias trains, a dropout is active outside of the
    attention, a hook sits on an inner module or a layer computes as ``reference``, the original
    forward runs; :meth:`unfused_reason` and :func:`svf_fast.memory_report` say so. So it does for a
    call with other arguments than x, such as a mask.

    Attributes:
        recompute: compute the input of GELU again in the backward pass instead of keeping it: 6 C,
            for another product of fc1.
        keeps_int8: keep the output of fc2 in 8 bits, a byte instead of a number, with ``gram``. The
            gradient of its S alone is computed from it; output and dL/dx stay the same to the bit.

    Shapes: x [..., C] -> [..., C].
    """

    recompute: bool
    _names: Modes
    # of the inner modules, and their attributes, as they were when the forward was read
    _kinds: dict[str, str]
    _attributes: dict[str, dict[str, Any]]

    @classmethod
    def adopt(cls, module: nn.Module, found: Modes) -> Fused:
        """Fuse a block that was found, in place."""
        fused = recast(module, cls)
        fused._names, fused.recompute = found, False
        fused._kinds, fused._attributes = remember(fused, ())
        return fused

    def _fitting(self) -> TransformerBlock:
        """Return the block that it is in one of its modes."""
        return cast(TransformerBlock, fitting(self._names))

    def fused_convs(self) -> dict[str, bool]:
        return dict.fromkeys(self._fitting().layers, False)

    @property
    def takes_int8(self) -> bool:  # type: ignore[override]  # of a strategy, here
        """Whether the output of fc2 is kept, which may be in 8 bits."""
        fc2 = self.get_submodule(self._fitting().fc2)
        if not isinstance(fc2, SVFLinear) or fc2.in_features <= fc2.out_features:
            return False  # of a layer that does not narrow x is kept
        planned = fc2.strategy_in_use if fc2.has_values else fc2.strategy
        return planned in ("auto", "gram")

    @property
    def recomputed(self) -> str:
        """Name of the layer that ``recompute`` runs again."""
        return self._fitting().fc1

    @property
    def run_again(self) -> tuple[str, ...]:
        """Names of the layers that the backward pass runs again, as it is set now."""
        proj = self._fitting().proj
        return (proj, self.recomputed) if self.recompute else (proj,)

    @property
    def directions_again(self) -> tuple[str, ...]:
        """Names of the layers of which ``chain`` computes Vᵀx again in the backward pass."""
        names = self._fitting()
        return (names.queries,) if self.recompute else (names.queries, names.fc1)

    def unfused_reasons(self) -> list[str]:
        names = self._names[self.training]
        if isinstance(names, str):
            return [names]
        return [
            replaced(self, self._kinds)
            or changed(self)
            or self._mode_differs()
            or self._layer_reason(names)
            or hooked(self)
        ]

    def _mode_differs(self) -> str:
        """Name a part in another mode than the block, where the mode matters."""
        if self._names[True] == self._names[False]:
            return ""
        parts = self.named_modules()
        name = next((name for name, part in parts if part.training != self.training), "")
        return f"{name} is in another mode than the block" if name else ""

    def _layer_reason(self, names: TransformerBlock) -> str:
        for name in names.layers:
            layer = self.get_submodule(name)
            if not isinstance(layer, SVFLinear):
                return f"{name} is a {type(layer).__name__}, not an SVF layer"
            if layer.strategy_in_use == "reference":
                return f"{name} computes as 'reference'"
        return ""

    def frozen_parts(self) -> dict[str, Tensor]:
        """Return by name what must not train: norms, scales and biases, as it is now."""
        names = self._fitting()
        found = {f"{name}.bias": _own(self, f"{name}.bias") for name in names.layers}
        for norm in names.norms:
            found |= {f"{norm}.{key}": _own(self, f"{norm}.{key}") for key in ("weight", "bias")}
        found |= {name: _own(self, name) for name in (names.scale1, names.scale2) if name}
        return {name: value for name, value in found.items() if value is not None}

    def forward(self, x: Tensor, *others, **given) -> Tensor:
        reasons = read(self).reasons(self)
        unlike = any(each is not None for each in (*others, *given.values()))
        if reasons[0] or unlike or not isinstance(x, Tensor) or self._training_part():
            return super().forward(x, *others, **given)
        names = cast(TransformerBlock, self._names[self.training])
        first = self._layer(names.queries)
        dtype = first.compute_dtype(x, type(self).__name__)
        if x.dim() == 0 or x.shape[-1] != first.in_features:
            raise ValueError(
                f"{type(self).__name__}: expected x of shape [..., {first.in_features}], got "
                f"{list(x.shape)}"
            )
        queries = normalized_linear(x, self._norm(names.norm1), _linear(first, dtype))
        attended = self._run(names.attention, queries, x)
        if attended.shape[:-1] != x.shape[:-1]:  # added to each token, as pooled ones are
            return super().forward(x, *others, **given)
        proj, fc1, fc2 = (_linear(self._layer(name), dtype) for name in names.layers[1:])
        scale1, scale2 = (_own(self, n) if n else None for n in (names.scale1, names.scale2))
        rest = Rest(proj, fc1, fc2, self._norm(names.norm2), scale1, scale2, names.gelu)
        return after_attention(x, attended, rest, self.recompute, self.keeps_int8)

    def unfused_reason(self) -> str:
        return super().unfused_reason() or self._training_part()

    def _training_part(self) -> str:
        """Tell which of the frozen parts trains; looked at each time, being cheap to look at."""
        if not torch.is_grad_enabled():
            return ""
        for name, tensor in self.frozen_parts().items():
            if tensor.requires_grad:
                return f"{name} trains: call requires_grad_(False) on it"
        return ""

    def _layer(self, name: str) -> SVFLinear:
        return cast(SVFLinear, self.get_submodule(name))

    def _norm(self, name: str) -> Norm:
        norm = cast(nn.LayerNorm, self.get_submodule(name))
        return Norm(norm.weight, norm.bias, norm.eps)

    def _run(self, steps: Sequence[Step], queries: Tensor, like: Tensor) -> Tensor:
        """Compute what the attention returns, freeing what no later step reads."""
        values: list[Any] = [queries, like]
        del queries
        for step in steps:
            args = _filled(step.args, values)
            kwargs = {name: _filled(each, values) for name, each in step.kwargs.items()}
            if step.kind == "call_function":
                result = step.target(*args, **kwargs)
            elif step.kind == "call_method":
                result = getattr(args[0], step.target)(*args[1:], **kwargs)
            elif step.kind == "call_module":
                result = self.get_submodule(step.target)(*args, **kwargs)
            else:
                result = operator.attrgetter(step.target)(self)
            del args, kwargs
            values.append(result)
            for number in step.frees:
                values[number] = None
        return values[-1]


def _linear(layer: SVFLinear, dtype: torch.dtype) -> Linear:
    conv = layer.convolution(dtype)
    assert conv is not None  # the reasons have seen to it
    return Linear(conv, layer.bias)


def _own(module: nn.Module, name: str) -> Tensor | None:
    """Return a tensor of an inner module by its name; None where it has none."""
    owner, _, own = name.rpartition(".")
    return getattr(module.get_submodule(owner), own)


def _filled(argument: Any, values: list[Any]) -> Any:
    """Return an argument with the values that it refers to."""
    if isinstance(argument, Ref):
        return values[argument]
    if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
        kind = list if isinstance(argument, list) else tuple
        return kind(_filled(each, values) for each in argument)
    if isinstance(argument, dict):
        return {key: _filled(each, values) for key, each in argument.items()}
    if isinstance(argument, slice):
        parts = argument.start, argument.stop, argument.step
        return slice(*(_filled(each, values) for each in parts))
    return argument
