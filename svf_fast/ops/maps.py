"""Checks of the maps that ops take: tensors [N, C, *spatial]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svf_fast import _library

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = DTYPES[1:]  # float64 is left to the definitions


def on_gpu(x: Tensor) -> bool:
    """Tell whether the kernels of a GPU serve x."""
    return x.is_cuda


def shrinks(x: Tensor) -> bool:
    """Tell whether codes of 8 bits and their grid are smaller than a map x [N, C, *spatial]."""
    spared = x.shape[2:].numel() * (x.dtype.itemsize - 1)
    return spared > 3 * torch.promote_types(x.dtype, torch.float32).itemsize


def float32_products() -> tuple[str, str]:
    """Return torch's switches for float32 products on a GPU: of convolutions, and of matrices."""
    # not `allow_tf32`, which raises once anyone has set `fp32_precision`
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def check_maps(op: str, **maps: Tensor) -> None:
    """Check that all are maps of one dtype, shape and device; errors name `op` and the argument."""
    (first_name, first), *_ = maps.items()
    for name, value in maps.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name}: expected float64, float32, bfloat16 or float16, got {value.dtype}"
            )
    if first.dim() < 2:
        raise ValueError(
            f"{op}: {first_name}: expected at least two dimensions [N, C, *spatial], got shape "
            f"{list(first.shape)}"
        )
    for name, value in maps.items():
        if value.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name}: expected {first.dtype} as {first_name}, got {value.dtype}"
            )
        if value.shape != first.shape:
            raise ValueError(
                f"{op}: {name}: expected shape {list(first.shape)} as {first_name}, got "
                f"{list(value.shape)}"
            )
        if value.device != first.device:
            raise ValueError(
                f"{op}: {name}: expected device {first.device} as {first_name}, got {value.device}"
            )
    _library.check_device(op, first)
