"""Convolution and its gradients as the SVF operations need them: layout followed, no input kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from svf_fast.ops import maps


class Geometry(NamedTuple):
    """Stride, symmetric zero padding, dilation (height, width) and groups of a convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether a 1×1 convolution with it is a matrix product over all positions."""
        return self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def pointwise(self) -> Geometry:
        """Return the geometry of the 1×1 convolution that follows this one."""
        return Geometry(groups=self.groups)


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x is dense in channels_last order, and not in the default order too."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def match_layout(weight: Tensor, x: Tensor) -> Tensor:
    """Return the weight in the memory format of x, so that the output has it too."""
    if not is_channels_last(x):
        return weight.contiguous()
    in_channels, height, width = weight.shape[1:]
    if height == width == 1:  # both formats at once: only strides that say channels_last decide
        stride = (in_channels, 1, in_channels, in_channels)
        return weight.contiguous().as_strided(weight.shape, stride)
    return weight.contiguous(memory_format=torch.channels_last)


def directions_last(V: Tensor) -> Tensor:
    """Lay V [G·R, Ci/G, *kernel] out with directions innermost in memory, channels next to them.

    So tensor cores take it from memory as it is, because the product U diag(S) V sums over the
    directions; and W, in V's order of the rest, is a weight for channels_last maps.
    """
    order = [*range(2, V.dim()), 1, 0]
    return V.permute(order).contiguous().permute([order.index(dim) for dim in range(V.dim())])


def directions_first(V: Tensor) -> Tensor:
    """Lay V out as a convolution's weight: the directions outermost, the rest as it lay."""
    order = _order(V)
    return V.permute(order).contiguous().permute([order.index(dim) for dim in range(V.dim())])


def channels_innermost(V: Tensor) -> bool:
    """Tell whether V [G·R, Ci/G, kh, kw] has its channels inside its positions in memory."""
    if V.dim() != 4 or V.shape[2:].numel() == 1 or V.shape[1] == 1:
        return False
    return V.stride(1) < V.stride(3 if V.shape[3] > 1 else 2)


def _order(V: Tensor) -> list[int]:
    """Order V's dimensions from outermost to innermost: channels last, or as written."""
    return [0, 2, 3, 1] if channels_innermost(V) else list(range(V.dim()))


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Compute ``conv2d`` of x [N, Ci, H, W] with weight [Co, Ci/G, kh, kw] -> [N, Co, Ho, Wo]."""
    if _is_product(x, weight, geometry) and (bias is None or is_channels_last(x)):
        out = _product(weight.flatten(1), x)
        return out if bias is None else out.add_(bias[:, None, None])
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
    grad_y: Tensor,
    weight: Tensor,
    shape: torch.Size,
    geometry: Geometry,
    into: Tensor | None = None,
) -> Tensor:
    """Compute dL/dx ``[N, Ci, H, W] = shape`` from dL/dy [N, Co, Ho, Wo]; needs no x.

    With ``into``, a map of that shape, the gradient is added to it in place.
    """
    product = _is_product(grad_y, weight, geometry) or (
        into is not None and is_channels_last(into) and _accumulates(grad_y, weight, geometry)
    )
    if product and shape[2:] == grad_y.shape[2:]:
        return _product(weight.flatten(1).mT, grad_y, into)
    # the operator reads of x its shape, and cuDNN its memory format
    stand_in = grad_y if shape == grad_y.shape else _like(grad_y, shape)
    grad_x = torch.ops.aten.convolution_backward(
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
    return grad_x if into is None else into.add_(grad_x)


def _like(x: Tensor, shape: torch.Size) -> Tensor:
    """Return an empty map in the memory format of x; on the CPU one element stands for all."""
    if x.device.type == "cpu":
        return x.new_empty(1).expand(shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _is_product(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Tell whether a matrix product does it: 1×1 on the CPU, where BLAS beats oneDNN."""
    return (
        x.is_cpu
        and weight.shape[-1] == weight.shape[-2] == 1
        and geometry.is_plain
        and x.numel() > 0
        and (x.is_contiguous() or is_channels_last(x))
    )


def _accumulates(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Tell whether a GPU's matrix product adds to a map it writes: 1×1, 16-bit, channels_last.

    A product in float32 has another switch for TF32 than a convolution.
    """
    return (
        maps.on_gpu(x)
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[2:] == (1, 1)
        and geometry.is_plain
        and x.numel() > 0
        and is_channels_last(x)
    )


def _product(matrix: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """Compute ``Σ_c matrix_dc x_ncp``: [D, C], [N, C, H, W] -> [N, D, H, W], laid out as x.

    With ``into`` it is added to that map; on a GPU both are channels_last.
    """
    if x.is_cpu:
        if into is None:
            return torch.ops.svf_fast.product.default(x, matrix)
        torch.ops.svf_fast.product_add_.default(into, x, matrix)
        return into
    assert into is not None
    rows, out = (maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (x, into))
    out.addmm_(rows, matrix.t())
    return into


@torch.library.register_fake("svf_fast::product")
def _(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))
    return out.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else out


@torch.library.register_fake("svf_fast::product_add_")
def _(out: Tensor, x: Tensor, weight: Tensor) -> None:
    return None


def convolution_weight_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> Tensor:
    """Compute dL/dW [Co, Ci/G, kh, kw] from dL/dy [N, Co, Ho, Wo] and x [N, Ci, H, W]."""
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
