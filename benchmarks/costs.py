"""What a recorded launch costs a GPU: bytes of DRAM and of L2, FLOPs, and the time they take.

Everything is read off the launch: its operands, and for a Triton kernel its numbers and block
sizes. A kernel whose products are not known here counts by its operands alone, and `unknown` says
so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from absent_gpu import Launch, Operand

# Bytes per second of DRAM and of L2, FLOP per second of each engine. H100 SXM: copies and cuBLAS as
# measured on such a card; the others have their datasheet's part of that. L2: what the kernels'
# block sizes were chosen by.
_HOPPER = {"l2": 5.5e12, "bfloat16": 798e12, "tf32": 399e12, "tf32x3": 133e12, "float32": 54e12}
MEASURED = {
    "A100 80GB SXM": {
        "memory": 1.8e12,
        "l2": 4.5e12,
        "bfloat16": 251e12,
        "tf32": 126e12,
        "tf32x3": 42e12,
        "float32": 15.7e12,
    },
    "H100 SXM": {"memory": 3.0e12, **_HOPPER},
    "H200": {"memory": 4.3e12, **_HOPPER},
}
ARCH = {"H100 SXM": 90, "H200": 90, "A100 80GB SXM": 80}
EFFICIENCY = 0.7  # of the rate of cuBLAS, for every product alike; assumed
GAP = 1.75e-6  # seconds from one kernel to the next, in a graph or queued; assumed
UNREAD = {"copy_": 0, "native_batch_norm_backward": 1}  # operands that the kernel does not read
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm_", "matmul")


class Cost(NamedTuple):
    """Bytes of DRAM and of L2, FLOPs (two a multiplication) and their engine."""

    bytes: float
    l2: float = 0.0
    flops: float = 0.0
    engine: str = "bfloat16"

    def seconds(self, rates: dict[str, float]) -> float:
        """The longest of what memory, L2 and the engine take."""
        products = self.flops / (EFFICIENCY * rates[self.engine])
        return max(self.bytes / rates["memory"], self.l2 / rates["l2"], products)


def cost(launch: Launch) -> Cost:
    """Of a launch; a copy between host and GPU costs none of its time."""
    if launch.is_copy_between:
        return Cost(0)
    if launch.kernel in KERNELS:
        operands = dict(zip(launch.options["names"], launch.inputs, strict=True))
        return KERNELS[launch.kernel](launch, operands)
    if launch.kernel in ("convolution", "input gradient", "weight gradient"):
        return _convolution(launch)
    if launch.kernel in PRODUCTS and launch.outputs:
        *_, left, right = launch.inputs
        flops = 2 * math.prod(left.shape) * right.shape[-1]
        return Cost(launch.bytes, 0.0, flops, _engine(left.dtype, "float32"))
    spared = UNREAD.get(launch.kernel)
    unread = launch.inputs[spared].bytes if spared is not None and launch.inputs else 0
    return Cost(launch.bytes - unread)


def seconds(found: Iterable[Launch], rates: dict[str, float]) -> float:
    """Of kernels that follow one another, gaps included."""
    return sum(cost(x).seconds(rates) + GAP for x in found if not x.is_copy_between)


def unknown(found: Iterable[Launch]) -> set[str]:
    """Triton kernels that count by their operands alone."""
    return {x.kernel for x in found if "names" in x.options and x.kernel not in KERNELS}


def _engine(dtype: torch.dtype, for_float32: str) -> str:
    return "bfloat16" if dtype.itemsize == 2 else for_float32


def _convolution(launch: Launch) -> Cost:
    """cuDNN's: in float32 products are TF32, as torch's default has it."""
    weight = launch.outputs[0] if launch.kernel == "weight gradient" else launch.inputs[1]
    target = launch.outputs[0] if launch.kernel == "convolution" else launch.inputs[0]
    flops = 2 * math.prod(target.shape) * math.prod(weight.shape[1:])
    return Cost(launch.bytes, 0.0, flops, _engine(weight.dtype, "tf32"))


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _pointwise(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """[positions, K] × [K, D]: a tile reads its rows of x and its part of the weight from L2."""
    numbers = launch.options
    (D, K), positions = operands["weight"].shape, numbers["positions"]
    across, down = _tiles(D, numbers["BLOCK_D"]), _tiles(positions, numbers["BLOCK_P"])
    read = [operands[name].bytes for name in ("x", "in_mask") if name in operands]
    again = (across - 1) * sum(read) + (down - 1) * operands["weight"].bytes
    flops = 2 * positions * K * D
    return Cost(launch.bytes, launch.bytes + again, flops, _engine(operands["x"].dtype, "tf32"))


def _gram(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """Tiles [BLOCK_A, BLOCK_B] of a matrix read BLOCK_A + BLOCK_B channels of every position."""
    numbers = launch.options
    a, b, width_a, width_b = operands["a"], operands["b"], numbers["width_a"], numbers["width_b"]
    again = (_tiles(width_b, numbers["BLOCK_B"]) - 1) * a.bytes
    again += (_tiles(width_a, numbers["BLOCK_A"]) - 1) * b.bytes
    flops = 2 * math.prod(a.shape) * width_b
    return Cost(launch.bytes, launch.bytes + again, flops, _engine(a.dtype, "tf32"))


def _activation_grams(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """A tile reads its rows of y and, for ``before``, of grad, and its columns of the other map."""
    numbers = launch.options
    maps, channels, sides = operands["y"].bytes, numbers["channels"], numbers["sides"]
    across = _tiles(channels, numbers["BLOCK_B"])
    down = _tiles(channels, numbers["BLOCK_A"])
    before = sides == 2 or numbers["side"] == 0
    rows = (2 * before + (sides == 2 or not before)) * across * maps
    columns = 0 if numbers["ONE_TILE"] else sides * down * maps
    apart = launch.bytes - 2 * maps  # g, partial matrices
    flops = 2 * math.prod(operands["y"].shape) * channels * sides
    engine = _engine(operands["y"].dtype, "tf32")
    return Cost(launch.bytes, apart + rows + columns, flops, engine)


def _compose(launch: Launch, operands: dict[str, Operand]) -> Cost:
    numbers, U, V = launch.options, operands["U"], operands["V"]
    rows, columns = numbers["rows"], numbers["columns"]
    again = (_tiles(columns, numbers["BLOCK_N"]) - 1) * U.bytes
    again += (_tiles(rows, numbers["BLOCK_M"]) - 1) * V.bytes
    flops = 2 * math.prod(U.shape) * columns
    return Cost(launch.bytes, launch.bytes + again, flops, "tf32")


def _compose_all(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """The weights of a network: their factors are known to a table alone, and to the op."""
    numbers, (every_U, _, every_V, groups) = launch.options, launch.within[:4]
    moved = launch.bytes + sum(x.bytes for x in (*every_U, *every_V))
    again, flops = 0, 0
    for U, V, count in zip(every_U, every_V, groups, strict=True):
        columns = math.prod(V.shape[1:])
        again += (_tiles(columns, numbers["BLOCK_N"]) - 1) * U.bytes
        again += (_tiles(U.shape[0] // count, numbers["BLOCK_M"]) - 1) * V.bytes
        flops += 2 * math.prod(U.shape) * columns
    return Cost(moved, moved + again, flops, "tf32")


def _read_off(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """A block of directions reads its part of the matrices, and all of ``right``, from L2."""
    numbers, partial = launch.options, operands["partial"]
    sides = [(numbers["rank"], numbers["groups"], operands["right"])]
    if numbers["rank_after"]:
        sides.append((numbers["rank_after"], 1, operands["right_after"]))
    twice = (
        0 if numbers["rank_after"] else sum(operands[f"{x}_after"].bytes for x in ("left", "right"))
    )
    matrix = partial.bytes // numbers["matrices"]
    again = -twice
    for rank, groups, right in sides:
        blocks = _tiles(rank, numbers["BLOCK_R"])
        again += (blocks - 1) * groups * matrix + (numbers["PARTS"] - 1) * right.bytes
    flops = sum(2 * n * groups * numbers["rows"] * numbers["columns"] for n, groups, _ in sides)
    return Cost(launch.bytes - twice, launch.bytes + again, flops, "tf32x3")


def _operands(launch: Launch, operands: dict[str, Operand]) -> Cost:
    return Cost(launch.bytes)


KERNELS: dict[str, Callable[[Launch, dict[str, Operand]], Cost]] = {
    "pointwise_kernel": _pointwise,
    "gram_partial_kernel": _gram,
    "activation_grams_partial_kernel": _activation_grams,
    "compose_kernel": _compose,
    "compose_all_kernel": _compose_all,
    "read_off_kernel": _read_off,
    "guards_hold_kernel": _operands,
}
