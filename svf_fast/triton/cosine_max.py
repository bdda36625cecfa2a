"""cosine_max on a GPU: a running maximum over tiles of products, and the pairs it chose, backward.

The positions of a map are the rows of a matrix of positions by channels: a map whose channels are
adjacent in memory is read in place, any other is copied once. Masked support positions are left
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
from svf_fast.triton.language import dot, precision
from svf_fast.triton.tuning import Config

_MOST_SPLITS = 32
_OPTIONS = {"num_warps": 4, **tuning.OPTIONS}
READING = {"ROWS": 16, "CHANNELS": 256, **_OPTIONS}  # of the passes that compare nothing


@triton.jit
def cosine_max_choose_kernel(mask, chosen, counts, masked, supports, BLOCK: tl.constexpr):
    """List the positions whose weight is not 0, count them, and find the first of the others."""
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
    norm = tl.sqrt(squares(rows, inside[:, None], channels, ROWS, CHANNELS))
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
    """Compute norm n and floor e of the listed positions: the cosine is ``q·s / (|q| n + e)``.

    With s' = w s: (q·s') / (|q||s'| + eps), numerator and denominator divided by the weight w.
    """
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tl.load(counts + image)
    out = image * supports + place
    j = tl.load(chosen + out, mask=inside, other=0)
    weight = tl.load(mask + image * supports + j, mask=inside, other=1.0)
    rows = support + image * support_image + j.to(tl.int64)[:, None] * support_row
    norm = tl.sqrt(squares(rows, inside[:, None], channels, ROWS, CHANNELS))
    tl.store(norms + out, tl.where(weight < 0, -norm, norm), mask=inside)
    tl.store(floors + out, EPSILON / weight, mask=inside)


@triton.jit
def squares(rows, inside, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum the squares of rows in float32."""
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
    PRECISION: tl.constexpr,
):
    """Find the largest cosine of each query to a split of the list, and the first place of it.

    NaN counts as infinity, which no cosine is. Columns beyond the last are the last one again, and
    count as it: their products may be rounded in another way.
    """
    image = tl.program_id(2).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    count = tl.load(counts + image)
    tiles = tl.cdiv(count, SUPPORTS)
    begin, end = tiles * split // splits, tiles * (split + 1) // splits
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
        place = tl.where(better, tl.minimum(tile * SUPPORTS + at, count - 1), place)
    out = (image * splits + split) * queries + i
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
    splits,
    BLOCK: tl.constexpr,
):
    """Find the largest of all splits and of the masked positions' zero, at the first of them."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < queries
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for split in range(splits):
        at = (image * splits + split) * queries + i
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


def cosine_max(
    query: Tensor, support: Tensor, mask: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``svf_fast::cosine_max`` for float32, bfloat16 and float16 (``ops/cosine_max.py``).

    Beyond the arguments: 4 bytes per position, 8 per query position and split, 4 per support
    position; a map whose channels are not adjacent is copied.
    """
    batch, channels, queries = query.shape
    supports = support.shape[2]
    values = query.new_empty((batch, queries), dtype=torch.float32)
    index = query.new_empty((batch, queries), dtype=torch.int64)
    if values.numel() == 0:
        return values, index
    q, s, weights = positions_by_channels(query), positions_by_channels(support), mask.contiguous()
    problem = Problem(batch, channels, queries, supports, query.dtype)
    kind = _kind(query.dtype)
    with torch.cuda.device_of(query):
        if config is None:
            config = tuning.find("cosine_max", problem)
        chosen = query.new_empty((batch, supports), dtype=torch.int32)
        counts = query.new_empty(batch, dtype=torch.int32)
        masked = torch.empty_like(counts)
        cosine_max_choose_kernel[(batch,)](
            weights, chosen, counts, masked, supports, BLOCK=1024, **_OPTIONS
        )
        query_norms = query.new_empty((batch, queries), dtype=torch.float32)
        cosine_max_query_norms_kernel[(triton.cdiv(queries, READING["ROWS"]), batch)](
            q, query_norms, queries, channels, *strides(q), **READING
        )
        support_norms = torch.empty_like(weights)
        floors = torch.empty_like(weights)
        cosine_max_support_norms_kernel[(triton.cdiv(supports, READING["ROWS"]), batch)](
            s,
            weights,
            chosen,
            counts,
            support_norms,
            floors,
            supports,
            channels,
            *strides(s),
            EPSILON=EPSILON,
            **READING,
        )
        options = dict(config)
        splits = options.pop("SPLITS")
        partial = batch, splits, queries
        best = query.new_empty(partial, dtype=torch.float32)
        places = query.new_empty(partial, dtype=torch.int32)
        grid = triton.cdiv(queries, config["QUERIES"]), splits, batch
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
            *strides(q),
            *strides(s),
            PRECISION="ieee" if kind == "16-bit" else kind,
            **options,
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
            splits,
            BLOCK=256,
            **_OPTIONS,
        )
    return values, index


def positions_by_channels(x: Tensor) -> Tensor:
    """Return [B, C, P] as [B, P, C] with adjacent channels; copied where they are not adjacent."""
    rows = x.mT
    return rows if rows.stride(2) == 1 else rows.contiguous()


def strides(rows: Tensor) -> tuple[int, int]:
    return rows.stride(0), rows.stride(1)


def _kind(dtype: torch.dtype) -> str:
    """Say how products are made: tf32, tf32x3 or 16-bit."""
    return precision(convolves=False) if dtype == torch.float32 else "16-bit"


class Problem(NamedTuple):
    batch: int
    channels: int
    queries: int
    supports: int
    dtype: torch.dtype

    def key(self) -> str:
        queries = tuning.bucket(self.batch * self.queries)
        supports = tuning.bucket(self.supports)
        return f"{_kind(self.dtype)} C{self.channels} N{queries} M{supports}"

    def rule(self, arch: int) -> Config:
        """Return the largest tiles whose comparison does not spill registers."""
        kind = _kind(self.dtype)
        tile = {"QUERIES": 128, "SUPPORTS": 128, "num_warps": 8, "num_stages": 3}
        if arch == 0:
            tile |= {"QUERIES": 16, "SUPPORTS": 32, "CHANNELS": 64}
        elif kind == "16-bit":
            tile |= (
                {"QUERIES": 256, "CHANNELS": 64}
                if tuning.has_room(arch)
                else {"CHANNELS": 64, "num_stages": 4}
            )
        elif kind == "tf32x3" and not tuning.has_room(arch):
            tile |= {"CHANNELS": 16, "num_stages": 4}
        else:
            tile |= {"CHANNELS": 32}
        return {**tile, "SPLITS": self._splits(tile, arch)}

    def candidates(self, arch: int) -> list[Config]:
        found = [self.rule(arch)]
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
                    "CHANNELS": channel_bytes // self.dtype.itemsize,
                    "num_warps": warps,
                    "num_stages": stages,
                }
                splits = self._splits(tile, arch)
                found.append({**tile, "SPLITS": splits})
                found.append({**tile, "SPLITS": min(2 * splits, _MOST_SPLITS)})
        return [config for at, config in enumerate(found) if config not in found[:at]]

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        arguments = self.inputs(device)
        return lambda config: cosine_max(*arguments, config=config)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Make random maps in channels_last, half of the support masked."""
        query, support = (
            torch.randn(self.batch, positions, self.channels, device=device, dtype=self.dtype)
            for positions in (self.queries, self.supports)
        )
        mask = torch.rand(self.batch, self.supports, device=device) < 0.5
        return query.mT, support.mT, mask.float()

    def _splits(self, tile: Config, arch: int) -> int:
        """Return the number of splits of the supports that takes the busiest processor least time.

        Time is counted in tiles, half a tile more for each program, and summed for all supports
        and for half of them.
        """
        programs = self.batch * triton.cdiv(self.queries, tile["QUERIES"])
        processors = tuning.processors(arch)
        most = triton.cdiv(self.supports, tile["SUPPORTS"])

        def time(splits: int) -> float:
            waves = triton.cdiv(programs * splits, processors)
            return waves * sum(triton.cdiv(tiles, splits) + 0.5 for tiles in (most, most // 2))

        return min(range(1, min(_MOST_SPLITS, most) + 1), key=time)


def problems() -> list[Problem]:
    """List the last maps of a ResNet and of a VGG at 641 and 473 pixels."""
    return [
        Problem(batch, channels, positions, positions, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for batch, channels, positions in (
            (1, 2048, 6561),
            (1, 2048, 3600),
            (4, 2048, 3600),
            (4, 512, 3600),
        )
    ]


TUNABLES = {"cosine_max": problems}
