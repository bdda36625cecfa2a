"""Definition of the test that the guarded directions of ``gram`` are still enough."""

from __future__ import annotations

from torch import Tensor


def guard_holds(S: Tensor, tail: Tensor | None, groups: int, limit: float) -> Tensor:
    """Whether ``S_rms / |S_r|`` has a root mean square of at most ``limit`` beside the tail.

    S [G·R]; tail [G, T] indices of the guarded directions per group -> bool []. The mean is over
    the other directions of all groups, S_rms that of each group; False where one is 0 or NaN.
    """
    square = S.double().reshape(groups, -1).square()
    ratio = square.mean(dim=1, keepdim=True) / square
    kept = ratio.numel()
    if tail is not None:
        ratio = ratio.scatter(1, tail, 0.0)
        kept -= tail.numel()
    return ratio.sum() <= kept * limit**2
