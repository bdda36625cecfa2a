"""What SVFConv2d and SVFLinear share: factors, strategy, W composed once per change of S or s'."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from svf_fast import svd
from svf_fast.layers import core as cores
from svf_fast.layers.costs import gram_is_cheaper
from svf_fast.layers.fingerprint import fingerprint, of_factors, of_older_version
from svf_fast.layers.log_scale import check_trains, log_scale_of, scaled
from svf_fast.layers.network import Network, assert_guarded
from svf_fast.layers.state_dict import explain_other_layer
from svf_fast.layers.values import (
    CoreInUse,
    Made,
    Plan,
    Seen,
    Values,
    bytes_of,
    gathered,
    is_narrow,
    sharded_as,
    widened,
)
from svf_fast.layers.weight import read_only
from svf_fast.ops import maps
from svf_fast.ops.compose import Entry, compose
from svf_fast.ops.convolution import Geometry, directions_first, directions_last
from svf_fast.ops.core import DIAGONAL, Core
from svf_fast.ops.factors import STRATEGIES, Constants, Kind, SVFConvolution, weights
from svf_fast.ops.node import AS_REFERENCE, is_transforming, refuse_transforms
from svf_fast.svd import (
    Factors,
    decompose,
    dual,
    guarded_directions,
    guarded_indices,
)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def svf_layers(model: nn.Module) -> dict[str, Factored]:
    """Return the SVF layers of a model by name, each once."""
    check_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, Factored)}


class Factored(nn.Module):
    """Base of the SVF layers: buffers U, V, ``fingerprint``, trained S, frozen bias.

    With ``trains="log_scale"`` S is a buffer too, and log_scale trains. Both stay in float32
    (float64) whatever dtype the layer is converted to: in 16 bits the steps of an optimizer would
    be rounded away. So do the parameters that a core has besides.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    log_scale: Tensor | None
    bias: Tensor | None
    fingerprint: Tensor
    trains = "S"  # the name of the parameter that trains
    core: Core = DIAGONAL  # the structure of Σ
    weight_made_by = ""  # the class that made its weight of parameters, as standardized ones
    reads_square = False  # `square` of :func:`svf_fast.ops.factors.reads_input`
    plan: Plan | None  # of the last values that were planned for: `current_plan`
    network: Network
    costs: tuple[tuple, int, int, int] | None = None  # kept by `gram_is_cheaper`

    def __init__(self, strategy: str, trains: str = "S", core: str | Core = DIAGONAL):
        super().__init__()
        check_trains(trains)
        self.core = Core.of(core)
        if strategy not in ("auto", *STRATEGIES):
            expected = ", ".join(("auto", *STRATEGIES))
            raise ValueError(f"strategy: expected one of {expected}, got {strategy!r}")
        self.strategy, self.trains = strategy, trains
        self.plan = None
        self.values = Values()
        Network().join(self)
        self._register_load_state_dict_pre_hook(explain_other_layer, with_module=True)

    def _adopt(
        self, weight: Tensor, bias: Tensor | None, factors: Factors | None, groups: int = 1
    ) -> None:
        svd.check_weight(weight)
        U, S, V = decompose(weight, groups) if factors is None else factors
        summary = fingerprint(weight) if factors is None else of_factors(factors, weight, groups)
        self.weight_trained = weight.requires_grad  # what `merge` gives back
        self.register_buffer("U", U)
        self.register_buffer("V", V)
        self.register_buffer("fingerprint", summary)
        S = widened(S.detach()).clone()  # known factors stay as they are
        if self.trains == "S":
            self.S = nn.Parameter(S)
        else:
            self.register_buffer("S", S)
        log_scale = None if self.trains == "S" else nn.Parameter(torch.zeros_like(S))
        self.register_parameter("log_scale", log_scale)
        self.core = self.core.within(self.rank)
        cores.adopt_parts(self, S, groups)
        frozen = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self.refresh()

    @property
    def geometry(self) -> Geometry:
        """Stride, padding inside the convolution, dilation and groups."""
        raise NotImplementedError

    @property
    def kernel(self) -> Tensor:
        """V as the weight [G·R, Ci/G, kh, kw] of a convolution."""
        raise NotImplementedError

    def merged(self) -> nn.Module:
        """Return the plain layer with the composed weight; shares no memory with this one."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Singular values per group."""
        return self.U.shape[1]

    @property
    def trained(self) -> Tensor:
        """The parameter that trains: S, or log_scale."""
        return self.S if self.trains == "S" else self.log_scale  # type: ignore[return-value]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The parameters besides it that :attr:`svf_fast.ops.core.Core.parts` names."""
        return tuple(getattr(self, name) for name in self.core.parts)

    @property
    def all_trained(self) -> tuple[Tensor, ...]:
        """All that trains: S or log_scale, and what a core has besides."""
        return (self.trained, *self.parts)

    @property
    def learns(self) -> bool:
        """Whether anything of it takes a gradient."""
        return self.trained.requires_grad or any(part.requires_grad for part in self.parts)

    @property
    def S_in_use(self) -> Tensor:
        """The singular values that the layer computes with [G·R]: S, or S·exp(s') as it is kept.

        Detached, and after :meth:`current_plan` those of the present s'.
        """
        kept = self.values.S_in_use
        return self.present_S() if kept is None else kept

    def present_S(self) -> Tensor:
        """Return S, or compute S·exp(s'), detached, for the present s'."""
        return self.S if self.trains == "S" else scaled(self.S, self.trained)

    @property
    def differentiable_S(self) -> Tensor:
        """The singular values in use [G·R], differentiable in what trains by autograd."""
        return self.S if self.trains == "S" else self.S * self.trained.exp()

    @property
    def differentiable_core(self) -> Tensor:
        """What stands between U and V: S in use [G·R], or a core's Σ [G, R, R]; differentiable."""
        S = self.differentiable_S
        return S if self.core.is_diagonal else self.core.matrix(S, self.parts)

    @property
    def strategy_in_use(self) -> str:
        """The strategy of the next forward pass: what ``auto`` came to, else the one asked for."""
        plan = self.plan if torch.compiler.is_compiling() else self.current_plan()
        return "reference" if plan is None else plan.strategy  # shapes alone: the definition

    @property
    def guarded(self) -> int:
        """Directions per group whose gradient ``gram`` computes from v instead of dividing by S."""
        plan = self.current_plan()
        return 0 if plan is None or plan.tail is None else plan.tail.shape[-1]

    @property
    def weight(self) -> Tensor:
        """``U diag(S) V`` in the original weight's shape, differentiable in what trains.

        Read only: writing to it raises RuntimeError, because it would reach nothing.

        For a module that uses its layer's weight itself, as torchvision's Swin does. Composed
        whenever it is read, and its gradient costs a dense one: calling the layer is cheaper.
        """
        S = self.differentiable_S
        core = None if self.core.is_diagonal else self.differentiable_core
        factors = cores.composed_of(self, S, core)
        W = svd.compose(*factors, self.V, self.geometry.groups).to(self.U.dtype)
        return read_only(W)

    def composed_weight(self) -> Tensor:
        """Compute ``U diag(S) V`` in the original weight's shape and dtype, detached."""
        S = self._gathered_S()
        with torch.no_grad():
            U, S = cores.composed_of(self, S, cores.gathered_core(self, S))
        return compose(U, S, self.V, self.geometry.groups, self.U.dtype)[0]

    def singular_values(self) -> Tensor:
        """Copy the values in use, S or S·exp(s'), to the host.

        Where they are sharded, all processes must take part.
        """
        return self._gathered_S().cpu().clone()

    def _gathered_S(self) -> Tensor:
        S = gathered(self.S).detach()
        return S if self.trains == "S" else scaled(S, gathered(self.trained))

    def repr_of_factors(self) -> str:
        """Describe rank, strategy, and what trains unless it is S."""
        trains = "" if self.trains == "S" else f", trains={self.trains!r}"
        core = "" if self.core.is_diagonal else f", core={str(self.core)!r}"
        return f"rank={self.rank}, strategy={self.strategy!r}{trains}{core}"

    def refresh(self) -> None:
        """Plan anew from the values of U, S and V: strategy, guarded directions, composed weight.

        Happens by itself when they change. Only under ``torch.compile`` and in a CUDA graph a
        forward pass keeps the guarded directions of the last plan, and stops with an error once S
        has moved so far that they are too few; then call this, and capture the graph again.
        """
        self.plan, self.values = None, Values()
        if not self.has_values:
            return
        groups = self.geometry.groups
        with torch.no_grad():
            self._arrange()
            factors, seen = Seen(*self._frozen()), Seen(*self.all_trained)
            S = self.present_S()
            core, in_use = cores.core_of(self, S), None
            if core is None:
                strategy, host_tail = self._choose(S.cpu())
                tail = None if host_tail is None else host_tail.to(self.U.device)
            else:
                host_tail = None
                strategy, tail, in_use = cores.choose(self, core, None)
            plan = Plan(factors, self.strategy, strategy, tail, host_tail)
            if self.strategy in ("auto", "gram"):
                rows = self.V.reshape(groups, self.rank, -1).mT.reshape(-1, self.rank)
                plan.dual_U = dual(self.U, groups)
                narrower = len(rows) < len(self.U) + self.reads_square
                plan.dual_V = dual(rows, groups) if narrower else None
        S_in_use = None if self.trains == "S" else S
        self.values = Values(seen, self.host_copy(), S_in_use, in_use)
        self.plan = plan

    def _frozen(self) -> tuple[Tensor, ...]:
        """Return the factors that do not train."""
        own: dict[str, Any] = self._buffers
        return (own["U"], own["V"]) if self.trains == "S" else (own["U"], own["V"], own["S"])

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute as the paper's three layers within."""
        plan = self.plan
        if plan is not None:
            self.plan = dataclasses.replace(plan, strategy="reference", tail=None)
        try:
            yield
        finally:
            self.plan = plan

    def _arrange(self) -> None:
        """Lay V down as what composes W reads it: on a GPU its directions innermost."""
        if self.strategy == "reference":
            return
        inside = self.V.is_cuda
        if inside != (self.V.stride(0) == 1) and self.V.dim() > 1:
            self._buffers["V"] = directions_last(self.V) if inside else directions_first(self.V)

    @torch.no_grad()
    def assign(self, S: Tensor, parts: Sequence[Tensor] | None = None) -> None:
        """Set S to values on the host, or log_scale so that S·exp(s') is these; plan for them.

        ``parts``: of a core; without them Σ becomes diag(S).

        What follows from U and V alone is kept, W is composed when next needed; does not
        synchronize. Values far from the present ones are as good as near ones. With log_scale they
        must be such as :func:`svf_fast.layers.log_scale.out_of_reach` finds nothing wrong with.
        """
        trained = self.trained
        wanted = S if self.trains == "S" else log_scale_of(S, gathered(self.S))
        trained.copy_(sharded_as(trained, wanted))
        for index, part in enumerate(self.parts):
            if parts is not None:
                part.copy_(sharded_as(part, parts[index]))
            elif self.core.parts[index] != "core_A":  # which may be what it was drawn
                part.zero_()
        if not self.has_values:
            return
        if self._outdated() or not self.core.is_diagonal:
            self.refresh()
            return
        self.network.forget()
        self.network.moved([self])
        self.plan_for(S.to(self.S.dtype))

    def host_copy(self) -> bytes | None:
        """Return the bytes of what trains where that does not synchronize, else None."""
        if self.trained.is_cuda:
            return None
        return b"".join(map(bytes_of, self.all_trained))

    @property
    def has_values(self) -> bool:
        """Whether U, S and V are more than shapes (meta or fake tensors), or shards of values."""
        if not (svd.has_memory(self.U) and all(map(svd.has_memory, self.all_trained))):
            return False
        return self.trains == "S" or svd.has_memory(cast(Tensor, self._buffers["S"]))

    @property
    def is_captured(self) -> bool:
        """Whether what runs now goes into a CUDA graph."""
        if torch.compiler.is_compiling():
            return False
        return self.S.is_cuda and torch.cuda.is_current_stream_capturing()

    def _choose(self, S: Tensor) -> tuple[str, Tensor | None]:
        """Choose the strategy and, on the CPU, guarded directions for the values S."""
        strategy = self.strategy
        if strategy not in ("auto", "gram"):
            return strategy, None
        # as weights of a GPU's products they come in multiples of eight
        tail = guarded_directions(S, self.geometry.groups, 8 if self.U.is_cuda else 1)
        if strategy == "auto":
            strategy = "gram" if gram_is_cheaper(self, tail.shape[1]) else "chain"
        return strategy, tail if strategy == "gram" and tail.shape[1] else None

    def plan_for(self, S: Tensor) -> None:
        """Plan for the values S; keeps the plan where nothing changes but W."""
        plan = self.plan
        assert plan is not None
        unguarded = plan.strategy == "gram" and plan.host_tail is None
        if unguarded and not guarded_indices(S, S.numel() // self.rank)[0]:
            return  # the usual case, recognized at once
        strategy, host_tail = self._choose(S)
        if strategy == plan.strategy and _same(host_tail, plan.host_tail):
            return
        tail = host_tail
        if tail is not None and self.S.is_cuda:
            tail = tail.pin_memory().to(self.S.device, non_blocking=True)
        self.plan = dataclasses.replace(
            plan, strategy=strategy, tail=tail, host_tail=host_tail, constants={}
        )

    def _outdated(self) -> bool:
        """Tell whether the plan is of other factors, or of another strategy than is asked for."""
        plan = self.plan
        if plan is None or plan.asked != self.strategy:
            return True
        return not plan.factors.holds(*self._frozen())

    def current_plan(self) -> Plan | None:
        """Return the plan for the present values of U, S and V; drops what was made of others."""
        if is_transforming():
            return None if self.strategy == "reference" else self.plan
        if not self.has_values:  # shapes alone: the plan of the last values, or none
            return self.plan
        if self._outdated():
            with self.network.lock:
                if self._outdated():
                    self.refresh()
            return self.plan
        if not self.core.is_diagonal:
            cores.follow(self)
            return self.plan
        trained = self.trained
        if trained.is_cuda:
            if not torch.cuda.is_current_stream_capturing():
                with self.network.lock:
                    self.network.follow(trained.device, not self.values.seen.holds(trained))
        # writes through `param.data` pass the version counter by: the values decide
        elif not self.values.are(now := bytes_of(trained), trained):
            with self.network.lock:
                if not self.values.are(now, trained):
                    S = self.present_S()
                    self.plan_for(S)  # before others see that it is known
                    self.values.moved(Seen(trained), now, None if self.trains == "S" else S)
        return self.plan

    def convolution(self, dtype: torch.dtype, scale: Tensor | None = None) -> SVFConvolution | None:
        """Return what the next forward pass computes with in a dtype; None for ``reference``.

        With ``scale`` [Co] the gradient of y will come without it: ``scaled`` of
        :class:`svf_fast.ops.factors.SVFConvolution`.
        """
        # a graph runs again with other values of S: it composes W and checks the guard itself
        in_graph = torch.compiler.is_compiling() or (
            self.is_captured and not (self.network.composed and self.core.is_diagonal)
        )
        plan = self.plan if in_graph else self.current_plan()
        if plan is None or plan.strategy == "reference":
            return None
        refuse_transforms(f"strategy {plan.strategy!r}", AS_REFERENCE)
        fresh = in_graph or not self.has_values
        S = self.present_S() if fresh else self.S_in_use
        core = self.values.core
        if fresh and not self.core.is_diagonal:
            core = cores.in_graph(self, S)
        elif in_graph and plan.strategy == "gram":
            layers = S.new_zeros((2, 2), dtype=torch.int64)
            layers[0, 1].fill_(self.geometry.groups)  # by kernels: nothing is sent in a capture
            layers[1, 0].fill_(S.numel())
            assert_guarded(S, self.guarded_mask(), layers)
        kind, constants = self.constants(plan, dtype, scale)
        if fresh:
            pair = weights(kind, self.U, S, constants.V, dtype, scale, core and core.core)
        else:
            pair = self.weights(kind, dtype, scale)
        return self.made_of(kind, constants, S, pair, core)

    def made_of(
        self,
        kind: Kind,
        constants: Constants,
        S: Tensor,
        pair: tuple[Tensor, Tensor | None],
        core: CoreInUse | None,
    ) -> SVFConvolution:
        """Return the convolution of these and of what trains."""
        log_scale = None if self.trains == "S" else self.log_scale
        if core is None:
            return SVFConvolution(kind, S, *pair, constants, log_scale)
        return SVFConvolution(kind, S, *pair, constants, log_scale, self.parts, core.inverse)

    def constants(
        self, plan: Plan, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[Kind, Constants]:
        """Return what the gradients take of U and V under a plan, kept where that is possible."""
        geometry, trains = self.geometry, self.learns
        keep = not torch.compiler.is_compiling() and self.has_values
        at = dtype, geometry, trains, scale is not None
        found = plan.constants.get(at) if keep else None
        if found is not None and found[0] is scale:
            return found[1:]
        U, V, strategy = self.U, self.kernel, plan.strategy if trains else "frozen"
        shape = torch.Size((len(U), *V.shape[1:]))
        kind = Kind.of(shape, geometry, strategy, self.core, self.reads_square)
        made = Constants.of(kind, U, V, dtype, plan.tail, plan.dual_U, plan.dual_V, scale)
        if keep and not self.is_captured:
            plan.constants[at] = scale, kind, made
        return kind, made

    def weights(
        self, kind: Kind, dtype: torch.dtype, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return W, and with a scale scale ⊙ W, for the present values of S."""
        chain = kind.strategy == "chain"
        made = self.values.take(dtype, scale, chain)
        if made is None:
            with self.network.lock:
                made = self.values.take(dtype, scale, chain)  # by another thread meanwhile
                if made is None:
                    made = self._make(kind, dtype, scale)
        return made.weight, None if scale is None else made.scaled

    def _make(self, kind: Kind, dtype: torch.dtype, scale: Tensor | None) -> Made:
        values, chain = self.values, kind.strategy == "chain"
        values.made.pop(dtype, None)
        values.scales[dtype] = scale
        if maps.on_gpu(self.U) and self.composes(dtype) and not self.is_captured:
            self.network.compose(self.network.to_compose(dtype, self.S.device), dtype)
        else:
            core = None if values.core is None else values.core.core
            pair = weights(kind, self.U, self.S_in_use, self.kernel, dtype, scale, core)
            values.made[dtype] = Made(scale, chain, *pair)
        made = values.take(dtype, scale, chain)
        assert made is not None
        return made

    def composes(self, dtype: torch.dtype) -> bool:
        """Tell whether one launch makes W, which was asked for in a dtype, with that of others."""
        plan, U, S, V, trains = self.plan, self.U, self.S, self.V, self.trained.requires_grad
        return (
            dtype in self.values.scales
            and self.core.is_diagonal
            and dtype != torch.float64
            and maps.on_gpu(U)
            and U.dtype == S.dtype == V.dtype == torch.float32
            and not (plan is not None and plan.strategy == "chain" and trains)
        )

    def entry(self, dtype: torch.dtype) -> Entry:
        """Return what :func:`svf_fast.ops.compose.compose_all` takes of this layer."""
        groups, scale = self.geometry.groups, self.values.scales[dtype]
        return Entry(self.U, self.S_in_use.detach(), self.kernel, groups, scale)

    def guarded_mask(self) -> Tensor:
        """Return which directions are guarded: bool [G·R]."""
        groups, tail = self.geometry.groups, None if self.plan is None else self.plan.tail
        guarded = torch.zeros_like(self.S, dtype=torch.bool)
        if tail is None:
            return guarded
        return guarded.reshape(groups, -1).scatter(1, tail, True).flatten()

    def compute_dtype(self, x: Tensor, layer: str) -> torch.dtype:
        """Return the dtype the layer computes in; checks type, dtype and device of x."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{layer}: expected a Tensor, got {type(x).__name__}")
        if x.device != self.U.device:
            raise ValueError(
                f"{layer}: expected x on {self.U.device}, where the factors are, got x on "
                f"{x.device}; move one with .to()"
            )
        if x.is_meta:  # shapes alone, where autocast does not reach
            return self.U.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        if x.dtype != self.U.dtype:
            raise TypeError(
                f"{layer}: expected x of {self.U.dtype}, the dtype of the factors, got {x.dtype}; "
                "convert one with .to(), or use torch.autocast"
            )
        return x.dtype

    def _apply(self, fn, recurse=True):
        trained = self.all_trained
        values = self.S, *trained, *(x.grad for x in trained)

        def keeping_S_wide(x: Tensor) -> Tensor:
            moved = fn(x)
            if any(x is one for one in values) and is_narrow(moved):
                return x.to(moved.device, torch.float32)
            return moved

        super()._apply(keeping_S_wide, recurse)
        self._arrived()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        kept = state_dict.get(f"{prefix}fingerprint")
        if isinstance(kept, Tensor):
            state_dict[f"{prefix}fingerprint"] = of_older_version(kept)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._arrived()

    def _arrived(self) -> None:
        """Plan for values that came from outside; for those not planned for yet, when they run.

        Not planned for are those of ``to_empty`` before others are loaded: anything, not of rank R.
        """
        for name in ("S", "log_scale", *self.core.parts):
            x = getattr(self, name)
            if x is not None and is_narrow(x):  # of an older file, assigned
                wide = widened(x.detach())
                is_buffer = name in self._buffers
                setattr(self, name, wide if is_buffer else nn.Parameter(wide, x.requires_grad))
        with contextlib.suppress(ValueError):
            self.refresh()

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.plan, replica.values = None, Values()  # of its own S
        replica.__dict__.pop("network")
        Network().join(replica)
        return replica

    def __getstate__(self):
        return {**self.__dict__, "plan": None, "values": None}

    def __setstate__(self, state):
        network = state.get("network") or Network()
        super().__setstate__({key: value for key, value in state.items() if key != "network"})
        self.fingerprint = of_older_version(self.fingerprint)
        self._parameters.setdefault("log_scale", None)  # of an older version
        network.join(self)
        self._arrived()
