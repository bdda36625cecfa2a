"""Definition of a pre-norm transformer block but for what lies between its queries and attention.

Vaswani et al., "Attention Is All You Need", 2017; norms first as in Dosovitskiy et al., "An Image
is Worth 16x16 Words", 2021; LayerScale as in Touvron et al., "Going Deeper with Image
Transformers", 2021.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Map = Callable[[Tensor], Tensor]


def normalized_linear(x: Tensor, norm: Map, linear: Map) -> Tensor:
    """Compute ``linear(norm(x))`` of tokens x [..., C]."""
    return linear(norm(x))


def after_attention(
    x: Tensor,
    attended: Tensor,
    proj: Map,
    scale1: Tensor | None,
    norm: Map,
    fc1: Map,
    act: Map,
    fc2: Map,
    scale2: Tensor | None,
) -> Tensor:
    """Compute ``m + scale2 ⊙ fc2(act(fc1(norm(m))))`` of ``m = x + scale1 ⊙ proj(attended)``.

    x, attended: tokens [..., C]. scale1, scale2 [C]: LayerScale, 1 where None.
    """
    middle = proj(attended)
    middle = x + (middle if scale1 is None else middle * scale1)
    out = fc2(act(fc1(norm(middle))))
    return middle + (out if scale2 is None else out * scale2)
