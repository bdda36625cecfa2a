"""Convolution and its gradients as the SVF operations need them: layout followed, no input kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Geometry(NamedTuple):
    """Stride, symmetric zero padding, dilation (height, width) and groups of a convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def pointwise(self) -> Geometry:
        """The geometry of the 1×1 convolution that follows this one."""
        return Geometry(groups=self.groups)


def is_channels_last(x: Tensor) -> bool:
    """Dense in channels_last order, and not in the default order at the same time."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def match_layout(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the memory format of x: a backend takes its output's format from either."""
    if not is_channels_last(x):
        return weight
    in_channels, height, width = weight.shape[1:]
    if height == width == 1:  # both formats at once: only strides that say channels_last decide
        stride = (in_channels, 1, in_channels, in_channels)
        return weight.contiguous().as_strided(weight.shape, stride)
    return weight.contiguous(memory_format=torch.channels_last)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``conv2d`` of x [N, Ci, H, W] with weight [Co, Ci/G, kh, kw] -> [N, Co, Ho, Wo]."""
    return functional.conv2d(
        x,
        match_layout(weight, x),
        bias,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )


def convolution_input_gradient(
    grad_y: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry
) -> Tensor:
    """dL/dx ``[N, Ci, H, W] = shape`` from dL/dy [N, Co, Ho, Wo]; x itself is not needed."""
    stand_in = grad_y.new_empty(1).expand(shape)  # the aten operator reads its shape alone
    return torch.ops.aten.convolution_backward(
        grad_y,
        stand_in,
        match_layout(weight, grad_y),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        (True, False, False),
    )[0]


def convolution_weight_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> Tensor:
    """dL/dW [Co, Ci/G, kh, kw] from dL/dy [N, Co, Ho, Wo] and x [N, Ci, H, W]."""
    return torch.ops.aten.convolution_backward(
        grad_y,
        x,
        match_layout(weight, x),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        (False, True, False),
    )[1]
