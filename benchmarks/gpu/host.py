"""Host time of a block and of a step of layers 2-4, where computing is nothing: results/host.json.

    python -m benchmarks.gpu.host && python -m benchmarks.render

One thread, channels_last, 3×3 positions, a few channels: what is left is Python and PyTorch, which
a GPU waits for. Forward and backward, the peers in turns; S written to before each step, or not.
Seconds are CPU time of the thread: others who use the machine disturb it least.

"GPU path": CPU tensors take the way of a GPU. Triton's kernels are compiled and looked up as ever,
but for the launcher in C, which is not called; csrc's CPU kernels stand for its CUDA ones. All in
float32: a CPU computes longer in 16 bits than Python takes. Autocast's casts are left out by that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from triton.runtime import driver

from benchmarks.files import RESULTS, write_results
from benchmarks.gpu.absent_gpu import COMPILED, DEVICE, Driver, Event
from benchmarks.gpu.tables import host_table
from benchmarks.race.exactness import renew, step
from benchmarks.race.levels import LEVELS, Settings, trained
from svf_fast import _library
from svf_fast.ops import convolution, maps, program

PEERS = ("official", "frozen bound", "svf_fast")
# level, group, width of the network: a bottleneck of 32 channels, and 13 blocks of 32 to 256
MEASURED = {"bottleneck": ("block", "layer2", 4), "layers 2-4": ("backbone", "layers 2-4", 8)}
PATHS = ("CPU", "GPU path")


class OnDevice(Tensor):
    """A tensor of the CPU that says it is a GPU's; what is computed of it does not."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


class OfNorm(OnDevice):
    """One that no map is compared with: its device is the GPU too."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


@contextlib.contextmanager
def gpu_path(arch: int = 90) -> Iterator[None]:
    """Send CPU tensors down the path of a GPU of sm_``arch``; Triton's kernels do not run.

    Parameters that :func:`placed` has put on it claim to be there.
    """
    library = torch.library.Library("svf_fast", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {name.removeprefix("svf_fast::") for name in _schemas()}
    compiled = {f"svf_fast::{name}" for name in COMPILED}
    known = {at: call for at, call in _library.gpu_kernels.items() if at not in compiled}
    empty, before = torch.empty, driver._active

    def on_host(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*arguments, **options)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (maps, "on_gpu", lambda x: True),
            (convolution, "_is_product", lambda *_: False),  # what is for CPU tensors alone
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "Event", Event),
            (torch.cuda, "current_stream", lambda device=None: None),
            (torch, "empty", on_host),
            (program, "python_kernel", lambda op, _: known.get(op._schema.name)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that some are overridden
            for name in sorted(names - COMPILED.keys()):
                if has(f"svf_fast::{name}", "CUDA"):
                    library.impl(name, _as_on_gpu(name), "CPU", allow_override=True)
        driver.set_active(Driver(arch))  # type: ignore[arg-type]
        stack.callback(setattr, driver, "_active", before)
        stack.callback(library._destroy)
        yield


def _schemas() -> list[str]:
    return [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("svf_fast::")]


def _as_on_gpu(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.svf_fast, name).default
    return lambda *arguments: op._op_dk(torch._C.DispatchKey.CUDA, *arguments)


def placed(network: nn.Module) -> nn.Module:
    """Return the network with parameters that claim to be on a GPU."""
    for module in network.modules():
        kind = OfNorm if isinstance(module, nn.BatchNorm2d) else OnDevice
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    tensor = value.detach().as_subclass(kind)
                    values[name] = tensor.requires_grad_(value.requires_grad)  # type: ignore[assignment]
    return network


def measure(what: str, path: str, rounds: int) -> list[dict[str, Any]]:
    """Time the peers in turns, with S changed and not; return a row for each."""
    kind, group, width = MEASURED[what]
    level = LEVELS[kind]
    on_gpu = path == PATHS[1]
    settings = Settings(size=17, batch=1, width=width, channels_last=True)
    networks = {}
    for name in PEERS:
        network = level.convert(level.network(settings, group), name, None)
        networks[name] = placed(network) if on_gpu else network
    inputs = level.inputs(settings, group)
    rows = []
    with gpu_path() if on_gpu else contextlib.nullcontext():
        for changed in (True, False):
            taken = _in_turns(level, networks, inputs, settings, changed, rounds)
            rows += [
                {"peer": name, "changed": changed, "seconds": seconds}
                for name, seconds in taken.items()
            ]
    return rows


def _in_turns(level, networks, inputs, settings, changed, rounds) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    gc.collect()
    gc.disable()
    try:
        for number in range(-max(3, rounds // 20), rounds):
            for name in networks if number % 2 else reversed(networks):
                network = networks[name]
                if changed:
                    renew(network, inputs)
                else:
                    for leaf in (*trained(network).values(), *inputs.arguments):
                        leaf.grad = None
                started = time.thread_time()
                step(level, network, inputs, name, settings)
                if number >= 0:
                    seconds[name].append(time.thread_time() - started)
    finally:
        gc.enable()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=400, help="of a bottleneck; a tenth of a step"
    )
    parser.add_argument("--what", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the file instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups = []
    for path in options.paths:
        for what in options.what:
            rounds = options.rounds if what == "bottleneck" else max(2, options.rounds // 10)
            rows = measure(what, path, rounds)
            rows = [{**row, **summary(row["seconds"])} for row in rows]
            groups.append({"name": f"{what}, {path}", "what": what, "path": path, "rows": rows})
    settings = dataclasses.asdict(Settings(size=17, batch=1, channels_last=True))
    title = "Host time of forward and backward"
    target = options.results / "host.json"
    write_results(target, "host", title, settings, groups)
    result = json.loads(target.read_text())
    print(json.dumps(result, indent=1) if options.json else host_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
