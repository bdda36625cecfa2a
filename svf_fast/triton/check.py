"""Compiles the kernels for GPUs that are not here: registers, spills and shared memory of each.

``python -m svf_fast.triton.check`` prints a table for sm_80 and sm_90 and fails on a spill or on
more shared memory than a block can have.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from svf_fast.triton.tuning import Config, Tunable

ARCHITECTURES = (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have
MODULES = ("activation_grams", "compose", "cosine_max", "gram", "pointwise")


class Usage(NamedTuple):
    """What one compiled kernel needs per thread and per block, and its instructions."""

    kernel: str
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per block
    ptx: str


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Usage]]:
    """Launches inside compile for sm_``arch`` and do not run; the usage of each is appended."""
    launch, before, usages = JITFunction.run, driver._active, []

    def run(self, *args, grid, warmup, **options):
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        usages.append(_usage(self.fn.__name__, compiled))
        return compiled

    driver.set_active(_Absent(arch))
    JITFunction.run = run
    try:
        yield usages
    finally:
        JITFunction.run = launch
        driver._active = before


class _Absent:
    """The driver of a GPU that is not here."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _usage(name: str, compiled) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spilled = found["STACK"] + found["LOCAL"]
    return Usage(name, found["REG"], spilled, compiled.metadata.shared, compiled.asm["ptx"])


def tunables() -> list[Tunable]:
    """Every kernel with a configuration to choose."""
    modules = [import_module(f"svf_fast.triton.{name}") for name in MODULES]
    return [tunable for module in modules for tunable in module.TUNABLES]


def usages(tunable: Tunable, problem, config: Config, arch: int) -> list[Usage]:
    """What the kernels need that a launch of the problem with a configuration compiles."""
    with compile_only(arch) as found:
        tunable.launcher(problem, torch.device("cpu"))(config)
    return found
