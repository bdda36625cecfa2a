"""The Triton kernel of gram against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svf_fast.reference import gram as reference
from tests.svf_fast.drawn import maps
from tests.svf_fast.ops.test_quantize import GRAMS, check_gram
from tests.svf_fast.tolerance import accumulated, assert_error_within

pytest.importorskip("triton")
from svf_fast.triton.gram import TUNABLES, Problem, gram

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]  # cpu: the interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]

# Images, channels of a and of b, groups, spatial. Odd sizes; one channel; channels per group beside
# a tile's; no spatial dimension; several splits and a last one that is shorter; nothing at all.
CASES = [
    (2, 3, 5, 1, (11, 7)),
    (3, 12, 6, 3, (9,)),
    (2, 4, 4, 4, (5, 3)),
    (1, 1, 17, 1, (3, 3)),
    (70, 6, 9, 3, ()),
    (2, 33, 18, 1, (2, 3, 4)),
    (1, 32, 64, 1, (8, 12)),
    (0, 4, 3, 1, (3, 3)),
    (2, 4, 3, 1, (0, 3)),
    (2, 0, 3, 1, (3, 3)),
]


def affine(channels: int, device: str) -> tuple[Tensor, Tensor]:
    scale, shift = torch.randn(channels, 2, device=device).unbind(1)  # with gaps; negative too
    scale[::5] = 0
    return scale, shift


def check(actual: Tensor, a: Tensor, b: Tensor, groups: int, scale=None, shift=None) -> None:
    exact = a.double()
    if scale is not None:  # rounded only where eager rounds it
        shape = (-1, *[1] * (a.dim() - 2))
        exact = exact * scale.double().reshape(shape) + shift.double().reshape(shape)
        exact = exact.relu().to(a.dtype).double()
    truth = reference.gram(exact, b.double(), groups)
    terms = reference.gram(exact.abs(), b.double().abs(), groups)
    assert actual.shape == truth.shape
    assert actual.dtype == torch.float32
    # a rebuilt 16-bit value may round the other way than in float64: one eps of it
    turns = scale is not None and a.dtype != torch.float32
    assert_error_within(
        actual,
        reference.gram(a, b, groups, scale, shift),
        truth,
        magnitude=terms if turns else accumulated(terms, torch.float32),
        dtype=a.dtype if turns else torch.float32,
        channel_dim=None,
        name="gram",
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_definition(case, dtype, layout, device, poisoned_memory) -> None:
    images, width_a, width_b, groups, spatial = case
    a = maps((images, width_a, *spatial), dtype, layout, device)
    b = maps((images, width_b, *spatial), dtype, layout, device)
    for arguments in ((a, b, groups), (a, b, groups, *affine(width_a, device))):
        check(gram(*arguments), *arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", (False, True), ids=("b is codes", "a is codes"))
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRAMS)
def test_of_codes(case, dtype, layout, left, device, poisoned_memory) -> None:
    check_gram(gram, case, dtype, layout, left, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_maps_of_different_layouts(left, right, device) -> None:
    a = maps((3, 6, 5, 4), torch.bfloat16, left, device)
    b = maps((3, 9, 5, 4), torch.bfloat16, right, device)
    arguments = (a, b, 3, *affine(6, device))
    check(gram(*arguments), *arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_any_number_of_splits(splits, layout, device, poisoned_memory) -> None:
    a, b = (maps((3, width, 35), torch.float32, layout, device) for width in (20, 37))
    config = {"BLOCK_A": 16, "BLOCK_B": 32, "BLOCK_P": 16, "SPLITS": splits}
    check(gram(a, b, config=config), a, b, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_many_channels(device) -> None:
    a, b = (maps((1, width, 3, 7), torch.bfloat16, "channels_last", device) for width in (2048, 65))
    config = {"BLOCK_A": 256, "BLOCK_B": 128, "BLOCK_P": 16, "SPLITS": 2}
    arguments = (a, b, 1, *affine(2048, device))
    check(gram(*arguments, config=config if device == "cpu" else None), *arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_equal_from_run_to_run(device) -> None:
    a, b = (maps((3, width, 67), torch.bfloat16, "channels_last", device) for width in (18, 20))
    torch.testing.assert_close(gram(a, b), gram(a, b), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_and_infinite_shift_does_not_leak(device) -> None:
    a, b = torch.randn(2, 1, 4, 5, 5, device=device).half()
    a[0, 2, 1, 1] = float("nan")
    scale, shift = torch.full((4,), 8192.0, device=device), torch.full((4,), 7e4, device=device)
    a[0, :2] = -4.0  # 7e4 - 4 · 8192 fits in float16, and 7e4 alone does not
    M = gram(a, b, 1, scale, shift)
    assert M[0, 2].isnan().all()
    assert M[0, :2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_refuses_float64(device) -> None:
    x = torch.randn(1, 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="gram: a: expected float32, bfloat16 or float16"):
        gram(x, x)


def test_configurations() -> None:
    problems = TUNABLES["gram"]()
    assert len({problem.key() for problem in problems}) == len(problems)
    odd = Problem(37, 301, 2, 9, torch.float32, True, False)
    for problem in [*problems, odd]:
        for arch in (80, 89, 90):
            first, *others = problem.candidates(arch)
            tiles = -(-problem.width_a // first["BLOCK_A"]) * -(
                -problem.width_b // first["BLOCK_B"]
            )
            assert tiles * problem.groups * first["SPLITS"] >= 64  # not most of the GPU idle
            assert all(1 <= config["SPLITS"] <= 4 * 3 * 132 for config in (first, *others))
