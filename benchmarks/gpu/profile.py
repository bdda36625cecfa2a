"""Where the time of a step of layers 2-4 goes: kernels by time, and the host's share: profile.json.

    python -m benchmarks.gpu.profile --svd-cache runs/gpu/cache/svd

Of each peer and batch: milliseconds of a step, until the host has queued it, kernels launched, and
every kernel's launches and microseconds a step. S changes before each step. Written after each
peer; earlier ones are kept. On the CPU operators stand for kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.files import RESULTS, earlier_groups, write_results
from benchmarks.race.exactness import renew, step
from benchmarks.race.levels import LEVELS, Inputs, Level, Settings, add_step_options

PEERS = ("svf_fast", "official", "frozen bound")
WARMUP, TIMED = 4, 15  # steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_step_options(parser, PEERS)
    parser.add_argument("--steps", type=int, default=5, help="profiled")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    level = LEVELS["backbone"]
    (group,) = level.groups
    settings = Settings.of(options, channels_last=True)
    path = options.results / "profile.json"
    groups = earlier_groups(path, settings)
    torch.backends.cudnn.benchmark = options.device != "cpu"
    for name in options.peers.split(";"):
        missing = [batch for batch in options.batches if name not in _peers(groups, batch)]
        if not missing:
            continue
        network = level.network(dataclasses.replace(settings, device="cpu"), group)
        network = level.convert(network, name, options.svd_cache).to(options.device)
        for batch in missing:
            at_batch = dataclasses.replace(settings, batch=batch)
            inputs = level.inputs(at_batch, group)
            row = measure(level, network, inputs, name, at_batch, options.steps)
            _rows(groups, batch).append(row)
            title = f"{level.title}, kernel by kernel"
            write_results(path, "profile", title, settings, groups)
            print(f"batch {batch}, {name}: {_line(row)}", flush=True)
    print(path)
    return 0


def measure(
    level: Level, network: nn.Module, inputs: Inputs, name: str, settings: Settings, steps: int
) -> dict[str, Any]:
    """Time a step on the host and on the device, then profile `steps` more."""
    cuda = settings.device != "cpu"

    def one() -> tuple[float, float]:
        """Return the seconds until all is queued, and until it is done."""
        renew(network, inputs)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(level, network, inputs, name, settings)
        queued = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        return queued - start, time.perf_counter() - start

    for _ in range(WARMUP):
        one()
    times = [one() for _ in range(TIMED)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            one()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events() or ():
        if not cuda or event.device_type == DeviceType.CUDA:
            taken = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            kernels[event.name][0] += 1 / steps
            kernels[event.name][1] += taken / steps
    listed = [
        {"name": kernel, "launches": count, "microseconds": taken}
        for kernel, (count, taken) in kernels.items()
    ]
    listed.sort(key=lambda kernel: -kernel["microseconds"])
    return {
        "peer": name,
        "seconds": [done for _, done in times],
        "host_seconds": [queued for queued, _ in times],
        "launches": sum(kernel["launches"] for kernel in listed),
        "kernel_seconds": sum(kernel["microseconds"] for kernel in listed) / 1e6,
        "kernels": listed,
    }


def _rows(groups: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Return the rows of a batch; add an empty group if there is none."""
    for group in groups:
        if group["batch"] == batch:
            return group["rows"]
    groups.append({"name": f"batch {batch}", "batch": batch, "rows": []})
    return groups[-1]["rows"]


def _peers(groups: list[dict[str, Any]], batch: int) -> set[str]:
    return {row["peer"] for group in groups if group["batch"] == batch for row in group["rows"]}


def _line(row: dict[str, Any]) -> str:
    host, done = (1e3 * statistics.median(row[key]) for key in ("host_seconds", "seconds"))
    kernels = 1e3 * row["kernel_seconds"]
    return (
        f"step {done:.2f} ms, host {host:.2f} ms, kernels {kernels:.2f} ms in "
        f"{row['launches']:.0f} launches"
    )


if __name__ == "__main__":
    sys.exit(main())
