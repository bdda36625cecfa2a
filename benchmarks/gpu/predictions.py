"""What a step of ResNet-50's layers 2-4 will take on a GPU, from the launches of the code.

    python -m benchmarks.gpu.predictions --weights resnet50.safetensors
    python -m benchmarks.render

Device time: the launches that `launches` records, each at what `costs` says of it: with partial
matrices, with what its block sizes read again from L2, and with the gaps between kernels; eager,
and as captured in a CUDA graph. Guarded directions depend on the weights, so those of the race are
given. Host time is what `host` measured. No GPU takes part; what kinds of kernels attain was
measured on one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.files import RESULTS, write_results
from benchmarks.gpu.absent_gpu import Launch
from benchmarks.gpu.costs import ARCH, MEASURED, cost, seconds, unknown
from benchmarks.gpu.launches import MODES, PEERS, Step, launches, network, record
from benchmarks.gpu.roofline import passes
from benchmarks.gpu.roofline import seconds as roofline_seconds
from benchmarks.race.levels import LEVELS, Settings

PREDICTED = ("official", "recomposed, BN folded", *PEERS[1:])
REFERENCE = "H100 SXM"  # whose launches are reported: block sizes differ between architectures


def predict(plain: nn.Module, settings: Settings) -> dict[str, dict[str, Any]]:
    """Predict, by mode, launches, bytes, FLOPs and device seconds on each GPU."""
    first = record(plain, settings)
    tiled = any("names" in launch.options for found in first.values() for launch in found)

    @functools.cache
    def step(graph: bool, arch: int) -> Step:
        # without Triton kernels nothing depends on the GPU or on a graph
        return record(plain, settings, graph, arch) if tiled else first

    modes: dict[str, dict[str, Any]] = {}
    for mode, graph in zip(MODES, (False, True), strict=True):
        own = _all(step(graph, ARCH[REFERENCE]))
        each = [cost(launch) for launch in own]
        modes[mode] = {
            "launches": launches(step(graph, ARCH[REFERENCE])),
            "bytes": sum(c.bytes for c in each),
            "l2_bytes": sum(c.l2 for c in each),
            "flops": sum(c.flops for c in each),
            "unknown": sorted(unknown(own)),
            "device_seconds": {
                gpu: seconds(_all(step(graph, ARCH[gpu])), rates) for gpu, rates in MEASURED.items()
            },
        }
    return modes


def _all(step: Step) -> list[Launch]:
    return [launch for found in step.values() for launch in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=641)
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 2, 1])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--weights", default="none", help="a file; none: no direction is guarded")
    parser.add_argument("--stride-on", default="conv2", choices=("conv1", "conv2"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = Settings.of(options, dtype="bfloat16", channels_last=True)
    groups: list[dict[str, Any]] = [
        {"name": f"batch {batch}", "batch": batch, "rows": []} for batch in options.batches
    ]
    with tempfile.TemporaryDirectory() as cache:
        for name in PREDICTED:
            plain = network(name, settings, Path(cache))
            for group in groups:
                at_batch = dataclasses.replace(settings, batch=group["batch"])
                roofline = passes(at_batch, name)
                least = {gpu: roofline_seconds(roofline, rates) for gpu, rates in MEASURED.items()}
                row = {"peer": name, "roofline_seconds": least, **predict(plain, at_batch)}
                group["rows"].append(row)
    title = f"{LEVELS['backbone'].title}, predicted from the launches of the code"
    path = options.results / "predictions.json"
    print(write_results(path, "predictions", title, settings, groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
