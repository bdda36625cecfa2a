"""Batch norms as a fused block reads them, and how they stay frozen while a model is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from svf_fast.fusion.attributes import attributes
from svf_fast.fusion.fused import Recast, recast, restore

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_KEPT = "_svf_fast_eps"


FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
"""Of torch's own batch norms, which depend on nothing but their tensors and eps."""


def is_norm(module: nn.Module | None) -> bool:
    return hasattr(module, "running_var")


class Norm(NamedTuple):
    """``(y - mean) / sqrt(var + eps) · weight + bias`` per channel."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> Norm | None:
        """Read a batch norm as it computes with its stored statistics; None if it is none.

        Also one without parameters, which has no other statistics: ``FrozenBatchNorm2d`` of
        torchvision, detectron2, DETR and others.
        """
        eps = module.eps if isinstance(module, _BatchNorm) else _eps_of_constants(module)
        if eps is None:
            return None
        mean, var, weight, bias = (getattr(module, name) for name in _TENSORS)
        return cls(mean, var, weight, bias, eps)


def _eps_of_constants(module: nn.Module) -> float | None:
    """Return eps of a batch norm that has buffers alone, None if the module is none.

    Found by what it computes, again when one of its attributes changes, and kept on the module.
    """
    buffers = module._buffers
    if module._parameters or module._modules or any(buffers.get(n) is None for n in _TENSORS):
        return None
    known = module.__dict__.get(_KEPT)
    if not torch.compiler.is_compiling():
        state = {name: value for name, value in attributes(module).items() if name != _KEPT}
        if known is None or known[0] != (type(module), state):
            candidates = ("eps",) if hasattr(module, "eps") else (1e-5, 0.0)
            found = next((eps for eps in candidates if _computes(module, eps)), None)
            known = module.__dict__[_KEPT] = (type(module), state), found
    eps = None if known is None else known[1]
    return getattr(module, eps) if isinstance(eps, str) else eps


def _computes(module: nn.Module, eps: str | float) -> bool:
    """Tell whether a copy of the module is batch norm with its buffers, whatever they and x are."""
    draw = torch.Generator().manual_seed(0)
    try:
        trial = copy.deepcopy(module).to_empty(device="cpu").double()
        buffers = [getattr(trial, name) for name in _TENSORS]
        for buffer in buffers:
            buffer.copy_(torch.rand(len(buffer), generator=draw) ** 3)  # some nearly zero
        kept = [buffer.clone() for buffer in buffers]
        x = torch.randn(2, len(kept[0]), 3, 2, generator=draw).double()
        number = getattr(module, eps) if isinstance(eps, str) else eps
        mean, var, weight, bias = kept
        expected = functional.batch_norm(x, mean, var, weight, bias, eps=number)
        for training in (True, False):
            for differentiable in (True, False):
                y = trial.train(training).forward(x.clone().requires_grad_(differentiable))
                torch.testing.assert_close(y.detach(), expected, rtol=1e-9, atol=1e-9)
                if y.requires_grad != differentiable:
                    return False
        return all(map(torch.equal, buffers, kept))
    except Exception:  # whatever a stranger's forward raises
        return False


class StaysFrozen(Recast):
    """A batch norm that ``train()`` leaves in evaluation mode while none of its parameters trains.

    So a training loop that begins with ``model.train()`` neither takes a fused block apart nor
    moves statistics of which an adapter knows nothing.
    """

    def train(self, mode: bool = True):
        return super().train(mode and not _is_constant(self))

    def reset_running_stats(self) -> None:
        """Refuse: statistics that no forward pass would gather again (``update_bn``)."""
        raise RuntimeError(
            f"{type(self).__name__}: expected its statistics to stay, as svf_fast.convert found it "
            "frozen, got a call of reset_running_stats(); to gather new ones convert with "
            "keep_norms_frozen=False"
        )


def keep_frozen(model: nn.Module) -> list[Callable[[], object]]:
    """Make the frozen batch norms of a model stay so, in place; returns what undoes it."""
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm) and is_frozen(m))
    found = [m for m in norms if not isinstance(m, StaysFrozen)]
    return [partial(restore, recast(m, StaysFrozen)) for m in found]


def is_frozen(norm: _BatchNorm) -> bool:
    """Tell whether a batch norm uses its stored statistics, and nothing of it trains."""
    stored = norm.running_mean is not None and not isinstance(norm, LazyModuleMixin)
    return stored and not norm.training and _is_constant(norm)


def _is_constant(norm: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
