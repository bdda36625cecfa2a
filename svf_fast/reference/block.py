"""Definition of a chain of SVF convolutions, each with its frozen batch norm, and a shortcut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional


def block(
    x: Tensor,
    stages: Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]],
    shortcut: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Compute ``relu?(bn_n(conv_n(… relu(bn_1(conv_1(x))))) + shortcut(x))``.

    Each stage is its convolution, its batch norm, and whether a ReLU follows (after the sum, if it
    is the last); without ``shortcut`` nothing is added.
    """
    out = x
    for conv, norm, relu in stages[:-1]:
        out = norm(conv(out))
        out = functional.relu(out) if relu else out
    conv, norm, relu = stages[-1]
    out = norm(conv(out))
    if shortcut is not None:
        out = out + shortcut(x)
    return functional.relu(out) if relu else out
