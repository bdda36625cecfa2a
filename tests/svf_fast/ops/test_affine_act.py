"""affine_act and affine_act_backward against their definitions in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svf_fast.ops.affine_act import (
    affine_act,
    affine_act_,
    affine_act_backward,
    affine_act_backward_,
)
from svf_fast.reference import affine_act as reference
from tests.svf_fast.drawn import maps
from tests.svf_fast.tolerance import assert_error_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Rows that end inside a vector, a byte and a block; fewer elements than a vector; more than a unit
# of work; every rank; nothing at all.
SHAPES = [
    (2, 3, 5, 7),
    (3, 17, 1),
    (1, 1, 9),
    (5, 130, 9, 9),
    (2, 1100, 3, 3),
    (1, 5, 101, 99),
    (4, 7),
    (2, 3, 4, 5, 6),
    (2, 64, 8, 8),
    (0, 4, 3, 3),
    (2, 0, 3, 3),
]


def channels(count, dtype, device="cpu", zero=0) -> Tensor:
    """Of either sign, one of them zero: a batch norm's weight may be all of these."""
    values = torch.randn(count, dtype=torch.float64, device=device)
    values[zero : zero + 1] = 0
    return values.to(torch.promote_types(dtype, torch.float32))


def affine(count, dtype, device) -> tuple[Tensor, Tensor]:
    return channels(count, dtype, device), channels(count, dtype, device, zero=1)


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check(shape, dtype, layout, device, residual, scaled, relu) -> None:
    y = maps(shape, dtype, layout, device)
    scale, shift = affine(shape[1], dtype, device)
    other = maps(shape, dtype, layout, device) if residual else None
    factor = channels(shape[1], dtype, device) if scaled else None
    out, mask = affine_act(y, scale, shift, other, factor, relu=relu, mask=True)
    arguments = (y, scale, shift, other, factor)
    size = widened(*(None if x is None else x.abs() for x in arguments))
    assert_error_within(
        out,
        reference.affine_act(*arguments, relu=relu),
        reference.affine_act(*widened(*arguments), relu=relu),
        # the terms may cancel; in float64 the truth itself rounds four times
        magnitude=reference.affine_act(*size) * (4 if dtype == torch.float64 else 1),
        channel_dim=1,
        name="out",
    )
    if not relu:
        assert mask.numel() == 0
        return
    assert torch.equal(mask, reference.pack_mask(out))
    grad = maps(shape, dtype, "contiguous", device).contiguous(memory_format=torch.preserve_format)
    grad = torch.empty_like(out).copy_(grad)
    for by in (None, scale):
        got = affine_act_backward(grad, mask=mask, scale=by)
        truth = reference.affine_act_backward(grad.double(), None, mask, *widened(by), None)
        eager = reference.affine_act_backward(grad, None, mask, by, None)
        assert_error_within(got, eager, truth, channel_dim=None, name="grad by mask")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype, layout, device, poisoned_memory) -> None:
    for residual, scaled, relu in ((0, 0, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0)):
        check(shape, dtype, layout, device, residual, scaled, bool(relu))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_from_y(shape, dtype, layout, device, poisoned_memory) -> None:
    y = maps(shape, dtype, layout, device)
    grad = maps(shape, dtype, "contiguous", device)
    scale, shift = affine(shape[1], dtype, device)
    out, mask = affine_act(y, scale, shift, mask=True)
    got = affine_act_backward(grad, y=y, scale=scale, shift=shift)
    assert out.stride() == got.stride()
    by_mask = affine_act_backward(torch.empty_like(out).copy_(grad), mask=mask, scale=scale)
    if dtype != torch.float16:  # whose rounding makes zeros of small activations
        assert torch.equal(got, by_mask)
    arguments = (grad, y, None, scale, shift)
    # the definition in float64 may see the other sign of a z at rounding
    z = reference.affine_act(*widened(y, scale, shift), relu=False)
    terms = reference.affine_act(*widened(y.abs(), scale.abs(), shift.abs()))
    sure = z.abs() > 4 * torch.finfo(scale.dtype).eps * terms
    truth = reference.affine_act_backward(*widened(*arguments))
    eager = reference.affine_act_backward(*arguments)
    assert sure.double().mean() > 0.99 or sure.numel() < 200
    got_sure, eager, truth = got * sure, eager * sure, truth * sure
    assert_error_within(got_sure, eager, truth, channel_dim=1, name="grad by y")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(shape, dtype, layout, device) -> None:
    y, residual = maps(shape, dtype, layout, device), maps(shape, dtype, "contiguous", device)
    scale, shift = affine(shape[1], dtype, device)
    out, mask = affine_act(y, scale, shift, residual, mask=True)
    grad = torch.empty_like(out).copy_(maps(shape, dtype, "contiguous", device))
    for arguments in ({"mask": mask}, {"y": y, "scale": scale, "shift": shift}):
        expected = affine_act_backward(grad, **arguments)
        mine = grad.clone(memory_format=torch.preserve_format)
        assert affine_act_backward_(mine, **arguments) is mine
        assert torch.equal(mine, expected)
    assert torch.equal(affine_act_(y, scale, shift, residual, mask=True), mask)
    assert torch.equal(y, out)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(["contiguous", "channels_last", "sliced"]),
    st.booleans(),
)
def test_any_shape(shape, dtype, layout, residual) -> None:
    check(tuple(shape), dtype, layout, "cpu", residual, False, True)


def shifted(x: Tensor, offset: int) -> Tensor:
    """A copy in the same layout that begins `offset` elements into its memory."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    return storage[offset:].as_strided(x.shape, x.stride()).copy_(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "offsets", [(0, 0, 1, 0), (1, 0, 0, 0), (0, 3, 0, 0), (8, 8, 4, 1)], ids=str
)
def test_any_alignment(offsets, dtype, layout, device) -> None:
    """Of y, residual, the channels' vectors and the mask; the result is the same bit by bit."""
    y, residual = (maps((2, 24, 5, 7), dtype, layout, device) for _ in range(2))
    scale, shift = affine(24, dtype, device)
    out, mask = affine_act(y, scale, shift, residual, mask=True)
    grad = affine_act_backward(out, mask=mask, scale=scale)
    y, residual = shifted(y, offsets[0]), shifted(residual, offsets[1])
    scale, shift = shifted(scale, offsets[2]), shifted(shift, offsets[2])
    again, bits = affine_act(y, scale, shift, residual, mask=True)
    assert torch.equal(again, out)
    assert torch.equal(bits, mask)
    arriving = shifted(out, offsets[0])
    got = affine_act_backward(arriving, mask=shifted(mask, offsets[3]), scale=scale)
    assert torch.equal(got, grad)
    by_y = affine_act_backward(out, y=y, scale=scale, shift=shift)
    assert torch.equal(affine_act_backward_(arriving, y=y, scale=scale, shift=shift), by_y)
    assert torch.equal(affine_act_(y, scale, shift, residual, mask=True), mask)
    assert torch.equal(y, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_single_rounding_is_the_definition_bit_by_bit(dtype, layout, device) -> None:
    y, grad = (maps((3, 40, 7, 5), dtype, layout, device) for _ in range(2))
    scale, none = channels(40, dtype, device), torch.zeros_like(channels(40, dtype, device))
    out, mask = affine_act(y, scale, none, mask=True)
    assert torch.equal(out, reference.affine_act(y, scale, none))
    got = affine_act_backward(grad, mask=mask, scale=scale)
    assert torch.equal(got, reference.affine_act_backward(grad, None, mask, scale, None))
    got = affine_act_backward(grad, y=y, scale=scale, shift=none)
    assert torch.equal(got, reference.affine_act_backward(grad, y, None, scale, none))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("count", [1, 2, 8, 12, 96, 100, 264, 2048])
def test_any_number_of_channels(count, layout, device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check((2, count, 5, 3), dtype, layout, device, True, True, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_one_round_of_a_grid(layout, device) -> None:
    y, residual = (maps((5, 24, 190, 190), torch.float32, layout, device) for _ in range(2))
    scale, shift = affine(24, torch.float32, device)
    out, mask = affine_act(y, scale, shift, residual, mask=True)
    grad = affine_act_backward(residual, y=y, scale=scale, shift=shift)
    assert torch.equal(mask, reference.pack_mask(out))
    for image in range(5):
        at = slice(image, image + 1)
        part, _ = affine_act(y[at], scale, shift, residual[at])
        assert torch.equal(part, out[at])
        part = affine_act_backward(residual[at], y=y[at], scale=scale, shift=shift)
        assert torch.equal(part, grad[at])


def test_special_values() -> None:
    """Zero does not pass, NaN and +inf do: as in the gradient of torch's relu."""
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan, 1.0, -1.0])
    for dtype in DTYPES:
        y = values.to(dtype).reshape(1, 1, -1)
        one = torch.ones(1, dtype=torch.promote_types(dtype, torch.float32))
        out, mask = affine_act(y, one, one - 1, mask=True)
        leaf = y.clone().requires_grad_()
        leaf.relu().backward(torch.ones_like(leaf))
        passes = reference.unpack_mask(mask, y)
        assert torch.equal(passes, leaf.grad.bool()), dtype
        assert torch.equal(out.nan_to_num(), y.relu().nan_to_num()), dtype
        got = affine_act_backward(torch.ones_like(y), mask=mask)
        assert torch.equal(got, leaf.grad)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets_agree_with_the_definition(capability) -> None:
    """The kernels of lower instruction sets, which this machine would not choose."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    chosen = ["-q", "-p", "no:cacheprovider", __file__, "-k", "any_shape or special_values"]
    command = [sys.executable, "-m", "pytest", *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_does_not_depend_on_the_number_of_threads() -> None:
    y = torch.randn(3, 67, 41, 43)
    scale, shift = torch.randn(67), torch.randn(67)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(affine_act(y, scale, shift, mask=True))
    torch.set_num_threads(threads)
    for out, mask in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(mask, results[0][1])


def test_opcheck() -> None:
    y = torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    scale = torch.randn(5)
    ops = torch.ops.svf_fast
    for arguments in (
        (y, scale, scale, None, None, True, True),
        (y, scale, scale, y.contiguous(), scale, False, False),
    ):
        torch.library.opcheck(ops.affine_act.default, arguments)
        torch.library.opcheck(ops.affine_act_.default, (y.clone(), *arguments[1:]))
    _, mask = ops.affine_act(y, scale, scale, None, None, True, True)
    for arguments in ((y, y, None, scale, scale), (y, None, mask, None, None)):
        torch.library.opcheck(ops.affine_act_backward.default, arguments)
        torch.library.opcheck(ops.affine_act_backward_.default, (y.clone(), *arguments[1:]))


y, vector = torch.randn(2, 5, 3, 3), torch.randn(5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: affine_act(y, vector.double(), vector),
            TypeError,
            "scale: expected torch.float32",
        ),
        (lambda: affine_act(y, vector, vector[:4]), ValueError, r"shift: expected shape \[5\]"),
        (lambda: affine_act(y, vector, vector, y[:1]), ValueError, r"residual: expected shape \[2"),
        (lambda: affine_act(y.int(), vector, vector), TypeError, "y: expected float64"),
        (lambda: affine_act_backward(y), ValueError, "either y or mask"),
        (lambda: affine_act_(y[..., ::2], vector, vector), ValueError, "y: expected a contiguous"),
        (lambda: affine_act_backward(y, y=y), ValueError, "scale and shift"),
        (
            lambda: affine_act_backward(y, mask=torch.zeros(3, dtype=torch.uint8)),
            ValueError,
            "mask: expected 24 bytes .* got 3",
        ),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
