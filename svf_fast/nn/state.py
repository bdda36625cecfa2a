"""What a fused block's forward depends on besides its input, as a tuple that is cheap to compare.

Reading a block (may it be fused, with which weights?) takes several times as long as launching its
kernels. It is read again only when this tuple is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from svf_fast.nn.conv2d import SVFConv2d

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def is_hooked(module: nn.Module) -> bool:
    """Whether something listens to the module's calls."""
    own = module.__dict__
    return bool(own[_HOOKS[0]] or own[_HOOKS[1]] or own[_HOOKS[2]] or own[_HOOKS[3]])


def state(module: nn.Module) -> tuple[Any, ...] | None:
    """Of all modules inside `module`; None where it cannot be told by looking.

    That is while torch.compile traces, and for tensors without values or version.
    """
    if torch.compiler.is_compiling():
        return None
    found: list[Any] = [torch.is_grad_enabled()]
    try:
        _look(module, found)
    except RuntimeError:  # fake and inference tensors
        return None
    return tuple(found)


def _look(module: nn.Module, found: list[Any]) -> None:
    for child in module._modules.values():
        if child is None:
            continue
        own = child.__dict__
        found += (child, type(child), own["training"], is_hooked(child), "forward" in own)
        if isinstance(child, SVFConv2d):
            if not child._has_values():
                raise RuntimeError("no values to look at")
            S, bias = own["_parameters"]["S"], own["_parameters"]["bias"]
            found += (child.strategy_in_use, S.requires_grad, own["stride"], own["padding_mode"])
            found += (own["dilation"], own["_explicit_padding"])
            _look_at(bias, found)
        elif isinstance(child, _BatchNorm):
            found.append(own["eps"])
            for tensor in _constants(child):
                _look_at(tensor, found)
        else:
            _look(child, found)


def host_values(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The constants of the batch norms inside `module`, on the CPU, each with a copy.

    Writes through ``tensor.data`` pass the version counter by; there the values decide. On a GPU
    looking would mean waiting.
    """
    norms = (inner for inner in module.modules() if isinstance(inner, _BatchNorm))
    tensors = (tensor for norm in norms for tensor in _constants(norm))
    return [(t, t.detach().clone()) for t in tensors if t is not None and t.device.type == "cpu"]


def _constants(norm: _BatchNorm) -> tuple[Tensor | None, ...]:
    parameters, buffers = norm._parameters, norm._buffers
    affine = parameters["weight"], parameters["bias"]
    return *affine, buffers["running_mean"], buffers["running_var"]


def _look_at(tensor: Tensor | None, found: list[Any]) -> None:
    if isinstance(tensor, FakeTensor):
        raise RuntimeError("no values to look at")
    if tensor is not None:
        found += (tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.dtype)
    else:
        found.append(None)
