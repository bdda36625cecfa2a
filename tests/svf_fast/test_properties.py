"""The public API on arguments of all kinds: a right answer, or a typed error.

What torch's own layer refuses is refused, what it computes is computed. SVF_LONG=1 draws other and
many more arguments than CI does.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import svf_fast
from svf_fast.ops.affine_act import affine_act
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.gram import gram
from svf_fast.reference.affine_act import affine_act as reference_affine_act
from svf_fast.reference.cosine_max import cosine_max as reference_cosine_max
from svf_fast.reference.gram import gram as reference_gram
from tests.long import LONG

TYPED = (TypeError, ValueError)
# Of the largest value; the numbers are drawn from [-1, 1] and sums have a few hundred terms.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}

FLOATS = st.sampled_from(list(TOLERANCE))
DTYPES = st.sampled_from([*TOLERANCE, torch.float32, torch.int64, torch.bool, torch.complex64])
STRATEGIES = st.sampled_from(["auto", "reference", "fold", "chain", "gram", "gram", "fast", None])
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "sliced", "expanded", "reversed"])


def examples(count: int) -> Callable:
    return settings(
        max_examples=20 * count if LONG else count,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """A tensor of values from -1 to 1 that lies in memory as `layout` says."""
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    x = 2 * torch.rand(shape, dtype=torch.float64) - 1
    if layout == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced" and x.dim():
        x = torch.stack([x, x], dim=-1)[..., 1]
    elif layout == "reversed":
        turned = tuple(reversed(range(x.dim())))
        x = x.permute(turned).contiguous().permute(turned)
    elif layout == "expanded" and x.dim() and x.shape[0]:
        x = x[:1].expand(shape)
    found = x.to(dtype)
    assert found.shape == tuple(shape)
    return found


def near(actual: Tensor, truth: Tensor, dtype: torch.dtype, message: str = "") -> None:
    assert actual.shape == truth.shape, message
    if truth.numel():
        error = (actual.double() - truth).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, truth.abs().max().item()), message


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcome(call: Callable) -> tuple[object, Exception | None]:
    """What a call returns, or the error it raises."""
    try:
        with silent():
            return call(), None
    except Exception as error:
        return None, error


pairs = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
SIZES = [5, 6, 1, 2, 7, 0]


@examples(150)
@given(
    channels=st.tuples(st.integers(0, 6), st.integers(0, 8)),
    kernel=st.one_of(pairs, pairs, st.just(0), st.just((3,)), st.just("3")),
    stride=st.one_of(pairs, st.sampled_from([0, -1])),
    padding=st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid", "all", (1, 0)])),
    dilation=st.one_of(st.just(1), pairs),
    groups=st.sampled_from([1, 1, 2, 3, 0, -1]),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate", "wrong"]),
    strategy=STRATEGIES,
    dtype=FLOATS,
    other=st.one_of(st.none(), DTYPES),
    shape=st.tuples(st.sampled_from([2, 1, 0]), st.sampled_from(SIZES), st.sampled_from(SIZES)),
    wrong=st.sampled_from(["", "", "", "channels", "rank", "no tensor"]),
    layout=LAYOUTS,
    batched=st.booleans(),
)
def test_a_convolution_is_that_of_torch(
    channels, kernel, stride, padding, dilation, groups, bias, mode, strategy, dtype, other, shape,
    wrong, layout, batched,
) -> None:  # fmt: skip
    arguments = (*channels, kernel, stride, padding, dilation, groups, bias, mode, None, dtype)
    conv, refused = outcome(lambda: nn.Conv2d(*arguments))
    layer, error = outcome(lambda: svf_fast.SVFConv2d(*arguments, strategy=strategy))
    if error is not None:
        assert isinstance(error, TYPED) or type(error) is type(refused), repr(error)
        own = strategy not in ("auto", "reference", "fold", "chain", "gram")
        odd = refused is None and (0 in conv.weight.shape or conv.weight.dim() != 4)
        assert refused is not None or own or odd, repr(error)
        return
    assert refused is None, f"torch refuses it: {refused!r}"
    layer = svf_fast.SVFConv2d.from_conv(conv, strategy)
    merged = layer.merged()
    near(merged.weight, conv.weight.double(), dtype)
    images, height, width = shape
    size = (images, channels[0] + (wrong == "channels"), height, width)
    size = size[1:] if not batched else size
    size = (1, *size) if wrong == "rank" and batched else size[1:] if wrong == "rank" else size
    x = numbers(size, other or dtype, layout)
    if wrong == "no tensor":
        x = x.tolist()
    truth, refused = outcome(lambda: copy.deepcopy(conv).double()(x.double()))
    y, error = outcome(lambda: layer(x))
    if error is not None:
        mistake = wrong or (other or dtype) != dtype
        assert isinstance(error, TYPED) or type(error) is type(refused), repr(error)
        assert mistake or refused is not None, repr(error)
        return
    assert refused is None and (other or dtype) == dtype, f"torch refuses it: {refused!r}"
    near(y, truth, dtype)
    y.double().sum().backward()
    assert layer.S.grad is not None and layer.S.grad.isfinite().all()
    if dtype == torch.float64:
        own = copy.deepcopy(conv)
        own(x).sum().backward()
        gradient = torch.autograd.functional.vjp(
            lambda S: svf_fast.compose(layer.U, S, layer.V, layer.groups),
            layer.S.detach(),
            own.weight.grad,
        )[1]
        near(layer.S.grad, gradient, torch.float32)


@examples(60)
@given(
    features=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    bias=st.booleans(),
    strategy=STRATEGIES,
    dtype=FLOATS,
    other=st.one_of(st.none(), DTYPES),
    leading=st.lists(st.sampled_from([2, 3, 1, 0]), max_size=3),
    wrong=st.sampled_from(["", "", "features", "rank", "no tensor"]),
    layout=LAYOUTS,
)
def test_a_linear_layer_is_that_of_torch(
    features, bias, strategy, dtype, other, leading, wrong, layout
) -> None:
    with silent():
        linear = nn.Linear(*features, bias, dtype=dtype)
    layer, error = outcome(lambda: svf_fast.SVFLinear.from_linear(linear, strategy))
    if error is not None:
        assert isinstance(error, TYPED), repr(error)
        assert strategy in ("fast", None) or 0 in features
        return
    shape = () if wrong == "rank" else (*leading, features[0] + (wrong == "features"))
    x = numbers(shape, other or dtype, layout)
    x = x.tolist() if wrong == "no tensor" else x
    y, error = outcome(lambda: layer(x))
    if wrong or (other or dtype) != dtype:
        assert isinstance(error, TYPED), repr(error)
        return
    assert error is None, repr(error)
    near(y, copy.deepcopy(linear).double()(x.double()), dtype)


@examples(150)
@given(
    shape=st.lists(st.integers(0, 5), max_size=5),
    groups=st.sampled_from([1, 1, 1, 2, 3, 0, -2]),
    dtype=DTYPES,
    scale=st.sampled_from([1.0, 1.0, 1e-30, 1e30, 0.0]),
    special=st.sampled_from([None, None, None, math.nan, math.inf, "rank one", "equal"]),
    layout=LAYOUTS,
)
def test_decompose_and_compose_are_inverse(shape, groups, dtype, scale, special, layout) -> None:
    weight = numbers(tuple(shape), dtype, layout)
    if dtype.is_floating_point and weight.numel():
        weight = weight.clone() * (scale if dtype in (torch.float32, torch.float64) else 1)
        if special == "rank one":
            weight[...] = weight.flatten()[0]
        elif special == "equal" and weight.dim():
            weight = torch.eye(*weight.reshape(weight.shape[0], -1).shape).reshape(shape).to(dtype)
        elif isinstance(special, float):
            weight[(-1,) * weight.dim()] = special
    factors, error = outcome(lambda: svf_fast.decompose(weight, groups))
    finite = not dtype.is_floating_point or weight.isfinite().all()
    fits = dtype.is_floating_point and weight.dim() >= 2 and weight.numel() and finite
    if not fits or groups < 1 or shape[0] % groups:
        assert isinstance(error, TYPED), repr(error)
        return
    assert error is None, repr(error)
    U, S, V = factors
    rank = min(shape[0] // groups, math.prod(shape[1:]))
    assert S.shape == (groups * rank,) and U.shape == (shape[0], rank)
    assert V.shape == (groups * rank, *shape[1:])
    assert (S >= 0).all() and (S.reshape(groups, rank).diff(dim=1) <= 0).all()
    largest = weight.double().abs().max().item() or 1.0
    again = svf_fast.compose(U, S, V, groups)
    near(again / largest, weight.double() / largest, dtype)
    columns = U.double().reshape(groups, -1, rank)
    near(columns.mT @ columns, torch.eye(rank).expand(groups, -1, -1).double(), dtype)


@examples(80)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 40), st.integers(0, 40)),
    dtype=st.tuples(FLOATS, st.one_of(st.none(), st.none(), DTYPES)),
    mask=st.sampled_from(["bool", "float", "zeros", "int", "shape", "none"]),
    wrong=st.sampled_from(["", "", "", "channels", "batch", "rank", "no tensor"]),
    layout=st.tuples(LAYOUTS, LAYOUTS),
)
def test_cosine_max_is_its_definition(sizes, dtype, mask, wrong, layout) -> None:
    batch, channels, queries, supports = sizes
    own, other = dtype[0], dtype[1] or dtype[0]
    query = numbers((batch, channels, queries), own, layout[0])
    support = numbers((batch + (wrong == "batch"), channels + (wrong == "channels"), supports),
                      other, layout[1])  # fmt: skip
    weights = torch.rand(batch, supports + (mask == "shape")) > 0.4
    if mask in ("float", "zeros"):
        weights = weights.float() * (mask == "float")
    elif mask == "int":
        weights = weights.long()
    if wrong == "rank":
        query = query[0] if batch else query[None]
    arguments = [query, support.tolist() if wrong == "no tensor" else support, weights]
    if mask == "none":
        arguments[2] = None
    found, error = outcome(lambda: svf_fast.cosine_max(*arguments))
    if wrong or own != other or mask in ("int", "shape", "none") or not supports:
        assert isinstance(error, TYPED), repr(error)
        return
    assert error is None, repr(error)
    if not channels or not queries or not batch:
        assert found.shape == (batch, queries) and not found.any()
        return
    truth = reference_cosine_max(query.double(), support.double(), weights.double())
    near(found, truth, torch.promote_types(own, torch.float32))


@examples(120)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=5).map(tuple),
    dtype=st.tuples(DTYPES, st.one_of(st.none(), st.none(), DTYPES)),
    layout=st.tuples(LAYOUTS, LAYOUTS),
    wrong=st.sampled_from(["", "", "", "shape", "scale", "scale dtype", "no tensor"]),
    groups=st.sampled_from([1, 1, 2, 3, 0, -1]),
    relu=st.booleans(),
)
def test_channel_ops_are_their_definitions(shape, dtype, layout, wrong, groups, relu) -> None:
    own, other = dtype[0], dtype[1] or dtype[0]
    a = numbers(shape, own, layout[0])
    b = numbers((*shape, 2) if wrong == "shape" else shape, other, layout[1])
    channels = shape[1] if len(shape) > 1 else 1
    wide = torch.promote_types(own, torch.float32)
    wide = torch.int32 if wrong == "scale dtype" else wide
    s = numbers((channels + (wrong == "scale"),), wide)
    b = [b] if wrong == "no tensor" else b
    fits = own.is_floating_point and own == other and len(shape) >= 2
    whole = fits and wrong in ("", "scale", "scale dtype")
    with silent():
        results = [
            (outcome(lambda: channel_dot(a, b)), whole),
            (outcome(lambda: affine_act(a, s, s, b, None, relu)[0]), fits and not wrong),
            (
                outcome(lambda: gram(a, b, groups)),
                whole and groups > 0 and channels % groups == 0,
            ),
        ]
    for (_, error), right in results:
        assert isinstance(error, TYPED) if not right else error is None, repr(error)
    (dot, _), (act, _), (matrix, _) = (result for result, _ in results)
    x, y = (a.double(), b.double()) if whole else (None, None)
    rest = [0, *range(2, len(shape))]
    precision = torch.promote_types(own, torch.float32) if own.is_floating_point else None
    if whole:
        near(dot, (x * y).sum(rest), precision)
    if matrix is not None:
        near(matrix, reference_gram(x, y, groups) if a.numel() else matrix.double(), precision)
    if act is not None:
        near(act, reference_affine_act(x, s.double(), s.double(), y, None, relu), own)
    if not (fits and not wrong and (a.is_contiguous() or a.movedim(1, -1).is_contiguous())):
        return
    dense = a.clone(memory_format=torch.preserve_format)
    assume(dense.is_contiguous() or dense.movedim(1, -1).is_contiguous())
    near(channel_dot_scale_(dense, b, s), (x * y).sum(rest), precision)
    near(dense, x * s.double().reshape(-1, *[1] * (len(shape) - 2)), own)


LAYERS = st.lists(
    st.sampled_from(["conv", "grouped", "batch norm", "relu", "inplace", "nested", "shared"]),
    min_size=0,
    max_size=6,
)


def network(kinds: list[str]) -> nn.Sequential:
    layers: list[nn.Module] = []
    shared = nn.Conv2d(4, 4, 3, padding=1)
    for kind in kinds:
        layers.append(
            {
                "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
                "grouped": lambda: nn.Conv2d(4, 4, 1, groups=2, bias=False),
                "batch norm": lambda: nn.BatchNorm2d(4),
                "relu": nn.ReLU,
                "inplace": lambda: nn.ReLU(inplace=True),
                "nested": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
                "shared": lambda: shared,
            }[kind]()
        )
    return nn.Sequential(*layers)


@examples(50)
@given(
    kinds=LAYERS,
    layers=st.sampled_from([None, ("*",), "0", ("0", "2*"), ("nowhere",), (), 3]),
    strategy=STRATEGIES,
    fuse=st.booleans(),
    budget=st.sampled_from([None, None, "1GiB", "1B", "many", -1, 10**9, 1.5]),
    shape=st.sampled_from([None, (2, 4, 6, 5), (2, 3, 6, 5), (), (0, 4, 6, 5), (2, 4, -1, 5)]),
)
def test_convert_changes_nothing_or_the_layers_alone(
    kinds, layers, strategy, fuse, budget, shape
) -> None:
    model = network(kinds).eval().requires_grad_(False)
    x = numbers((2, 4, 6, 5), torch.float32)
    before, state = model(x.clone()), copy.deepcopy(model.state_dict())
    arguments = {"memory_budget": budget, "input_shape": shape} if budget or shape else {}
    found, error = outcome(
        lambda: svf_fast.convert(model, layers, strategy, fuse, progress=False, **arguments)
    )
    if error is not None:
        assert isinstance(error, TYPED) or shape not in (None, (2, 4, 6, 5)), repr(error)
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in now)
        assert torch.equal(model(x.clone()), before)
        return
    assert found is model
    near(model(x.clone()), before.double(), torch.float32)
    report, error = outcome(lambda: svf_fast.memory_report(model, (2, 4, 6, 5)))
    assert error is None and report.saved_bytes >= 0, repr(error)
    svf_fast.merge(model)
    now = model.state_dict()
    assert list(now) == list(state)
    for key in now:
        near(now[key], state[key].double(), torch.float32, key)
    with pytest.raises(ValueError, match="expected SVF layers"):
        svf_fast.merge(model)


@examples(40)
@given(
    scale=st.floats(allow_nan=True, allow_infinity=True),
    t=st.one_of(st.floats(), st.booleans(), st.none(), st.text(max_size=2)),
    card=st.one_of(
        st.none(),
        st.integers(),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.integers()),
            st.recursive(
                st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=4), st.binary()),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=5,
            ),
            max_size=3,
        ),
    ),
)
def test_adapters_come_back_to_the_bit_or_are_refused(tmp_path, scale, t, card) -> None:
    model = svf_fast.convert(network(["conv", "relu", "grouped"]), None, progress=False)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(scale)
    values = [S.detach().clone() for S in svf_fast.svf_parameters(model)]
    path = tmp_path / "a.safetensors"
    path.unlink(missing_ok=True)
    _, error = outcome(lambda: svf_fast.save_adapter(model, path, card))
    if error is not None:
        assert isinstance(error, TYPED) and not path.exists(), repr(error)
        return
    assert all(S.isfinite().all() for S in values)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.fill_(7)
    svf_fast.load_adapter(model, path)
    found = list(svf_fast.svf_parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(values, found))
    adapter = svf_fast.Adapter.load(path)
    mixed, error = outcome(lambda: svf_fast.interpolate_adapters(adapter, adapter, t))
    if isinstance(t, bool) or not isinstance(t, float) or not math.isfinite(t):
        assert isinstance(error, TYPED), repr(error)
    elif error is None:
        for name, S in mixed.S.items():
            near(S / (S.abs().max() or 1), adapter.S[name].double() / (S.abs().max() or 1), S.dtype)
    else:
        assert isinstance(error, TYPED), repr(error)  # beyond the largest number


@examples(100)
@given(
    size=st.one_of(
        st.text(max_size=8),
        st.from_regex(r"\A\d{1,5}(\.\d{1,3})? ?(GiB|MB|kib|B|PiB)?\Z"),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.none(),
    ),
)
def test_a_memory_budget_is_bytes_or_refused(size) -> None:
    from svf_fast.budget import parse_bytes

    found, error = outcome(lambda: parse_bytes(size))
    if error is not None:
        assert isinstance(error, TYPED), repr(error)
    else:
        assert isinstance(found, int) and found >= 0
