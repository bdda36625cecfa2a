r"""What a step keeps, at the sizes papers train at: results/memory.json and memory-models.json.

    python -m benchmarks.race.memory && python -m benchmarks.race.memory --models
    python -m benchmarks.race.memory --models --peaks --name memory-methods
    python -m benchmarks.race.memory --only backbone step --shots 1 5 10 20 --sizes 641 \
      --peers "svf_fast;svf_fast, 8 bits" --name memory-int8
    python -m benchmarks.render

ResNet-50's layers 2-4 for one image, whose input needs no gradient, for layer 1 is frozen; the
baseline model for one 5-shot episode; the prior mask of one shot. With --models instead a 5-shot
episode of each model in each regime. Peers that keep gigabytes are counted on shapes, with tensors
that have no values; svf_fast and the prior mask, unless all models are counted, on a real forward
pass. Peaks are measured, in a process of their own each, of those peers only that fit into
the memory that is free.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import svf_fast
from benchmarks.files import RESULTS, write_results
from benchmarks.race.levels import LEVELS, Inputs, Level, Settings, autocast
from benchmarks.race.peak import measure_peaks
from fss.training.measure import SavedBytes

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="none", help="of the backbone, see levels.Settings")
    parser.add_argument("--stride-on", default="conv2")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[641, 473], help="first: the step")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shots", type=int, nargs="+", default=[5], help="of the step")
    levels = "backbone", "step", "prior"
    parser.add_argument("--only", nargs="+", choices=levels, default=levels, help="of the levels")
    parser.add_argument("--peers", help="names separated by semicolons (default: all)")
    parser.add_argument("--peaks", nargs="*", default=["float32"], help="dtypes to measure them in")
    parser.add_argument("--largest", type=float, default=float("inf"), help="peak to measure, GiB")
    parser.add_argument("--models", action="store_true", help="a step of each model instead")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the file of results, without .json")
    options = parser.parse_args()
    base = Settings.of(options, size=options.sizes[0], batch=1)
    chosen = options.peers.split(";") if options.peers else None
    name = options.name or ("memory-models" if options.models else "memory")
    with tempfile.TemporaryDirectory() as cache:  # of the decomposed weights, which groups share
        groups = [
            figure(
                level,
                group,
                settings,
                options.largest if settings.dtype in options.peaks else 0.0,
                Path(cache),
                chosen,
            )
            for level, group, settings in (_models if options.models else _peers)(base, options)
        ]
    path = options.results / f"{name}.json"
    print(write_results(path, "memory", "Saved bytes", base, groups))
    return 0


def _peers(base: Settings, options: argparse.Namespace) -> Iterator[tuple[str, str, Settings]]:
    """Yield level, group and settings of each column of memory.json."""
    wanted = options.only
    for dtype in options.dtypes:
        for size in options.sizes if "backbone" in wanted else ():
            yield "backbone", "layers 2-4", dataclasses.replace(base, size=size, dtype=dtype)
        for shots in options.shots if "step" in wanted else ():
            yield "step", "step", dataclasses.replace(base, dtype=dtype, shots=shots)
    if "prior" in wanted:
        yield "prior", "cosine_max", base


def _models(base: Settings, options: argparse.Namespace) -> Iterator[tuple[str, str, Settings]]:
    for dtype in options.dtypes:
        for group in LEVELS["models"].groups:
            yield "models", group, dataclasses.replace(base, dtype=dtype)


def figure(
    level_name: str,
    group: str,
    settings: Settings,
    largest: float,
    cache: Path | None = None,
    peers: Collection[str] | None = None,
) -> dict[str, Any]:
    """Count the peers of a group for one size and dtype; measure peaks up to `largest` GiB.

    `cache` is a folder of decompositions; `peers` are all if not given.
    """
    level = LEVELS[level_name]
    plain = level.network(settings, group)
    rows = []
    for name, peer in level.peers.items():
        if peer.compiled or (peers is not None and name not in peers):
            continue
        network = level.convert(copy.deepcopy(plain), name, cache)
        shapes = level_name == "models" or not (by_values(name) or level_name == "prior")
        count = saved_on_shapes if shapes else saved_measured
        inputs = level.inputs(settings, group)
        if level_name == "backbone" and peer.trains != "nothing":
            inputs = Inputs(tuple(argument.detach() for argument in inputs.arguments))
        row = {"peer": name, "saved_bytes": count(level, network, inputs, name, settings)}
        row["counted_on"] = "shapes" if shapes else "a forward pass"
        del network, inputs
        if largest and level_name in ("step", "models"):
            row |= _peak(level, group, name, settings, row["saved_bytes"], largest)
        print(f"{level_name} {group} {settings.size} px {settings.dtype}: {row}", flush=True)
        rows.append(row)
    what = {"models": group}.get(level_name, level.title)
    parts = [f"{settings.shots}-shot"] if level_name in ("step", "models") else []
    name = ", ".join([what, f"{settings.size} px", *parts, settings.dtype])
    return {"name": name, "level": level_name, "rows": rows}


def by_values(name: str) -> bool:
    """Tell whether what a peer keeps depends on values: guarded directions, or codes of maps."""
    return name.startswith("svf_fast") or name == "official, 8 bits"


def saved_measured(
    level: Level, network: nn.Module, inputs: Inputs, name: str, settings: Settings
) -> int:
    """Count the bytes that a forward pass keeps."""
    return _saved(SavedBytes(level.owner(network, inputs)), level, network, inputs, name, settings)


def saved_on_shapes(
    level: Level, network: nn.Module, inputs: Inputs, name: str, settings: Settings
) -> int:
    """Count the same without arithmetic and memory; `network` is of no use afterwards."""
    for module in network.modules():
        if isinstance(module, svf_fast.SVFConv2d):
            module.strategy_in_use  # noqa: B018  plans from the present values, which fakes have not
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    tensors[key] = None if tensor is None else mode.from_tensor(tensor)
        arguments = tuple(mode.from_tensor(argument) for argument in inputs.arguments)
        return _saved(SavedShapes(network), level, network, Inputs(arguments), name, settings)


def _saved(counter: SavedBytes, level, network, inputs, name, settings) -> int:
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.count, lambda tensor: tensor)
    with hooks, autocast(settings):
        y = level.forward(network, inputs, name)  # alive until it is counted
    del y
    return counter.total


class SavedShapes(SavedBytes):
    """Counts tensors that have no memory: a storage is known by its own address, not its data's."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._storages = {}

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage.nbytes()
        return tensor


def _peak(
    level: Level, group: str, name: str, settings: Settings, saved: int, largest: float
) -> dict[str, Any]:
    needed = (1.2 * saved + GIB) / GIB
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    free = min(largest, 1024 * int(found.group(1)) / GIB if found else 0)
    if needed > free:
        return {"peak_reason": f"needs {needed:.0f} GiB, {free:.0f} may be used"}
    measured = measure_peaks(level, name, settings, group)
    return measured.get(group, measured)


if __name__ == "__main__":
    sys.exit(main())
