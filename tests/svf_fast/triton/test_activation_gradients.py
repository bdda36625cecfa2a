"""The Triton kernel of activation_grams against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svf_fast.reference import gram as reference
from svf_fast.reference import quantize as definition
from svf_fast.reference.affine_act import affine_act_backward
from tests.svf_fast.drawn import maps
from tests.svf_fast.tolerance import accumulated, assert_error_within

pytest.importorskip("triton")
from svf_fast.triton.activation_gradients import TUNABLES, Problem, activation_grams

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]  # cpu: the interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]

# Images, channels, spatial. Odd sizes; one channel; a tile's channels and more; no spatial
# dimension; several splits and a last one that is shorter; nothing at all.
CASES = [
    (2, 3, (11, 7)),
    (1, 1, (3, 3)),
    (70, 6, ()),
    (2, 33, (2, 3, 4)),
    (1, 32, (8, 12)),
    (0, 4, (3, 3)),
    (2, 4, (0, 3)),
    (2, 0, (3, 3)),
]


def affine(channels: int, device: str) -> tuple[Tensor, Tensor]:
    scale, shift = torch.randn(channels, 2, device=device).unbind(1)  # with gaps; negative too
    scale[1::5] = 0
    return scale, shift


def check(actual: tuple[Tensor, ...], grad, y, scale, shift, before=True, after=True) -> None:
    g, *matrices = actual
    assert g.shape == y.shape
    assert g.dtype == y.dtype
    double = [x.double() for x in (grad, y, scale, shift)]
    eager = affine_act_backward(grad, y, None, scale, shift)
    exact = affine_act_backward(double[0], double[1], None, *double[2:])
    assert_error_within(g, eager, exact, channel_dim=1, name="g")

    # truth: g and x rounded where eager rounds them
    shape = (-1, *[1] * (y.dim() - 2))
    x = (double[1] * double[2].reshape(shape) + double[3].reshape(shape)).relu()
    g, x = (map.to(y.dtype).double() for map in (exact, x))
    sides = {
        "before": (before, (g, double[1]), (eager, y)),
        "after": (after, (x, double[0]), (y, grad, 1, scale, shift)),
    }
    # a 16-bit value may round the other way than in float64: one eps of it
    turns = y.dtype != torch.float32
    for matrix, (name, (asked, factors, arguments)) in zip(matrices, sides.items()):
        assert matrix.dtype == torch.float32
        if not asked:
            assert matrix.numel() == 0
            continue
        terms = reference.gram(*(factor.abs() for factor in factors))
        assert_error_within(
            matrix,
            reference.gram(*arguments),
            reference.gram(*factors),
            magnitude=terms if turns else accumulated(terms, torch.float32),
            dtype=y.dtype,
            channel_dim=None,
            name=name,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_definition(case, dtype, layout, device, poisoned_memory) -> None:
    images, channels, spatial = case
    grad, y = (maps((images, channels, *spatial), dtype, layout, device) for _ in range(2))
    arguments = (grad, y, *affine(channels, device), True, True)
    check(activation_grams(*arguments), *arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_what_is_asked_for(layout, sides, device, poisoned_memory) -> None:
    grad, y = (maps((2, 35, 13, 3), torch.bfloat16, layout, device) for _ in range(2))
    arguments = (grad, y, *affine(35, device), *sides)
    check(activation_grams(*arguments), *arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_maps_of_different_layouts(left, right, device) -> None:
    grad = maps((3, 6, 5, 4), torch.bfloat16, left, device)
    y = maps((3, 6, 5, 4), torch.bfloat16, right, device)
    arguments = (grad, y, *affine(6, device), True, True)
    actual = activation_grams(*arguments)
    check(actual, *arguments)
    dense = y.is_contiguous() or y.movedim(1, -1).is_contiguous()
    assert actual[0].stride() == (y if dense else y.contiguous()).stride()


@pytest.mark.parametrize("device", DEVICES)
def test_leaves_its_inputs_alone(device) -> None:
    grad, y = torch.randn(2, 3, 20, 35, device=device)
    scale, shift = affine(20, device)
    before = [x.clone() for x in (grad, y, scale, shift)]
    activation_grams(grad, y, scale, shift, True, True)
    torch.testing.assert_close([grad, y, scale, shift], before, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", [(True, True), (False, True)])
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_any_number_of_splits_and_tiles(splits, sides, device, poisoned_memory) -> None:
    grad, y = (maps((2, 37, 35), torch.float32, "channels_last", device) for _ in range(2))
    config = {"BLOCK_A": 16, "BLOCK_B": 32, "BLOCK_P": 16, "SPLITS": splits}
    arguments = (grad, y, *affine(37, device), *sides)
    check(activation_grams(*arguments, config=config), *arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_many_channels(device) -> None:
    grad, y = (maps((1, 2048, 3, 3), torch.bfloat16, "channels_last", device) for _ in range(2))
    config = {"BLOCK_A": 512, "BLOCK_B": 2048, "BLOCK_P": 16, "SPLITS": 1}
    arguments = (grad, y, *affine(2048, device), True, True)
    check(activation_grams(*arguments, config=config if device == "cpu" else None), *arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_equal_from_run_to_run(device) -> None:
    grad, y = (maps((3, 18, 67), torch.bfloat16, "channels_last", device) for _ in range(2))
    arguments = (grad, y, *affine(18, device), True, True)
    first, second = (activation_grams(*arguments) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_the_edge_of_the_relu(device) -> None:
    grad, y = torch.ones(2, 1, 3, 5, device=device)
    y[0, 1, 2] = float("nan")
    scale, shift = torch.ones(3, device=device), torch.tensor([-1.0, 1.0, 0.0], device=device)
    g, before, after = activation_grams(grad, y, scale, shift, True, True)
    assert (g[0, 0] == 0).all()  # exactly on the edge: no gradient
    assert (g[0, 1:] == 1).all()
    assert before[0, 2].isnan().tolist() == [False, True, False]
    assert after.isnan().any(dim=2).tolist() == [[False, True, False]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 19, 40])  # of a tile and more
def test_y_in_8_bits(channels, dtype, layout, sides, device, poisoned_memory) -> None:
    """As of the map that the codes stand for, with the mask that they tell."""
    grad, y = (maps((2, channels, 13, 5), dtype, layout, device) for _ in range(2))
    scale, shift = affine(channels, device)
    codes, grid = definition.quantize(y, scale.contiguous(), shift.contiguous())
    g, before, after = activation_grams(grad, codes, scale, shift, *sides, grid)
    expected = definition.quantized_backward(grad, codes, grid, scale)
    assert torch.equal(g, expected) and g.stride() == y.stride()
    decoded = definition.dequantize(codes, grid, None, None, dtype)
    x = definition.dequantize(codes, grid, scale, shift, dtype)
    # what x is the difference of beside the edge
    sizes = decoded.double().abs() * scale.double().abs()[:, None, None]
    sizes = torch.where(x > 0, sizes + shift.double().abs()[:, None, None], 0)
    for matrix, asked, pair in ((before, sides[0], (g, decoded)), (after, sides[1], (x, grad))):
        if not asked:
            assert matrix.numel() == 0
            continue
        exact = [factor.double() for factor in pair]
        rounded = sizes if pair[0] is x else exact[0].abs()
        terms = reference.gram(rounded, exact[1].abs())
        turns = dtype != torch.float32  # a value may round the other way
        assert_error_within(
            matrix,
            reference.gram(*pair),
            reference.gram(*exact),
            magnitude=terms if turns else accumulated(terms, torch.float32),
            dtype=dtype,
            channel_dim=None,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_refuses_float64(device) -> None:
    x = torch.randn(1, 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="activation_gradients: y: expected float32, bfloat16 or"):
        activation_grams(x, x, x[0, :, 0], x[0, :, 0], True, True)


def test_configurations() -> None:
    problems = TUNABLES["activation_gradients"]()
    assert len({problem.key() for problem in problems}) == len(problems)
    for problem in [*problems, Problem(37, 9, 1, torch.float32, False)]:
        for arch in (80, 89, 90):
            first, *others = problem.candidates(arch)
            tiles = -(-problem.channels // first["BLOCK_A"])
            tiles *= -(-problem.channels // first["BLOCK_B"])
            assert tiles * problem.sides * first["SPLITS"] >= 64  # not most of the GPU idle
            assert all(1 <= config["SPLITS"] <= 4 * 3 * 132 for config in (first, *others))
