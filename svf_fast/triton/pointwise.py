"""The 1×1 convolution of maps with what surrounds it in a residual block, in one kernel.

A product [positions, K] × [K, D] whose prologue rebuilds or masks its input as it is loaded and
whose epilogue applies the affine map, the residual sum, the ReLU and its mask to what it just
computed: maps between a convolution and its neighbours are neither written nor read.

Definition: :mod:`svf_fast.reference.pointwise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svf_fast.ops.maps import TRITON_DTYPES
from svf_fast.ops.pointwise import Extras
from svf_fast.reference.affine_act import mask_bytes
from svf_fast.reference.pointwise import PLAIN_INPUT, PLAIN_OUTPUT, Epilogue, Prologue
from svf_fast.triton import passes
from svf_fast.triton.language import affine_relu, dot, narrow, pack_bits, precision
from svf_fast.triton.launch import launch
from svf_fast.triton.tuning import (
    INTERPRETED,
    OPTIONS,
    SEPARATE,
    Config,
    bucket,
    find,
    gpu,
    has_room,
    per_gpu,
    processors,
)


@triton.jit
def load_bit_rows(
    mask, bit, row, inside_p, column, width, COLUMNS: tl.constexpr, WORD: tl.constexpr
):
    """Load bits [rows, COLUMNS] from ``column`` on of a mask of [positions, width].

    Read in words of WORD bits, which column and width are multiples of; bit: 0 .. WORD - 1. Where
    a word is as wide as the tile no bit changes threads.
    """
    words = mask.to(tl.pointer_type(tl.core.get_int_dtype(WORD, True)), bitcast=True)
    word = column // WORD + tl.arange(0, COLUMNS // WORD)
    inside = inside_p[:, None] & (word < width // WORD)[None, :]
    value = tl.load(words + row[:, None] * (width // WORD) + word[None, :], mask=inside, other=0)
    left = (WORD - 1 - bit).to(value.dtype)  # moves the bit to where the sign is: cheap to test
    if COLUMNS == WORD:
        signed = value << left[None, :]
    else:
        signed = tl.reshape(value[:, :, None] << left[None, None, :], (row.shape[0], COLUMNS))
    return signed < 0


@triton.jit
def columns(z, SLICES: tl.constexpr):
    """Split [R, C] into SLICES tiles [R, C / SLICES], from left to right."""
    if SLICES == 1:
        parts = (z,)
    else:
        halves = tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        parts = columns(left, SLICES // 2) + columns(right, SLICES // 2)
    return parts


@triton.jit
def pointwise_kernel(
    x,  # [positions, K]
    weight,  # [D, K], any strides
    in_scale,  # [K], as in_shift
    in_shift,
    in_mask,  # bits of [positions, K]
    scale,  # [D], as shift and residual_scale
    shift,
    residual,  # [positions, D], as v, out and y
    residual_scale,
    residual_mask,  # bits of [positions, D], as mask
    v,
    out,
    y,
    mask,
    dots,  # [cdiv(positions, BLOCK_P), D]
    positions,
    in_eighths,  # K / 8
    out_eighths,  # D / 8
    weight_stride_d,
    weight_stride_k,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # no block reaches beyond K
    EVEN_D: tl.constexpr,
    IN_WORD: tl.constexpr,  # bits of in_mask that are read at once
    OUT_WORD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,  # parts of a tile that the epilogue finishes one after the other
):
    WIDTH: tl.constexpr = BLOCK_D // SLICES
    K = in_eighths * 8  # so the compiler knows that rows begin at multiples of eight elements
    D = out_eighths * 8

    # GROUP row tiles take turns with one tile of the weight: both stay in L2
    tiles_p, tiles_d = tl.cdiv(positions, BLOCK_P), tl.cdiv(D, BLOCK_D)
    group, within = tl.program_id(0) // (GROUP * tiles_d), tl.program_id(0) % (GROUP * tiles_d)
    rows_of_group = tl.minimum(tiles_p - group * GROUP, GROUP)
    tile_p, tile_d = group * GROUP + within % rows_of_group, within // rows_of_group

    first = tile_p.to(tl.int64) * BLOCK_P
    row = tl.arange(0, BLOCK_P)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_p = row < positions - tile_p * BLOCK_P
    x += first * K

    acc = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    if in_mask is not None:  # what was loaded may move to where tensor cores want it: none is
        number = tl.arange(0, IN_WORD)
        somewhere = in_mask.to(tl.pointer_type(tl.int32), bitcast=True) + number
        bit = tl.load(somewhere, mask=number < -positions, other=number)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside_x = inside_p[:, None] if EVEN_K else inside_p[:, None] & (k < K)[None, :]
        a = tl.load(x + row[:, None] * K + k[None, :], mask=inside_x, other=0.0)
        at = weight + d[None, :] * weight_stride_d + k[:, None] * weight_stride_k
        inside_weight = (d < D)[None, :] & (k < K)[:, None]
        even = EVEN_K and EVEN_D
        b = tl.load(at) if even else tl.load(at, mask=inside_weight, other=0.0)
        if in_scale is not None:
            inside_k = k < K
            s = tl.load(in_scale + k) if EVEN_K else tl.load(in_scale + k, mask=inside_k, other=0.0)
            t = tl.load(in_shift + k) if EVEN_K else tl.load(in_shift + k, mask=inside_k, other=0.0)
            a = affine_relu(a, s[None, :], t[None, :])
        if in_mask is not None:
            start = in_mask + first * in_eighths
            passes = load_bit_rows(start, bit, row, inside_p, k0, K, BLOCK_K, IN_WORD)
            a = tl.where(passes, a, 0.0)
        acc = dot(a, b, acc, PRECISION)

    dtype = out.dtype.element_ty
    parts = columns(acc, SLICES)
    for part in tl.static_range(SLICES):  # a part at a time: what one needs fits in registers
        z = parts[part]
        d0 = tile_d * BLOCK_D + part * WIDTH
        d = d0 + tl.arange(0, WIDTH)
        inside_d = d < D
        inside = inside_p[:, None] if EVEN_D else inside_p[:, None] & inside_d[None, :]
        at = row[:, None] * D + d[None, :]
        byte = d0 // 8 + tl.arange(0, WIDTH // 8)
        inside_bits = inside_p[:, None]
        if not EVEN_D:
            inside_bits = inside_p[:, None] & (byte < out_eighths)[None, :]
        at_bits = row[:, None] * out_eighths + byte[None, :]

        if y is not None or v is not None:
            rounded = narrow(z, dtype)
            z = rounded.to(tl.float32)
            if y is not None:
                tl.store(y + first * D + at, rounded, mask=inside)
        if v is not None:
            other = tl.load(v + first * D + at, mask=inside, other=0.0).to(tl.float32)
            partial = tl.sum(z * other, axis=0)
            tl.store(dots + tile_p.to(tl.int64) * D + d, partial, mask=inside_d)
        if scale is not None:
            z *= tl.load(scale + d, mask=inside_d, other=0.0)[None, :]
        if shift is not None:
            z += tl.load(shift + d, mask=inside_d, other=0.0)[None, :]
        if residual is not None:
            added = tl.load(residual + first * D + at, mask=inside, other=0.0)
            if residual_mask is not None:
                start = residual_mask + first * out_eighths
                bits = tl.arange(0, OUT_WORD)
                passes = load_bit_rows(start, bits, row, inside_p, d0, D, WIDTH, OUT_WORD)
                added = tl.where(passes, added, 0.0)
            added = added.to(tl.float32)
            if residual_scale is not None:
                added *= tl.load(residual_scale + d, mask=inside_d, other=0.0)[None, :]
            z += added
        if RELU:
            z = tl.where(z <= 0, 0.0, z)  # NaN passes
        result = narrow(z, dtype)
        tl.store(out + first * D + at, result, mask=inside)
        if mask is not None:
            passes = (result.to(tl.float32) <= 0) == 0  # as NaN does
            packed = pack_bits(passes, BLOCK_P, WIDTH)
            tl.store(mask + first * out_eighths + at_bits, packed, mask=inside_bits)
    if mask is not None and tl.program_id(0) == 0:  # bytes that hold no element
        end = positions.to(tl.int64) * out_eighths
        pad = end + tl.arange(0, 16)
        tl.store(mask + pad, tl.zeros((16,), tl.uint8), mask=pad < end // 8 * 8 + 16)


def pointwise(
    x: Tensor,
    weight: Tensor,
    prologue: Prologue = PLAIN_INPUT,
    epilogue: Epilogue = PLAIN_OUTPUT,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``y_p = weight x'_p``, with x' what the prologue makes of x, and the epilogue of y.

    x [N, K, *spatial] in channels_last, weight [D, K] in any strides, both in bfloat16, float16 or
    float32; residual [N, D, *spatial]; the vectors are float32 -> out and y (rounded before out is
    computed of it; empty unless ``keep``) [N, D, *spatial] in channels_last, and the bits of out
    (:func:`svf_fast.reference.affine_act.pack_mask`; empty unless ``mask``). Reads x, residual and
    the bits once, apart from what L2 returns.

    Raises:
        ValueError: operands that :func:`serves` refuses; a masked residual in another layout.
    """
    _require(x, weight)
    residual, keep, mask = epilogue.residual, epilogue.keep, epilogue.mask
    if residual is not None:
        if epilogue.residual_mask is not None and not _has_rows(residual):
            raise ValueError(
                "pointwise: residual: expected channels_last, as its mask counts elements, got "
                f"strides {residual.stride()}"
            )
        residual = _with_rows(residual)
    out = _maps(x, len(weight))
    y = _maps(x, len(weight)) if keep else x.new_empty(0)
    bits = x.new_empty(mask_bytes(out.numel()) if mask else 0, dtype=torch.uint8)
    if x.numel() == 0:
        return out, y, bits.zero_()
    prologue = Prologue(_packed(prologue.scale), _packed(prologue.shift), _aligned(prologue.mask))
    epilogue = epilogue._replace(
        scale=_packed(epilogue.scale),
        shift=_packed(epilogue.shift),
        residual=residual,
        residual_scale=_packed(epilogue.residual_scale),
        residual_mask=_aligned(epilogue.residual_mask),
    )
    results = out, y if keep else None, bits if mask else None
    _launch(x, weight, prologue, epilogue, None, results, config)
    return out, y, bits


def pointwise_dot(
    x: Tensor, weight: Tensor, v: Tensor, s: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``a_p = weight x_p`` -> ``a·s`` per channel and ``dot_d = Σ_p a_pd v_pd`` in float32.

    x [N, K, *spatial] in channels_last, weight [D, K] in any strides, v [N, D, *spatial], s [D] in
    float32. Both are computed of a rounded to the dtype of x. v is read once, a is not written.

    Raises:
        ValueError: operands that :func:`serves` refuses.
    """
    _require(x, weight)
    out = _maps(x, len(weight))
    if x.numel() == 0:
        return out, x.new_zeros(len(weight), dtype=torch.float32)
    epilogue = Epilogue(scale=s.contiguous())
    dots = _launch(x, weight, PLAIN_INPUT, epilogue, _with_rows(v), (out, None, None), config)
    assert dots is not None
    return out, dots.sum(dim=0)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernel takes these operands: channels_last, channels in multiples of 8."""
    return (
        x.dtype == weight.dtype
        and x.dtype in TRITON_DTYPES
        and _fit(x.shape, weight.shape)
        and _has_rows(x)
    )


@functools.lru_cache(4096)  # asked at each launch
def _fit(maps: torch.Size, weight: torch.Size) -> bool:
    D, K, *ones = weight if len(weight) > 1 else (0, 0)
    return (
        ones in ([], [1, 1])
        and len(maps) > 1
        and maps[1] == K
        and min(D, K) > 0
        and D % 8 == K % 8 == 0
        and max(D * K, maps.numel() // K) < 2**30  # offsets in 32 bits
    )


def wanted(x: Tensor, weight: Tensor, extras: Extras) -> bool:
    """Tell whether to launch the kernel: it serves, and no table says that passes are faster.

    weight: [D, K] or [D, K, 1, 1].
    """
    if not serves(x, weight):
        return False
    if x.numel() == 0:
        return True
    D, K = weight.shape[:2]
    with torch.cuda.device_of(x):
        return _wins(Problem(x.numel() // K, K, D, _number(x.dtype), extras))


@per_gpu
def _wins(problem: Problem) -> bool:
    return "fused" not in find("pointwise", problem)


class _Launch(NamedTuple):
    """What a problem's launch needs besides tensors; tiles: of rows."""

    tiles: int
    grid: tuple[int]
    constants: dict[str, Any]


def _launch_with(problem: Problem, config: Config) -> _Launch:
    if "fused" in config:  # the table prefers separate passes but the caller asked for the kernel
        config = problem.tiles(gpu().arch) | OPTIONS
    positions, K, D = problem[:3]
    block_d, block_k = config["BLOCK_D"], config["BLOCK_K"]
    tiles = triton.cdiv(positions, config["BLOCK_P"])
    constants = {
        "PRECISION": "ieee" if problem.number == "16bit" else problem.number,
        "EVEN_K": K % block_k == 0,
        "EVEN_D": D % block_d == 0,
        "IN_WORD": min(K & -K, 64, block_k),
        "OUT_WORD": min(D & -D, 64, block_d // config["SLICES"]),
        **config,
    }
    return _Launch(tiles, (tiles * triton.cdiv(D, block_d),), constants)


@per_gpu
def _launch_of(problem: Problem) -> _Launch:
    return _launch_with(problem, find("pointwise", problem))


def _launch(
    x: Tensor,
    weight: Tensor,
    prologue: Prologue,
    epilogue: Epilogue,
    v: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None],
    config: Config | None,
) -> Tensor | None:
    """Fill out, y and the mask; return the sums of each row of tiles if there is a v."""
    D, K = weight.shape
    extras = Extras.of(prologue, epilogue, dot=v is not None)
    problem = Problem(x.numel() // K, K, D, _number(x.dtype), extras)
    *after, relu, _, _ = epilogue
    with torch.cuda.device_of(x):
        found = _launch_with(problem, config) if config else _launch_of(problem)
        dots = None if v is None else x.new_empty((found.tiles, D), dtype=torch.float32)
        launch(
            pointwise_kernel,
            found.grid,
            x,
            weight,
            *prologue,
            *after,
            v,
            *results,
            dots,
            problem.positions,
            K // 8,
            D // 8,
            *weight.stride(),
            RELU=relu,
            **found.constants,
        )
    return dots


def _number(dtype: torch.dtype) -> str:
    """Say how products are made, as :class:`Problem` names it."""
    return precision(convolves=True) if dtype == torch.float32 else "16bit"


def _maps(x: Tensor, channels: int) -> Tensor:
    """Allocate maps of the positions of x in channels_last."""
    images, _, *spatial = x.shape
    if len(spatial) == 2:
        shape = images, channels, *spatial
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty((images, *spatial, channels)).movedim(-1, 1)


def _has_rows(x: Tensor) -> bool:
    """Tell whether the map is [positions, channels] in memory."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) or x.numel() == 0
    return x.dim() > 1 and x.movedim(1, -1).is_contiguous()


def _with_rows(x: Tensor) -> Tensor:
    return x if _has_rows(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _packed(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _aligned(mask: Tensor | None) -> Tensor | None:
    """Copy a mask that does not begin at a multiple of eight bytes: it is read in such words."""
    return mask if mask is None or mask.data_ptr() % 8 == 0 else mask.clone()


def _require(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or not serves(x, weight):
        raise ValueError(
            "pointwise: x, weight: expected channels_last maps [N, K, *spatial] and [D, K] of one "
            f"dtype of {', '.join(map(str, TRITON_DTYPES))}, K and D multiples of 8, got {x.dtype} "
            f"{list(x.shape)} with strides {x.stride()} and {weight.dtype} {list(weight.shape)}"
        )


class Problem(NamedTuple):
    """[positions, K] × [K, D], and what it comes with.

    number: "16bit" for bfloat16 and float16, for float32 how products are made: "tf32", "tf32x3".
    """

    positions: int
    K: int
    D: int
    number: str
    extras: Extras

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.number == "16bit" else torch.float32

    def key(self) -> str:
        names = [name for name, given in zip(Extras._fields, self.extras, strict=True) if given]
        where = f"{bucket(self.positions)}x{self.K}x{self.D}"
        return f"{where} {self.number} {'+'.join(names) or 'plain'}"

    def rule(self, arch: int) -> Config:
        """Return what to launch where nothing was timed; cuBLAS adds a residual as well as this."""
        spares = any(self.extras._replace(residual=False))
        return self.tiles(arch) if spares else SEPARATE

    def tiles(self, arch: int) -> Config:
        """Return tiles that do not spill, with two blocks or more on every multiprocessor."""
        if arch == 0:
            block_d, block_k = (32 if self.D <= 128 else 512), (16 if self.K <= 128 else 512)
            return _config(32, block_d, block_k, slices=2, warps=4, stages=1)
        extras = self.extras
        uneven = self.K % 64 > 0 or self.D % 128 > 0  # masks take registers, as do two prologues
        if uneven or self.number != "16bit" or (extras.in_scale and extras.in_mask):
            return _config(64, 64 if self.D > 32 else 32, 32, slices=1, warps=4, stages=3)
        blocks = triton.cdiv(self.positions, 128) * (self.D // 128)
        block_p = 64 if blocks < processors(arch) else 128
        if not has_room(arch):
            slices = 4 if extras.in_scale else 2
            return _config(block_p, 128, 32, slices, warps=4, stages=4)
        if block_p == 64:
            return _config(64, 128, 64, slices=2, warps=4, stages=4)
        if self.K >= 1024 and self.D % 256 == 0 and blocks >= 2 * processors(arch):
            # L2 delivers 64 FLOP a byte to the other tiles, 85 to these
            return _config(128, 256, 64, slices=4, warps=8, stages=4)
        if extras.in_scale or extras.in_mask:  # x passes through registers: less of it a time
            return _config(128, 128, 32, slices=2, warps=8, stages=5, maxnreg=128)
        return _config(128, 128, 64, slices=2, warps=8, stages=3, maxnreg=128)

    def candidates(self, arch: int) -> list[Config]:
        """Return the rule's, its tiles, others that suit the architecture, and separate passes."""
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

    def launcher(self, device: torch.device) -> Callable[[Config], Any]:
        D, K, extras = self.D, self.K, self.extras
        forward = extras.scale and not extras.dot
        # values matter where kernels run, not where they are only compiled
        runs = device.type == "cuda" or INTERPRETED
        filled = functools.partial(torch.randn if runs else torch.empty, device=device)

        def maps(channels: int) -> Tensor:
            shape = 1, self.positions, 1, channels
            return filled(shape, dtype=self.dtype).movedim(-1, 1)

        def vector(channels: int, wanted: bool) -> Tensor | None:
            return filled(channels) if wanted else None

        def bits(channels: int, wanted: bool) -> Tensor | None:
            shape = (mask_bytes(self.positions * channels),)
            return torch.randint(256, shape, dtype=torch.uint8, device=device) if wanted else None

        x, weight = maps(K), filled(D, K, dtype=self.dtype)
        weight = weight if forward else weight.t().contiguous().t()
        if extras.dot:
            dot = x, weight, maps(D), filled(D)
            return lambda config: (
                passes.pointwise_dot(*dot)
                if "fused" in config
                else pointwise_dot(*dot, config=config)
            )
        given = (
            x,
            weight,
            Prologue(
                vector(K, extras.in_scale), vector(K, extras.in_scale), bits(K, extras.in_mask)
            ),
            Epilogue(
                vector(D, forward),
                vector(D, forward),
                maps(D) if extras.residual else None,
                # as of a shortcut's convolution: the most registers
                vector(D, extras.residual and forward),
                bits(D, extras.residual_mask),
                forward,
                extras.keep,
                extras.mask,
            ),
        )
        return lambda config: (
            passes.pointwise(*given) if "fused" in config else pointwise(*given, config=config)
        )


def problems() -> list[Problem]:
    """List 1×1 convolutions of ResNet-50's layers 2-4 at 641 px, with supports and without.

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
        Problem(images * 6561, k * C, d * C, "16bit", Extras(**dict.fromkeys(names, True)))
        for images in (1, 6)
        for C in (128, 256, 512)
        for k, d, names in calls
    ]


def _config(
    block_p: int, block_d: int, block_k: int, slices: int, warps: int, stages: int, **more: int
) -> Config:
    blocks = {"BLOCK_P": block_p, "BLOCK_D": block_d, "BLOCK_K": block_k, "GROUP": 8}
    return {**blocks, "SLICES": slices, "num_warps": warps, "num_stages": stages, **more}


TUNABLES = {"pointwise": problems}
