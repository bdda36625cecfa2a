"""The machine and the ceilings measured on it: results/facts.json.

    python -m benchmarks.gpu.facts

Ceilings: a device-to-device copy, counting bytes read and bytes written, and a product of two large
bfloat16 matrices of random values (zeros would run faster).
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import RESULTS, write_results
from fss.training.measure import StepTimer

COPIED = {"cuda": 4 * 2**30, "cpu": 2**24}  # bytes of the source
SIDE = {"cuda": 8192, "cpu": 256}  # of the matrices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = machine(device) | {
        "copy_bytes_per_second": copy_rate(device),
        "matmul_flops_per_second": matrix_rate(device),
    }
    for name, value in facts.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    groups = [{"name": "facts", "rows": [], "facts": facts}]
    path = options.results / "facts.json"
    print(write_results(path, "facts", "Machine", {"device": options.device}, groups))
    return 0


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: GPU, driver, versions."""
    facts: dict[str, Any] = {"torch": torch.__version__, "triton": _triton(), "nvcc": nvcc()}
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output(query).strip().splitlines()
    return facts | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def copy_rate(device: torch.device) -> float:
    """Measure the bytes read and written per second by a copy within the device."""
    source = torch.randint(0, 256, (COPIED[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = statistics.median(times(lambda: target.copy_(source), device))
    return 2 * source.numel() / taken


def matrix_rate(device: torch.device) -> float:
    """Measure the FLOP per second of a bfloat16 matrix product."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    taken = statistics.median(times(lambda: a @ b, device))
    return 2 * side**3 / taken


def times(
    run: Callable[[], Any], device: torch.device, repeats: int = 20, warmup: int = 3
) -> list[float]:
    """Time each run; on a GPU by events, without waiting until the last is queued."""
    for _ in range(warmup):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    timer = StepTimer(device)
    for _ in range(repeats):
        timer.start()
        run()
        timer.stop()
    return timer.take()


def nvcc() -> str:
    """Return the release of nvcc on the path, or in the usual place."""
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release (\S+),", _output([found, "--version"]))
    return release[1] if release else "not found"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
