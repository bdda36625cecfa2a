"""Launches of a training step of ResNet-50's layers 2-4 on a GPU, counted without one.

    python -m benchmarks.gpu.launches
    python -m benchmarks.gpu.launches --peers svf_fast --weights resnet50.safetensors --json

Forward and backward as the race runs them, S written to before: bfloat16 by autocast,
channels_last. Each aten op that writes something is a launch, views and empty tensors none; inside
an op of this project its own ones count, and so do the copies that cuDNN needs of an operand in
another layout. Copies between host and GPU are counted apart. What cuDNN and cuBLAS launch beside
their product is not known and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import svf_fast
from benchmarks.gpu import tables
from benchmarks.gpu.absent_gpu import AbsentGPU, Launch, absent_gpu
from benchmarks.race.levels import LEVELS, Settings, trained
from svf_fast.svd import Factors

LEVEL = LEVELS["backbone"]
PEERS = ("official", "frozen bound", "svf_fast")
PHASES = ("what follows from S", "guards", "forward", "backward", "accumulation")
MODES = ("eager", "in a graph")
Step = dict[str, list[Launch]]  # launches by phase


def network(name: str, settings: Settings, cache: Path | None = None) -> nn.Module:
    """Build layers 2-4 as a peer makes them, on the host.

    With random weights nothing depends on their values, and factors of the same shapes replace
    the decompositions: singular values of 1, so none is guarded.
    """
    (group,) = LEVEL.groups
    plain = LEVEL.network(settings, group)
    if settings.weights != "none":
        return LEVEL.convert(plain, name, cache)
    with undecomposed():
        return LEVEL.convert(plain, name, None)


@contextlib.contextmanager
def undecomposed() -> Iterator[None]:
    """Convert layers with factors of the right shapes instead of decompositions, to save time."""
    with contextlib.ExitStack() as stack:
        for module in ("svf_fast.convert", "svf_fast.layers.factored"):
            owner = sys.modules[module]
            stack.enter_context(mock.patch.object(owner, "decompose", _shapes))
        stack.enter_context(mock.patch.object(sys.modules[module], "dual", lambda *_: None))
        yield


def _shapes(weight: Tensor, groups: int = 1) -> Factors:
    rank = min(weight.shape[0] // groups, weight[0].numel())
    U, V = weight.new_zeros(len(weight), rank), weight.new_zeros(groups * rank, *weight.shape[1:])
    return Factors(U, weight.new_ones(groups * rank), V)


def inputs(gpu: AbsentGPU, settings: Settings) -> tuple[Tensor, Tensor]:
    """Make the input of layer 2 and the gradient of layer 4's output, without values."""
    width, side, dtype = settings.width, settings.map_size, getattr(torch, settings.dtype)
    outer = 2 * side - 1
    x = (settings.batch, 4 * width, outer, outer)
    grad = (settings.batch, 32 * width, side, side)
    last = settings.channels_last
    return gpu.maps(x, torch.float32, last).requires_grad_(), gpu.maps(grad, dtype, last)


def record(plain: nn.Module, settings: Settings, graph: bool = False, arch: int = 90) -> Step:
    """Record the launches of a step after a change of S, eager or as a CUDA graph captures it.

    ``plain`` is of :func:`network`; it stays on the host.
    """
    with absent_gpu(arch) as gpu:
        with undecomposed() if settings.weights == "none" else contextlib.nullcontext():
            moved = gpu.placed(plain)
        x, grad = inputs(gpu, settings)
        for warm_up in (True, True, False):  # guards have settled, tables are read
            for parameter in trained(moved).values():
                parameter.grad = None
                with torch.no_grad():
                    parameter.mul_(1.0)
            x.grad = None
            if graph:
                svf_fast.follow(moved)
            gpu.take()
            gpu.capturing = graph and not warm_up
            with svf_fast.composed(moved):
                with gpu.autocast(settings.dtype):
                    y = moved(x)
                forward = gpu.take()
                torch.autograd.backward(y, grad.to(y.dtype))
                backward = gpu.take()
    step: Step = {phase: [] for phase in PHASES}
    for launch in forward:
        step[_of_forward(launch)].append(launch)
    for launch in backward:
        accumulates = launch.kernel in ("add", "add_") and not launch.callers
        step["accumulation" if accumulates else "backward"].append(launch)
    return step


def _of_forward(launch: Launch) -> str:
    """Return the phase of a launch of the forward pass, by the functions that called it."""
    if any("guard" in caller.rpartition(".")[2] for caller in launch.callers):
        return "guards"
    for caller in launch.callers:
        file, _, function = caller.rpartition(".")
        if file == "ops/block":
            break
        if file.startswith(("layers/", "fusion/")) and function != "forward":
            return "what follows from S"
    return "forward"


def launches(step: Step) -> int:
    return sum(not launch.is_copy_between for found in step.values() for launch in found)


def copies(step: Step) -> int:
    """Count the copies between host and GPU."""
    return sum(launch.is_copy_between for found in step.values() for launch in found)


def counted(step: Step) -> dict[str, dict[str, int]]:
    """Count launches and copies by op and phase, the most frequent op first."""
    total = Counter(launch.kernel for found in step.values() for launch in found)
    by_phase = {phase: Counter(launch.kernel for launch in found) for phase, found in step.items()}
    return {
        kernel: {phase: count[kernel] for phase, count in by_phase.items() if count[kernel]}
        for kernel, _ in total.most_common()
    }


def table(step: Step) -> str:
    """Format the launches by op and phase as a table."""
    head = ["", *PHASES, "all"]
    lines = []
    for kernel, phases in counted(step).items():
        cells = [str(phases.get(phase, "")) for phase in PHASES]
        lines.append([kernel, *cells, str(sum(phases.values()))])
    sums = [str(launches({phase: step[phase]})) for phase in PHASES]
    lines.append(["**launches**", *sums, str(launches(step))])
    return tables.table(head, lines)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=";".join(PEERS))
    parser.add_argument("--size", type=int, default=641)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--weights", default="none", help="a file; none draws them")
    parser.add_argument("--stride-on", default="conv2", choices=("conv1", "conv2"))
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90))
    parser.add_argument("--json", action="store_true", help="counts by peer, mode, op and phase")
    options = parser.parse_args(None if arguments is None else list(arguments))
    settings = Settings.of(options, dtype="bfloat16", channels_last=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in options.peers.split(";"):
            plain = network(name, settings, Path(cache))
            for mode in MODES:
                step = record(plain, settings, mode != MODES[0], options.arch)
                total = {"launches": launches(step), "copies": copies(step)}
                found.setdefault(name, {})[mode] = {**total, "by op and phase": counted(step)}
                if not options.json:
                    between = f"{total['copies']} copies between host and GPU"
                    print(f"{name}, {mode}: {total['launches']} launches, {between}\n")
                    print(table(step), end="\n\n", flush=True)
    if options.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), "peers": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
