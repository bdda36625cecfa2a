"""Which block sizes a kernel is launched with: measured on this GPU, else by the kernel's rule.

A configuration is a dict of compile-time constants, ``num_warps`` and ``num_stages``. It is looked
up by the kernel's name and the key of its problem, in the table that
``python -m svf_fast.triton.tune`` left for this GPU in the user's cache folder; where the table has
none, the first candidate of the problem is taken, which the kernel's own rule makes.

Nothing is timed while a model trains: a search would wait for the device and break graph capture.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import triton
from triton import knobs
from triton.runtime import driver

Config = dict[str, int]
INTERPRETED: bool = knobs.runtime.interpret  # read when a kernel is defined
SEPARATE: Config = {"fused": 0}  # no kernel: the passes that it joins
# multiprocessors of an A100 and of an H100 or H200; for the interpreter a few
PROCESSORS = {0: 2, 80: 108, 90: 132}
# KiB of shared memory that a block can have, by architecture; others have 99 at least
SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
# products may join sums: named because Triton's default changes between versions
OPTIONS: Config = {"enable_fp_fusion": True}
_MOST_KEPT = 4096
_found: dict[tuple[int, str, str], Config] = {}
_kept: list[dict[tuple, Any]] = [_found]
Result = TypeVar("Result")


class Gpu(NamedTuple):
    """arch: 80 for an A100, 90 for an H100 or H200, 0 for the interpreter.

    name: empty where kernels are interpreted or only compiled.
    """

    arch: int
    name: str
    processors: int


class Problem(Protocol):
    """What a kernel is launched on: as a named tuple of dimensions, dtype and options.

    A kernel's module has a dict ``TUNABLES`` from the kernel's name to a function that returns the
    problems of a network's layers, those worth an entry of their own in the table.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def key(self) -> str:
        """Return what the configuration is looked up by."""

    def candidates(self, arch: int) -> list[Config]:
        """Return the configurations worth timing on an architecture, first that of the rule."""

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        """Make random inputs; return a function that launches the kernel with a configuration."""


def per_gpu(function: Callable[..., Result]) -> Callable[..., Result]:
    """Cache a function of hashable arguments per GPU, until :func:`forget`.

    What a launch needs besides its tensors is made once; asking for it takes a microsecond.
    """
    results: dict[tuple, Result] = {}
    _kept.append(results)

    @functools.wraps(function)
    def ask(*arguments):
        at = _device(), *arguments
        if at not in results:
            if len(results) == _MOST_KEPT:  # maps may be of any size
                results.clear()
            results[at] = function(*arguments)
        return results[at]

    return ask


def find(kernel: str, problem: Problem) -> Config:
    """Return the configuration on the current GPU; where no table has one, that of the rule.

    Call it with the device of the operands as the current one (``torch.cuda.device_of``).
    """
    at = _device(), kernel, problem.key()
    found = _found.get(at)
    if found is None:
        own = gpu()
        path = cache_path(own.name) if own.name else None
        listed = {} if path is None else _table(path).get(kernel, {})
        by_table = listed.get(at[2]) or problem.candidates(own.arch)[0]
        found = _found[at] = {**by_table, **OPTIONS}
    return found


def bucket(positions: int) -> int:
    """Round up to a power of two: problems in the same bucket share a configuration."""
    return max(1024, triton.next_power_of_2(positions))


def gpu() -> Gpu:
    """Describe the current GPU."""
    return _gpu(_device())


def processors(arch: int) -> int:
    """Count the multiprocessors to keep busy: of the current GPU if it is of that architecture."""
    if not INTERPRETED and torch.cuda.is_available() and gpu().arch == arch:
        return gpu().processors
    return PROCESSORS.get(arch, PROCESSORS[90 if arch >= 90 else 80])


def shared_memory(arch: int) -> int:
    """Return the bytes of shared memory that a block can have."""
    return 1024 * SHARED_MEMORY.get(arch, 99)


def has_room(arch: int) -> bool:
    """Tell whether the tiles of an H100 fit, up to 196 KiB; those of an A100 take 96 KiB."""
    return arch >= 90 and shared_memory(arch) >= 200 * 1024


def cache_path(name: str) -> Path:
    """Return where the search writes its table for GPUs of that name and this Triton."""
    root = os.environ.get("SVF_FAST_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "svf_fast"
    return folder / "triton" / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}-{triton.__version__}.json"


def read_table(path: Path) -> dict[str, dict[str, Config]]:
    """Read configurations by kernel and key; return none if there is no file.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        return json.loads(path.read_text())["kernels"]
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table of kernel configurations, got {type(error).__name__}: "
            f"{error}. Delete the file, or write it anew: python -m svf_fast.triton.tune"
        ) from error


def forget() -> None:
    """Read the tables again at the next launch."""
    _table.cache_clear()
    for results in _kept:
        results.clear()


def _device() -> int:
    """Return the number of the current GPU, the key of everything cached."""
    return -1 if INTERPRETED else driver.active.get_current_device()


@functools.cache
def _gpu(device: int) -> Gpu:
    if INTERPRETED:
        return Gpu(0, "", PROCESSORS[0])
    arch = driver.active.get_current_target().arch
    if torch.cuda.is_available() and device < torch.cuda.device_count():
        properties = torch.cuda.get_device_properties(device)
        return Gpu(arch, properties.name, properties.multi_processor_count)
    return Gpu(arch, "", PROCESSORS.get(arch, PROCESSORS[80]))


_table = functools.cache(read_table)
