"""The weight of a layer from its factors, in the dtype that the convolution wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast import _library, svd
from svf_fast.ops.convolution import channels_innermost


def compose(
    U: Tensor, S: Tensor, V: Tensor, groups: int, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute W = ``U diag(S) V`` [Co, Ci/G, *kernel] in ``dtype``, and scale ⊙ W if given a scale.

    scale [Co] in float32 (float64 for float64). Multiplied in float32 at least, rounded once. Not
    differentiable. On a GPU one kernel reads the factors and writes both, in V's order of memory.
    """
    made = torch.ops.svf_fast.compose.default(U, S.detach(), V, groups, dtype, scale)
    return made[0], None if scale is None else made[1]


class Entry(NamedTuple):
    """A layer for :func:`compose_all`: the arguments of :func:`compose`."""

    U: Tensor
    S: Tensor
    V: Tensor
    groups: int
    scale: Tensor | None


def compose_all(entries: Sequence[Entry], dtype: torch.dtype, table: Tensor) -> list[Tensor | None]:
    """Compute :func:`compose` of several layers on one GPU in one launch, the two of each in turns.

    Up to float32. table: of :func:`compose_table` for entries at the same addresses, sent to the
    GPU.
    """
    U, S, V, groups, scales = zip(*entries, strict=True)
    made = torch.ops.svf_fast.compose_all(U, S, V, groups, scales, dtype, table)
    wanted = [x for scale in scales for x in (True, scale is not None)]
    return [x if is_wanted else None for x, is_wanted in zip(made, wanted, strict=True)]


def compose_table(entries: Sequence[Entry], dtype: torch.dtype) -> Tensor:
    """Tabulate addresses and sizes for :func:`compose_all`, on the CPU."""
    return _table(entries, dtype)


def scaled_columns(U: Tensor, S: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Compute ``U diag(S)`` in ``dtype`` as the weight [Co, R, 1, 1] of a grouped convolution."""
    wide = torch.promote_types(dtype, torch.float32)
    columns = U.to(wide).reshape(groups, -1, U.shape[1])
    scaled = columns * S.detach().to(wide).reshape(groups, 1, -1)
    return scaled.reshape(*U.shape, 1, 1).to(dtype)


def compose_by_definition(
    U: Tensor, S: Tensor, V: Tensor, groups: int, dtype: torch.dtype, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compose on devices without a kernel, and float64 on a GPU."""
    wide = svd.compose(U, S, V, groups)
    rows = None if scale is None else scale.reshape(-1, *[1] * (V.dim() - 1))
    scaled = wide.new_empty(0) if rows is None else wide * rows
    return wide.to(dtype), scaled.to(dtype)


def _compose_on_gpu(U: Tensor, S: Tensor, V: Tensor, groups: int, dtype: torch.dtype, scale):
    wide = torch.float64 in (U.dtype, S.dtype, V.dtype, dtype)
    return (compose_by_definition if wide else _compose_kernel)(U, S, V, groups, dtype, scale)


_compose_kernel = _library.triton_kernel("compose", "compose")
torch.library.impl("svf_fast::compose", "default", compose_by_definition)
_library.register_gpu("compose", _compose_on_gpu)
_library.register_gpu("compose_all", _library.triton_kernel("compose", "compose_all"))
_table = _library.triton_kernel("compose", "table")


@torch.library.register_fake("svf_fast::compose")
def _(U, S, V, groups, dtype, scale):
    W = U.new_empty((U.shape[0], *V.shape[1:]), dtype=dtype)
    if channels_innermost(V):
        W = W.contiguous(memory_format=torch.channels_last)
    return W, W.new_empty(0) if scale is None else torch.empty_like(W)
