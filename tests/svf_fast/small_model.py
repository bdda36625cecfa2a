"""A network of both kinds of layers, small enough for tests that need many."""

from __future__ import annotations

import torch
from torch import nn

import svf_fast


def build() -> nn.Module:
    """Two convolutions, a frozen batch norm and a linear layer; takes images [N, 3, 6, 6]."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    return model.requires_grad_(False)


def converted(**options) -> nn.Module:
    """Convert all of it; `options` are those of `svf_fast.convert`."""
    return svf_fast.convert(build(), None, progress=False, **options)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two images that it takes."""
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
