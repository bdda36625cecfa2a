"""channel_dot and channel_dot_scale_ against their definitions in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.reference import channel_dot as reference
from tests.svf_fast.drawn import maps
from tests.svf_fast.tolerance import assert_error_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]
DENSE = LAYOUTS[:2]

# Odd sizes, so that no row starts or ends on a vector; one and many channels; rows longer than a
# unit of work and maps of fewer elements than a vector; every rank; nothing at all.
SHAPES = [
    (2, 3, 5, 7),
    (3, 17, 1),
    (1, 1, 9),
    (2, 1, 33, 33),
    (5, 130, 9, 9),
    (2, 1100, 3, 3),
    (1, 5, 201, 199),
    (4, 7),
    (3000, 33),
    (2, 3, 4, 5, 6),
    (0, 4, 3, 3),
    (2, 4, 0, 3),
    (2, 0, 3, 3),
]


def check_dot(actual: Tensor, a: Tensor, b: Tensor) -> None:
    # wider than float64, so that float64 has an error to measure too
    terms = a.cpu().double().numpy().astype(np.longdouble) * b.cpu().double().numpy()
    dims = tuple(dim for dim in range(a.dim()) if dim != 1)
    truth = torch.from_numpy(terms.sum(dims).astype(np.float64))
    # the size of a sum of terms of either sign: this is what is rounded on the way
    spread = torch.from_numpy(np.sqrt((terms**2).sum(dims)).astype(np.float64))
    assert actual.dtype == torch.promote_types(a.dtype, torch.float32)
    assert_error_within(
        actual,
        reference.channel_dot(a, b),
        truth,
        magnitude=2 * torch.maximum(spread, truth.abs()),  # eager is lucky on a few channels
        name="channel_dot",
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, dtype, layout, device, poisoned_memory) -> None:
    a, b = maps(shape, dtype, layout, device), maps(shape, dtype, layout, device)
    check_dot(channel_dot(a, b), a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_matches_definition(shape, dtype, layout, device, poisoned_memory) -> None:
    a, v = maps(shape, dtype, layout, device), maps(shape, dtype, layout, device)
    s = torch.randn(shape[1], dtype=torch.promote_types(dtype, torch.float32), device=device)
    expected, written = a.clone(), a.clone()
    reference.channel_dot_scale_(expected, v, s)
    dot = channel_dot_scale_(written, v, s)
    check_dot(dot, a, v)
    assert torch.equal(written, expected)  # one product, rounded once: the same bits
    assert written.stride() == a.stride()
    assert torch.equal(dot, channel_dot(a, v))


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_operands_of_different_layouts(left: str, right: str) -> None:
    shape = (3, 6, 5, 4)
    a, b = maps(shape, torch.float32, left), maps(shape, torch.float32, right)
    check_dot(channel_dot(a, b), a, b)
    if left in DENSE:
        s = torch.randn(6)
        expected, written = a.clone(), a.clone()
        reference.channel_dot_scale_(expected, b, s)
        check_dot(channel_dot_scale_(written, b, s), a, b)
        assert torch.equal(written, expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    offset=st.integers(0, 3),
)
def test_any_shape_and_alignment(shape, dtype, layout, offset) -> None:
    a, b = maps(shape, dtype, layout), maps(shape, dtype, layout)
    if layout == "contiguous":
        storage = torch.empty(b.numel() + offset, dtype=dtype)
        b = storage[offset:].view(shape).copy_(b)
    check_dot(channel_dot(a, b), a, b)


def test_large_cancelling_sums_stay_accurate() -> None:
    # a float32 accumulator alone would lose the second term: 2^24 + 1 = 2^24
    a = torch.ones(1, 2, 3 * 16384)
    a[:, :, 0] = 2.0**26
    a[:, :, -1] = -(2.0**26)
    for maps_a in (a, a.movedim(1, -1).contiguous().movedim(-1, 1)):
        dot = channel_dot(maps_a, torch.ones_like(maps_a))
        assert (dot - (3 * 16384 - 2)).abs().max() <= 64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_come_through_in_their_channel_alone(value, dtype) -> None:
    a = torch.ones(2, 3, 19, dtype=dtype)
    a[1, 1, 7] = value
    s = torch.ones(3, dtype=torch.promote_types(dtype, torch.float32))
    dot = channel_dot_scale_(a, torch.ones_like(a), s)
    assert torch.equal(dot[1].isnan(), a[1, 1, 7].isnan())
    assert not dot[1].isfinite()
    assert dot[[0, 2]].tolist() == [38.0, 38.0]
    assert a.isfinite().sum() == a.numel() - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_and_written_exactly(dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].reshape(1, 1, -1)
    for factor in (1.0, 1.0009765625, 0.3, 3e-5, -7.0):
        s = torch.tensor([factor])
        written, expected = finite.clone(), finite.clone()
        channel_dot_scale_(written, torch.zeros_like(finite), s)
        reference.channel_dot_scale_(expected, torch.zeros_like(finite), s)
        assert torch.equal(written.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("layout", DENSE)
def test_does_not_depend_on_the_number_of_threads(layout: str) -> None:
    a, b = (maps((3, 70, 41, 41), torch.float32, layout) for _ in range(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(channel_dot(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability: str, tmp_path: Path, monkeypatch) -> None:
    # the instruction set is chosen once per process, by torch's own variable
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    inputs = []
    for dtype, layout in itertools.product(DTYPES, DENSE):
        s = torch.randn(37, dtype=torch.promote_types(dtype, torch.float32))
        inputs.append((*(maps((3, 37, 11, 13), dtype, layout) for _ in range(2)), s))
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n"
        "from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_\n"
        "from svf_fast import _C\n"
        "results = []\n"
        "for a, b, s in torch.load(sys.argv[1] + '/inputs.pt'):\n"
        "    dot = channel_dot(a, b)\n"
        "    assert torch.equal(channel_dot_scale_(a, b, s), dot)\n"
        "    results.append((dot, a))\n"
        "torch.save(results, sys.argv[1] + '/results.pt')\n"
        "print(_C.build_facts()['instruction_set'])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "avx512" not in done.stdout
    for (a, b, s), (dot, written) in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        check_dot(dot, a, b)
        reference.channel_dot_scale_(a, b, s)
        assert torch.equal(written, a)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device) -> None:
    a, b = (
        maps((2, 3, 5, 7), dtype, "contiguous", device),
        maps((2, 3, 5, 7), dtype, "sliced", device),
    )
    torch.library.opcheck(torch.ops.svf_fast.channel_dot.default, (a, b))
    s = torch.rand(3, device=device)
    torch.library.opcheck(torch.ops.svf_fast.channel_dot_scale_.default, (a, b, s))


def test_compiles_as_one_graph() -> None:
    def backward(a: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = a * 2
        dot = channel_dot_scale_(a, v, s)
        return dot, a, channel_dot(a, v)

    compiled = torch.compile(backward, fullgraph=True)
    for shape in [(2, 3, 5, 7), (1, 3, 9, 2)]:
        a, v = torch.randn(shape), torch.randn(shape)
        s = torch.rand(3)
        for expected, actual in zip(backward(a, v, s), compiled(a, v, s), strict=True):
            torch.testing.assert_close(actual, expected)


def test_compiled_mutation_of_an_input_is_seen() -> None:
    a, v, s = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.rand(3)
    expected = a * s[:, None]
    torch.compile(channel_dot_scale_, fullgraph=True)(a, v, s)
    torch.testing.assert_close(a, expected)


def test_first_and_second_gradient() -> None:
    a, b = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(channel_dot, (a, b))
    assert torch.autograd.gradgradcheck(channel_dot, (a, b))


def test_scale_marks_its_operand_as_changed() -> None:
    a = torch.randn(2, 3, 4)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = x * a  # saves a
    channel_dot_scale_(a, torch.ones_like(a), torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


A = torch.zeros(2, 3, 4)
S = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: channel_dot([1.0], A), TypeError, "a: expected a tensor, got list"),
        (lambda: channel_dot(A.int(), A.int()), TypeError, "a: expected float64.*got torch.int32"),
        (lambda: channel_dot(A, A.double()), TypeError, "b: expected torch.float32 as a, got"),
        (
            lambda: channel_dot(A, A[:, :2]),
            ValueError,
            r"b: expected shape \[2, 3, 4\].*\[2, 2, 4\]",
        ),
        (lambda: channel_dot(A[0, 0], A[0, 0]), ValueError, r"at least two dimensions.*\[4\]"),
        (lambda: channel_dot(A, A.to("meta")), ValueError, "b: expected device cpu as a, got meta"),
        (lambda: channel_dot_scale_(A, A, S.double()), TypeError, "s: expected torch.float32 for"),
        (lambda: channel_dot_scale_(A.bfloat16(), A.bfloat16(), S.bfloat16()), TypeError, "s: exp"),
        (
            lambda: channel_dot_scale_(A, A, S[:2]),
            ValueError,
            r"s: expected shape \[3\].*got \[2\]",
        ),
        (lambda: channel_dot_scale_(A, A, S.to("meta")), ValueError, "s: expected device cpu"),
        (
            lambda: channel_dot_scale_(A[..., ::2], A[..., ::2], S),
            ValueError,
            "a: expected a contiguous or channels_last.*a.contiguous",
        ),
        (
            lambda: channel_dot_scale_(A.clone().requires_grad_(), A, S),
            RuntimeError,
            "call it under torch.no_grad",
        ),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_memory_is_safe_behind_the_python_checks() -> None:
    raw = torch.ops.svf_fast
    with pytest.raises(RuntimeError, match="differ in shape"):
        raw.channel_dot(A, torch.zeros(2, 3, 5))
    with pytest.raises(RuntimeError, match="differ in dtype"):
        raw.channel_dot(A, A.half())
    with pytest.raises(RuntimeError, match=r"s must be \[C\]"):
        raw.channel_dot_scale_(A, A, torch.zeros(2))
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        raw.channel_dot_scale_(A[:1].expand(2, 3, 4), A, S)
    storage = torch.zeros(100)
    with pytest.raises(RuntimeError, match="share memory"):
        raw.channel_dot_scale_(storage[:24].view(2, 3, 4), storage[4:28].view(2, 3, 4), S)
