"""What SVFConv2d and SVFLinear share: factors, strategy, and W composed once per change of S."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from svf_fast import svd
from svf_fast.ops.compose import compose
from svf_fast.ops.convolution import Geometry
from svf_fast.ops.guard import guards_hold
from svf_fast.ops.svf_conv2d import STRATEGIES, Frozen, reads_input
from svf_fast.svd import (
    GUARD_LIMIT,
    Factors,
    decompose,
    dual,
    guarded_directions,
)


def fingerprint(weight: Tensor) -> Tensor:
    """First 16 bytes of the SHA-256 of a weight's shape and float32 values, as uint8 [16]."""
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    values = weight.detach().cpu().float().contiguous().flatten()
    digest.update(values.view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()[:16]), dtype=torch.uint8, device=weight.device)


class _Arrival:
    """Values of S on their way from a GPU to the host."""

    def __init__(self, S: Tensor):
        self.values = torch.empty(S.shape, dtype=S.dtype, pin_memory=True)
        self._event = torch.cuda.Event()
        self._started = False

    def start(self, S: Tensor) -> None:
        """Nothing where the last ones have not arrived: the host is ahead, they are read first."""
        if not self._started:
            self.values.copy_(S.detach(), non_blocking=True)
            self._event.record()
            self._started = True

    def here(self) -> bool:
        """Whether values have come since this was last true."""
        if self._started and self._event.query():
            self._started = False
            return True
        return False


def _sent(tail: Tensor, device: torch.device) -> Tensor:
    return tail.pin_memory().to(device, non_blocking=True)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@dataclasses.dataclass(eq=False)
class _Plan:
    """What follows from the factors' present values; never saved.

    Another object whenever they change: who has the same plan may keep what follows from it.
    """

    factors_key: tuple
    scale_key: tuple
    S: Tensor  # the values the plan was made for
    strategy: str
    tail: Tensor | None
    dual_U: Tensor | None
    dual_V: Tensor | None
    weights: dict[torch.dtype, Tensor] = dataclasses.field(default_factory=dict)
    host_tail: Tensor | None = None  # of a GPU's tail
    arrival: _Arrival | None = None


def svf_layers(model: nn.Module) -> dict[str, Factored]:
    """The SVF layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factored)}


class Factored(nn.Module):
    """Base of the SVF layers: buffers U, V, ``fingerprint``, trained S, frozen bias."""

    U: Tensor
    S: Tensor
    V: Tensor
    bias: Tensor | None
    fingerprint: Tensor

    def __init__(self, strategy: str):
        super().__init__()
        if strategy not in ("auto", *STRATEGIES):
            expected = ", ".join(("auto", *STRATEGIES))
            raise ValueError(f"strategy: expected one of {expected}, got {strategy!r}")
        self.strategy = strategy
        self._plan: _Plan | None = None
        self._register_load_state_dict_pre_hook(_explain_weight_key, with_module=True)

    def _adopt(self, weight: Tensor, bias: Tensor | None, factors: Factors | None) -> None:
        U, S, V = decompose(weight, self._geometry().groups) if factors is None else factors
        self.weight_trained = weight.requires_grad  # what `merge` gives back
        self.register_buffer("U", U)
        self.register_buffer("V", V)
        self.register_buffer("fingerprint", fingerprint(weight))
        self.S = nn.Parameter(S)
        frozen = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self.refresh()

    def _geometry(self) -> Geometry:
        """Stride, padding inside the convolution, dilation and groups."""
        raise NotImplementedError

    def merged(self) -> nn.Module:
        """The plain layer with the composed weight; shares no memory with this one."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Singular values per group."""
        return self.U.shape[1]

    @property
    def strategy_in_use(self) -> str:
        """The strategy of the next forward pass: what ``auto`` came to, else the one asked for."""
        plan = self._plan if torch.compiler.is_compiling() else self._current_plan()
        return "reference" if plan is None else plan.strategy  # shapes alone: the definition

    @property
    def guarded(self) -> int:
        """Directions per group whose gradient ``gram`` computes from v instead of dividing by S."""
        plan = self._current_plan()
        return 0 if plan is None or plan.tail is None else plan.tail.shape[1]

    @property
    def weight(self) -> Tensor:
        """``U diag(S) V`` in the shape of the original weight, differentiable in S; read only.

        For a module that uses its layer's weight itself, as torchvision's Swin does. Composed
        whenever it is read, and its gradient costs a dense one: calling the layer is cheaper.
        """
        return svd.compose(self.U, self.S, self.V, self._geometry().groups).to(self.S.dtype)

    def composed_weight(self) -> Tensor:
        """``U diag(S) V`` in the shape of the original weight and the dtype of S, detached."""
        return compose(self.U, self.S, self.V, self._geometry().groups, self.S.dtype)

    def refresh(self) -> None:
        """Plan anew from the values of U, S and V: strategy, guarded directions, composed weight.

        Happens by itself when they change. Only under ``torch.compile`` and in a CUDA graph a
        forward pass keeps the guarded directions of the last plan, and stops with an error once S
        has moved so far that they are too few; then call this, and capture the graph again.
        """
        self._plan = None
        if not self._has_values():
            return
        groups = self._geometry().groups
        with torch.no_grad():
            strategy, host_tail = self._choose(self.S)
            tail = None if host_tail is None else host_tail.to(self.U.device)
            plan = _Plan(*self._keys(), self.S.detach().clone(), strategy, tail, None, None)
            plan.host_tail = None if host_tail is None else host_tail.cpu()
            if self.strategy in ("auto", "gram"):
                rows = self.V.reshape(groups, self.rank, -1).mT.reshape(-1, self.rank)
                plan.dual_U = dual(self.U, groups)
                plan.dual_V = dual(rows, groups) if len(rows) < len(self.U) else None
        self._plan = plan

    @torch.no_grad()
    def assign(self, S: Tensor) -> None:
        """Sets S to values on the host and plans for them at once.

        What follows from U and V alone is kept, W is composed when next needed, and a GPU is not
        waited for. Values far from the present ones are as good as near ones.
        """
        self.S.copy_(S)
        if not self._has_values():
            return
        factors_key, scale_key = self._keys()
        if self._plan is None or self._plan.factors_key != factors_key:
            self.refresh()
            return
        strategy, tail = self._choose(S.to(self.S.dtype))
        self._plan = dataclasses.replace(
            self._plan,
            scale_key=scale_key,
            S=self.S.detach().clone(),
            strategy=strategy,
            tail=_sent(tail, self.S.device) if tail is not None and self.S.is_cuda else tail,
            weights={},
            host_tail=tail,
            arrival=None,
        )

    def _has_values(self) -> bool:
        return not (self.U.is_meta or isinstance(self.U, FakeTensor))

    def _is_captured(self) -> bool:
        """Whether what runs now goes into a CUDA graph."""
        return self.S.is_cuda and torch.cuda.is_current_stream_capturing()

    def _choose(self, S: Tensor) -> tuple[str, Tensor | None]:
        """Strategy and guarded directions for the values S."""
        strategy = self.strategy
        if strategy not in ("auto", "gram"):
            return strategy, None
        tail = guarded_directions(S, self._geometry().groups)
        if strategy == "auto":
            strategy = "gram" if self._gram_is_cheaper(tail.shape[1]) else "chain"
        return strategy, tail if strategy == "gram" and tail.shape[1] else None

    def _gram_is_cheaper(self, guarded: int) -> bool:
        """Fewer multiplications than ``chain``, per group and position, beyond plain conv's own.

        ``gram`` keeps a map that is kept already, or the smaller one: memory never speaks for
        ``chain``.
        """
        groups = self._geometry().groups
        fan_in, fan_out = self.V[0].numel(), len(self.U) // groups
        weight_shape = torch.Size((len(self.U), *self.V.shape[1:], 1, 1)[:4])
        matrix = fan_in if reads_input(weight_shape, self._geometry()) else fan_out
        gram = matrix**2 + guarded * (fan_in + fan_out)
        chain = 2 * self.rank * (fan_in + fan_out) - 2 * fan_in * fan_out
        return gram <= chain

    def _keys(self) -> tuple[tuple, tuple]:
        """Of the factors and of S: another key whenever one is replaced or written to."""
        if self.S.is_inference() or self.U.is_inference():  # no version counter: never equal
            return (object(),), (object(),)
        factors = tuple((t.data_ptr(), t._version, t.dtype) for t in (self.U, self.V))
        return factors, (self.S.data_ptr(), self.S._version)

    def _current_plan(self) -> _Plan | None:
        if not self._has_values():  # shapes alone: the plan of the last values, or none
            return self._plan
        factors_key, scale_key = self._keys()
        if self._plan is None or self._plan.factors_key != factors_key:
            self.refresh()
            return self._plan
        plan = self._plan
        if self.S.is_cuda:
            return self._follow_on_device(plan, scale_key)
        # writes through `param.data` pass the version counter by: the values decide
        if plan.scale_key != scale_key or not torch.equal(plan.S, self.S):
            S = self.S.detach().clone()
            strategy, tail = self._choose(S)
            self._plan = dataclasses.replace(
                plan, scale_key=scale_key, S=S, strategy=strategy, tail=tail, weights={}
            )
        return self._plan

    def _follow_on_device(self, plan: _Plan, scale_key: tuple) -> _Plan:
        """The plan for a changed S on a GPU, without waiting for it.

        The values travel to the host while the step runs, so the guarded directions follow a
        change of S or two behind: an optimizer step moves S by far less than the guard's margin.
        """
        if self._is_captured():
            return plan
        arrival = plan.arrival
        if arrival is not None and arrival.here():
            strategy, tail = self._choose(arrival.values)
            if strategy != plan.strategy or not _same(tail, plan.host_tail):
                on_device = None if tail is None else _sent(tail, self.S.device)
                plan = dataclasses.replace(plan, strategy=strategy, tail=on_device, host_tail=tail)
        if plan.scale_key != scale_key:
            arrival = arrival or _Arrival(self.S)
            arrival.start(self.S)
            plan = dataclasses.replace(plan, scale_key=scale_key, weights={}, arrival=arrival)
        self._plan = plan
        return plan

    def _strategy_and_frozen(self, dtype: torch.dtype) -> tuple[str, Frozen]:
        """Strategy and constants of the next forward pass in the compute dtype."""
        # a graph runs again with other values of S: it composes W and checks the guard itself
        graph = torch.compiler.is_compiling() or self._is_captured()
        if graph:
            plan = self._plan
            if plan is not None and plan.strategy == "gram":
                self._assert_guarded(plan)
        else:
            plan = self._current_plan()
        if plan is None:  # no values to plan from: meta and fake tensors, where shapes are all
            return "reference", Frozen()
        weight = None
        folds = plan.strategy in ("fold", "gram") or not self.S.requires_grad
        if folds and not graph and self._has_values():
            weight = plan.weights.get(dtype)
            if weight is None:
                weight = compose(self.U, self.S, self.V, self._geometry().groups, dtype)
                plan.weights[dtype] = weight
        return plan.strategy, Frozen(weight, plan.tail, plan.dual_U, plan.dual_V)

    def _assert_guarded(self, plan: _Plan) -> None:
        groups = self._geometry().groups
        guarded = torch.zeros_like(self.S, dtype=torch.bool).reshape(groups, -1)
        if plan.tail is not None:
            guarded = guarded.scatter(1, plan.tail, True)
        layers = self.S.new_zeros((2, 2), dtype=torch.int64)
        layers[0, 1], layers[1, 0] = groups, self.S.numel()
        torch._assert_async(
            guards_hold(self.S, guarded.flatten(), layers, 2 * GUARD_LIMIT).all(),
            "SVF layer under torch.compile or in a CUDA graph: S has moved so far that more "
            "directions need the exact gradient; call refresh() on the converted layers and "
            "capture the graph again, or use strategy='chain'.",
        )

    def _compute_dtype(self, x: Tensor, layer: str) -> torch.dtype:
        """The dtype the layer computes in; checks type, dtype and device of x."""
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
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def __getstate__(self):
        return {**self.__dict__, "_plan": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.refresh()


def _explain_weight_key(module, state_dict, prefix, *_):
    if f"{prefix}weight" in state_dict and f"{prefix}S" not in state_dict:
        raise ValueError(
            f"{prefix}weight: this checkpoint is of the plain layer, but the model here was "
            "converted to U, S, V. Load it first and call svf_fast.convert after."
        )
