"""Bytes and FLOPs of a training step of ResNet-50's layers 2-4, and the time they allow.

    python -m benchmarks.gpu.roofline && python -m benchmarks.render

Counted pass by pass from the shapes, maps in bfloat16 and channels_last: what each kernel has to
read and write once, and what it multiplies. A pass takes the longer of its bytes at the memory's
rate and its FLOPs at the engine's; passes follow one another. Launches and caches are left out.
Plain PyTorch is counted as it runs: batch norm, ReLU, sums, bias and autocast's casts of weights
are passes of their own. Ours is counted as it is planned: see `fused`. What the code as it is will
take: `predictions`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.files import RESULTS, write_results
from benchmarks.race.levels import LEVELS, Settings

MAP = 2  # bytes of an element of a map, and of a weight as a convolution reads it
FACTOR = 4  # of U, S, V and Gram matrices
BIT = 1 / 8  # of an element in a mask
# Datasheets, dense: bytes per second, FLOP per second of each engine.
CEILINGS = {
    "A100 80GB SXM": {
        "memory": 2.0e12,
        "bfloat16": 312e12,
        "tf32": 156e12,
        "tf32x3": 52e12,
        "float32": 19.5e12,
    },
    "H100 SXM": {
        "memory": 3.35e12,
        "bfloat16": 990e12,
        "tf32": 495e12,
        "tf32x3": 165e12,
        "float32": 67e12,
    },
    "H200": {
        "memory": 4.8e12,
        "bfloat16": 990e12,
        "tf32": 495e12,
        "tf32x3": 165e12,
        "float32": 67e12,
    },
}
ATTAINABLE = {"memory": 0.85, "bfloat16": 0.70, "tf32": 0.70, "tf32x3": 0.70, "float32": 0.70}


class Pass(NamedTuple):
    """One kernel: bytes read and written, FLOPs (two a multiplication), and on which engine."""

    name: str
    bytes: float
    flops: float = 0.0
    engine: str = "bfloat16"


class Conv(NamedTuple):
    """A convolution: channels and positions of input (as it lies, as sampled) and of output."""

    inputs: int
    outputs: int
    kernel: int  # elements of it: 1 or 9
    lying: int  # positions of the input as it lies in memory
    source: int  # positions that are read: fewer where a 1×1 convolution has a stride
    target: int

    @property
    def fan_in(self) -> int:
        return self.inputs * self.kernel

    @property
    def rank(self) -> int:
        return min(self.outputs, self.fan_in)

    @property
    def weights(self) -> int:
        return self.outputs * self.fan_in


class Block(NamedTuple):
    """A bottleneck: conv1, conv2, conv3, and that of the shortcut where there is one."""

    name: str
    convs: tuple[Conv, Conv, Conv]
    shortcut: Conv | None

    @property
    def all(self) -> list[Conv]:
        return [*self.convs, *([] if self.shortcut is None else [self.shortcut])]

    @property
    def lying(self) -> int:
        """Return the elements of the block's input."""
        return self.convs[0].inputs * self.convs[0].lying

    @property
    def leaving(self) -> int:
        """Return the elements of its output."""
        return self.convs[2].outputs * self.convs[2].target


def blocks(settings: Settings) -> Iterator[Block]:
    """List the blocks of layers 2-4 at output stride 8, as `fss.models.build_backbone` has them."""
    side = settings.map_size
    small, large = settings.batch * side**2, settings.batch * (2 * side - 1) ** 2
    channels = 4 * settings.width
    for layer, depth in ((2, 4), (3, 6), (4, 3)):
        width = settings.width * 2 ** (layer - 1)
        for index in range(depth):
            lying = large if layer == 2 and index == 0 else small
            middle = small if settings.stride_on == "conv1" else lying
            convs = (
                Conv(channels, width, 1, lying, middle, middle),
                Conv(width, width, 9, middle, middle, small),
                Conv(width, 4 * width, 1, small, small, small),
            )
            shortcut = None if index else Conv(channels, 4 * width, 1, lying, small, small)
            yield Block(f"layer{layer}.{index}", convs, shortcut)
            channels = 4 * width


def product(name: str, conv: Conv, read: float, written: float) -> Pass:
    """Count a convolution or its input gradient: maps read and written, and the weight once."""
    return Pass(name, MAP * (read + written + conv.weights), 2 * conv.weights * conv.target)


def elementwise(name: str, read: float, written: float) -> Pass:
    return Pass(name, MAP * (read + written))


def compose(conv: Conv, engine: str) -> Pass:
    """Count W = U diag(S) Vᵀ, composed again at each change of S."""
    factors = conv.rank * (conv.outputs + conv.fan_in)
    flops = 2 * conv.outputs * conv.rank * conv.fan_in
    return Pass("compose W", FACTOR * factors + MAP * conv.weights, flops, engine)


def gram_gradient(channels: int) -> Pass:
    """Count dS from a Gram matrix [C, C] and as many singular vectors."""
    return Pass("dS", FACTOR * 2 * channels**2, 2 * channels**3, "float32")


def fused(block: Block) -> Iterator[Pass]:
    """Yield ours: strategy `gram`, no guarded directions, W composed in TF32.

    Forward, beside the convolutions: conv1 writes y1 and relu(bn(y1)), conv3 reads y2 and rebuilds
    its input, adds the shortcut and writes bits. Backward: one pass over a gradient and y for both
    Gram matrices on the two sides of a ReLU and the gradient before it; the last ReLU's mask is
    applied where the gradient is read.
    """
    conv1, conv2, conv3 = block.convs
    wide, one = block.leaving, conv2.outputs * conv2.target
    first = conv1.outputs * conv1.target
    bits = wide * BIT / MAP
    for conv in block.all:
        yield compose(conv, "tf32")
    yield product("conv1", conv1, conv1.inputs * conv1.source, 2 * first)
    yield product("conv2", conv2, first, one)
    total, short = wide + bits, block.shortcut
    if short is not None:
        sampled = short.inputs * short.source
        if short.lying != short.source:
            yield elementwise("x as sampled", sampled, sampled)
        yield product("shortcut", short, sampled, wide)
    yield product("conv3", conv3, one + wide, wide + bits)
    if short is not None:
        yield elementwise("mask of the gradient", total, wide)
        total = wide
    yield product("conv3 backward", conv3, total, one)
    grams = 2 * 2 * conv2.outputs**2 * conv2.target
    yield Pass("Gram matrices of conv2, conv3", MAP * 3 * one, grams)
    yield product("conv2 backward", conv2, one, first)
    yield Pass("Gram matrix of conv1", MAP * 3 * first, 2 * conv1.outputs**2 * conv1.target)
    if short is None:
        yield product("conv1 backward", conv1, first + total, block.lying)
    else:
        yield product("shortcut backward", short, wide, sampled)
        yield Pass(
            "Gram matrix of the shortcut", MAP * 2 * sampled, 2 * short.inputs**2 * short.source
        )
        yield product("conv1 backward", conv1, first + sampled, block.lying)
    yield from (gram_gradient(min(conv.inputs, conv.outputs)) for conv in block.all)


def official(block: Block) -> Iterator[Pass]:
    """Yield the paper's layers in PyTorch: conv V, mul S, conv U, batch norm, ReLU."""
    for number, conv in enumerate(block.all, 1):
        inner, outer = conv.rank * conv.target, conv.outputs * conv.target
        V = conv._replace(outputs=conv.rank)
        U = Conv(conv.rank, conv.outputs, 1, conv.target, conv.target, conv.target)
        source = conv.inputs * conv.source
        yield Pass("casts of U and V", (FACTOR + MAP) * (U.weights + V.weights))
        yield product("conv V", V, source, inner)
        yield elementwise("mul S", inner, inner)
        yield product("conv U", U, inner, outer)
        yield elementwise("batch norm", outer, outer)
        if number < 3:
            yield elementwise("ReLU", outer, outer)
            yield elementwise("ReLU backward", 2 * outer, outer)
        yield elementwise("batch norm backward", outer, outer)
        yield product("conv U backward", U, outer, inner)
        yield elementwise("gradient of v", inner, inner)
        yield elementwise("gradient of S, product", 2 * inner, inner)
        yield elementwise("gradient of S, sum", inner, 0)
        yield product("conv V backward", V, inner, conv.inputs * conv.lying)
    yield from _residual(block)


def frozen(block: Block) -> Iterator[Pass]:
    """Yield the frozen network in PyTorch, batch norm folded: only the input's gradient."""
    for number, conv in enumerate(block.all, 1):
        outer = conv.outputs * conv.target
        yield Pass("cast of W", (FACTOR + MAP) * conv.weights)
        yield product("conv", conv, conv.inputs * conv.source, outer)
        yield elementwise("bias", outer, outer)
        if number < 3:
            yield elementwise("ReLU", outer, outer)
            yield elementwise("ReLU backward", 2 * outer, outer)
        yield product("conv backward", conv, outer, conv.inputs * conv.lying)
    yield from _residual(block)


def recomposed(block: Block) -> Iterator[Pass]:
    """Yield W composed by autograd in float32, batch norm folded: `frozen`, and dW."""
    for conv in block.all:
        factors = conv.rank * (conv.outputs + conv.fan_in)
        flops = 2 * conv.outputs * conv.rank * conv.fan_in
        source, outer = conv.inputs * conv.source, conv.outputs * conv.target
        yield Pass("compose W", FACTOR * (factors + conv.weights), flops, "float32")
        yield product("weight gradient", conv, source + outer, 0)
        yield Pass("cast of the weight gradient", (FACTOR + MAP) * conv.weights)
        yield Pass("gradient of U diag(S)", FACTOR * (factors + conv.weights), flops, "float32")
        yield Pass("gradient of S", FACTOR * 2 * conv.outputs * conv.rank)
    yield from frozen(block)


def _residual(block: Block) -> Iterator[Pass]:
    """Yield what PyTorch runs at the end of a block, and where its two branches begin."""
    wide = block.leaving
    yield elementwise("sum with the shortcut", 2 * wide, wide)
    yield elementwise("ReLU", wide, wide)
    yield elementwise("ReLU backward", 2 * wide, wide)
    yield elementwise("sum of the branches' gradients", 2 * block.lying, block.lying)


def frozen_fused(block: Block) -> Iterator[Pass]:
    """Yield the frozen network with bias, ReLU, residual and masks fused into convolutions."""
    conv1, conv2, conv3 = block.convs
    wide, one = block.leaving, conv2.outputs * conv2.target
    first = conv1.outputs * conv1.target
    bits = wide * BIT / MAP
    yield product("conv1", conv1, conv1.inputs * conv1.source, first)
    yield product("conv2", conv2, first, one)
    sampled = 0
    if block.shortcut is not None:
        sampled = block.shortcut.inputs * block.shortcut.source
        yield product("shortcut", block.shortcut, sampled, wide)
        yield product("shortcut backward", block.shortcut, wide + bits, sampled)
    yield product("conv3", conv3, one + wide, wide + bits)
    yield product("conv3 backward", conv3, wide + bits + one, one)
    yield product("conv2 backward", conv2, one + first, first)
    residual = sampled if block.shortcut is not None else wide + bits
    yield product("conv1 backward", conv1, first + residual, block.lying)


ROWS = {
    "official": official,
    "recomposed, BN folded": recomposed,
    "frozen bound": frozen,
    "frozen bound, all fused": frozen_fused,
    "svf_fast": fused,
}


def seconds(passes: list[Pass], ceilings: dict[str, float]) -> float:
    """Return the seconds of passes in sequence, each bound by memory or by its engine."""
    return sum(max(p.bytes / ceilings["memory"], p.flops / ceilings[p.engine]) for p in passes)


def attainable(ceilings: dict[str, float]) -> dict[str, float]:
    return {name: ATTAINABLE[name] * value for name, value in ceilings.items()}


def measured_ceilings(facts: dict[str, Any]) -> dict[str, float]:
    """Return the ceilings measured on a GPU; scale those that were not measured."""
    matrix = facts["matmul_flops_per_second"]
    h200 = CEILINGS["H200"]
    engines = {
        name: matrix * h200[name] / h200["bfloat16"] for name in ("tf32", "tf32x3", "float32")
    }
    return {"memory": facts["copy_bytes_per_second"], "bfloat16": matrix, **engines}


def passes(settings: Settings, name: str) -> list[Pass]:
    return [p for block in blocks(settings) for p in ROWS[name](block)]


def count(settings: Settings) -> list[dict[str, Any]]:
    """Return a row for each way to run the step: totals, and predicted seconds on each GPU."""
    rows = []
    for name in ROWS:
        step = passes(settings, name)
        row: dict[str, Any] = {"peer": name, "passes": len(step)}
        row["bytes"] = sum(p.bytes for p in step)
        row["flops"] = sum(p.flops for p in step)
        row["predicted_seconds"] = {
            gpu: seconds(step, attainable(ceilings)) for gpu, ceilings in CEILINGS.items()
        }
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=641)
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 2, 1])
    parser.add_argument("--stride-on", default="conv2", choices=("conv1", "conv2"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = Settings.of(options, dtype="bfloat16", channels_last=True)
    title = f"Roofline of {LEVELS['backbone'].title}"
    groups = [
        {"name": f"batch {n}", "batch": n, "rows": count(dataclasses.replace(settings, batch=n))}
        for n in options.batches
    ]
    path = options.results / "roofline.json"
    print(write_results(path, "roofline", title, settings, groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
