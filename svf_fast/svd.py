"""The decomposition W' = U diag(S) Vᵀ of a folded convolution or linear weight, and its inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast._library import _C
from svf_fast.reference.compose import compose as reference_compose

# S_rms / |S_r| may reach this root mean square over the directions whose gradient is read off the
# layer's output; the rest is guarded. At 2 the error stays within twice that of the paper's layers.
GUARD_LIMIT = 2.0


class Factors(NamedTuple):
    """U [Co, R], S [G·R], V [G·R, Ci/G, kh, kw] (linear: [R, Ci]); R is the rank per group."""

    U: Tensor
    S: Tensor
    V: Tensor


def decompose(weight: Tensor, groups: int = 1) -> Factors:
    """Decompose a weight into its singular values at full rank, per group (SVF paper, eq. 1).

    ``weight [Co, Ci/G, *kernel]`` is folded to G matrices ``[Co/G, Ci/G·K]``; each becomes
    ``U diag(S) V`` with orthonormal columns of U and rows of V, and rank
    ``R = min(Co/G, Ci/G·K)``. The decomposition runs in float64; the factors come back in the
    dtype and on the device of the weight.

    Raises:
        TypeError: the weight is not a floating point tensor.
        ValueError: fewer than two dimensions, channels not divisible by ``groups``, or NaN / Inf.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a floating point tensor, got {got}")
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"weight: expected [out, in/groups, *kernel] without empty dimensions, "
            f"got shape {list(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of {weight.shape[0]} channels, got {groups}")
    matrix = weight.detach().reshape(groups, weight.shape[0] // groups, -1).double()
    if not torch.isfinite(matrix).all():
        raise ValueError(
            "weight: expected finite values, got NaN or Inf; was the checkpoint saved after a "
            "diverged run?"
        )
    tall = matrix.shape[1] > matrix.shape[2]
    long_side, short_side = max(matrix.shape[1:]), min(matrix.shape[1:])
    if long_side >= 2 * short_side:  # QR first: a third less time on ResNet's shapes
        q, r = torch.linalg.qr(matrix if tall else matrix.mT)
        left, S, right = torch.linalg.svd(r)
        U, V = (q @ left, right) if tall else (right.mT, (q @ left).mT)
    else:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return Factors(
        U.reshape(weight.shape[0], -1).to(weight.dtype).contiguous(),
        S.reshape(-1).to(weight.dtype),
        V.reshape(-1, *weight.shape[1:]).to(weight.dtype).contiguous(),
    )


def compose(U: Tensor, S: Tensor, V: Tensor, groups: int = 1) -> Tensor:
    """Compose ``U diag(S) V`` and fold it back to the weight ``[Co, Ci/G, *kernel]``.

    Multiplied in float32 at least, whatever the dtype of the factors or of autocast, and returned
    in that dtype. Inverse of :func:`decompose` up to rounding; differentiable.
    """
    with torch.autocast(U.device.type, enabled=False):
        return reference_compose(U, S, V, groups)


def guarded_directions(S: Tensor, groups: int = 1, multiple: int = 1) -> Tensor:
    """Return the indices ``[G, T]`` of the smallest |S_r|, whose gradient must not divide by S_r.

    They ascend; T is the smallest number, the same in every group, that leaves the root mean
    square of ``S_rms / |S_r|`` over the other directions at most 2: by this factor a rounding error
    of the layer's output weighs more in dS_r than the same error of ``v_r = Vᵀ_r x`` does. Where
    there are any, T is filled up to a multiple of ``multiple`` as far as there are directions.
    """
    found = guarded_indices(S, groups, multiple)
    if not found[0]:
        return torch.empty(groups, 0, dtype=torch.int64, device=S.device)
    return torch.tensor(found, device=S.device)


def guarded_indices(S: Tensor, groups: int = 1, multiple: int = 1) -> list[list[int]]:
    """Return :func:`guarded_directions` as lists, one a group. Compiled, as it is asked often."""
    dtype = S.dtype
    if not (S.is_cpu and S.is_contiguous() and dtype in (torch.float32, torch.float64)):
        S, dtype = S.detach().cpu().double().contiguous(), torch.float64
    rank = S.numel() // groups
    wide = dtype == torch.float64
    return _C.guarded_directions(S.data_ptr(), wide, groups, rank, GUARD_LIMIT, multiple)


def dual(U: Tensor, groups: int = 1) -> Tensor | None:
    """Compute ``U (UᵀU)⁻¹``, which reads ``S ⊙ v`` off ``y`` if U's columns are not orthonormal.

    Returns None where they are, to float32 rounding (float64: its own): then U serves itself.
    Factors kept in a 16-bit dtype, or that have been through one, are not: they are off by 1e-3.
    """
    dtype = torch.promote_types(U.dtype, torch.float32)
    columns = U.detach().double().reshape(groups, -1, U.shape[1])
    product = columns.mT @ columns
    identity = torch.eye(U.shape[1], dtype=product.dtype, device=U.device)
    if (product - identity).abs().max() <= 16 * torch.finfo(dtype).eps:
        return None
    return torch.linalg.solve(product, columns, left=False).reshape(U.shape).to(dtype)
