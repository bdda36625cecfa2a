"""gram against its definition in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svf_fast.ops.gram import gram, gram_by_images
from svf_fast.ops.gram_gradient import gram_gradient
from svf_fast.reference.gram import gram as definition
from tests.svf_fast.drawn import maps
from tests.svf_fast.tolerance import accumulated, assert_error_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]
DENSE = LAYOUTS[:2]

# Images, channels of a and of b, groups, spatial. Odd sizes; one channel, depthwise, no spatial
# dimension; more positions than are packed at once, of one image and of all; nothing at all.
CASES = [
    (2, 3, 5, 1, (5, 7)),
    (3, 12, 6, 3, (9,)),
    (2, 8, 8, 8, (5, 3)),
    (1, 1, 17, 1, (3, 3)),
    (9, 1, 3, 1, ()),
    (70, 6, 9, 3, ()),
    (4, 6, 4, 2, (1, 1)),
    (2, 33, 18, 1, (2, 3, 4)),
    (1, 5, 7, 1, (47, 45)),
    (3, 4, 6, 2, (31, 33)),
    (0, 4, 3, 1, (3, 3)),
    (2, 4, 3, 1, (0, 3)),
    (2, 0, 3, 1, (3, 3)),
]


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = torch.randn(2, channels, dtype=wide)  # negative scales too
    scale[::5] = 0
    return scale, shift


def rebuilt(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """a' in float64, rounded to the dtype of a only where eager rounds it."""
    shape = (-1, *[1] * (a.dim() - 2))
    exact = a.double() * scale.double().reshape(shape) + shift.double().reshape(shape)
    return exact.relu().to(a.dtype).double()


def check(actual: Tensor, a: Tensor, b: Tensor, groups: int, scale=None, shift=None) -> None:
    exact = a.double() if scale is None else rebuilt(a, scale, shift)
    truth = definition(exact, b.double(), groups)
    terms = definition(exact.abs(), b.double().abs(), groups)
    assert actual.shape == truth.shape
    assert actual.dtype == torch.promote_types(a.dtype, torch.float32)
    # a rebuilt 16-bit value may round the other way than in float64: one eps of it
    turns = scale is not None and a.dtype != actual.dtype
    assert_error_within(
        actual,
        definition(a, b, groups, scale, shift),
        truth,
        magnitude=terms if turns else accumulated(terms, actual.dtype),
        dtype=a.dtype if turns else actual.dtype,
        channel_dim=None,
        name="gram",
    )


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_definition(case, dtype, layout, prologue, poisoned_memory) -> None:
    images, rows, columns, groups, spatial = case
    a = maps((images, rows, *spatial), dtype, layout)
    b = maps((images, columns, *spatial), dtype, layout)
    arguments = (a, b, groups, *(affine(rows, dtype) if prologue else ()))
    check(gram(*arguments), *arguments)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_different_layouts(left, right, dtype) -> None:
    a, b = maps((3, 6, 5, 4), dtype, left), maps((3, 9, 5, 4), dtype, right)
    check(gram(a, b, 3), a, b, 3)
    scale, shift = affine(6, dtype)
    check(gram(a, b, 3, scale, shift), a, b, 3, scale, shift)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 4),
    groups=st.integers(1, 3),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    spatial=st.lists(st.integers(1, 30), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    prologue=st.booleans(),
)
def test_any_shape(images, groups, rows, columns, spatial, dtype, layouts, prologue) -> None:
    a = maps((images, groups * rows, *spatial), dtype, layouts[0])
    b = maps((images, groups * columns, *spatial), dtype, layouts[1])
    arguments = (a, b, groups, *(affine(groups * rows, dtype) if prologue else ()))
    check(gram(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", DENSE)
def test_the_rebuilt_map_is_rounded_as_it_would_be_stored(dtype, layout) -> None:
    # products with a unit map give the rebuilt values themselves
    a = maps((1, 37, 3, 5), dtype, layout)
    scale, shift = affine(37, dtype)
    b = torch.eye(15).reshape(1, 15, 3, 5).to(dtype)
    found = gram(a, b, 1, scale, shift)[0].reshape(1, 37, 3, 5)
    assert torch.equal(found, found.to(dtype).to(found.dtype))
    shape = (1, -1, 1, 1)
    # one rounding of the sum apart where the product is not rounded before it (fused)
    expected = (a.to(scale.dtype) * scale.reshape(shape) + shift.reshape(shape)).relu().to(dtype)
    torch.testing.assert_close(found.to(dtype), expected)
    assert (found.to(dtype) != expected).double().mean() < (0.01 if dtype.itemsize == 2 else 0.5)


def test_nan_stays_in_the_rebuilt_map() -> None:
    a, b = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    a[0, 1, 2] = torch.nan
    one, zero = torch.ones(3), torch.zeros(3)
    for implementation in (gram, gram_by_images):
        found = implementation(a, b, 1, one, zero).isnan()
        assert found[0].all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_without_a_kernel_compute_the_definition(dtype, prologue) -> None:
    a, b = maps((3, 6, 5, 4), dtype, "contiguous"), maps((3, 4, 5, 4), dtype, "contiguous")
    scale, shift = affine(6, dtype) if prologue else (None, None)
    check(gram_by_images(a, b, 2, scale, shift), a, b, 2, scale, shift)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    inputs = []
    for dtype in DTYPES:
        for layout in DENSE:
            a, b = maps((2, 37, 11, 3), dtype, layout), maps((2, 5, 11, 3), dtype, layout)
            inputs.append((a, b, 1, *affine(37, dtype)))
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n"
        "from svf_fast.ops.gram import gram\n"
        "from svf_fast import build_info\n"
        "inputs = torch.load(sys.argv[1] + '/inputs.pt')\n"
        "torch.save([gram(*arguments) for arguments in inputs], sys.argv[1] + '/results.pt')\n"
        "print(build_info()['instruction_set'])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "avx512" not in done.stdout
    for arguments, found in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        check(found, *arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, layout) -> None:
    a, b = maps((2, 6, 5, 7), dtype, layout), maps((2, 4, 5, 7), dtype, "contiguous")
    scale, shift = affine(6, dtype)
    torch.library.opcheck(torch.ops.svf_fast.gram.default, (a, b, 2, None, None))
    torch.library.opcheck(torch.ops.svf_fast.gram.default, (a, b, 2, scale, shift))


def test_compiles_as_one_graph() -> None:
    def gradient(a, b, U, S, scale, shift):
        return gram_gradient(gram(a, b * 2, 1, scale, shift), U, U, S)

    arguments = (torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7), torch.randn(1, 6, 4))
    arguments += (torch.rand(1, 4), *affine(6, torch.float32))
    expected = gradient(*arguments)
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True)(*arguments), expected)


def test_autocast_does_not_touch_it() -> None:
    a, b = maps((2, 6, 5, 7), torch.float32, "contiguous"), torch.randn(2, 4, 5, 7)
    expected = gram(a, b, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram(a, b, 2), expected)
        torch.testing.assert_close(gram_by_images(a, b, 2, None, None), expected)


A, B, S = torch.zeros(2, 4, 3), torch.zeros(2, 6, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], B), TypeError, "a: expected a tensor, got list"),
        ((A.int(), B.int()), TypeError, "a: expected float64.*got torch.int32"),
        ((A, B.double()), TypeError, "b: expected torch.float32 as a, got torch.float64"),
        ((A[0, 0], B), ValueError, r"a: expected \[N, C, \*spatial\], got shape \[3\]"),
        ((A, B[:1]), ValueError, r"b: .*positions of a, \[2, 4, 3\], got \[1, 6, 3\]"),
        ((A, B[:, :, :2]), ValueError, r"b: .*positions of a, \[2, 4, 3\], got \[2, 6, 2\]"),
        ((A, B, 4), ValueError, "groups: expected a divisor of 4 and 6 channels, got 4"),
        ((A, B, 0), ValueError, "groups: .*got 0"),
        ((A, B, 1, S), ValueError, "shift: expected a tensor, because scale and shift go together"),
        ((A, B, 1, None, S), ValueError, "scale: expected a tensor, because"),
        ((A, B, 1, S.double(), S), TypeError, "scale: expected torch.float32 for a of torch.float"),
        ((A, B, 1, S, S[:3]), ValueError, r"shift: expected shape \[4\].*got \[3\]"),
        ((A, B.to("meta")), ValueError, "b: expected device cpu, got meta"),
        ((A, B, 1, S, S.to("meta")), ValueError, "shift: expected device cpu, got meta"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        gram(*arguments)


def test_memory_is_safe_behind_the_python_checks() -> None:
    raw = torch.ops.svf_fast.gram
    with pytest.raises(RuntimeError, match="differ in images or positions"):
        raw(A, B[:, :, :2], 1, None, None)
    with pytest.raises(RuntimeError, match="differ in dtype"):
        raw(A, B.half(), 1, None, None)
    with pytest.raises(RuntimeError, match="groups must divide"):
        raw(A, B, 4, None, None)
    with pytest.raises(RuntimeError, match="come together"):
        raw(A, B, 1, S, None)
    with pytest.raises(RuntimeError, match=r"scale must be \[C\]"):
        raw(A, B, 1, S[:2], S)
    with pytest.raises(RuntimeError, match="shift must be float32"):
        raw(A, B, 1, S, S.double())
