"""Definition of the SVF convolution: the three layers of the paper."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def svf_conv2d(
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve K×K with V, scale by S, convolve 1×1 with U (SVF paper, section 3.2).

    x [N, Ci, H, W], U [Co, R], S [G·R], V [G·R, Ci/G, kh, kw], bias [Co] -> [N, Co, Ho, Wo].
    With a core Σ [G, R, R] in the place of S the layer between is a convolution 1×1 with it.
    Saved for the backward pass: x, v = Vᵀ*x and S⊙v, or Σv.
    """
    v = functional.conv2d(x, V, None, stride, padding, dilation, groups)
    if S.dim() == 3:
        scaled = functional.conv2d(v, S.reshape(-1, S.shape[2], 1, 1), groups=groups)
    else:
        scaled = v * S.reshape(1, -1, 1, 1)
    return functional.conv2d(scaled, U[:, :, None, None], bias, groups=groups)
