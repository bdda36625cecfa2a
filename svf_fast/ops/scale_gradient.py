"""The gradient of S from two maps: their Gram matrix, and what is read off it, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast import _library
from svf_fast.ops.gram import gram

Reader = tuple[Tensor, Tensor, Tensor]  # left, right and S of `scale_gradient`


def scale_gradient(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """Compute ``dS_r = left_rᵀ M right_r / S_r`` with ``M = Σ_p a'_p b_pᵀ``, per group.

    a, b, scale, shift and grid as for ``gram``; left [G, Ca/G, R], right [G, Cb/G, R], S [G·R] ->
    [G, R] in the dtype that maps are accumulated in, not finite where S is 0. Not differentiable.
    Definition: :func:`svf_fast.reference.scale_gradient.scale_gradient`.
    """
    return torch.ops.svf_fast.scale_gradient.default(a, b, scale, shift, left, right, S, grid)


def scale_gradient_by_gram(
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    grid: Tensor | None = None,
) -> Tensor:
    """Compute it by two ops, where no kernel does both."""
    M = gram(a, b, len(left), scale, shift, grid)
    return torch.ops.svf_fast.gram_gradient.default(M, left, right, S.reshape(len(left), -1))


_kernel = _library.triton_kernel("gram", "scale_gradient")


def _on_gpu(a: Tensor, b: Tensor, scale, shift, left, right, S, grid=None) -> Tensor:
    one_by_one = left.shape[1] == right.shape[1] == 1 and scale is None and grid is None
    by_gram = one_by_one or torch.float64 in (a.dtype, b.dtype)
    compute = scale_gradient_by_gram if by_gram else _kernel
    return compute(a, b, scale, shift, left, right, S, grid)


torch.library.impl("svf_fast::scale_gradient", "default", scale_gradient_by_gram)
_library.register_gpu("scale_gradient", _on_gpu)


@torch.library.register_fake("svf_fast::scale_gradient")
def _(a: Tensor, b: Tensor, scale, shift, left, right, S: Tensor, grid=None) -> Tensor:
    return empty_scale_gradient(left, b if a.dtype == torch.uint8 else a)


def empty_scale_gradient(left: Tensor, maps: Tensor) -> Tensor:
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return maps.new_empty((left.shape[0], left.shape[2]), dtype=dtype)
