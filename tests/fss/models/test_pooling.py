"""Resizing of masks to the sides of feature maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fss.models.pooling import nearest


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_the_nearest_pixel_is_that_of_torch_where_maps_shrink(stride):
    for side in range(9, 802):
        size = (-(-side // stride), 2)
        rows = torch.arange(side).float()[None, :, None].expand(1, side, 3)
        expected = functional.interpolate(rows[:, None], size=size)[:, 0]
        assert torch.equal(nearest(rows, size), expected), side
