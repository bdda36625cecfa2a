"""Affine map, residual sum, ReLU and its 1-bit mask in one pass, and the way back in another.

Serves where ``csrc/cuda/affine_act.cu`` was not built, with the same bits as results: products and
sums are fused alike. Maps are read as they lie in memory, BLOCK elements a program, 16 bytes at a
time whatever the number of channels, whose values come from L1.

Bytes are the CUDA kernel's. Predicted, as no GPU has timed it: its time too, to a tenth, for
channels_last maps of 8·n channels and contiguous ones of 1024 positions and more; longer where the
values of channels are loaded one by one, and for shorter rows, which cost a division an element.

Definition: :mod:`svf_fast.reference.affine_act`, which also computes float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.reference import affine_act as definition
from svf_fast.reference.affine_act import mask_bytes, pack_mask
from svf_fast.triton.language import narrow, pack_bits
from svf_fast.triton.launch import launch
from svf_fast.triton.maps import (
    Rows,
    dense,
    divide_up,
    is_dense,
    like,
    load_block,
    rows_of,
    store_block,
    unit_of,
    with_strides_of,
)
from svf_fast.triton.tuning import INTERPRETED, OPTIONS, Config


@triton.jit
def of_channels(
    values, start, units, positions, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Load a value per channel for the BLOCK elements of a map from ``start`` on.

    ROWS: "channels" where the map is channels_last, "long" and "short" where rows are of positions:
    a block lies in two of the long ones at most.
    """
    element = tl.arange(0, BLOCK)
    channels = units * UNIT
    if ROWS == "channels":
        found = tl.load(values + ((start % channels).to(tl.int32) + element) % channels)
    else:
        row = start // positions
        position = start - row * positions
        channel = (row % channels).to(tl.int32)
        if ROWS == "long":
            following = tl.where(channel + 1 == channels, 0, channel + 1)
            here, there = tl.load(values + channel), tl.load(values + following)
            before = tl.minimum(positions - position, BLOCK).to(tl.int32)
            found = tl.where(element < before, here, there)
        else:
            row_of_block = (position.to(tl.int32) + element) // positions
            found = tl.load(values + (channel + row_of_block) % channels)
    return found


@triton.jit
def affine_act_kernel(
    y,
    scale,
    shift,
    residual,
    residual_scale,
    out,  # may be y
    mask,
    elements,
    units,  # channels / UNIT
    positions,
    RELU: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    inside, whole = element < elements - start, start + BLOCK <= elements
    value = load_block(y + start + element, inside, whole)
    factor = of_channels(scale, start, units, positions, UNIT, ROWS, BLOCK)
    offset = of_channels(shift, start, units, positions, UNIT, ROWS, BLOCK)
    z = tl.fma(value.to(tl.float32), factor, offset)
    if residual is not None:
        added = load_block(residual + start + element, inside, whole).to(tl.float32)
        if residual_scale is not None:
            factor = of_channels(residual_scale, start, units, positions, UNIT, ROWS, BLOCK)
            z = tl.fma(added, factor, z)
        else:
            z += added
    if RELU:
        z = tl.where(z < 0, 0.0, z)  # NaN passes
    result = narrow(z, out.dtype.element_ty)
    store_block(out + start + element, result, inside, whole)
    if mask is not None:
        passes = inside & ((result.to(tl.float32) <= 0) == 0)  # as NaN does
        bits = pack_bits(tl.reshape(passes, (BLOCK // 8, 8)), BLOCK // 8, 8)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        # bytes that hold no element are there, too
        tl.store(mask + byte, tl.reshape(bits, (BLOCK // 8,)), mask=byte < elements // 64 * 8 + 16)


@triton.jit
def affine_act_backward_kernel(
    grad,
    y,
    mask,
    scale,
    shift,
    out,  # may be grad
    elements,
    units,
    positions,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    inside, whole = element < elements - start, start + BLOCK <= elements
    g = load_block(grad + start + element, inside, whole).to(tl.float32)
    if scale is not None:
        factor = of_channels(scale, start, units, positions, UNIT, ROWS, BLOCK)
    if y is not None:
        value = load_block(y + start + element, inside, whole).to(tl.float32)
        offset = of_channels(shift, start, units, positions, UNIT, ROWS, BLOCK)
        passes = (tl.fma(value, factor, offset) <= 0) == 0
    else:
        byte = tl.arange(0, BLOCK // 8)
        eight = load_block(mask + start // 8 + byte, byte * 8 < elements - start, whole)
        bits = (eight.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
        passes = tl.reshape(bits, (BLOCK,)) != 0
    if scale is not None:
        g *= factor
    result = narrow(tl.where(passes, g, 0.0), out.dtype.element_ty)
    store_block(out + start + element, result, inside, whole)


def rule(dtype: torch.dtype) -> Config:
    """Return blocks of 16 bytes a thread; larger ones for the interpreter, slow at each program."""
    block = 8192 if INTERPRETED else 2048 // dtype.itemsize
    return {"BLOCK": block, "num_warps": 4, **OPTIONS}


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    """Compute ``relu?(y·scale_c + shift_c + residual·residual_scale_c)``, and its mask or no bytes.

    y, residual [N, C, *spatial] of one dtype; scale, shift, residual_scale [C] in float32 -> out in
    the layout of y, contiguous where that has gaps. A residual in another layout is copied first.
    """
    y = dense(y)
    out = like(y)
    return out, _forward(y, scale, shift, residual, residual_scale, relu, mask, out)


def affine_act_(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    mask: bool,
) -> Tensor:
    """Compute :func:`affine_act` in place of y; return the mask.

    Raises:
        ValueError: y that is neither contiguous nor channels_last.
    """
    _require_dense("affine_act_", "y", y)
    return _forward(y, scale, shift, residual, residual_scale, relu, mask, y)


def affine_act_backward(
    grad: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Compute ``scale_c · grad`` where the ReLU passed, by y or by the mask, in its layout.

    Raises:
        ValueError: with a mask, grad that is neither contiguous nor channels_last.
    """
    if y is None:
        _require_dense("affine_act_backward", "grad", grad)
    else:
        y = dense(y)
        grad = with_strides_of(grad, y)
    out = like(grad)
    _backward(grad, y, mask, scale, shift, out)
    return out


def affine_act_backward_(
    grad: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Compute :func:`affine_act_backward` in place of grad.

    Raises:
        ValueError: grad that is neither contiguous nor channels_last.
    """
    _require_dense("affine_act_backward_", "grad", grad)
    _backward(grad, None if y is None else with_strides_of(y, grad), mask, scale, shift, grad)


def _forward(y, scale, shift, residual, residual_scale, relu, mask, out) -> Tensor:
    bits = y.new_empty(mask_bytes(y.numel()) if mask else 0, dtype=torch.uint8)
    if y.numel() == 0:
        return bits.zero_()
    if residual is not None:
        residual = with_strides_of(residual, y)
    if y.dtype == torch.float64:
        with torch.no_grad():
            out.copy_(definition.affine_act(y, scale, shift, residual, residual_scale, relu))
            return pack_mask(out) if mask else bits
    elements = 8 * len(bits) if mask else y.numel()
    config = rule(y.dtype)
    with torch.cuda.device_of(y):
        launch(
            affine_act_kernel,
            (divide_up(elements, config["BLOCK"]),),
            y,
            scale.contiguous(),
            shift.contiguous(),
            residual,
            None if residual is None or residual_scale is None else residual_scale.contiguous(),
            out,
            bits if mask else None,
            y.numel(),
            RELU=relu,
            **_shape_of(y, config["BLOCK"]),
            **config,
        )
    return bits


def _backward(grad, y, mask, scale, shift, out) -> None:
    if grad.numel() == 0:
        return
    if grad.dtype == torch.float64:
        with torch.no_grad():
            out.copy_(definition.affine_act_backward(grad, y, mask, scale, shift))
        return
    config = rule(grad.dtype)
    with torch.cuda.device_of(grad):
        launch(
            affine_act_backward_kernel,
            (divide_up(grad.numel(), config["BLOCK"]),),
            grad,
            y,
            mask,
            None if scale is None else scale.contiguous(),
            None if y is None or shift is None else shift.contiguous(),
            out,
            grad.numel(),
            **_shape_of(grad, config["BLOCK"]),
            **config,
        )


def _shape_of(x: Tensor, block: int) -> dict[str, Any]:
    """Return the kernels' arguments that say how a map lies in memory."""
    rows: Rows = rows_of(x)
    unit = unit_of(rows.channels)
    kind = "channels" if rows.last else "long" if rows.positions >= block else "short"
    return {
        "units": rows.channels // unit,
        "positions": rows.positions,
        "UNIT": unit,
        "ROWS": kind,
    }


def _require_dense(op: str, name: str, x: Tensor) -> None:
    if not is_dense(x):
        raise ValueError(
            f"{op}: {name}: expected a contiguous or channels_last tensor, got strides "
            f"{x.stride()} for shape {list(x.shape)}"
        )


class Problem(NamedTuple):
    """A map of so many channels and positions, and what a call comes with.

    kind: "forward" of conv3's end, with residual and mask; "by y" and "by mask" the ways back.
    """

    channels: int
    positions: int
    dtype: torch.dtype
    last: bool
    kind: str

    def key(self) -> str:
        layout = "channels_last" if self.last else "contiguous"
        return f"{self.channels}x{self.positions} {self.dtype} {layout} {self.kind}"

    def candidates(self, arch: int) -> list[Config]:
        return [rule(self.dtype)]

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        y = torch.randn(2, self.positions, self.channels, device=device).to(self.dtype).mT
        y = y if self.last else y.contiguous()
        scale, shift = torch.randn(2, self.channels, device=device)
        mask = torch.zeros(mask_bytes(y.numel()), dtype=torch.uint8, device=device)
        calls: dict[str, Callable[[Config], Any]] = {
            "forward": lambda config: affine_act(y, scale, shift, y, scale, True, True),
            "by y": lambda config: affine_act_backward(y, y, None, scale, shift),
            "by mask": lambda config: affine_act_backward(y, None, mask, scale, None),
        }
        return calls[self.kind]


def problems() -> list[Problem]:
    """List channels in eights and not, rows longer than a block and not."""
    return [
        Problem(channels, positions, dtype, last, kind)
        for dtype in (torch.bfloat16, torch.float32)
        for kind in ("forward", "by y", "by mask")
        for channels, positions, last in (
            (264, 49, True),
            (33, 49, True),
            (33, 1680, False),
            (33, 49, False),
        )
    ]


TUNABLES = {"affine_act": problems}
