"""The weight of a layer from its factors, in the dtype that the convolution wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast import _library, svd
from svf_fast.ops import maps


def compose(
    U: Tensor, S: Tensor, V: Tensor, groups: int, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """W = ``U diag(S) V`` [Co, Ci/G, *kernel] in ``dtype``, and scale ⊙ W where a scale is given.

    scale [Co] in float32 (float64 for float64). Multiplied in float32 at least, rounded once. Not
    differentiable. On a GPU one kernel reads the factors and writes both, in V's order of memory.
    """
    S = S.detach()
    if maps.on_gpu(U) and torch.float64 not in (U.dtype, S.dtype, V.dtype, dtype):
        W, scaled = torch.ops.svf_fast.compose(U, S, V, groups, dtype, scale)
        return W, None if scale is None else scaled
    wide = svd.compose(U, S, V, groups)
    if scale is None:
        return wide.to(dtype), None
    return wide.to(dtype), (wide * scale.reshape(-1, *[1] * (V.dim() - 1))).to(dtype)


class Entry(NamedTuple):
    """A layer for :func:`compose_all`: the arguments of :func:`compose`."""

    U: Tensor
    S: Tensor
    V: Tensor
    groups: int
    scale: Tensor | None


def compose_all(
    entries: Sequence[Entry], dtype: torch.dtype, table: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """:func:`compose` of several layers on one GPU in one launch; up to float32.

    table: of :func:`compose_table` for entries at the same addresses, sent to the GPU.
    """
    U, S, V, groups, scales = zip(*entries, strict=True)
    made = torch.ops.svf_fast.compose_all(U, S, V, groups, scales, dtype, table)
    pairs = zip(made[::2], made[1::2], scales, strict=True)
    return [(weight, None if scale is None else scaled) for weight, scaled, scale in pairs]


def compose_table(entries: Sequence[Entry], dtype: torch.dtype) -> Tensor:
    """Addresses and sizes for :func:`compose_all`, on the CPU."""
    return _table(entries, dtype)


def scaled_columns(U: Tensor, S: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``U diag(S)`` as the weight [Co, R, 1, 1] of a grouped 1×1 convolution, in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    columns = U.to(wide).reshape(groups, -1, U.shape[1])
    scaled = columns * S.detach().to(wide).reshape(groups, 1, -1)
    return scaled.reshape(*U.shape, 1, 1).to(dtype)


_library.register_gpu("compose", _library.triton_kernel("compose", "compose"))
_library.register_gpu("compose_all", _library.triton_kernel("compose", "compose_all"))
_table = _library.triton_kernel("compose", "table")


@torch.library.register_fake("svf_fast::compose")
def _(U, S, V, groups, dtype, scale):
    W = U.new_empty((U.shape[0], *V.shape[1:]), dtype=dtype)
    return W, W.new_empty(W.shape if scale is not None else 0)
