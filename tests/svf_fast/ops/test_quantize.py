"""Maps in 8 bits: their codes, what these stand for, and the mask that they tell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svf_fast.ops.gram import gram
from svf_fast.ops.quantize import dequantize, quantize, quantized_backward
from svf_fast.reference import quantize as reference
from svf_fast.reference.gram import gram as gram_definition
from tests.svf_fast.drawn import maps
from tests.svf_fast.tolerance import accumulated, assert_error_within

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DENSE = ("contiguous", "channels_last")
# Images, channels, spatial: odd sizes; one channel; one position; no spatial dimension; more
# channels than a unit of work; rows longer than one; nothing at all.
SHAPES = (
    (2, 7, 9, 11),
    (3, 1, 5, 4),
    (4, 33, 1, 1),
    (5, 6),
    (2, 130, 6, 5),
    (1, 3, 150, 131),
    (2, 5, 2, 3, 4),
    (0, 4, 3, 3),
    (2, 4, 0, 3),
    (2, 0, 3, 3),
)


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Edges within the range of normal numbers, outside of it, and a scale of 0."""
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = torch.randn(2, channels, dtype=wide)
    scale[::5] = 0
    shift[1::6] = 40
    shift[2::6] = -40
    return scale, shift


def masks(y: Tensor, scale: Tensor, shift: Tensor, codes: Tensor, grid: Tensor) -> list[Tensor]:
    grad = torch.randn(y.shape, dtype=torch.float32).to(y.dtype)
    if not y.is_contiguous():
        grad = torch.empty_like(y).copy_(grad)
    place = grad.clone(memory_format=torch.preserve_format)
    torch.ops.svf_fast.quantized_backward_(place, codes, grid, scale)
    exact = torch.ops.svf_fast.affine_act_backward(grad, y, None, scale, shift)
    return [quantized_backward(grad, codes, grid, scale), place, exact]


@pytest.mark.parametrize("edge", (False, True), ids=("plain", "edge"))
@pytest.mark.parametrize("layout", (*DENSE, "sliced"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_nearest_and_tell_the_mask(shape, dtype, layout, edge, poisoned_memory):
    y = (3 * maps(shape, torch.float64, layout) + 1).to(dtype)
    scale, shift = affine(shape[1], dtype) if edge else (None, None)
    codes, grid = quantize(y, scale, shift)
    expected, expected_grid = reference.quantize(y, scale, shift)
    assert codes.dtype == torch.uint8 and codes.shape == y.shape
    assert layout == "sliced" or codes.stride() == y.stride()
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(grid, expected_grid, rtol=8 * torch.finfo(wide).eps, atol=1e-30)
    turned = (codes.int() - expected.int()).abs()  # at the middle between two codes
    assert (turned <= 1).all()
    if wide == dtype:  # of 16 bits many have the same value
        assert turned.sum() <= 1 + 0.002 * codes.numel()

    exact = dequantize(codes, grid, torch.float64) if dtype == torch.float64 else None
    values = reference.dequantize(codes, grid, None, None, wide) if exact is None else exact
    error = (values.double() - y.double()).abs()
    step = reference._per_image(grid[1], codes).double().abs()
    rounding = 4 * torch.finfo(wide).eps * y.double().abs()
    assert (error <= 0.5 * step * (1 + 1e-3) + rounding).all()
    if edge:
        mine, in_place, exact = masks(y, scale, shift, codes, grid)
        assert torch.equal(mine, exact) and torch.equal(in_place, exact)
        defined = reference.quantized_backward(mine, codes, grid, torch.ones_like(scale))
        assert torch.equal(defined, mine)  # already masked: the same mask again


numbers = st.floats(width=32) | st.sampled_from((0.0, -0.0, 1.0, 1 + 2**-23, 3e38, 1e-42))
channels = st.lists(numbers, min_size=12, max_size=12)


@given(channels, numbers, numbers, st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_mask_is_exact_whatever_the_numbers(values, scale, shift, dtype, last):
    """NaN and infinite ones, constant channels, edges at a value or far off."""
    y = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(1, 2, 3, 2)
    y = y.contiguous(memory_format=torch.channels_last) if last else y
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = (torch.tensor([x, 1.0], dtype=torch.float64).to(wide) for x in (scale, shift))
    codes, grid = quantize(y, scale, shift)
    mine, in_place, exact = masks(y, scale, shift, codes, grid)
    assert torch.equal(mine.isnan(), exact.isnan())
    assert torch.equal(mine.nan_to_num(7.0), exact.nan_to_num(7.0))
    assert torch.equal(in_place.nan_to_num(7.0), exact.nan_to_num(7.0))


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("edge", (False, True))
def test_a_value_that_is_not_finite_is_told_by_its_channel_alone(edge, layout):
    y = maps((2, 5, 6, 7), torch.float32, layout)
    y[1, 2, 3, 4] = float("nan")
    y[0, 4, 0, 0] = float("-inf")
    scale, shift = affine(5, y.dtype) if edge else (None, None)
    values = dequantize(*quantize(y, scale, shift), torch.float32)
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[1, 2] = expected[0, 4] = True
    assert torch.equal(values.isnan().any(dim=(2, 3)), expected)
    assert torch.equal(values.isnan().all(dim=(2, 3)), expected)


@pytest.mark.parametrize("layout", DENSE)
def test_what_a_relu_made_zero_stays_zero(layout):
    x = maps((2, 70, 9, 8), torch.float32, layout).relu_()
    values = dequantize(*quantize(x), torch.float32)
    assert torch.equal(values == 0, x < x.amax(dim=(2, 3), keepdim=True) / 510)
    assert (values[x == 0] == 0).all()


@pytest.mark.parametrize("layout", DENSE)
def test_a_constant_channel_is_kept_as_it_is(layout):
    y = torch.full((1, 3, 4, 5), 0.1)
    y = y.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else y
    for affine_map in ((None, None), (torch.ones(3), torch.tensor([-0.1, 1.0, -1.0]))):
        assert torch.equal(dequantize(*quantize(y, *affine_map), torch.float32), y)


def test_rounding_has_no_bias_that_shows():
    """The mean error of many values is as small as rounding to either side by chance leaves it."""
    y = torch.randn(1, 64, 200, 200)
    scale, shift = torch.rand(64) + 0.5, torch.randn(64) * 0.5
    codes, grid = quantize(y, scale, shift)
    error = (dequantize(codes, grid, torch.float32) - y) / grid[1][:, :, None, None]
    by_chance = 1 / (12 * 40000) ** 0.5
    assert error.mean(dim=(2, 3)).abs().max() < 5 * by_chance
    assert abs((error * y).mean()) < 5 * by_chance / 8  # nor with the values


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_of_codes(dtype, layout, poisoned_memory):
    y = maps((2, 70, 9, 8), dtype, layout)
    scale, shift = affine(70, dtype)
    codes, grid = quantize(y, scale, shift)
    got = dequantize(codes, grid, dtype, scale, shift)
    expected = reference.dequantize(codes, grid, scale, shift, dtype)
    exact = reference.dequantize(codes, grid.double(), scale.double(), shift.double(), dtype)
    assert got.stride() == y.stride() and got.dtype == dtype
    y_sizes = (reference.dequantize(codes, grid, None, None, dtype).double()).abs()
    shape = (1, -1, 1, 1)
    sizes = y_sizes * scale.double().abs().reshape(shape) + shift.double().abs().reshape(shape)
    assert_error_within(got, expected, exact.double(), magnitude=2 * sizes, channel_dim=None)
    assert torch.equal(got > 0, (got > 0) & (codes >= grid[2][:, :, None, None]))


GRAMS = ((2, 6, 5, 1, (5, 7)), (3, 12, 6, 3, (9, 1)), (1, 1, 17, 1, (47, 45)), (2, 4, 4, 4, (3, 3)))


@pytest.mark.parametrize("left", (False, True), ids=("b is codes", "a is codes"))
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRAMS, ids=str)
def test_gram_of_codes(case, dtype, layout, left, poisoned_memory):
    check_gram(gram, case, dtype, layout, left)


def check_gram(gram, case, dtype, layout, left, device="cpu") -> None:
    """Check a gram of which an operand is codes, a or b, with the 2x rule."""
    images, width_a, width_b, groups, spatial = case
    y = maps((images, width_a if left else width_b, *spatial), dtype, layout, device)
    other = maps((images, width_b if left else width_a, *spatial), dtype, layout, device)
    scale, shift = (x.to(device) for x in affine(y.shape[1], dtype))
    codes, grid = reference.quantize(y, scale, shift)
    for rebuilds in (False, True) if left else (False,):
        ends = (scale, shift) if rebuilds else (None, None)
        operands = (codes, other) if left else (other, codes)
        decoded = reference.dequantize(codes, grid, *ends, dtype).double()
        exact = (decoded, other.double()) if left else (other.double(), decoded)
        terms = gram_definition(exact[0].abs(), exact[1].abs(), groups)
        wide = torch.promote_types(dtype, torch.float32)
        turns = dtype != wide  # a value may round the other way where products are fused
        assert_error_within(
            gram(*operands, groups, *ends, grid),
            gram_definition(*operands, groups, *ends, grid),
            gram_definition(*exact, groups),
            magnitude=terms if turns else accumulated(terms, wide),
            dtype=dtype if turns else wide,
            channel_dim=None,
            name="gram of codes",
        )


def test_opcheck_and_memory_safety():
    raw = torch.ops.svf_fast
    y = torch.randn(2, 4, 3, 3)
    scale, shift = torch.randn(2, 4)
    codes, grid = quantize(y, scale, shift)
    torch.library.opcheck(raw.quantize.default, (y, scale, shift))
    torch.library.opcheck(raw.dequantize.default, (codes, grid, scale, shift, torch.bfloat16))
    torch.library.opcheck(raw.quantized_backward.default, (y, codes, grid, scale))
    torch.library.opcheck(raw.quantized_backward_.default, (y.clone(), codes, grid, scale))
    torch.library.opcheck(raw.gram.default, (y, codes, 2, None, None, grid))
    torch.library.opcheck(raw.gram.default, (codes, y, 2, scale, shift, grid))
    for wrong in (grid[:2], grid.double(), grid[:, :1], grid.mT):
        with pytest.raises(RuntimeError, match="grid must be the contiguous"):
            raw.dequantize(codes, wrong, None, None, torch.float32)
        with pytest.raises(RuntimeError, match="grid must be the contiguous"):
            raw.gram(y, codes, 1, None, None, wrong)
    with pytest.raises(RuntimeError, match="differ in shape"):
        raw.quantized_backward(y[:, :, 1:], codes, grid, scale)


def test_refusals():
    y = torch.randn(2, 4, 3, 3)
    with pytest.raises(TypeError, match="quantize: y: expected float64, float32"):
        quantize(y.long())
    with pytest.raises(ValueError, match="quantize: shift: expected a tensor"):
        quantize(y, torch.ones(4))
    with pytest.raises(ValueError, match=r"quantize: shift: .* of shape \[4\], one value per"):
        quantize(y, torch.ones(4), torch.ones(3))
    codes, grid = quantize(y)
    with pytest.raises(TypeError, match="gram: grid: expected codes in uint8 as a or b"):
        gram(y, y, grid=grid)
    with pytest.raises(TypeError, match="gram: b: expected float64"):
        gram(y, codes)
    with pytest.raises(ValueError, match=r"gram: grid: expected torch.float32 of shape \[3, 2, 4"):
        gram(y, codes, grid=grid[:, :1])
