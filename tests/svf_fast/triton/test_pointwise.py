"""The 1×1 convolution with prologue and epilogue against its definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from svf_fast.ops.pointwise import Extras
from svf_fast.reference import pointwise as reference
from svf_fast.reference.affine_act import mask_bytes, pack_mask
from svf_fast.reference.channel_dot import channel_dot
from svf_fast.reference.pointwise import Epilogue, Prologue
from tests.svf_fast.tolerance import accumulated, assert_error_within

pytest.importorskip("triton")
from svf_fast.triton import passes, pointwise, tune, tuning
from svf_fast.triton.pointwise import Problem, problems
from svf_fast.triton.tuning import SEPARATE

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]  # cpu: Triton's interpreter
# whose tiles are tried; any where the interpreter runs them
ARCHITECTURES = [80, 90]
if torch.cuda.is_available():
    ARCHITECTURES = [90 if torch.cuda.get_device_capability() >= (9, 0) else 80]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# Images, K, D, spatial. As few channels as are served; neither K nor D a multiple of a block; more
# row tiles than a group has; words of masks of every width; no spatial dimension; nothing at all.
CASES = [
    (2, 8, 8, (3, 3)),
    (3, 24, 40, (5, 7)),
    (2, 8, 48, (13, 11)),
    (1, 64, 128, (9, 4)),
    (70, 40, 24, ()),
    (2, 32, 64, (2, 3, 4)),
    (0, 16, 24, (3, 3)),
    (2, 16, 24, (0, 3)),
]
WIDE = (1, 2048, 8, (3, 5)), (1, 8, 2048, (3, 5))

# What a residual block asks for: the calls of conv1 and conv3, of a shortcut, and the way back.
CALLS: dict[str, set[str]] = {
    "plain": set(),
    "conv1": {"scale", "shift", "relu", "keep"},
    "conv3": {"in", "scale", "shift", "residual", "relu", "mask"},
    "conv3 with shortcut": {"in", "scale", "shift", "residual", "residual_scale", "relu", "mask"},
    "dgrad of conv3": {"in_mask", "transposed"},
    "dgrad of conv1": {"residual", "residual_mask", "transposed"},
    "dgrad into a sum": {"in_mask", "residual", "transposed"},
    "everything": {
        *("in", "in_mask", "scale", "shift", "residual", "residual_scale", "residual_mask"),
        *("relu", "keep", "mask"),
    },
    "scale": {"scale", "keep", "mask"},
    "shift": {"shift", "transposed"},
}


@pytest.fixture(autouse=True)
def _products_of_float32() -> Iterator[None]:
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    yield
    switch.fp32_precision = before


def rows(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random maps in channels_last."""
    images, channels, *spatial = shape
    x = torch.randn(images, *spatial, channels, dtype=torch.float64)
    return x.to(dtype).to(device).movedim(-1, 1)


def bits(like: Tensor) -> Tensor:
    """A random mask of a map."""
    return pack_mask(torch.randn(like.movedim(1, -1).shape, device=like.device).movedim(-1, 1))


def operands(case: Any, call: set[str], dtype: torch.dtype, device: str) -> dict[str, Any]:
    images, K, D, spatial = case
    x = rows(images, K, *spatial, dtype=dtype, device=device)
    weight = (torch.randn(D, K, dtype=torch.float64) / K**0.5).to(dtype).to(device)
    given: dict[str, Any] = {"x": x, "weight": weight}
    if "transposed" in call:
        given["weight"] = weight.t().contiguous().t()
    if "in" in call:
        given["in_scale"], given["in_shift"] = torch.randn(2, K, device=device)
    if "in_mask" in call:
        given["in_mask"] = bits(x)
    for name in sorted(call & {"scale", "shift", "residual_scale"}):
        given[name] = torch.randn(D, device=device)
    if "residual" in call:
        given["residual"] = rows(images, D, *spatial, dtype=dtype, device=device)
    if "residual_mask" in call:
        given["residual_mask"] = bits(given["residual"])
    return {**given, "relu": "relu" in call}


def tuples(x: Tensor, weight: Tensor, **given: Any) -> tuple[Tensor, Tensor, Prologue, Epilogue]:
    """Return the operands as the op takes them."""
    before = {name: given.pop(f"in_{name}", None) for name in Prologue._fields}
    return x, weight, Prologue(**before), Epilogue(**given)


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The same operands in float64."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def check(given: dict[str, Any], call: set[str]) -> None:
    keep, mask = "keep" in call, "mask" in call
    out, y, packed = pointwise.pointwise(*tuples(**given, keep=keep, mask=mask))
    assert out.movedim(1, -1).is_contiguous()

    eager_out, eager_y = reference.pointwise(*tuples(**given))
    truth_out, truth_y = reference.pointwise(*tuples(**doubled(given)))
    dtype = out.dtype
    size = accumulated(truth_out, dtype)  # what the sum adds to may cancel it
    for name in given.keys() & {"residual", "shift"}:
        size = size + (given[name].double().abs().max() if out.numel() else 0)
    channels = None if given["relu"] else 1  # few positions: rounding may silence a channel
    assert_error_within(out, eager_out, truth_out, magnitude=size, channel_dim=channels, name="out")
    if keep:
        assert_error_within(
            y, eager_y, truth_y, magnitude=accumulated(truth_y, dtype), channel_dim=1, name="y"
        )
    else:
        assert y.numel() == 0
    if mask:
        assert torch.equal(packed, pack_mask(out))
        assert packed.numel() == mask_bytes(out.numel())
    else:
        assert packed.numel() == 0


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("call", "dtype"),
    [(call, dtype) for call in CALLS for dtype in DTYPES[::2]] + [("everything", torch.float16)],
)
def test_calls_of_a_block(call: str, dtype: torch.dtype, device: str) -> None:
    check(operands((3, 24, 40, (5, 7)), CALLS[call], dtype, device), CALLS[call])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=str)
def test_shapes(case: Any, device: str) -> None:
    call = CALLS["everything"]
    check(operands(case, call, torch.bfloat16, device), call)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[6]], ids=str)
def test_dot(case: Any, dtype: torch.dtype, device: str) -> None:
    given = operands(case, {"transposed"}, dtype, device)
    x, weight = given["x"], given["weight"]
    v = rows(x.shape[0], len(weight), *x.shape[2:], dtype=dtype, device=device)
    s = torch.randn(len(weight), device=device)

    scaled, dot = pointwise.pointwise_dot(x, weight, v, s)
    assert dot.dtype == torch.float32
    eager_scaled, eager_dot = reference.pointwise_dot(x, weight, v, s)
    truth = reference.pointwise_dot(*(t.double() for t in (x, weight, v, s)))
    size = accumulated(truth[0], dtype)
    assert_error_within(scaled, eager_scaled, truth[0], magnitude=size, channel_dim=1)
    magnitude = channel_dot(truth[0].abs(), v.double().abs())  # a sum that cancels
    assert_error_within(dot, eager_dot, truth[1], magnitude=magnitude, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_dot_is_of_a_as_it_is_stored(device: str) -> None:
    given = operands((3, 24, 40, (5, 7)), {"transposed"}, torch.bfloat16, device)
    x, weight = given["x"], given["weight"]
    v = rows(3, 40, 5, 7, dtype=torch.bfloat16, device=device)
    s = torch.ones(40, device=device)
    stored, dot = pointwise.pointwise_dot(x, weight, v, s)
    exact = channel_dot(stored.double(), v.double())
    size = channel_dot(stored.double().abs(), v.double().abs())
    assert_error_within(dot, channel_dot(stored, v), exact, magnitude=size)


@pytest.mark.parametrize("device", DEVICES)
def test_tf32_rounds_operands_to_eleven_bits(device: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    given = operands((3, 24, 40, (5, 7)), {"transposed"}, torch.float32, device)
    out = pointwise.pointwise(*tuples(**given))[0]
    eager, truth = (reference.pointwise(*tuples(**x))[0] for x in (given, doubled(given)))
    assert_error_within(out, eager, truth, dtype=torch.float16, channel_dim=1)


@pytest.mark.parametrize("device", DEVICES)
def test_out_comes_from_the_y_that_is_kept(device: str) -> None:
    given = operands((3, 24, 40, (5, 7)), {"scale", "shift"}, torch.bfloat16, device)
    given["scale"] *= 100  # the rounding of y shows
    out, y, _ = pointwise.pointwise(*tuples(**given, keep=True))
    scale, shift = (given[name][:, None, None] for name in ("scale", "shift"))
    exact = y.double() * scale.double() + shift.double()
    assert_error_within(out, (y.float() * scale + shift).bfloat16(), exact, channel_dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_an_architecture(arch: int, dtype: torch.dtype, device: str) -> None:
    call = CALLS["everything"] - {"in"}
    given = operands((2, 128, 256, (5, 7)), call, dtype, device)
    number = "16bit" if dtype == torch.bfloat16 else "tf32x3"
    extras = Extras(in_mask=True, scale=True, residual=True, keep=True, mask=True)
    problem = Problem(70, 128, 256, number, extras)
    expected = pointwise.pointwise(*tuples(**given, keep=True, mask=True))
    for config in problem.candidates(arch):
        actual = pointwise.pointwise(*tuples(**given, keep=True, mask=True), config=config)
        for a, b in zip(actual[:2], expected[:2]):
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(actual[2], pack_mask(actual[0]))


@pytest.mark.parametrize("device", DEVICES)
def test_runs_agree_bitwise(device: str) -> None:
    given = operands((2, 24, 32, (5, 7)), CALLS["everything"], torch.bfloat16, device)
    first, second = (pointwise.pointwise(*tuples(**given, keep=True, mask=True)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    x, weight = given["x"], given["weight"]
    dots = [pointwise.pointwise_dot(x, weight, first[0], given["scale"]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*dots))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_passes_and_is_marked(device: str) -> None:
    given = operands((1, 8, 8, (3, 3)), CALLS["conv3"], torch.float32, device)
    given["x"][0, 3, 1, 1] = float("nan")
    out, _, packed = pointwise.pointwise(*tuples(**given, mask=True))
    assert out[0, :, 1, 1].isnan().all()
    assert out.isnan().sum() == 8
    assert torch.equal(packed, pack_mask(out))


@pytest.mark.parametrize("device", DEVICES)
def test_residual_in_another_layout(device: str) -> None:
    call = CALLS["conv3"]
    given = operands((2, 16, 24, (3, 5)), call, torch.float32, device)
    expected = pointwise.pointwise(*tuples(**given))[0]
    given["residual"] = given["residual"].contiguous()
    assert torch.equal(pointwise.pointwise(*tuples(**given))[0], expected)
    given["residual_mask"] = bits(given["x"])
    with pytest.raises(ValueError, match="channels_last"):
        pointwise.pointwise(*tuples(**given))


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_operands(device: str) -> None:
    call = CALLS["everything"]
    given = operands((4, 16, 24, (3, 5)), call, torch.bfloat16, device)
    expected = pointwise.pointwise(*tuples(**given, keep=True, mask=True))
    for name, x in given.items():
        if not isinstance(x, Tensor):
            continue
        # one place further in memory than what an allocator returns; vectors with gaps
        flat = x.movedim(1, -1).reshape(-1) if x.dim() == 4 else x.reshape(-1)
        moved = torch.cat([flat[:1], flat])[1:]
        if x.dim() == 4:
            given[name] = moved.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
        elif x.dim() == 2:
            given[name] = torch.stack([x, x], dim=-1).repeat(1, 2, 1)[:, : x.shape[1], 0]
        elif x.dtype == torch.float32:
            given[name] = torch.stack([x, x], dim=-1)[:, 0]
        else:
            given[name] = moved
    actual = pointwise.pointwise(*tuples(**given, keep=True, mask=True))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_served(device: str) -> None:
    x = rows(2, 16, 3, 5, dtype=torch.bfloat16, device=device)
    weight = torch.randn(24, 16, device=device).bfloat16()
    assert pointwise.serves(x, weight)
    assert pointwise.serves(x[1:], weight)
    assert pointwise.serves(rows(2, 16, dtype=torch.float16, device=device), weight.half())
    for other_x, other_weight in [
        (x.contiguous(), weight),
        (x[:, :8], weight[:, :8]),
        (x.double(), weight.double()),
        (x, weight.float()),
        (x, weight[:23]),
        (x, weight[:0]),
        (rows(2, 12, 3, 5, dtype=torch.bfloat16, device=device), weight[:, :12]),
    ]:
        assert not pointwise.serves(other_x, other_weight)
        assert not pointwise.wanted(other_x, other_weight, Extras(keep=True))
        with pytest.raises(ValueError, match="channels_last"):
            pointwise.pointwise(other_x, other_weight)


@pytest.mark.parametrize("device", DEVICES)
def test_a_table_can_say_no(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands((2, 16, 24, (3, 5)), {"residual"}, torch.float32, device)
    x, weight = given["x"], given["weight"]
    assert pointwise.wanted(x, weight, Extras(residual=True, mask=True))
    assert pointwise.wanted(x, weight, Extras(scale=True, dot=True))
    assert not pointwise.wanted(x, weight, Extras())  # nothing that cuBLAS would not do
    assert not pointwise.wanted(x, weight, Extras(residual=True))
    expected = pointwise.pointwise(*tuples(**given))[0]
    monkeypatch.setattr(pointwise, "find", lambda *_: {"fused": 0, "enable_fp_fusion": True})
    tuning.forget()
    try:
        assert not pointwise.wanted(x, weight, Extras(residual=True, mask=True))
        assert torch.equal(pointwise.pointwise(*tuples(**given))[0], expected)
    finally:
        tuning.forget()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS)
def test_what_it_is_raced_against(call: str, device: str) -> None:
    given = operands((2, 16, 24, (3, 5)), CALLS[call], torch.float32, device)
    keep, mask = "keep" in CALLS[call], "mask" in CALLS[call]
    expected = pointwise.pointwise(*tuples(**given, keep=keep, mask=mask))
    raced = passes.pointwise(*tuples(**given, keep=keep, mask=mask))
    for kernels, apart in zip(expected, raced, strict=True):
        assert kernels.shape == apart.shape and kernels.stride() == apart.stride()
        torch.testing.assert_close(kernels, apart)


@pytest.mark.parametrize("device", DEVICES)
def test_every_problem_can_be_tuned(device: str) -> None:
    """Separate passes, which the search may choose, are no other result to it."""
    kinds = {problem.extras: problem for problem in problems()}
    for problem in kinds.values():
        small = problem._replace(positions=129, K=16, D=64)
        launch = small.launcher(torch.device(device))
        kernel, separate = (
            tune.collect_tensors(launch(config))
            for config in (small.tiles(0 if device == "cpu" else ARCHITECTURES[0]), SEPARATE)
        )
        assert tune.agree(separate, kernel), small.key()
        assert len(kernel) == (2 if problem.extras.dot else 3)
        names = [name for name in Extras._fields if getattr(problem.extras, name)]
        assert problem.key().endswith("+".join(names))


def test_the_rule_comes_first() -> None:
    for problem in problems():
        for arch in ARCHITECTURES:
            first, *others = problem.candidates(arch)
            assert first == problem.rule(arch)
            assert SEPARATE in (first, *others) and problem.tiles(arch) in (first, *others)
            assert first not in others
