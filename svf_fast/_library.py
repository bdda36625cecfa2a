"""Loads the compiled ops into torch: `_C` (CPU, always) and `_C_cuda` (where torch has CUDA).

Each op of `_C_cuda` has a Triton twin, which serves GPUs where that library is missing: what
`pip install torch` brings along is CUDA and Triton, but no compiler for CUDA sources.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
import runpy
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

__version__ = "0.1.0"
_HERE = Path(__file__).resolve().parent


def _find_installed() -> Path | None:
    """Find the library of an installation elsewhere on the path, for sources that have none."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if (_HERE / name).exists():
        return None
    folders = (Path(entry).resolve() / "svf_fast" for entry in sys.path)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _load() -> ModuleType:
    try:
        return importlib.import_module("svf_fast._C")
    except ImportError as error:
        cause = error
    installed = _find_installed()
    spec = installed and importlib.util.spec_from_file_location("svf_fast._C", installed)
    if spec and spec.loader:
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules["svf_fast._C"] = sys.modules["svf_fast"]._C = module  # type: ignore
            return module
        except ImportError as error:  # built against another torch
            cause = error
    raise ImportError(
        f"the compiled library svf_fast._C cannot be imported: {cause}. It is built when the "
        "package is installed, against the torch of that environment: run `pip install .` in "
        f"the repository with the Python and the torch ({torch.__version__}) you use here, and "
        "not only a copy of the sources."
    ) from cause


def _check_sources(library: ModuleType) -> None:
    """Refuse a library that was built of other C++ sources than those beside this package."""
    sources, file = _HERE.parent / "csrc", Path(library.__file__ or "")
    if not (sources / "digest.py").is_file():  # an installation: built in one piece
        return
    digest = runpy.run_path(str(sources / "digest.py"))["digest"]()
    if library.build_facts().get("sources") == digest:
        return
    command = f"`pip install -e .` in {_HERE.parent}"
    if file.parent != _HERE:
        command += ", or leave that folder to use what is installed"
    raise ImportError(
        f"the compiled library {file} was built from older or newer sources than {sources}: run "
        f"{command}"
    )


_C = _load()
_check_sources(_C)


def _load_cuda() -> str:
    """Load the CUDA ops; returns why there are none, empty when they are loaded."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    facts, own = _C.build_facts(), Path(_C.__file__ or "")
    if not facts["cuda_built"]:
        return f"svf_fast was built without them ({facts['cuda_decision']})"
    file = own.with_name(own.name.replace("_C.", "_C_cuda.", 1))
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file.name} cannot be loaded ({error})"
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
        "svf_fast": __version__,
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
