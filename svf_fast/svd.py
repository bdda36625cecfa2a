"""The decomposition W' = U diag(S) Vᵀ of a folded convolution or linear weight, and its inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from svf_fast._library import _C
from svf_fast.reference.compose import compose as reference_compose

# S_rms / |S_r| may reach this root mean square over the directions whose gradient is read off the
# layer's output; the rest is guarded. At 2 the error stays within twice that of the paper's layers.
GUARD_LIMIT = 2.0


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """U [Co, R], S [G·R], V [G·R, Ci/G, kh, kw] (linear: [R, Ci]); R is the rank per group."""

    U: Tensor
    S: Tensor
    V: Tensor


def has_memory(x: Tensor) -> bool:
    """Tell whether a tensor is an ordinary one: neither meta nor fake, sharded or quantized.

    A subclass whose values can be read like an ordinary tensor's says so: ``has_values = True``.
    """
    ordinary = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return not x.is_meta and (ordinary or getattr(type(x), "has_values", False))


def check_weight(weight: Tensor) -> None:
    """Check that a weight is a tensor that can be decomposed, or has the shape of one.

    Raises TypeError for another dtype, and for what only holds a weight: a DTensor, a quantized
    tensor.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a floating point tensor, got {type(weight).__name__}")
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            f"weight: expected a whole tensor, got a sharded {type(weight).__name__}; convert the "
            "model first, and shard it after (fully_shard)"
        )
    is_shape = weight.is_meta or isinstance(weight, FakeTensor)
    if weight.dtype not in _DTYPES or not (is_shape or has_memory(weight)):
        kind = type(weight).__name__ if weight.dtype in _DTYPES else f"{weight.dtype}"
        raise TypeError(
            "weight: expected a floating point tensor (float64, float32, bfloat16 or float16), got "
            f"{kind}; convert the model before it is quantized, or dequantize its weights"
        )


def decompose(weight: Tensor, groups: int = 1) -> Factors:
    """Decompose a weight into its singular values at full rank, per group (SVF paper, eq. 1).

    ``weight [Co, Ci/G, *kernel]`` is folded to G matrices ``[Co/G, Ci/G·K]``; each becomes
    ``U diag(S) V`` with orthonormal columns of U and rows of V, and rank
    ``R = min(Co/G, Ci/G·K)``. The decomposition runs in float64; the factors come back on the
    device of the weight, U and V in its dtype, S in float32 at least: it is to train, and a step of
    an optimizer is less than a 16-bit value can take up. Of a weight without values (on the meta
    device) the factors have none either.

    Raises:
        TypeError: the weight is not a floating point tensor, or is sharded or quantized.
        ValueError: fewer than two dimensions, channels not divisible by ``groups``, or NaN / Inf.
    """
    check_weight(weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"weight: expected [out, in/groups, *kernel] without empty dimensions, "
            f"got shape {list(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of {weight.shape[0]} channels, got {groups}")
    weight = weight.detach()
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if not has_memory(weight):
        rank = min(matrix.shape[1:])
        return Factors(
            weight.new_empty(weight.shape[0], rank),
            weight.new_empty(groups * rank, dtype=wide),
            weight.new_empty(groups * rank, *weight.shape[1:]),
        )
    matrix = matrix.double()
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
        S.reshape(-1).to(wide),
        V.reshape(-1, *weight.shape[1:]).to(weight.dtype).contiguous(),
    )


def compose(U: Tensor, S: Tensor, V: Tensor, groups: int = 1) -> Tensor:
    """Compose ``U diag(S) V`` and fold it back to the weight ``[Co, Ci/G, *kernel]``.

    Multiplied in float32 at least, whatever the dtype of the factors or of autocast, and returned
    in that dtype. Inverse of :func:`decompose` up to rounding; differentiable.
    """
    with torch.autocast(U.device.type, enabled=False):
        return reference_compose(U, S, V, groups)


def are_of(weight: Tensor, factors: Factors, groups: int = 1) -> bool:
    """Tell whether factors compose a weight, to rounding in its dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    allowed = 4 * torch.finfo(weight.dtype).eps + 64 * torch.finfo(wide).eps
    error = (compose(*factors, groups).to(wide) - weight.to(wide)).norm()
    return bool(error <= allowed * weight.to(wide).norm())


def are_ordered(factors: Factors, groups: int = 1) -> bool:
    """Tell whether factors are as :func:`decompose` gives them, but for signs of u_r and v_r.

    That is with orthonormal directions, to rounding in 16 bits, and S that descends to 0.
    """
    S = factors.S.double().reshape(groups, -1)
    rounding = 1e-6 * S.abs().max()
    if S.min() < -rounding or bool((S.diff(dim=1) > rounding).any()):
        return False
    U = factors.U.float().reshape(groups, -1, S.shape[1])
    V = factors.V.float().reshape(groups, S.shape[1], -1).mT
    identity = torch.eye(S.shape[1], device=U.device)
    return all(bool(((x.mT @ x - identity).abs() <= 0.01).all()) for x in (U, V))


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


def guarded_indices(
    S: Tensor, groups: int = 1, multiple: int = 1, limit: float = GUARD_LIMIT
) -> list[list[int]]:
    """Return :func:`guarded_directions` as lists, one a group. Compiled, as it is asked often."""
    dtype = S.dtype
    if not (S.is_cpu and S.is_contiguous() and dtype in (torch.float32, torch.float64)):
        S, dtype = S.detach().cpu().double().contiguous(), torch.float64
    rank = S.numel() // groups
    wide = dtype == torch.float64
    return _C.guarded_directions(S.data_ptr(), wide, groups, rank, limit, multiple)


def lifted_inverse(
    core: Tensor, lift: Tensor | None = None, multiple: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Return ``K = (Σ + P Qᵀ)⁻ᵀ`` [G, R, R] of a core Σ, and the lift P, Q [2, G, R, T] in it.

    The guard of :func:`guarded_directions` for a Σ beyond the diagonal. With the singular value
    decomposition of Σ the layer is one with its singular values D, and the factors U and V turned.
    P and Q are the left and right vectors of the smallest T of D, P as long as the root mean square
    of D: ``P Qᵀ`` lifts these to about that size, so that the sum can be inverted, and what it adds
    to Σz is known from T maps ``Qᵀz``. None where T is 0.

    A lift need not be of this Σ, only serve it: ``lift`` is kept while the root mean square of
    ``Σ_rms ‖K‖_F / √R`` over the groups is at most 2, the factor by which a rounding error of Σz
    weighs more in z. Else another is made, with room for Σ to move if there was one before. T as
    in :func:`guarded_directions`. Inverted in float64, returned in the dtype of Σ; where Σ is not
    finite, neither is K.
    """
    wide = core.detach().double()
    inverse = _inverse(wide, lift)
    if bool(_amplification(wide, inverse) <= GUARD_LIMIT) or not bool(wide.isfinite().all()):
        return inverse.to(core.dtype), lift
    groups, rank = wide.shape[:2]
    try:
        P, D, Qt = torch.linalg.svd(wide)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            "Σ: expected a matrix that can be decomposed, got other; load weights first (after "
            "to_empty)"
        ) from error
    limit = GUARD_LIMIT if lift is None else 0.9 * GUARD_LIMIT
    found = guarded_indices(D.reshape(-1), groups, multiple, limit)
    if not found[0]:  # what an older lift serves no longer
        return _inverse(wide, None).to(core.dtype), None
    at = torch.tensor(found, device=core.device)[:, None, :].expand(-1, rank, -1)
    size = D.square().mean(dim=1).sqrt()[:, None, None]
    size = torch.where(size > 0, size, 1.0)
    lift = torch.stack([P.gather(2, at) * size, Qt.mT.gather(2, at)]).to(core.dtype)
    return _inverse(wide, lift).to(core.dtype), lift


def inverse_with(core: Tensor, lift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return K of :func:`lifted_inverse` with a lift, and whether it serves, without waiting.

    For graphs that run later: a lift serves up to twice the limit there.
    """
    wide = core.detach().double()
    inverse = _inverse(wide, lift)
    return inverse.to(core.dtype), _amplification(wide, inverse) <= 2 * GUARD_LIMIT


def _inverse(core: Tensor, lift: Tensor | None) -> Tensor:
    if lift is not None:
        P, Q = lift.to(core.dtype)
        core = core + P @ Q.mT
    inverse, failed = torch.linalg.inv_ex(core)
    return torch.where(failed[:, None, None] == 0, inverse.mT, torch.nan)


def _amplification(core: Tensor, inverse: Tensor) -> Tensor:
    """Compute the root mean square of ``Σ_rms ‖K‖_F / √R`` over the groups."""
    square, inverse_square = (x.square().sum(dim=(1, 2)) for x in (core, inverse))
    return (square * inverse_square).mean().sqrt() / core.shape[1]


def dual(U: Tensor, groups: int = 1) -> Tensor | None:
    """Compute ``U (UᵀU)⁻¹``, which reads ``S ⊙ v`` off ``y`` if U's columns are not orthonormal.

    Returns None where they are, to float32 rounding (float64: its own): then U serves itself.
    Factors kept in a 16-bit dtype, or that have been through one, are not: they are off by 1e-3.

    Raises ValueError where columns depend on each other, as those of memory that nobody filled.
    """
    dtype = torch.promote_types(U.dtype, torch.float32)
    columns = U.detach().double().reshape(groups, -1, U.shape[1])
    product = columns.mT @ columns
    identity = torch.eye(U.shape[1], dtype=product.dtype, device=U.device)
    if (product - identity).abs().max() <= 16 * torch.finfo(dtype).eps:
        return None
    try:
        return torch.linalg.solve(product, columns, left=False).reshape(U.shape).to(dtype)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            "U, V: expected independent directions, got others; load weights first (after to_empty)"
        ) from error
