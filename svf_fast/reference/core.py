"""Definition of Σ beyond the diagonal, the core of a layer ``W = U Σ Vᵀ``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def off_diagonals(matrix: Tensor, size: int, width: int) -> Iterator[Tensor]:
    """Yield the off-diagonals of the square blocks along the diagonal of a matrix, as views.

    matrix [G, R, R]; blocks of ``size``, the last one what is left; of each block the diagonals
    with ``0 < |j - i| <= width``, from below to above -> [G, blocks, length] each.
    """
    rank = matrix.shape[-1]
    whole = rank - rank % size
    for first, last, own in ((0, whole, size), (whole, rank, rank - whole)):
        if first == last:
            continue
        part = matrix[:, first:last, first:last].unflatten(2, (-1, own)).unflatten(1, (-1, own))
        blocks = part.diagonal(0, 1, 3)  # [G, own, own, blocks]
        most = min(width, own - 1)
        for offset in (*range(-most, 0), *range(1, most + 1)):
            yield blocks.diagonal(offset, 1, 2)


def entries_core(S: Tensor, entries: Tensor, size: int, width: int) -> Tensor:
    """Compute ``Σ = diag(S) + entries``, at the places of :func:`off_diagonals`.

    S [G·R], entries [G, n] -> [G, R, R]; differentiable in both.
    """
    diagonal = S.reshape(len(entries), -1)
    matrix = diagonal.diag_embed()
    counts = [view.shape[1:].numel() for view in off_diagonals(matrix, size, width)]
    parts = entries.split(counts, dim=1)
    for view, part in zip(off_diagonals(matrix, size, width), parts, strict=True):
        view.copy_(part.reshape(view.shape))
    return matrix


def low_rank_core(S: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Compute ``Σ = diag(S) + A Bᵀ``: S [G·R], A and B [G, R, r] -> [G, R, R]; differentiable."""
    return S.reshape(len(A), -1).diag_embed() + A @ B.mT


def turned(U: Tensor, core: Tensor) -> Tensor:
    """Compute ``U Σ`` [Co, R] of U [Co, R] and Σ [G, R, R], in float32 at least."""
    dtype = torch.promote_types(U.dtype, torch.float32)
    return (U.to(dtype).reshape(len(core), -1, U.shape[1]) @ core.to(dtype)).reshape(U.shape)
