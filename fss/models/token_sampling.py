"""Tokens of supports, drawn by random numbers that depend on the episode alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fss.models.random_numbers import random_numbers, shifted

TOKENS = 300
"""Tokens drawn of the object and of the rest, for each support (CyCTR's code)."""

# While training both are multiplied by a random factor: its range in tenths, for one shot and more.
_TENTHS = {True: (6, 40), False: (6, 14)}

_BITS = 24  # of the random factor


class Drawn(NamedTuple):
    """The tokens that were drawn of K supports; [B, n] each.

    index: their places among the K·h·w tokens, int64.
    foreground: whether they count as object in the cycle check, bool.
    padded: whether they count as padding, bool.
    valid: False where fewer than n were drawn, bool; None where that cannot be.
    """

    index: Tensor
    foreground: Tensor
    padded: Tensor
    valid: Tensor | None


def draw_tokens(
    seeds: Tensor, layer: int, foreground: Tensor, padded: Tensor, shots: int, training: bool
) -> Drawn:
    """Draw tokens of the object and of the rest, at random without replacement.

    w tokens are wanted of each, 300·K; if there are fewer, more of the other make up for them:

        object = min(|object|, max(w, 2w - |rest|)),  rest = min(|rest|, max(w, 2w - |object|))

    While training w is that times a random factor of the episode and layer, 0.6 to 4.0 for one
    support and to 1.4 for more; there are as many places as for the largest.

    Whether a token counts as object and as padding is looked up as in the published code: at the
    token's number among those of its kind (object or rest), as if that were its place among all.
    Its own place is used for objects if there are fewer than w, and else for the rest if that is
    fewer.

    Args:
        seeds: int64 [B], one for each episode.
        layer: of the transformer, from 0; each has random numbers of its own.
        foreground, padded: bool [B, T], of the T = K·h·w tokens.
        shots: number of supports (K).
        training: whether to draw the factor.
    """
    wanted, most = _wanted(seeds, layer, shots, training)
    objects = foreground.sum(dim=1, keepdim=True)
    rest = (~foreground).sum(dim=1, keepdim=True)
    of_object = torch.minimum(objects, (2 * wanted - rest).clamp(min=wanted))
    of_rest = torch.minimum(rest, (2 * wanted - objects).clamp(min=wanted))

    order = random_numbers(seeds, 2 * layer, foreground.shape[1]).argsort(dim=1)
    kind = foreground.gather(1, order)
    chosen = _number(kind) < torch.where(kind, of_object, of_rest)
    count = foreground.shape[1]
    everywhere = torch.arange(count, device=seeds.device)
    # the chosen ones first, in the order of their random numbers
    first = torch.where(chosen, everywhere, everywhere + count).argsort(dim=1)[:, : 2 * most]
    index = order.gather(1, first)

    few = objects < wanted
    own = (foreground & few) | (~foreground & ~few & (rest < wanted))
    place = torch.where(own, everywhere, _number(foreground)).gather(1, index)
    valid = chosen.gather(1, first) if training else None
    return Drawn(index, foreground.gather(1, place), padded.gather(1, place), valid)


def _wanted(seeds: Tensor, layer: int, shots: int, training: bool) -> tuple[Tensor, int]:
    """Compute how many tokens are wanted of each kind [B, 1], and the largest number possible."""
    most = TOKENS * shots
    if not training:
        return torch.full_like(seeds[:, None], most), most
    low, high = _TENTHS[shots == 1]
    fraction = shifted(random_numbers(seeds, 2 * layer + 1, 1), 64 - _BITS)
    # in integers, which round alike everywhere
    factor = (low << _BITS) + (high - low) * fraction
    return most * factor // (10 << _BITS), most * high // 10


def _number(kind: Tensor) -> Tensor:
    """Number the elements of a kind, and those that are not, from 0 each: bool [B, T] to int64."""
    return torch.where(kind, kind.cumsum(dim=1), (~kind).cumsum(dim=1)) - 1
