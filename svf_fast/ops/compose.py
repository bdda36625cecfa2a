"""The weight of a layer from its factors, in the dtype that the convolution wants."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library, svd
from svf_fast.ops import maps


def compose(U: Tensor, S: Tensor, V: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """:func:`svf_fast.svd.compose`, rounded to ``dtype``; not differentiable.

    On a GPU one kernel reads the factors and writes W, for all dtypes up to float32.
    """
    if maps.on_gpu(U) and torch.float64 not in (U.dtype, S.dtype, V.dtype, dtype):
        return torch.ops.svf_fast.compose(U, S.detach(), V, groups, dtype)
    return svd.compose(U, S.detach(), V, groups).to(dtype)


_library.register_gpu("compose", _library.triton_kernel("compose", "compose"))


@torch.library.register_fake("svf_fast::compose")
def _(U: Tensor, S: Tensor, V: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return U.new_empty((U.shape[0], *V.shape[1:]), dtype=dtype)
