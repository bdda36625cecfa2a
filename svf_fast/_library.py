"""Loads the compiled ops into torch: `_C` (CPU, always) and `_C_cuda` (where torch has CUDA).

Each op of `_C_cuda` has a Triton twin, which serves GPUs where that library is missing: what
`pip install torch` brings along is CUDA and Triton, but no compiler for CUDA sources.
"""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

try:
    from svf_fast import _C
except ImportError as error:
    raise ImportError(
        f"the compiled library svf_fast._C cannot be imported: {error}. It is built when the "
        "package is installed, against the torch of that environment: run `pip install .` in the "
        f"repository with the Python and the torch ({torch.__version__}) you use here, and not "
        "only a copy of the sources."
    ) from error


def _load_cuda() -> str:
    """Load the CUDA ops; returns why there are none, empty when they are loaded."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    files = sorted(Path(__file__).parent.glob("_C_cuda*.so"))
    if not files:
        return f"svf_fast was built without them ({_C.build_facts()['cuda_decision']})"
    try:
        torch.ops.load_library(files[0])
    except OSError as error:
        return f"{files[0].name} cannot be loaded ({error})"
    return ""


cuda_missing = _load_cuda()


@functools.cache
def triton_missing() -> str:
    """Tell why there are no Triton kernels; empty where Triton can be imported."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""


gpu_kernels: dict[str, Callable] = {}  # functions in Python, by the op that they serve


def register_gpu(op: str, kernel: Callable) -> None:
    """Make `kernel` what svf_fast::`op` runs on CUDA tensors, unless `_C_cuda` has a kernel."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"svf_fast::{op}", "CUDA"):
        torch.library.impl(f"svf_fast::{op}", "CUDA", kernel)
        gpu_kernels[f"svf_fast::{op}"] = kernel


def triton_kernel(module: str, name: str) -> Callable:
    """Return ``svf_fast.triton.MODULE.NAME``, imported when it is first called."""
    return lambda *arguments: _imported(module, name)(*arguments)


@functools.cache
def _imported(module: str, name: str) -> Callable:
    try:
        found = importlib.import_module(f"svf_fast.triton.{module}")
    except ImportError as error:
        raise RuntimeError(
            f"{name}: on a GPU this op is a Triton kernel, which cannot be imported: {error}. "
            "torch's CUDA builds for Linux bring Triton along; elsewhere: pip install triton."
        ) from error
    return getattr(found, name)


def check_device(op: str, tensor: Tensor) -> None:
    """Check that a kernel of ours can serve the device of `tensor`."""
    device = tensor.device.type
    if device in ("cpu", "meta"):
        return
    if device != "cuda":
        raise ValueError(f"{op}: expected CPU or CUDA tensors, got device {tensor.device}")
    if cuda_missing and triton_missing():
        raise RuntimeError(
            f"{op}: got a tensor on {tensor.device}, but the CUDA ops are missing: "
            f"{cuda_missing}; and so are their Triton twins: {triton_missing()}. Install Triton "
            "(torch's CUDA builds for Linux bring it along; elsewhere: pip install triton), or "
            "reinstall svf_fast with SVF_FAST_CUDA=1, which says why if they cannot be built, or "
            "move the tensors to the CPU."
        )


def build_info() -> dict[str, str | bool | int]:
    """Tell how svf_fast was built and what it uses here: for bug reports and benchmark tables.

    `cuda_decision` is what the build decided and why; `cuda_ops` says what serves GPUs now, and why
    it is not the CUDA ops.
    """
    if not cuda_missing:
        cuda_ops = "loaded"
    elif torch.version.cuda is not None and not triton_missing():
        cuda_ops = f"Triton, {cuda_missing}"
    else:
        cuda_ops = f"no, {cuda_missing}"
    return {
        "svf_fast": _version("svf-fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **_C.build_facts(),
        "cuda_ops": cuda_ops,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
