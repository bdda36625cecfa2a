"""Largest cosine of each query position to any support position: the core of the prior mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from svf_fast import _library
from svf_fast.ops.maps import DTYPES
from svf_fast.ops.node import differentiable_once, refuse_transforms
from svf_fast.svd import has_memory

EPSILON = 1e-7
_DEFINITION = "use svf_fast.reference.cosine_max.cosine_max, which is ordinary torch operations"
_TILE = 1024  # query positions compared at once where there is no kernel


def cosine_max(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """Compute the largest cosine of each query position to any masked support position.

    With s'_j = mask_j·s_j:  out_i = max_j (q_i·s'_j) / (|q_i||s'_j| + 1e-7)   (PFENet, section 3.2)

    Differentiable, once, in query and support, not in the mask. A support position with mask 0 has
    similarity exactly 0, whatever its features, and is not compared. Of equal similarities the
    first j gets the gradient. 16-bit features are compared in float32, under autocast too, because
    what follows subtracts nearly equal cosines.

    Saved for the backward pass: the arguments themselves and 12 bytes per query position (float64:
    16). On the CPU, where at most half of the support positions are the nearest to any query's, a
    copy of these is saved in the support's place: the others get no gradient; not where an
    operation like ReLU made the support, which keeps it anyway. Nothing of size N·M exists; beyond
    the arguments the forward pass needs a few tiles of 1024 positions, the backward pass the two
    gradients.

    Args:
        query: features [B, C, N].
        support: features [B, C, M] with M ≥ 1, of the query's dtype.
        mask: weights [B, M], floating or bool, without a gradient.

    Returns:
        [B, N] in float64 if the query is, else in float32.

    Raises:
        TypeError: an argument that is no tensor, or has another dtype than the above.
        ValueError: another shape or device, no support position, or a mask that requires gradient.
        RuntimeError: a second derivative, or a gradient or jvp of torch.func, is asked for.
    """
    _check(query, support, mask)
    mask = mask.to(_result_dtype(query))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or support.requires_grad)
    if needs_grad or forward_ad._current_level >= 0:  # whose tangents an op would drop silently
        refuse_transforms("cosine_max", _DEFINITION)
        return _CosineMax.apply(query, support, mask)
    return torch.ops.svf_fast.cosine_max(query, support, mask)[0]


class _CosineMax(Function):
    @staticmethod
    def forward(ctx, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        values, index = torch.ops.svf_fast.cosine_max(query, support, mask)
        nearest = _nearest(support, index)
        ctx.shape, ctx.inner = support.shape, support.stride(1) == 1
        if nearest is not None:
            columns, index = nearest
            support = support.gather(2, _of_channels(columns, support))
            mask = mask.gather(1, columns)
            ctx.save_for_backward(columns, query, support, mask, values, index)
        else:
            ctx.save_for_backward(None, query, support, mask, values, index)
        return values

    @staticmethod
    @differentiable_once("cosine_max", _DEFINITION)
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        columns, *saved = ctx.saved_tensors
        query, support = torch.ops.svf_fast.cosine_max_backward(grad, *saved)
        needs_query, needs_support, _ = ctx.needs_input_grad
        if needs_support and columns is not None:
            batch, channels, positions = ctx.shape
            if ctx.inner:
                whole = support.new_zeros((batch, positions, channels)).mT
            else:
                whole = support.new_zeros(ctx.shape)
            support = whole.scatter_(2, _of_channels(columns, support), support)
        return query if needs_query else None, support if needs_support else None, None


def _nearest(support: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the support positions [B, U] that `index` [B, N] names, and the index among them.

    None where that is no gain, and where it would wait for a GPU or has no values to look at.
    """
    if torch.compiler.is_compiling() or not support.is_cpu or not has_memory(support):
        return None
    made_by = (support if support._base is None else support._base).grad_fn
    if hasattr(type(made_by), "_saved_result"):  # as by ReLU, which keeps it anyway
        return None
    batch, _, positions = support.shape
    named = torch.zeros((batch, positions), dtype=torch.int64).scatter_(1, index, 1)
    most = int(named.sum(dim=1).max()) if batch else 0
    if not 0 < 2 * most <= positions:
        return None
    # those that are named come first, as many others after them as the batch asks for
    columns = named.argsort(dim=1, descending=True, stable=True)[:, :most]
    return columns.contiguous(), (named.cumsum(dim=1) - 1).gather(1, index)


def _of_channels(columns: Tensor, support: Tensor) -> Tensor:
    return columns.unsqueeze(1).expand(-1, support.shape[1], -1)


@torch.library.register_fake("svf_fast::cosine_max")
def _(query: Tensor, support: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    shape = query.shape[0], query.shape[2]
    return (
        query.new_empty(shape, dtype=_result_dtype(query)),
        query.new_empty(shape, dtype=torch.int64),
    )


@torch.library.register_fake("svf_fast::cosine_max_backward")
def _(
    grad: Tensor, query: Tensor, support: Tensor, mask: Tensor, values: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    # the kernel's layout: that of the query, where its channels are neighbors
    if query.shape[1] > 1 and query.stride(1) == 1 and query.stride(2) > 1:
        return query.new_empty(query.mT.shape).mT, support.new_empty(support.mT.shape).mT
    return query.new_empty(query.shape), support.new_empty(support.shape)


def tiled_cosine_max(query: Tensor, support: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the definition by tiles of query positions, for devices without a kernel."""
    dtype = _result_dtype(query)
    shape = query.shape[0], query.shape[2]
    values = query.new_empty(shape, dtype=dtype)
    index = query.new_empty(shape, dtype=torch.int64)
    with torch.autocast(query.device.type, enabled=False):
        # a choice, not a product: the features of a masked position are ignored, NaN too
        masked = torch.where(mask.unsqueeze(1) != 0, support.to(dtype) * mask.unsqueeze(1), 0)
        norms = masked.norm(dim=1).unsqueeze(1)
        for first in range(0, query.shape[2], _TILE):
            tile = query[:, :, first : first + _TILE].to(dtype)
            cosine = tile.mT @ masked
            cosine /= tile.norm(dim=1).unsqueeze(2) * norms + EPSILON
            out = slice(first, first + _TILE)
            values[:, out], index[:, out] = cosine.max(dim=2)
    return values, index


def paired_cosine_max_backward(
    grad: Tensor, query: Tensor, support: Tensor, mask: Tensor, values: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the pairs of each maximum, for devices without a kernel."""
    dtype = grad.dtype
    q = query.to(dtype)
    weight = mask.gather(1, index).unsqueeze(1)
    pairs = index.unsqueeze(1).expand(q.shape)
    s = support.gather(2, pairs).to(dtype).masked_fill(weight == 0, 0) * weight
    query_norm, support_norm = q.norm(dim=1, keepdim=True), s.norm(dim=1, keepdim=True)
    scale = grad.unsqueeze(1) / (query_norm * support_norm + EPSILON)
    slope = scale * values.unsqueeze(1)
    # at 0 a norm is flat
    own_query = (slope * support_norm / query_norm).masked_fill(query_norm == 0, 0)
    own_support = (slope * query_norm / support_norm).masked_fill(support_norm == 0, 0)
    grad_query = scale * s - own_query * q
    grad_pairs = weight * (scale * q - own_support * s)
    grad_support = grad_pairs.new_zeros(support.shape).scatter_add_(2, pairs, grad_pairs)
    return grad_query.to(query.dtype), grad_support.to(support.dtype)


_kernel = _library.triton_kernel("cosine_max", "cosine_max")
_backward_kernel = _library.triton_kernel("cosine_max_backward", "cosine_max_backward")


def _on_gpu(query: Tensor, *others) -> tuple[Tensor, Tensor]:
    return (tiled_cosine_max if query.dtype == torch.float64 else _kernel)(query, *others)


def _backward_on_gpu(grad: Tensor, query: Tensor, *others) -> tuple[Tensor, Tensor]:
    double = query.dtype == torch.float64
    return (paired_cosine_max_backward if double else _backward_kernel)(grad, query, *others)


torch.library.impl("svf_fast::cosine_max", "default", tiled_cosine_max)
torch.library.impl("svf_fast::cosine_max_backward", "default", paired_cosine_max_backward)
_library.register_gpu("cosine_max", _on_gpu)
_library.register_gpu("cosine_max_backward", _backward_on_gpu)


def _result_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _check(query: Tensor, support: Tensor, mask: Tensor) -> None:
    for name, tensor in (("query", query), ("support", support), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if query.dtype not in DTYPES:
        raise TypeError(
            "query: expected a floating-point tensor (float64, float32, bfloat16 or float16), "
            f"got {query.dtype}"
        )
    if support.dtype != query.dtype:
        raise TypeError(f"support: expected the query's dtype {query.dtype}, got {support.dtype}")
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(
            f"mask: expected a floating-point or bool tensor, got {mask.dtype}; "
            "compare class ids first, e.g. mask == 1"
        )
    if query.ndim != 3:
        raise ValueError(f"query: expected [B, C, N], got shape {list(query.shape)}")
    batch, channels, _ = query.shape
    if support.ndim != 3 or support.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"support: expected [{batch}, {channels}, M], the query's batch and channels, "
            f"got shape {list(support.shape)}"
        )
    positions = support.shape[2]
    if positions == 0:
        raise ValueError("support: expected at least one position, got M = 0")
    if mask.shape != (batch, positions):
        raise ValueError(
            f"mask: expected [{batch}, {positions}], one weight per support position, "
            f"got shape {list(mask.shape)}"
        )
    for name, tensor in (("support", support), ("mask", mask)):
        if tensor.device != query.device:
            raise ValueError(
                f"{name}: expected the query's device {query.device}, got {tensor.device}"
            )
    if mask.requires_grad:
        raise ValueError(
            "mask: expected a tensor that requires no gradient, because the mask is not "
            "differentiated; pass mask.detach()"
        )
