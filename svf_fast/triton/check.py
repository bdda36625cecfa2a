"""Compile the kernels for absent GPUs: registers, spills and shared memory of each.

``python -m svf_fast.triton.check`` prints a table for sm_80 and sm_90 and fails on a spill or on
more shared memory than a block can have; ``--architectures 89 120`` for other GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from svf_fast.triton.tuning import OPTIONS, SEPARATE, Config, Problem, shared_memory

ARCHITECTURES = (80, 90)


class Usage(NamedTuple):
    """What one compiled kernel needs per thread and per block, and its instructions."""

    kernel: str
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per block
    ptx: str


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Usage]]:
    """Compile launches for sm_``arch`` instead of running them; append the usage of each."""
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
    """The driver of an absent GPU."""

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


Kernels = Mapping[str, Callable[[], Sequence[Problem]]]
"""Problems to choose configurations for, by the name of the kernel."""


def tunables() -> Kernels:
    """Collect every kernel with a configuration to choose."""
    names = [found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [import_module(f"svf_fast.triton.{name}") for name in names]
    found = [getattr(module, "TUNABLES", {}) for module in modules]
    return {name: problems for kernels in found for name, problems in kernels.items()}


def usages(problem: Problem, config: Config, arch: int) -> list[Usage]:
    """Return what the kernels need that a launch of the problem with a configuration compiles."""
    with compile_only(arch) as found:
        problem.launcher(torch.device("cpu"))({**config, **OPTIONS})
    return found


class Case(NamedTuple):
    """A problem of a kernel, and whether torch's switches allow TF32."""

    kernel: str
    problem: Problem
    tf32: bool

    @property
    def key(self) -> str:
        with allow_tf32(self.tf32):
            return self.problem.key()

    def candidates(self, arch: int) -> list[Config]:
        with allow_tf32(self.tf32):
            return self.problem.candidates(arch)


def cases(kernels: Kernels) -> list[Case]:
    """List every problem of every kernel, in float32 with TF32 and without; a key once."""
    found: dict[tuple[str, str], Case] = {}
    for kernel, problems in kernels.items():
        for problem in problems():
            for tf32 in (False, True):
                case = Case(kernel, problem, tf32)
                found.setdefault((kernel, case.key), case)
    return list(found.values())


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Set torch's switches for products in TF32, and restore them."""
    cudnn: Any = torch.backends.cudnn
    switches = cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def choose(case: Case, arch: int) -> Config:
    """Return the rule's configuration of a case; where that is no kernel, the one after it."""
    return next(config for config in case.candidates(arch) if config != SEPARATE)


class Compilation(NamedTuple):
    """What a process is asked to compile."""

    problem: Problem
    tf32: bool
    arch: int
    config: Config


def compilations(found: Sequence[tuple[Case, int, Config]]) -> list[Compilation]:
    """Select the cases, architectures and configurations that Triton compiles separately.

    It distinguishes numbers that are 1 and multiples of 16; kernels distinguish multiples of their
    blocks. Of those it compiles alike, the smallest problem is selected.
    """
    apart: dict[tuple, tuple[int, Compilation]] = {}
    for case, arch, config in found:
        if config == SEPARATE:
            continue
        alike = case.kernel, case.tf32, arch, tuple(sorted(config.items())), *_kind(case)
        size = math.prod(x for x in case.problem if type(x) is int and x > 0)
        one = Compilation(case.problem, case.tf32, arch, config)
        if alike not in apart or size < apart[alike][0]:
            apart[alike] = size, one
    return [one for _, one in apart.values()]


def _kind(case: Case) -> Iterator[Any]:
    for value in case.problem:
        if type(value) is int:  # the largest power of two in it
            yield value == 1, min(value & -value, 256)
        else:
            yield value


def compile_one(one: Compilation) -> list[Usage]:
    """Compile, and return the usages; the kernels stay in Triton's cache on disk."""
    with allow_tf32(one.tf32):
        return usages(one.problem, one.config, one.arch)


def processes(count: int | None = None) -> ProcessPoolExecutor:
    """Start processes that compile and see no GPU."""
    return ProcessPoolExecutor(
        count or os.cpu_count(), multiprocessing.get_context("spawn"), initializer=_hide_gpus
    )


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel spills or needs more shared memory than a block has."""
    parser = argparse.ArgumentParser(prog="python -m svf_fast.triton.check", description=__doc__)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="all of them if not given")
    parser.add_argument("--processes", type=int, help="as many as there are processors")
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=ARCHITECTURES, metavar="N", help="80 90"
    )
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing can be compiled. Unset it.", file=sys.stderr)
        return 1
    found = cases(select_kernels(tunables(), options.kernels))
    todo = compilations(
        [(case, arch, choose(case, arch)) for case in found for arch in options.architectures]
    )
    print("| kernel | arch | configuration | registers | spilled | shared |")
    print("| --- | --- | --- | --- | --- | --- |")
    bad, seen = 0, set()
    with processes(options.processes) as pool:
        for one, used in zip(todo, pool.map(compile_one, todo), strict=True):
            for usage in used:
                row = one.arch, *usage[:4]
                if row not in seen:
                    wrong = usage.spilled > 0 or usage.shared > shared_memory(one.arch)
                    print(_row(one, usage) + (" <- too much" if wrong else ""), flush=True)
                    bad += wrong
                seen.add(row)
    print(f"{len(seen)} kernels, {bad} that spill or need too much shared memory")
    return 1 if bad else 0


def _row(one: Compilation, usage: Usage) -> str:
    numbers = f"{usage.registers} | {usage.spilled} | {usage.shared}"
    return f"| {usage.kernel} | sm_{one.arch} | {format_config(one.config)} | {numbers} |"


def format_config(config: Config) -> str:
    """Format a configuration in a line."""
    return " ".join(f"{name}={value}" for name, value in sorted(config.items()))


def select_kernels(kernels: Kernels, names: Sequence[str] | None) -> Kernels:
    """Select the kernels of some names, or all of them.

    Raises:
        ValueError: a name that no kernel has.
    """
    for name in names or ():
        if name not in kernels:
            raise ValueError(f"--kernels: expected names out of {', '.join(kernels)}, got {name}")
    return {name: kernels[name] for name in names or kernels}


if __name__ == "__main__":
    sys.exit(main())
