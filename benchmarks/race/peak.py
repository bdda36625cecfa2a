"""Most memory that one step of one peer holds, measured in this process, which does nothing else.

Reads the task as JSON from standard input and writes bytes of each group, or of the one that the
task names, as JSON to standard output: ``peak_bytes``, of the process's resident set above what it
was before the step, and ``resident_bytes``, the tensors that live between steps: parameters,
buffers and whatever else the converted network keeps. A first step comes before: what happens once
is not counted. For the CPU: on a GPU the allocator of torch counts, in the process of the race.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.race.exactness import renew, step
from benchmarks.race.levels import LEVELS, Level, Settings
from benchmarks.race.peers import compiler_missing


@functools.cache
def measure_peaks(
    level: Level, name: str, settings: Settings, group: str | None = None
) -> dict[str, Any]:
    """Run `measure` in a process of its own; return what it finds, or why it failed.

    Of each group, or only of the one that is named.
    """
    task = {"level": level.name, "peer": name, "settings": dataclasses.asdict(settings)}
    task["group"] = group
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(task | {"threads": torch.get_num_threads()}),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or f"ended with {done.returncode}"
        return {"peak_reason": last[:200]}
    return json.loads(done.stdout)


def measure(level: Level, group: str, name: str, settings: Settings) -> dict[str, int]:
    """Measure the bytes of one step of peer `name`."""
    if level.peers[name].compiled:
        compiler_missing()  # sets the limits of torch.compile
    with tempfile.TemporaryDirectory() as cache:
        network = level.convert(level.network(settings, group), name, Path(cache))
    inputs = level.inputs(settings, group)
    renew(network, inputs)
    step(level, network, inputs, name, settings)
    renew(network, inputs)
    given = [*inputs.arguments, *([] if inputs.grad_y is None else [inputs.grad_y])]
    resident = _tensors() - sum(tensor.untyped_storage().nbytes() for tensor in given)
    before = _held()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held
    step(level, network, inputs, name, settings)
    return {"peak_bytes": _status("VmHWM") - before, "resident_bytes": resident}


def _tensors() -> int:
    """Return the bytes of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _held() -> int:
    """Return the bytes held now, after free memory has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"the system does not tell the {field} of a process")
    return 1024 * int(found.group(1))


def main() -> None:
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    settings = Settings(**task["settings"])
    level = LEVELS[task["level"]]
    groups = level.groups if task["group"] is None else (task["group"],)
    found = {group: measure(level, group, task["peer"], settings) for group in groups}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
