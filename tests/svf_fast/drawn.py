"""Maps drawn for tests, in every layout that an op may meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def maps(
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers of that shape [N, C, *spatial].

    layout: "contiguous", "channels_last", "sliced" (every second element of a larger one along each
    dimension) or "expanded" (one image, seen N times).
    """
    if layout == "sliced":
        x = torch.randn([2 * n for n in shape], dtype=torch.float64, device=device).to(dtype)
        return x[tuple(slice(None, None, 2) for _ in shape)]
    images = 1 if layout == "expanded" else shape[0]
    x = torch.randn(images, *shape[1:], dtype=torch.float64, device=device).to(dtype)
    if layout == "expanded":
        return x.expand(*shape)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x
