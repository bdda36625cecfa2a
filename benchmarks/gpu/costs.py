"""What a recorded launch costs a GPU: bytes of DRAM and of L2, FLOPs, and the time they take.

Everything is read off the launch: its operands, and for a Triton kernel its numbers and block
sizes. A kernel whose products are not known here counts by its operands alone, and `unknown` says
so. What kinds of kernels attain was measured on an H200, see `KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from benchmarks.gpu.absent_gpu import LAYOUT_COPY, Launch, Operand
from svf_fast.triton.tuning import PROCESSORS

ARCH = {"H100 SXM": 90, "H200": 90, "A100 80GB SXM": 80}
# Bytes per second of DRAM and of L2, FLOP per second of each engine, multiprocessors, and how fast
# these issue beside an H200's. H100 SXM and H200: copies and cuBLAS as measured on such cards, the
# A100 has its datasheet's part of that. L2: what the kernels' block sizes were chosen by.
_HOPPER = {"l2": 5.5e12, "bfloat16": 798e12, "tf32": 399e12, "tf32x3": 133e12, "float32": 54e12}
_HOPPER |= {"processors": PROCESSORS[90], "issue": 1.0}
MEASURED = {
    "A100 80GB SXM": {
        "memory": 1.8e12,
        "l2": 4.5e12,
        "bfloat16": 251e12,
        "tf32": 126e12,
        "tf32x3": 42e12,
        "float32": 15.7e12,
        "processors": PROCESSORS[80],
        "issue": 0.6,  # 108 multiprocessors at 1.41 GHz to 132 at 1.98
    },
    "H100 SXM": {"memory": 3.0e12, **_HOPPER},
    "H200": {"memory": 4.3e12, **_HOPPER},
}
GAP = 1.75e-6  # seconds from one kernel to the next, in a graph or queued; assumed


class Kind(NamedTuple):
    """Kernels alike: seconds each takes beside its bytes and products, and what it attains.

    memory: bytes per second of DRAM at most, for kernels that are slower than a copy. l2, products:
    parts of the rates of L2 and of the engine.
    """

    start: float
    memory: float = math.inf
    l2: float = 1.0
    products: float = 1.0


# Fitted to kernel times of a step of layers 2-4 on an H200, bfloat16, channels_last, 6 and 1 images
# (profile.json): the part that grows with the images, and the one that does not.
KINDS = {
    "elementwise": Kind(1e-6),
    # PyTorch's for operands of several shapes or strides, not vectorised: bias, scaling by S
    "broadcast": Kind(1e-6, memory=1.55e12),
    "batch norm": Kind(1e-6, memory=2.6e12),
    # from one memory format to another, as batch norm's backward writes in evaluation mode
    "transposing": Kind(1e-6, memory=0.62e12),
    "sum over positions": Kind(6e-6, memory=0.55e12),
    "sum": Kind(4.5e-6),  # of a few rows
    "library": Kind(5e-6),  # cuDNN and cuBLAS reach the rate of one large product
    "channel_dot": Kind(5e-6),  # its two kernels, of a few channels
    "pointwise_kernel": Kind(3.8e-6, l2=0.92, products=0.7),
    "activation_grams_partial_kernel": Kind(3.8e-6, l2=0.67, products=0.7),
    "gram_partial_kernel": Kind(3.8e-6, l2=1.13, products=0.7),
    "compose_all_kernel": Kind(3.8e-6, l2=1.2, products=0.7),
    # as it was then 0.42 of L2; it reads eight splits at a time since, what that gains is assumed
    "read_off_kernel": Kind(3.8e-6, l2=0.5, products=0.5),
}
UNREAD = {"copy_": 0, "native_batch_norm_backward": 1}  # operands that the kernel does not read
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm_", "matmul")
CONVOLUTIONS = ("convolution", "input gradient", "weight gradient")


class Cost(NamedTuple):
    """Bytes of DRAM and of L2, FLOPs (two a multiplication) and their engine.

    kind: one of `KINDS`. programs: those of a Triton kernel; fewer than multiprocessors have their
    part of L2 and of the engine alone.
    """

    bytes: float
    l2: float = 0.0
    flops: float = 0.0
    engine: str = "bfloat16"
    kind: str = "elementwise"
    programs: float = math.inf

    def seconds(self, rates: dict[str, float]) -> float:
        """Return its start and the longest of memory, L2 and engine."""
        kind = KINDS[self.kind]
        part = min(1.0, self.programs / rates["processors"])
        memory = self.bytes / min(rates["memory"], kind.memory * rates["issue"])
        l2 = self.l2 / (part * kind.l2 * rates["l2"])
        products = self.flops / (part * kind.products * rates[self.engine])
        return kind.start + max(memory, l2, products)


def cost(launch: Launch) -> Cost:
    """Return the cost of a launch; a copy between host and GPU costs no device time."""
    if launch.is_copy_between:
        return Cost(0)
    if launch.kernel in KERNELS:
        operands = dict(zip(launch.options["names"], launch.inputs, strict=True))
        found = KERNELS[launch.kernel](launch, operands)
        kind = launch.kernel if launch.kernel in KINDS else "elementwise"
        return found._replace(kind=kind, programs=math.prod(launch.options["grid"]))
    if launch.kernel in CONVOLUTIONS:
        return _convolution(launch)
    if launch.kernel in PRODUCTS and launch.outputs:
        *_, left, right = launch.inputs
        flops = 2 * math.prod(left.shape) * right.shape[-1]
        return Cost(launch.bytes, 0.0, flops, _engine(left.dtype, "float32"), "library")
    spared = UNREAD.get(launch.kernel)
    unread = launch.inputs[spared].bytes if spared is not None and launch.inputs else 0
    return Cost(launch.bytes - unread, kind=_kind(launch))


def _kind(launch: Launch) -> str:
    """Return how PyTorch's own kernels, and csrc's, go through their maps."""
    operands = (*launch.inputs, *launch.outputs)
    if launch.kernel == LAYOUT_COPY:
        return "transposing"
    if launch.kernel == "native_batch_norm":
        return "batch norm"
    if launch.kernel == "sum":
        return "sum over positions" if _maps(launch.inputs) else "sum"
    if launch.kernel in KINDS:
        return launch.kernel
    if not (launch.inputs and launch.outputs) or "affine_act" in launch.kernel:
        return "elementwise"
    maps = _maps(operands)
    if any(_order(x) != _order(maps[0]) for x in maps):
        return "transposing"
    smaller = any(1 < math.prod(x.shape) < math.prod(maps[0].shape) for x in operands if maps)
    return "broadcast" if smaller else "elementwise"


def _maps(operands: Iterable[Operand]) -> list[Operand]:
    """Return the largest operands with four dimensions."""
    found = list(operands)
    size = max(math.prod(x.shape) for x in found)
    return [x for x in found if math.prod(x.shape) == size and len(x.shape) == 4]


def _order(x: Operand) -> list[int]:
    """Return the dimensions by stride, without those of one element."""
    there = [dim for dim, n in enumerate(x.shape) if n > 1]
    return sorted(there, key=lambda dim: x.strides[dim])


def seconds(found: Iterable[Launch], rates: dict[str, float]) -> float:
    """Return the seconds of kernels that follow one another, with the gaps between them."""
    return sum(cost(x).seconds(rates) + GAP for x in found if not x.is_copy_between)


def unknown(found: Iterable[Launch]) -> set[str]:
    """List the Triton kernels that are counted by their operands alone."""
    return {x.kernel for x in found if "names" in x.options and x.kernel not in KERNELS}


def _engine(dtype: torch.dtype, for_float32: str) -> str:
    return "bfloat16" if dtype.itemsize == 2 else for_float32


def _convolution(launch: Launch) -> Cost:
    """Cost cuDNN's kernel; float32 products are TF32, torch's default."""
    weight = launch.outputs[0] if launch.kernel == "weight gradient" else launch.inputs[1]
    target = launch.outputs[0] if launch.kernel == "convolution" else launch.inputs[0]
    flops = 2 * math.prod(target.shape) * math.prod(weight.shape[1:])
    return Cost(launch.bytes, 0.0, flops, _engine(weight.dtype, "tf32"), "library")


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _pointwise(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """Cost [positions, K] × [K, D]: a tile reads its rows of x and part of the weight from L2."""
    numbers = launch.options
    (D, K), positions = operands["weight"].shape, numbers["positions"]
    across, down = _tiles(D, numbers["BLOCK_D"]), _tiles(positions, numbers["BLOCK_P"])
    read = [operands[name].bytes for name in ("x", "in_mask") if name in operands]
    again = (across - 1) * sum(read) + (down - 1) * operands["weight"].bytes
    flops = 2 * positions * K * D
    return Cost(launch.bytes, launch.bytes + again, flops, _engine(operands["x"].dtype, "tf32"))


def _gram(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """Cost a Gram matrix: a tile reads BLOCK_A + BLOCK_B channels of every position."""
    numbers = launch.options
    a, b, width_a, width_b = operands["a"], operands["b"], numbers["width_a"], numbers["width_b"]
    again = (_tiles(width_b, numbers["BLOCK_B"]) - 1) * a.bytes
    again += (_tiles(width_a, numbers["BLOCK_A"]) - 1) * b.bytes
    flops = 2 * math.prod(a.shape) * width_b
    return Cost(launch.bytes, launch.bytes + again, flops, _engine(a.dtype, "tf32"))


def _activation_grams(launch: Launch, operands: dict[str, Operand]) -> Cost:
    """Cost tiles that read rows of y and, for ``before``, of grad, and the other map's columns."""
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
    """Cost the weights of a network; only a table and the op know their factors."""
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
    """Cost tiles that read rows of ``left`` and columns of ``right`` from L2, all directions."""
    numbers = launch.options
    sides = [(numbers["rank"] * numbers["groups"], operands["left"], operands["right"])]
    if numbers["rank_after"]:
        sides.append((numbers["rank_after"], operands["left_after"], operands["right_after"]))
        twice = 0
    else:  # the operands of one side stand for those of the other
        twice = sum(operands[f"{name}_after"].bytes for name in ("left", "right", "S"))
    rows, columns = numbers["rows"], numbers["columns"]
    across, down = _tiles(columns, numbers["BLOCK_B"]), _tiles(rows, numbers["BLOCK_A"])
    again = sum((across - 1) * left.bytes + (down - 1) * right.bytes for _, left, right in sides)
    moved = launch.bytes - twice
    flops = sum(2 * directions * rows * columns for directions, _, _ in sides)
    return Cost(moved, moved + again, flops, "tf32x3")


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
