"""Which block sizes a kernel is launched with: measured on this GPU, else shipped, else derived.

A configuration is a dict of compile-time constants, ``num_warps`` and ``num_stages``. It is looked
up by the kernel's name and a key that the kernel makes of its problem, in this order:

1. the table that ``python -m svf_fast.triton.tune`` left for this GPU in the user's cache folder,
2. the table shipped for its compute capability, ``configs/sm_80.json`` or ``configs/sm_90.json``,
3. the kernel's own rule.

Nothing is timed while a model trains: a search would wait for the device and break graph capture.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

Config = dict[str, int]
# multiprocessors of an A100 and of an H100 or H200; for the interpreter a few
PROCESSORS = {0: 2, 80: 108, 90: 132}
# products may join sums: named because Triton's default changes between versions
OPTIONS: Config = {"enable_fp_fusion": True}
SHIPPED = Path(__file__).with_name("configs")
_found: dict[tuple[int, str, str, str], Config] = {}


class Tunable(NamedTuple):
    """A kernel as the search sees it.

    key: of a problem (dimensions, dtype, options), what its configuration is looked up by.
    candidates: the configurations worth timing for a problem on an architecture; the rule's first.
    launcher: fresh random inputs for a problem -> a function that launches it with a configuration.
    problems: the problems of a network's layers that are worth an entry of their own.
    """

    name: str
    key: Callable[[Any], str]
    candidates: Callable[[Any, int], list[Config]]
    launcher: Callable[[Any, torch.device], Callable[[Config], Any]]
    problems: Callable[[], list[Any]]


def find(kernel: str, key: str, rule: Callable[[int], Config]) -> Config:
    """The configuration on the current GPU; where no table has it, the rule's for its architecture.

    Call it with the device of the operands as the current one (``torch.cuda.device_of``).
    """
    arch, name = architecture(), _name()
    at = arch, name, kernel, key
    if at not in _found:
        listed = _tables(arch, name).get(kernel, {}).get(key)
        _found[at] = {**(rule(arch) if listed is None else listed), **OPTIONS}
    return _found[at]


def bucket(positions: int) -> int:
    """Problems whose numbers of positions have the same next power of two share a configuration."""
    return max(1024, triton.next_power_of_2(positions))


def architecture() -> int:
    """80 for an A100, 90 for an H100 or H200; 0 for the interpreter."""
    return 0 if knobs.runtime.interpret else driver.active.get_current_target().arch


def cache_path(name: str) -> Path:
    """Where the search leaves its table for GPUs of that name and this Triton."""
    root = os.environ.get("SVF_FAST_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "svf_fast"
    return folder / "triton" / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}-{triton.__version__}.json"


def read_table(path: Path) -> dict[str, dict[str, Config]]:
    """Configurations by kernel and key; empty where there is no file.

    Raises:
        ValueError: a file that is no such table.
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
    _tables.cache_clear()
    _found.clear()


def _name() -> str:
    """Of the current GPU; empty where kernels are interpreted or only compiled."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def _tables(arch: int, name: str) -> dict[str, dict[str, Config]]:
    shipped = read_table(SHIPPED / f"sm_{arch}.json")
    own = read_table(cache_path(name)) if name else {}
    kernels = shipped.keys() | own.keys()
    return {kernel: shipped.get(kernel, {}) | own.get(kernel, {}) for kernel in kernels}
