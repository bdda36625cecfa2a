"""A step replayed from a CUDA graph, which leaves the time of launches out: results/replay.json.

    python -m benchmarks.gpu.replay

ResNet-50's layers 2-4, forward and backward, captured once and replayed. S is written to between
capture and replay, and the gradients of a replay must be those of an eager step with that S: what
is composed of S has to be made anew within the graph. One that fails there has no speed. Written
after each batch; earlier ones are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import svf_fast
from benchmarks.files import RESULTS, earlier_groups, write_results
from benchmarks.race.exactness import gradients, relative_error, renew, step
from benchmarks.race.levels import LEVELS, Inputs, Level, Settings, add_step_options, trained
from fss.training.measure import StepTimer

PEERS = ("official", "frozen bound", "svf_fast")
ALLOWED = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # cuDNN may choose otherwise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_step_options(parser, PEERS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    level = LEVELS["backbone"]
    settings = Settings.of(options, channels_last=True)
    path = options.results / "replay.json"
    groups = earlier_groups(path, settings)
    done = {group["batch"] for group in groups}
    torch.backends.cudnn.benchmark = options.device != "cpu"
    for batch in [batch for batch in options.batches if batch not in done]:
        at_batch = dataclasses.replace(settings, batch=batch)
        names = options.peers.split(";")
        rows = race(level, names, at_batch, options.rounds, options.svd_cache)
        groups.append({"name": f"batch {batch}", "batch": batch, "rows": rows})
        print(rows, flush=True)
        title = f"{level.title}, replayed from a CUDA graph"
        write_results(path, "replay", title, settings, groups)  # what there is
    print(path)
    return 0


def race(
    level: Level, names: list[str], settings: Settings, rounds: int, cache: Path | None
) -> list[dict[str, Any]]:
    """Capture each peer, then replay them in turns."""
    (group,) = level.groups
    rows: dict[str, dict[str, Any]] = {name: {"peer": name} for name in names}
    inputs = level.inputs(settings, group)
    runs: dict[str, Callable[[], None]] = {}
    for name in names:
        network = level.network(dataclasses.replace(settings, device="cpu"), group)
        network = level.convert(network, name, cache).to(settings.device)
        try:
            runs[name] = captured(level, network, inputs, name, settings)
            error = replay_error(level, runs[name], network, inputs, name, settings)
        except Exception as error_:  # the other peers go on
            runs.pop(name, None)
            reason = str(error_).strip().partition("\n")[0][:200]
            rows[name]["reason"] = f"{type(error_).__name__}: {reason}"
            continue
        rows[name] |= {"error": error, "exact": error <= ALLOWED[settings.dtype]}
        if not rows[name]["exact"]:
            del runs[name]
    timer = StepTimer(torch.device(settings.device))
    gc.collect()
    for number in range(-2, rounds):
        for name in runs if number % 2 else reversed(runs):
            if settings.device != "cpu":
                torch.cuda.synchronize()
            timer.start()
            runs[name]()
            timer.stop()
            taken = timer.take()
            if number >= 0:
                rows[name].setdefault("seconds", []).extend(taken)
    return list(rows.values())


def captured(
    level: Level, network: nn.Module, inputs: Inputs, name: str, settings: Settings
) -> Callable[[], None]:
    """Capture forward and backward; return a function that replays them into ``.grad``."""

    def eager() -> None:
        renew(network, inputs)
        step(level, network, inputs, name, settings)

    if settings.device == "cpu":
        eager()
        return eager
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    renew(network, inputs)  # the gradients get memory of the graph, and W is composed in it
    svf_fast.follow(network)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), svf_fast.composed(network):
        step(level, network, inputs, name, settings)
    return graph.replay


def replay_error(
    level: Level,
    replay: Callable[[], None],
    network: nn.Module,
    inputs: Inputs,
    name: str,
    settings: Settings,
) -> float:
    """Return the error of a replay's gradients after a change of S, against an eager step."""
    with torch.no_grad():
        for parameter in trained(network).values():
            parameter.mul_(1.02)
    replay()
    leaves = [*trained(network).values(), *inputs.arguments]
    grads = [leaf.grad for leaf in leaves]
    found = {key: p.grad.double() for key, p in trained(network).items() if p.grad is not None}
    found |= {f"argument {n}": a.grad.double() for n, a in enumerate(inputs.arguments)}
    truth = gradients(level, network, inputs, name, settings)
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad  # a replay writes where the captured ones are
    return relative_error(found, truth)


if __name__ == "__main__":
    sys.exit(main())
