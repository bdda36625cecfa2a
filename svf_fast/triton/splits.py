"""Sums over positions, split over programs: what kernels of Gram matrices share.

Maps are seen as [images, positions, channels]. Positions are taken in tiles that do not cross from
one image to the next, and splits of as many tiles each leave partial sums, added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.ops.maps import TRITON_DTYPES
from svf_fast.triton.language import precision
from svf_fast.triton.maps import divide_up
from svf_fast.triton.tuning import PROCESSORS, Config, processors


class Splits(NamedTuple):
    """``all_steps`` tiles in ``number`` splits of ``steps`` each; the last may have fewer."""

    number: int
    steps: int
    all_steps: int

    @classmethod
    def of(cls, images: int, positions: int, wanted: int, tile: int) -> Splits:
        """Make at most ``wanted`` splits of tiles of ``tile`` positions, none of them empty."""
        all_steps = images * divide_up(positions, tile)
        steps = divide_up(all_steps, max(1, wanted))
        return cls(divide_up(all_steps, steps), steps, all_steps)


class Launch(NamedTuple):
    """What a kernel over splits is launched with besides tensors.

    tiles: of one matrix. constants: compile-time ones and Triton's options.
    """

    splits: Splits
    tiles: int
    constants: Config

    @classmethod
    def of(cls, width_a: int, width_b: int, images: int, positions: int, config: Config) -> Launch:
        """Lay out matrices [width_a, width_b] in a configuration."""
        constants = dict(config)
        splits = Splits.of(images, positions, constants.pop("SPLITS"), constants["BLOCK_P"])
        rows = divide_up(width_a, constants["BLOCK_A"])
        return cls(splits, rows * divide_up(width_b, constants["BLOCK_B"]), constants)


@triton.jit
def tile_at(step, positions, image_stride, position_stride, BLOCK_P: tl.constexpr):
    """Return where the step-th tile of BLOCK_P positions begins, and how many of them exist."""
    steps = tl.cdiv(positions, BLOCK_P)  # of an image
    image = step // steps
    first = (step - image * steps) * BLOCK_P
    start = image.to(tl.int64) * image_stride + first.to(tl.int64) * position_stride
    return start, positions - first


@triton.jit
def image_of(step, positions, BLOCK_P: tl.constexpr):
    """Return the image in which the step-th tile of BLOCK_P positions lies."""
    return step // tl.cdiv(positions, BLOCK_P)


@triton.jit
def offsets(rows, channels, position_stride, channel_stride):
    """Return the offsets of a tile [positions, channels] from where it begins."""
    return rows[:, None] * position_stride + channels[None, :].to(tl.int64) * channel_stride


def sequences(*maps: Tensor, joined: bool = True) -> list[Tensor]:
    """Return [N, C, *spatial] as [N, P, C], or as [1, N · P, C] if images are adjacent in all maps.

    Views; a map is copied only where its positions have no common stride. Not ``joined``: always
    the former, for maps of which each image has values of its own.
    """
    images, positions = maps[0].shape[0], maps[0].shape[2:].numel()
    found = [x.movedim(1, -1).reshape(images, positions, x.shape[1]) for x in maps]
    if joined and all(1 in x.shape[:2] or x.stride(0) == positions * x.stride(1) for x in found):
        return [x.reshape(1, images * positions, x.shape[2]) for x in found]
    return found


class Shape(NamedTuple):
    """Sizes of a program's tiles; ``blocks``: programs that a multiprocessor holds at once."""

    rows: int
    columns: int
    positions: int
    warps: int
    stages: int
    blocks: int


def loads_vectors(maps: Sequence[Tensor]) -> bool:
    """Tell whether Triton loads all maps [N, P, C] by 16 bytes."""
    return all(x.stride(2) == 1 and x.stride(0) % 16 == x.stride(1) % 16 == 0 for x in maps)


def shapes_for(width: int, dtype: torch.dtype, vectors: bool, arch: int) -> list[Shape]:
    """Return the shapes worth timing for matrices of that width, the rule's first.

    None of them spills registers on sm_80 or sm_90. From 256 channels on L2 is what limits: a tile
    of 128 x 256 makes 85 FLOP of each byte of 16-bit maps that it reads. Loads by elements take
    more registers and do not overlap with products.
    """
    if arch == 0:
        return [Shape(32, 32, 32, 4, 2, 2)]
    if not vectors:
        return [Shape(64, 128, 16 if dtype == torch.float32 else 32, 8, 3, 1)]
    if dtype == torch.float32:
        small, large = Shape(64, 64, 32, 4, 3, 2), Shape(128, 128, 16, 8, 4, 1)
        return [small] if width <= 64 else [large, Shape(64, 128, 32, 8, 3, 1), small]
    if width <= 64:
        return [Shape(64, 64, 32, 4, 4, 3), Shape(64, 64, 64, 4, 3, 2), Shape(64, 64, 64, 8, 3, 1)]
    square = Shape(128, 128, 32, 8, 4, 1)
    few = [square, Shape(128, 128, 64, 8, 3, 1), Shape(64, 128, 32, 4, 3, 3)]
    if width <= 128 or arch not in PROCESSORS:  # others may have less shared memory
        return few
    # 32 positions spill on sm_80 with Triton 3.6
    large = Shape(128, 256, 32 if arch >= 90 else 16, 8, 4, 1)
    return [large, Shape(64, 256, 32, 8, 3, 1), *few]


def configurations(
    shapes: Sequence[Shape], width_a: int, width_b: int, matrices: int, arch: int
) -> list[Config]:
    """Return configurations for matrices [width_a, width_b] whose splits fill the GPU.

    Tiles are of the shapes, or smaller as the matrices are.

    The first shape comes again with fewer splits: few positions make less of a partial matrix than
    it costs to add it.
    """
    found: list[Config] = []
    for shape in shapes:
        a = min(shape.rows, max(16, triton.next_power_of_2(width_a)))
        b = min(shape.columns, max(16, triton.next_power_of_2(width_b)))
        programs = triton.cdiv(width_a, a) * triton.cdiv(width_b, b) * matrices
        tiles = {"BLOCK_A": a, "BLOCK_B": b, "BLOCK_P": shape.positions}
        splits = {"SPLITS": _splits_for(programs, shape.blocks * processors(arch))}
        options = {"num_warps": shape.warps, "num_stages": shape.stages}
        found.append(tiles | splits | options)
    fewer = [found[0]["SPLITS"] // part for part in (2, 4)]
    return found + [found[0] | {"SPLITS": splits} for splits in fewer if splits]


def _splits_for(programs: int, places: int) -> int:
    """Return how many splits of so many programs each fill the places of a GPU.

    They fill it once; more often only where more than a tenth of it would be idle.
    """
    for waves in range(1, 5):
        splits = max(1, waves * places // programs)
        if programs * splits >= 0.9 * places * triton.cdiv(programs * splits, places):
            break
    return splits


def refuse_float64(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise TypeError for maps that tensor cores do not multiply."""
    if dtype not in TRITON_DTYPES:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16 or float16, got {dtype}")


def product_precision(dtype: torch.dtype) -> str:
    """Say how maps of a dtype are multiplied: float32 by torch's switch for matmul."""
    return precision(convolves=False) if dtype == torch.float32 else "ieee"


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype and how it is multiplied, for a configuration's key."""
    name = str(dtype).removeprefix("torch.")
    return f"{name} {product_precision(dtype)}" if dtype == torch.float32 else name


def random_maps(
    positions: int,
    channels: Sequence[int],
    dtype: torch.dtype,
    vectors: bool,
    device: torch.device,
) -> list[Tensor]:
    """Make an image of that many positions for each number of channels.

    vectors: in channels_last, which is loaded by 16 bytes, else contiguous.
    """
    maps = [torch.randn(1, positions, 1, n, device=device).to(dtype) for n in channels]
    maps = [x.movedim(-1, 1) for x in maps]
    return maps if vectors else [x.contiguous() for x in maps]


def positions_of_resnet() -> list[int]:
    """List positions of layers 2-4 at stride 8, 321 to 641 px, 1 to 12 images; one a bucket."""
    return [1681, 3600, 6561, 13122, 21600, 39366, 78732]
