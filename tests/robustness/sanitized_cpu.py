"""Compiles csrc and csrc/cpu with address and undefined-behaviour sanitizers, as `svf_fast._C`.

As a pytest plugin, `-p tests.robustness.sanitized_cpu`, svf_fast finds the library that
$SVF_FAST_SANITIZED names instead of its own.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch  # noqa: F401 (the library needs its symbols)
from torch.utils import cpp_extension

from tests.gpu.emulated_cuda import ROOT, build

HERE = Path(__file__).resolve().parent
LIBRARY = "SVF_FAST_SANITIZED"
# Optimized a little: kernels are always inlined, and without their vectors in registers too slow.
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"),
    *("-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"),
]


def build_library() -> Path:
    """The CPU ops, sanitized; built once per state of the sources."""
    sources = sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")])
    units = {f"{path.parent.name}_{path.stem}": [path] for path in sources}
    python = sysconfig.get_path("include")
    digest = runpy.run_path(str(ROOT / "csrc/digest.py"))["digest"]()
    flags = [
        *FLAGS,
        f'-DSVF_FAST_SOURCES="{digest}"',
        f"-I{pybind11.get_include()}",
        f"-I{python}",
        f"-I{ROOT / 'csrc'}",
    ]
    link = ["-shared", f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"]
    link += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    return build("_C.so", units, flags, link, HERE)


def pytest_configure() -> None:
    spec = importlib.util.spec_from_file_location("svf_fast._C", os.environ[LIBRARY])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["svf_fast._C"] = module
