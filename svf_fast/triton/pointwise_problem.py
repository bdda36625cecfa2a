"""The products that a network asks of :mod:`svf_fast.triton.pointwise`, and their tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from svf_fast.triton.tuning import SEPARATE, Config, bucket, has_room, processors

Options = tuple[bool, ...]
OPTIONS = ("in_scale", "in_mask", "scale", "residual", "residual_mask", "keep", "mask", "dot")


class Problem(NamedTuple):
    """[positions, K] × [K, D]; options: which of OPTIONS it comes with.

    number: "16bit" for bfloat16 and float16, for float32 how products are made: "tf32", "tf32x3".
    """

    positions: int
    K: int
    D: int
    number: str
    options: Options

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.number == "16bit" else torch.float32

    def has(self, option: str) -> bool:
        return self.options[OPTIONS.index(option)]

    def key(self) -> str:
        return _key(self)

    def rule(self, arch: int) -> Config:
        """What to launch where nothing was measured; sums that cuBLAS makes as well are its own."""
        spares = any(self.has(name) for name in OPTIONS if name != "residual")
        return self.tiles(arch) if spares else SEPARATE

    def tiles(self, arch: int) -> Config:
        """Tiles that do not spill, two or more blocks on a multiprocessor, all of them at work."""
        if arch == 0:
            block_d, block_k = (32 if self.D <= 128 else 512), (16 if self.K <= 128 else 512)
            return _config(32, block_d, block_k, slices=2, warps=4, stages=1)
        uneven = self.K % 64 > 0 or self.D % 128 > 0  # masks take registers, as do two prologues
        if uneven or self.number != "16bit" or (self.has("in_scale") and self.has("in_mask")):
            return _config(64, 64 if self.D > 32 else 32, 32, slices=1, warps=4, stages=3)
        blocks = triton.cdiv(self.positions, 128) * (self.D // 128)
        block_p = 64 if blocks < processors(arch) else 128
        if not has_room(arch):
            slices = 4 if self.has("in_scale") else 2
            return _config(block_p, 128, 32, slices, warps=4, stages=4)
        if block_p == 64:
            return _config(64, 128, 64, slices=2, warps=4, stages=4)
        if self.K >= 1024 and self.D % 256 == 0 and blocks >= 2 * processors(arch):
            # L2 delivers 64 FLOP a byte to the other tiles, 85 to these
            return _config(128, 256, 64, slices=4, warps=8, stages=4)
        if self.has("in_scale") or self.has(
            "in_mask"
        ):  # x passes through registers: less of it a time
            return _config(128, 128, 32, slices=2, warps=8, stages=5, maxnreg=128)
        return _config(128, 128, 64, slices=2, warps=8, stages=3, maxnreg=128)

    def candidates(self, arch: int) -> list[Config]:
        """The rule's, its tiles, others that suit the architecture, and separate passes."""
        if self.number != "16bit":
            others = [
                _config(128, 64, 32, slices=2, warps=8, stages=3),
                _config(64, 128, 32, slices=2, warps=8, stages=3),
            ]
        elif has_room(arch):
            others = [
                _config(64, 128, 64, slices=2, warps=4, stages=4),
                _config(128, 128, 32, slices=2, warps=8, stages=5, maxnreg=128),
                _config(128, 128, 64, slices=2, warps=8, stages=4),
                _config(128, 256, 64, slices=4, warps=8, stages=3),
                _config(128, 256, 64, slices=4, warps=8, stages=4),
                _config(64, 256, 64, slices=4, warps=4, stages=4),
            ]
        else:
            others = [
                _config(64, 128, 32, slices=2, warps=4, stages=5),
                _config(128, 128, 32, slices=4, warps=4, stages=5),
                _config(128, 128, 64, slices=4, warps=8, stages=3),
                _config(128, 256, 32, slices=4, warps=8, stages=4),
                _config(64, 256, 32, slices=4, warps=4, stages=4),
            ]
        others = [config for config in others if config["BLOCK_D"] <= max(64, self.D)]
        found = [self.rule(arch), self.tiles(arch), *others, SEPARATE]
        return [config for at, config in enumerate(found) if config not in found[:at]]


def problems() -> list[Problem]:
    """1×1 convolutions of ResNet-50's layers 2-4 at 641 px, a query alone and with five supports.

    In a block of width C: conv1, conv3, their input gradients, those of the first block and its
    shortcut, and the products with Uᵀ of layers that run as ``chain``.
    """
    calls = (
        (4, 1, ("scale", "keep")),
        (2, 1, ("scale", "keep")),
        (1, 4, ("in_scale", "scale", "residual", "mask")),
        (4, 1, ("in_mask",)),
        (1, 4, ("residual", "residual_mask")),
        (1, 2, ("residual",)),
        (4, 2, ("in_mask",)),
        (1, 4, ("scale", "residual", "mask")),
        (1, 1, ("scale", "dot")),
        (4, 1, ("scale", "dot")),
    )
    return [
        Problem(images * 6561, k * C, d * C, "16bit", tuple(name in names for name in OPTIONS))
        for images in (1, 6)
        for C in (128, 256, 512)
        for k, d, names in calls
    ]


def _config(
    block_p: int, block_d: int, block_k: int, slices: int, warps: int, stages: int, **more: int
) -> Config:
    blocks = {"BLOCK_P": block_p, "BLOCK_D": block_d, "BLOCK_K": block_k, "GROUP": 8}
    return {**blocks, "SLICES": slices, "num_warps": warps, "num_stages": stages, **more}


@functools.cache
def _key(problem: Problem) -> str:
    positions, K, D, number, options = problem
    names = [name for name, present in zip(OPTIONS, options, strict=True) if present]
    return f"{bucket(positions)}x{K}x{D} {number} {'+'.join(names) or 'plain'}"
