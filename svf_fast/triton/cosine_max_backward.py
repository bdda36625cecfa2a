"""Backward of cosine_max on a GPU: only the pair of each maximum has a gradient.

Each support sums over its queries in their order, which a stable sort by support finds: no atomic
addition, the same bits from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.ops.cosine_max import EPSILON
from svf_fast.triton import cosine_max as forward
from svf_fast.triton import tuning
from svf_fast.triton.cosine_max import READING, positions_by_channels, squares, strides
from svf_fast.triton.language import narrow
from svf_fast.triton.tuning import Config


@triton.jit
def cosine_max_query_gradient_kernel(
    grad,
    query,
    support,
    mask,
    values,
    index,
    grad_query,
    cross,
    own,
    keys,
    queries,
    supports,
    channels,
    query_image,
    query_row,
    support_image,
    support_row,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute the gradient of the query, and what each pair adds to that of its support.

    With n = |q||s'| + eps, s' = m s and f = (q·s')/n:
    df/dq = s'/n - f |s'|/(|q| n) q and df/ds = m (q/n - f |q|/(|s'| n) s'); at 0 a norm is flat.
    """
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < queries
    at = image * queries + i
    j = tl.load(index + at, mask=inside, other=0)
    weight = tl.load(mask + image * supports + j, mask=inside, other=0.0)
    paired = (weight != 0)[:, None]  # a masked support has no gradient and gives none
    left = query + image * query_image + i.to(tl.int64)[:, None] * query_row
    right = support + image * support_image + j[:, None] * support_row
    q = tl.sqrt(squares(left, paired, channels, ROWS, CHANNELS))
    s = tl.sqrt(squares(right, paired, channels, ROWS, CHANNELS)) * tl.abs(weight)
    scale = tl.load(grad + at, mask=inside, other=0.0) / (q * s + EPSILON)
    slope = scale * tl.load(values + at, mask=inside, other=0.0)
    to_both = tl.where(weight != 0, scale * weight, 0.0)
    to_query = tl.where((weight != 0) & (q != 0), slope * s / q, 0.0)
    to_support = tl.where((weight != 0) & (s != 0), slope * q / s * weight * weight, 0.0)
    tl.store(cross + at, to_both, mask=inside)
    tl.store(own + at, to_support, mask=inside)
    # pairs without a gradient are sorted behind all others
    last = tl.num_programs(1).to(tl.int64) * supports
    key = tl.where(weight != 0, image * supports + j, last)
    tl.store(keys + at, key.to(keys.dtype.element_ty), mask=inside)
    out = grad_query + at[:, None] * channels
    for c in range(0, channels, CHANNELS):
        channel = c + tl.arange(0, CHANNELS)[None, :]
        part = channel < channels
        a = tl.load(left + channel, mask=paired & part, other=0.0).to(tl.float32)
        b = tl.load(right + channel, mask=paired & part, other=0.0).to(tl.float32)
        value = to_both[:, None] * b - to_query[:, None] * a
        value = narrow(value, grad_query.dtype.element_ty)
        tl.store(out + channel, value, mask=inside[:, None] & part)


@triton.jit
def cosine_max_support_gradient_kernel(
    query,
    support,
    cross,
    own,
    order,
    starts,
    grad_support,
    queries,
    supports,
    channels,
    query_image,
    query_row,
    support_image,
    support_row,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradient of one support position: the sum over its queries, in their order."""
    image = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0)
    begin = tl.load(starts + image * supports + j)
    end = tl.load(starts + image * supports + j + 1)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    part = channel < channels
    left = query + image * query_image + channel[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    factor = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        place = start + tl.arange(0, ROWS)
        listed = place < end
        at = tl.load(order + place, mask=listed, other=0)
        rows = left + (at - image * queries)[:, None] * query_row
        a = tl.load(rows, mask=listed[:, None] & part[None, :], other=0.0).to(tl.float32)
        total += tl.load(cross + at, mask=listed, other=0.0)[:, None] * a
        factor += tl.load(own + at, mask=listed, other=0.0)
    s = support + image * support_image + j.to(tl.int64) * support_row
    needed = tl.where(end > begin, channels, 0)  # a support that no query chose is not read
    b = tl.load(s + channel, mask=channel < needed, other=0.0).to(tl.float32)
    value = tl.sum(total, axis=0) - tl.sum(factor, axis=0) * b
    value = narrow(value, grad_support.dtype.element_ty)
    out = grad_support + (image * supports + j) * channels
    tl.store(out + channel, value, mask=part)


def cosine_max_backward(
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``svf_fast::cosine_max_backward``; an index outside the support is not detected."""
    batch, channels, queries = query.shape
    supports = support.shape[2]
    grad_query = query.new_empty((batch, queries, channels))
    grad_support = support.new_empty((batch, supports, channels))
    if grad_query.numel() > 0:
        problem = Problem(batch, channels, queries, supports, query.dtype)
        with torch.cuda.device_of(query):
            if config is None:
                config = tuning.find("cosine_max_backward", problem)
            _fill_gradients(
                (grad.contiguous(), mask.contiguous(), values.contiguous(), index.contiguous()),
                (positions_by_channels(query), positions_by_channels(support)),
                (grad_query, grad_support),
                config,
            )
    else:
        grad_support.zero_()
    if channels > 1 and query.stride(1) == 1 and query.stride(2) > 1:
        return grad_query.mT, grad_support.mT
    return grad_query.mT.contiguous(), grad_support.mT.contiguous()


def _fill_gradients(
    arriving: tuple[Tensor, Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    config: Config,
) -> None:
    grad, mask, values, index = arriving
    query, support = maps
    batch, queries, channels = query.shape
    supports = support.shape[1]
    steps = *strides(query), *strides(support)
    cross, own = torch.empty_like(grad), torch.empty_like(grad)
    # of all images in one sort; 32 bits: half the passes
    narrow_keys = batch * supports < 2**31
    keys = torch.empty_like(index, dtype=torch.int32 if narrow_keys else torch.int64)
    cosine_max_query_gradient_kernel[(triton.cdiv(queries, READING["ROWS"]), batch)](
        grad,
        query,
        support,
        mask,
        values,
        index,
        gradients[0],
        cross,
        own,
        keys,
        queries,
        supports,
        channels,
        *steps,
        EPSILON=EPSILON,
        **READING,
    )
    ordered, order = keys.flatten().sort(stable=True)
    boundaries = torch.arange(batch * supports + 1, dtype=keys.dtype, device=keys.device)
    starts = torch.searchsorted(ordered, boundaries)
    grid = supports, triton.cdiv(channels, config["CHANNELS"]), batch
    cosine_max_support_gradient_kernel[grid](
        query,
        support,
        cross,
        own,
        order,
        starts,
        gradients[1],
        queries,
        supports,
        channels,
        *steps,
        **config,
    )


class Problem(forward.Problem):
    """The maps of a call, for its backward passes."""

    def rule(self, arch: int) -> Config:
        """Return few rows at once: most supports are chosen by few queries, some by hundreds."""
        if arch == 0:
            return {"ROWS": 16, "CHANNELS": 128, "STAGES": 1, "num_warps": 4}
        return {"ROWS": 8, "CHANNELS": 512, "STAGES": 2, "num_warps": 4}

    def candidates(self, arch: int) -> list[Config]:
        found = [self.rule(arch)]
        for rows, channels, warps in (
            (4, 512, 2),
            (4, 1024, 4),
            (8, 256, 2),
            (8, 512, 4),
            (16, 256, 4),
        ):
            for stages in (1, 2, 3):
                config = {"ROWS": rows, "CHANNELS": channels, "STAGES": stages, "num_warps": warps}
                if config not in found:
                    found.append(config)
        return found

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        query, support, mask = self.inputs(device)
        values = torch.rand(self.batch, self.queries, device=device)
        index = torch.randint(self.supports, values.shape, device=device)
        arguments = torch.randn_like(values), query, support, mask, values, index
        return lambda config: cosine_max_backward(*arguments, config=config)


def problems() -> list[Problem]:
    return [Problem(*problem) for problem in forward.problems()]


TUNABLES = {"cosine_max_backward": problems}
