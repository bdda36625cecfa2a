"""The one place where a numerical tolerance is defined."""

from __future__ import annotations

import torch
from torch import Tensor

# Roundings that a long sum of products allows, in eps of its result. float32: nothing wider
# accumulates, and sums over hundreds of positions in another order than eager's differ by up to 5.
# float64: the truth itself has this error. 16-bit: the sum is wider; W, y and the result round.
ROUNDINGS = {torch.float64: 64.0, torch.float32: 8.0, torch.bfloat16: 1.5, torch.float16: 1.5}


def accumulated(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The `magnitude` of a result that is a long sum of products."""
    return truth * ROUNDINGS[dtype]


def assert_error_within(
    actual: Tensor,
    reference: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    magnitude: Tensor | None = None,
    dtype: torch.dtype | None = None,
    channel_dim: int | None = 0,
    name: str = "result",
) -> None:
    """`actual` is as near to `truth` as eager PyTorch is, up to `factor` and a rounding floor.

    actual: what is tested; reference: the definition evaluated in the same dtype; truth: the
    definition in float64; all of one shape. Both in the L2 norm and in the largest element

        |actual - truth| <= factor · |reference - truth| + eps · |magnitude|.

    eps is that of `dtype` (of `actual` if not given): the floor allows two roundings to nearest,
    one of the result and one on the way, where the reference happens to round luckily.
    `magnitude` is the size of what was rounded on the way, where cancellation makes it larger than
    the truth, its default. Never NaN or infinity where the truth is finite, and no channel (slice
    along `channel_dim`; None: not checked) all zero where the truth, rounded, is not.
    """
    if not actual.shape == reference.shape == truth.shape:
        raise AssertionError(
            f"{name}: shapes differ: actual {list(actual.shape)}, reference "
            f"{list(reference.shape)}, truth {list(truth.shape)}"
        )
    if truth.dtype != torch.float64:
        raise AssertionError(f"{name}: the truth must be float64, it is {truth.dtype}")
    rounded = actual.detach()
    actual, reference, truth = (x.detach().cpu().double() for x in (actual, reference, truth))
    magnitude = truth if magnitude is None else magnitude.detach().cpu().double()
    eps = torch.finfo(dtype or rounded.dtype).eps

    wrong = (~actual.isfinite() & truth.isfinite()).sum().item()
    if wrong:
        raise AssertionError(f"{name}: {wrong} of {actual.numel()} values are NaN or infinite")
    if actual.numel() == 0:
        return
    for norm_name, order in (("L2", 2), ("maximum", float("inf"))):
        error, eager, floor = (
            torch.linalg.vector_norm(x, ord=order).item()
            for x in (actual - truth, reference - truth, magnitude)
        )
        bound = factor * eager + eps * floor
        if not error <= bound:
            size = torch.linalg.vector_norm(truth, ord=order).item()
            raise AssertionError(
                f"{name}: {norm_name} error {error:.3e} exceeds {bound:.3e} = {factor} · "
                f"{eager:.3e} (eager) + {eps:.1e} · {floor:.3e}; the truth is {size:.3e}"
            )
    if channel_dim is not None and truth.dim() > 0:
        expected, present = (
            x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1).ne(0).any(dim=1)
            for x in (truth.to(rounded.dtype), actual)
        )
        silent = (expected & ~present).nonzero().flatten().tolist()
        if silent:
            raise AssertionError(f"{name}: channels {silent} are all zero, but not in the truth")
