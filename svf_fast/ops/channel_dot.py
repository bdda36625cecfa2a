"""Channel-wise inner product of two maps, alone or fused with a scaling of the first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from svf_fast import _library
from svf_fast.ops.maps import check_maps


def channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``out_c = Σ_{n,p} a_ncp · b_ncp``.

    a, b [N, C, *spatial] of one dtype -> [C], in float32 (float64 for float64). One read of each;
    contiguous and channels_last maps are read as they lie, other strides are copied first, and
    `b` is brought to the layout of `a`. The result does not depend on the number of threads.
    Equivalent to ``(a.float() * b.float()).sum(dim=all but 1)``. Differentiable.
    """
    check_maps("channel_dot", a=a, b=b)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _ChannelDot.apply(a, b)
    return torch.ops.svf_fast.channel_dot(a, b)


def channel_dot_scale_(a: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Compute ``out_c = Σ_{n,p} a_ncp · v_ncp``, and in the same pass ``a_ncp ← a_ncp · s_c``.

    a, v [N, C, *spatial] of one dtype, s [C] in float32 (float64 for float64) -> [C], dtype of s.
    The backward of `chain`: with ``a = Uᵀg`` it returns dS and leaves ``S ⊙ a``, at one read of
    each map and one write. `a` must be contiguous or channels_last. Not differentiable.
    """
    check_maps("channel_dot_scale_", a=a, v=v)
    if torch.is_grad_enabled() and (a.requires_grad or v.requires_grad or s.requires_grad):
        raise RuntimeError(
            "channel_dot_scale_ overwrites a and has no gradient: call it under torch.no_grad(), "
            "or use channel_dot"
        )
    dtype = _result_dtype(a)
    if s.dtype != dtype:
        raise TypeError(
            f"channel_dot_scale_: s: expected {dtype} for a of {a.dtype}, got {s.dtype}"
        )
    if s.shape != a.shape[1:2]:
        raise ValueError(
            f"channel_dot_scale_: s: expected shape [{a.shape[1]}], one value per channel of a, "
            f"got {list(s.shape)}"
        )
    if s.device != a.device:
        raise ValueError(f"channel_dot_scale_: s: expected device {a.device}, got {s.device}")
    if not (a.is_contiguous() or a.movedim(1, -1).is_contiguous()):
        raise ValueError(
            "channel_dot_scale_: a: expected a contiguous or channels_last tensor to overwrite, "
            f"got strides {a.stride()} for shape {list(a.shape)}; pass a.contiguous()"
        )
    dot = torch.ops.svf_fast.channel_dot_scale_(a, v, s.contiguous())
    if not torch.compiler.is_compiling() and not a.is_inference():
        torch.autograd.graph.increment_version(a)
    return dot


class _ChannelDot(Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.svf_fast.channel_dot(a, b)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_out = grad_out.reshape(-1, *[1] * (a.dim() - 2))
        grad_a = (grad_out * b).to(a.dtype) if ctx.needs_input_grad[0] else None
        grad_b = (grad_out * a).to(b.dtype) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


for _name in ("channel_dot", "channel_dot_scale_"):
    _library.register_gpu(_name, _library.triton_kernel("channel_dot", _name))


@torch.library.register_fake("svf_fast::channel_dot")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], dtype=_result_dtype(a))


@torch.library.register_fake("svf_fast::channel_dot_scale_")
def _(a: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], dtype=_result_dtype(a))


def _result_dtype(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)
