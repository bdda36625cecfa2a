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

from svf_fast.triton.language import precision

PROCESSORS = {0: 2, 80: 108, 90: 132}  # multiprocessors of an A100 and of an H100 or H200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Splits(NamedTuple):
    """``all_steps`` tiles in ``number`` splits of ``steps`` each; the last may have fewer."""

    number: int
    steps: int
    all_steps: int

    @classmethod
    def of(cls, images: int, positions: int, wanted: int, tile: int) -> Splits:
        """At most ``wanted`` splits of tiles of ``tile`` positions, none of them empty."""
        all_steps = images * triton.cdiv(positions, tile)
        steps = triton.cdiv(all_steps, max(1, wanted))
        return cls(triton.cdiv(all_steps, steps), steps, all_steps)


@triton.jit
def tile_at(step, positions, image_stride, position_stride, BLOCK_P: tl.constexpr):
    """Where the step-th tile of BLOCK_P positions begins, and how many positions of it exist."""
    steps = tl.cdiv(positions, BLOCK_P)  # of an image
    image = step // steps
    first = (step - image * steps) * BLOCK_P
    start = image.to(tl.int64) * image_stride + first.to(tl.int64) * position_stride
    return start, positions - first


@triton.jit
def offsets(rows, channels, position_stride, channel_stride):
    """Of a tile [positions, channels] from where it begins."""
    return rows[:, None] * position_stride + channels[None, :].to(tl.int64) * channel_stride


def sequences(*maps: Tensor) -> list[Tensor]:
    """[N, C, *spatial] -> [N, P, C], or [1, N · P, C] where all maps' images follow each other.

    Views; a map is copied only where its positions have no common stride.
    """
    images, positions = maps[0].shape[0], maps[0].shape[2:].numel()
    found = [x.movedim(1, -1).reshape(images, positions, x.shape[1]) for x in maps]
    if all(1 in x.shape[:2] or x.stride(0) == positions * x.stride(1) for x in found):
        return [x.reshape(1, images * positions, x.shape[2]) for x in found]
    return found


def count_for(programs: int, arch: int, blocks: int) -> int:
    """Splits that keep a GPU busy: ``programs`` of a split, ``blocks`` at once on a processor.

    As many as fill it once; more only where more than a tenth of it would stand idle.
    """
    places = blocks * PROCESSORS[arch]
    for waves in range(1, 5):
        count = max(1, waves * places // programs)
        if programs * count >= 0.9 * places * triton.cdiv(programs * count, places):
            break
    return count


def refuse_float64(op: str, name: str, maps: Tensor) -> None:
    """Raises TypeError for maps that tensor cores do not multiply."""
    if maps.dtype not in DTYPES:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16 or float16, got {maps.dtype}")


def product_precision(dtype: torch.dtype) -> str:
    """How maps of a dtype are multiplied: float32 as torch's switch for matmul says."""
    return precision(convolves=False) if dtype == torch.float32 else "ieee"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype and how it is multiplied, for a configuration's key."""
    name = str(dtype).removeprefix("torch.")
    return f"{name} {product_precision(dtype)}" if dtype == torch.float32 else name


def random_maps(
    positions: int, channels: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One channels_last image of that many positions for each number of channels."""
    shapes = [(1, positions, 1, width) for width in channels]
    return [torch.randn(shape, device=device).to(dtype).movedim(-1, 1) for shape in shapes]


def positions_of_resnet() -> list[int]:
    """Of layers 2-4 at stride 8, 321, 473 and 641 px, 1 to 12 images; one of each bucket."""
    return [1681, 3600, 6561, 13122, 21600, 39366, 78732]
