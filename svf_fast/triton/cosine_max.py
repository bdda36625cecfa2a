"""cosine_max on a GPU: a running maximum over tiles of products, and the pairs it chose, backward.

The positions of a map are the rows of a matrix of positions by channels: a map whose channels are
neighbours in memory is read in place, any other is copied once. Masked support positions are left
out of a list that only the device knows; programs loop to its count, so that half a mask is half
the time and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.ops.cosine_max import EPSILON
from svf_fast.triton import tuning
from svf_fast.triton.language import dot, narrow, precision
from svf_fast.triton.tuning import Config, Tunable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is left to the definition

_PROCESSORS = {0: 1, 80: 108, 90: 132}  # an interpreter, an A100, an H100 or H200
_MOST_SPLITS = 32
_ROWS, _CHANNELS = 16, 256  # tile of the passes that only read and write
_OPTIONS = {"num_warps": 4, **tuning.OPTIONS}


@triton.jit
def cosine_max_choose_kernel(mask, chosen, counts, masked, supports, BLOCK: tl.constexpr):
    """Lists the positions whose weight is not 0, counts them, and finds the first of the others."""
    image = tl.program_id(0).to(tl.int64)
    count, first = 0, supports
    for start in range(0, supports, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < supports
        weight = tl.load(mask + image * supports + position, mask=inside, other=0.0)
        kept = (weight != 0).to(tl.int32)
        place = count + tl.cumsum(kept, axis=0) - kept
        tl.store(chosen + image * supports + place, position, mask=kept != 0)
        count += tl.sum(kept, axis=0)
        dropped = tl.where(inside & (kept == 0), position, supports)
        first = tl.minimum(first, tl.min(dropped, axis=0))
    tl.store(counts + image, count)
    tl.store(masked + image, first)


@triton.jit
def cosine_max_query_norms_kernel(
    query,
    norms,
    queries,
    channels,
    query_image,
    query_row,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < queries
    rows = query + image * query_image + i.to(tl.int64)[:, None] * query_row
    norm = tl.sqrt(_squares(rows, inside[:, None], channels, ROWS, CHANNELS))
    tl.store(norms + image * queries + i, norm, mask=inside)


@triton.jit
def cosine_max_support_norms_kernel(
    support,
    mask,
    chosen,
    counts,
    norms,
    floors,
    supports,
    channels,
    support_image,
    support_row,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """For the listed positions, norm n and floor e: the cosine is ``q·s / (|q| n + e)``.

    With s' = w s: (q·s') / (|q||s'| + eps), numerator and denominator divided by the weight w.
    """
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tl.load(counts + image)
    out = image * supports + place
    j = tl.load(chosen + out, mask=inside, other=0)
    weight = tl.load(mask + image * supports + j, mask=inside, other=1.0)
    rows = support + image * support_image + j.to(tl.int64)[:, None] * support_row
    norm = tl.sqrt(_squares(rows, inside[:, None], channels, ROWS, CHANNELS))
    tl.store(norms + out, tl.where(weight < 0, -norm, norm), mask=inside)
    tl.store(floors + out, EPSILON / weight, mask=inside)


@triton.jit
def _squares(rows, inside, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of squares of rows in float32."""
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for c in range(0, channels, CHANNELS):
        channel = c + tl.arange(0, CHANNELS)[None, :]
        value = tl.load(rows + channel, mask=inside & (channel < channels), other=0.0)
        value = value.to(tl.float32)
        total += value * value
    return tl.sum(total, axis=1)


@triton.jit
def cosine_max_compare_kernel(
    query,
    support,
    chosen,
    counts,
    query_norms,
    support_norms,
    floors,
    best,
    places,
    queries,
    supports,
    channels,
    query_image,
    query_row,
    support_image,
    support_row,
    QUERIES: tl.constexpr,
    SUPPORTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest cosine of each query to a split of the list, and the first place that has it.

    NaN counts as infinity, which no cosine is. Rows beyond the last are the last one again: of
    equals the first counts.
    """
    image = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    count = tl.load(counts + image)
    tiles = tl.cdiv(count, SUPPORTS)
    begin, end = tiles * split // SPLITS, tiles * (split + 1) // SPLITS
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    rows = tl.minimum(i, queries - 1)
    rows_norm = tl.load(query_norms + image * queries + rows)
    left = query + image * query_image + rows.to(tl.int64)[:, None] * query_row
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    place = tl.zeros((QUERIES,), tl.int32)
    for tile in range(begin, end):
        lane = tl.arange(0, SUPPORTS)
        j = tl.minimum(tile * SUPPORTS + lane, count - 1)
        columns = tl.load(chosen + image * supports + j)
        right = support + image * support_image + columns.to(tl.int64)[None, :] * support_row
        product = tl.zeros((QUERIES, SUPPORTS), tl.float32)
        for c in range(0, channels, CHANNELS):
            channel = c + tl.arange(0, CHANNELS)
            inside = channel < channels
            a = tl.load(left + channel[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(right + channel[:, None], mask=inside[:, None], other=0.0)
            product = dot(a, b, product, PRECISION)
        norm = tl.load(support_norms + image * supports + j)
        floor = tl.load(floors + image * supports + j)
        cosine = product / (rows_norm[:, None] * norm[None, :] + floor[None, :])
        cosine = tl.where(cosine == cosine, cosine, float("inf"))
        top = tl.max(cosine, axis=1)
        at = tl.min(tl.where(cosine == top[:, None], lane[None, :], SUPPORTS), axis=1)
        better = top > largest
        largest = tl.where(better, top, largest)
        place = tl.where(better, tile * SUPPORTS + at, place)
    out = (image * SPLITS + split) * queries + i
    tl.store(best + out, largest, mask=i < queries)
    tl.store(places + out, place, mask=i < queries)


@triton.jit
def cosine_max_finish_kernel(
    best,
    places,
    chosen,
    counts,
    masked,
    query_norms,
    values,
    index,
    queries,
    supports,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of all splits and of the masked positions' zero, which enters in their first."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < queries
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for split in range(SPLITS):
        at = (image * SPLITS + split) * queries + i
        value = tl.load(best + at, mask=inside, other=0.0)
        better = value > largest
        largest = tl.where(better, value, largest)
        place = tl.where(better, tl.load(places + at, mask=inside, other=0), place)
    count, first = tl.load(counts + image), tl.load(masked + image)
    position = tl.load(
        chosen + image * supports + place, mask=inside & (place < count), other=supports
    )
    # NaN for a query that is not finite
    zero = tl.load(query_norms + image * queries + i, mask=inside, other=0.0) * 0.0
    zero = tl.where(zero == zero, zero, float("inf"))
    wins = (first < supports) & ((zero > largest) | ((zero == largest) & (first < position)))
    largest = tl.where(wins, zero, largest)
    position = tl.where(wins, first, position)
    out = image * queries + i
    value = tl.where(largest == float("inf"), float("nan"), largest)
    tl.store(values + out, value, mask=inside)
    tl.store(index + out, position.to(tl.int64), mask=inside)


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
    """Gradient of the query, and what each pair adds to that of its support.

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
    q = tl.sqrt(_squares(left, paired, channels, ROWS, CHANNELS))
    s = tl.sqrt(_squares(right, paired, channels, ROWS, CHANNELS)) * tl.abs(weight)
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
    """Gradient of one support position: the sum over its queries, in their order."""
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


def cosine_max(
    query: Tensor, support: Tensor, mask: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """``svf_fast::cosine_max`` for float32, bfloat16 and float16 (``ops/cosine_max.py``).

    Beyond the arguments: 4 bytes per position, 8 per query position and split, 4 per support
    position; a map whose channels are not neighbours is copied.
    """
    batch, channels, queries = query.shape
    supports = support.shape[2]
    values = query.new_empty((batch, queries), dtype=torch.float32)
    index = query.new_empty((batch, queries), dtype=torch.int64)
    if values.numel() == 0:
        return values, index
    q, s, weights = _rows(query), _rows(support), mask.contiguous()
    problem = _Problem(batch, channels, queries, supports, query.dtype)
    kind = _kind(query.dtype)
    with torch.cuda.device_of(query):
        if config is None:
            config = tuning.find("cosine_max", _key(problem), lambda arch: _rule(problem, arch))
        chosen = query.new_empty((batch, supports), dtype=torch.int32)
        counts = query.new_empty(batch, dtype=torch.int32)
        masked = torch.empty_like(counts)
        cosine_max_choose_kernel[(batch,)](
            weights, chosen, counts, masked, supports, BLOCK=1024, **_OPTIONS
        )
        query_norms = query.new_empty((batch, queries), dtype=torch.float32)
        tile = {"ROWS": _ROWS, "CHANNELS": _CHANNELS, **_OPTIONS}
        cosine_max_query_norms_kernel[(triton.cdiv(queries, _ROWS), batch)](
            q, query_norms, queries, channels, *_strides(q), **tile
        )
        support_norms = torch.empty_like(weights)
        floors = torch.empty_like(weights)
        cosine_max_support_norms_kernel[(triton.cdiv(supports, _ROWS), batch)](
            s,
            weights,
            chosen,
            counts,
            support_norms,
            floors,
            supports,
            channels,
            *_strides(s),
            EPSILON=EPSILON,
            **tile,
        )
        partial = batch, config["SPLITS"], queries
        best = query.new_empty(partial, dtype=torch.float32)
        places = query.new_empty(partial, dtype=torch.int32)
        grid = triton.cdiv(queries, config["QUERIES"]), config["SPLITS"], batch
        cosine_max_compare_kernel[grid](
            q,
            s,
            chosen,
            counts,
            query_norms,
            support_norms,
            floors,
            best,
            places,
            queries,
            supports,
            channels,
            *_strides(q),
            *_strides(s),
            PRECISION="ieee" if kind == "16-bit" else kind,
            **config,
        )
        cosine_max_finish_kernel[(triton.cdiv(queries, 256), batch)](
            best,
            places,
            chosen,
            counts,
            masked,
            query_norms,
            values,
            index,
            queries,
            supports,
            SPLITS=config["SPLITS"],
            BLOCK=256,
            **_OPTIONS,
        )
    return values, index


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
    """``svf_fast::cosine_max_backward``; an index outside the support is not found out."""
    batch, channels, queries = query.shape
    supports = support.shape[2]
    grad_query = query.new_empty((batch, queries, channels))
    grad_support = support.new_empty((batch, supports, channels))
    if grad_query.numel() > 0:
        problem = _Problem(batch, channels, queries, supports, query.dtype)
        with torch.cuda.device_of(query):
            if config is None:
                key = _key(problem)
                config = tuning.find("cosine_max_backward", key, _backward_rule)
            _fill_gradients(
                (grad.contiguous(), mask.contiguous(), values.contiguous(), index.contiguous()),
                (_rows(query), _rows(support)),
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
    strides = *_strides(query), *_strides(support)
    cross, own = torch.empty_like(grad), torch.empty_like(grad)
    # of all images in one sort; 32 bits: half the passes
    narrow_keys = batch * supports < 2**31
    keys = torch.empty_like(index, dtype=torch.int32 if narrow_keys else torch.int64)
    cosine_max_query_gradient_kernel[(triton.cdiv(queries, _ROWS), batch)](
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
        *strides,
        EPSILON=EPSILON,
        ROWS=_ROWS,
        CHANNELS=_CHANNELS,
        **_OPTIONS,
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
        *strides,
        **config,
    )


def _rows(x: Tensor) -> Tensor:
    """[B, C, P] -> [B, P, C] with the channels as neighbours; copied where they are not."""
    rows = x.mT
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _strides(rows: Tensor) -> tuple[int, int]:
    return rows.stride(0), rows.stride(1)


def _kind(dtype: torch.dtype) -> str:
    """How products are made: tf32, tf32x3 or 16-bit."""
    return precision(convolves=False) if dtype == torch.float32 else "16-bit"


class _Problem(NamedTuple):
    batch: int
    channels: int
    queries: int
    supports: int
    dtype: torch.dtype


def _key(problem: _Problem) -> str:
    queries = tuning.bucket(problem.batch * problem.queries)
    supports = tuning.bucket(problem.supports)
    return f"{_kind(problem.dtype)} C{problem.channels} N{queries} M{supports}"


def _rule(problem: _Problem, arch: int) -> Config:
    """The largest tiles whose comparison leaves no register in memory."""
    kind = _kind(problem.dtype)
    tile = {"QUERIES": 128, "SUPPORTS": 128, "num_warps": 8, "num_stages": 3}
    if arch == 0:
        tile |= {"QUERIES": 16, "SUPPORTS": 32, "CHANNELS": 64}
    elif kind == "16-bit":
        tile |= {"QUERIES": 256 if arch >= 90 else 128, "CHANNELS": 64}
    elif kind == "tf32x3" and arch < 90:
        tile |= {"CHANNELS": 16, "num_stages": 4}
    else:
        tile |= {"CHANNELS": 32}
    return {**tile, "SPLITS": _splits(problem, tile, arch)}


def _splits(problem: _Problem, tile: Config, arch: int) -> int:
    """How many splits of the supports have the least time of the busiest processor, in tiles.

    Of all supports and of half of them; a program costs the half of a tile beside its tiles.
    """
    programs = problem.batch * triton.cdiv(problem.queries, tile["QUERIES"])
    processors = _PROCESSORS.get(arch, _PROCESSORS[90])
    most = triton.cdiv(problem.supports, tile["SUPPORTS"])

    def time(splits: int) -> float:
        waves = triton.cdiv(programs * splits, processors)
        return waves * sum(triton.cdiv(tiles, splits) + 0.5 for tiles in (most, most // 2))

    return min(range(1, min(_MOST_SPLITS, most) + 1), key=time)


def _candidates(problem: _Problem, arch: int) -> list[Config]:
    found = [_rule(problem, arch)]
    for queries, supports, channel_bytes, warps in (
        (64, 128, 128, 4),
        (64, 256, 128, 4),
        (128, 128, 64, 4),
        (128, 128, 128, 4),
        (128, 128, 128, 8),
        (128, 256, 64, 8),
        (128, 256, 128, 8),
        (256, 128, 128, 8),
    ):
        for stages in (2, 3, 4):
            tile = {
                "QUERIES": queries,
                "SUPPORTS": supports,
                "CHANNELS": channel_bytes // problem.dtype.itemsize,
                "num_warps": warps,
                "num_stages": stages,
            }
            splits = _splits(problem, tile, arch)
            found.append({**tile, "SPLITS": splits})
            found.append({**tile, "SPLITS": min(2 * splits, _MOST_SPLITS)})
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _backward_rule(arch: int) -> Config:
    """Few rows at once: most supports are chosen by few queries, some by hundreds."""
    if arch == 0:
        return {"ROWS": 16, "CHANNELS": 128, "STAGES": 1, "num_warps": 4}
    return {"ROWS": 8, "CHANNELS": 512, "STAGES": 2, "num_warps": 4}


def _backward_candidates(problem: _Problem, arch: int) -> list[Config]:
    found = [_backward_rule(arch)]
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


def _inputs(problem: _Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Maps in channels_last, half of the support masked."""
    query, support = (
        torch.randn(problem.batch, positions, problem.channels, device=device, dtype=problem.dtype)
        for positions in (problem.queries, problem.supports)
    )
    mask = torch.rand(problem.batch, problem.supports, device=device) < 0.5
    return query.mT, support.mT, mask.float()


def _launcher(problem: _Problem, device: torch.device) -> Callable[[Config], Any]:
    arguments = _inputs(problem, device)
    return lambda config: cosine_max(*arguments, config=config)


def _backward_launcher(problem: _Problem, device: torch.device) -> Callable[[Config], Any]:
    query, support, mask = _inputs(problem, device)
    values = torch.rand(problem.batch, problem.queries, device=device)
    index = torch.randint(problem.supports, values.shape, device=device)
    arguments = torch.randn_like(values), query, support, mask, values, index
    return lambda config: cosine_max_backward(*arguments, config=config)


def _problems() -> list[_Problem]:
    """The last maps of a ResNet and of a VGG at 641 and 473 pixels."""
    return [
        _Problem(batch, channels, positions, positions, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for batch, channels, positions in (
            (1, 2048, 6561),
            (1, 2048, 3600),
            (4, 2048, 3600),
            (4, 512, 3600),
        )
    ]


TUNABLES = [
    Tunable("cosine_max", _key, _candidates, _launcher, _problems),
    Tunable("cosine_max_backward", _key, _backward_candidates, _backward_launcher, _problems),
]
