"""SVFConv2d as a module: drop-in for nn.Conv2d, state, planning, bad input."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from svf_fast import SVFConv2d
from tests.svf_fast.ops.test_svf_conv2d import CASES, make


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram", "auto"))
@pytest.mark.parametrize("case", CASES)
def test_conversion_changes_the_output_by_rounding_alone(case, strategy):
    torch.manual_seed(0)
    *channels, kernel_size, arguments = CASES[case]
    conv = nn.Conv2d(*channels, kernel_size, **arguments)
    layer = SVFConv2d.from_conv(conv, strategy)
    x = torch.randn(2, conv.in_channels, 9, 11)
    expected = conv(x)
    assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()
    merged = layer.merged()
    assert (merged(x) - expected).norm() <= 1e-5 * expected.norm()
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in conv.state_dict().items()
    }
    assert repr(merged) == repr(conv)


def test_only_S_trains_and_the_factors_are_buffers():
    layer = SVFConv2d(4, 6, 3)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["S"]
    assert {name for name, _ in layer.named_buffers()} == {"U", "V", "fingerprint"}
    assert set(layer.state_dict()) == {"U", "S", "V", "bias", "fingerprint"}


def test_unbatched_input():
    layer = SVFConv2d(4, 6, 3)
    x = torch.randn(4, 7, 8)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram"))
def test_autocast(strategy):
    torch.manual_seed(0)
    layer = SVFConv2d(8, 6, 3, strategy=strategy)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()  # inside on purpose: sums must stay in float32
    got = layer.S.grad.clone(), x.grad.clone()
    assert got[0].dtype == got[1].dtype == torch.float32
    layer.S.grad = x.grad = None
    layer(x).square().sum().backward()
    for value, exact in zip(got, (layer.S.grad, x.grad), strict=True):
        assert (value - exact).norm() <= 2e-2 * exact.norm()


def test_composed_weight_follows_every_way_to_change_S():
    layer = SVFConv2d(4, 6, 3, strategy="gram")
    x = torch.randn(1, 4, 6, 6)

    def agrees():
        torch.testing.assert_close(layer(x), layer.merged()(x), rtol=1e-4, atol=1e-5)

    def write(change):
        with torch.no_grad():
            change()
        agrees()

    agrees()
    write(lambda: layer.S.mul_(1.5))
    write(lambda: layer.S.data.mul_(2))  # passes the version counter by
    write(lambda: setattr(layer.S, "data", torch.rand(6)))
    write(lambda: setattr(layer, "S", nn.Parameter(torch.rand(6))))
    write(lambda: layer.U.neg_())
    write(lambda: layer.load_state_dict(SVFConv2d(4, 6, 3).state_dict()))
    optimizer = torch.optim.SGD([layer.S], lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    agrees()
    with torch.inference_mode():
        agrees()
        inference_layer = SVFConv2d(4, 6, 3)
        torch.testing.assert_close(
            inference_layer(x), inference_layer.merged()(x), rtol=1e-4, atol=1e-5
        )


def test_weight_is_composed_once_for_all_calls_between_two_changes_of_S(monkeypatch):
    import svf_fast.ops.factors as op

    calls = []
    compose = op.compose
    monkeypatch.setattr(op, "compose", lambda *a: calls.append(1) or compose(*a))
    layer = SVFConv2d(4, 6, 3, strategy="gram")
    x = torch.randn(1, 4, 6, 6)
    for _ in range(3):
        layer(x)
        layer(x).sum().backward()
        with torch.no_grad():
            layer.S.add_(0.01)
    assert len(calls) == 3


def test_gradient_belongs_to_the_S_of_the_forward_pass():
    layer = SVFConv2d(4, 6, 3, strategy="gram")
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    other = layer(2 * x.detach())
    (again,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(expected, again)
    with torch.no_grad():
        layer.S.zero_()
    with pytest.raises(RuntimeError, match="changed in place, most often S, by an optimizer's"):
        y.sum().backward()
    del other


@pytest.mark.parametrize(
    "strategy, kept",
    [("fold", "its input, by an"), ("gram", "its output, by an"), ("chain", "one of its factors")],
)
def test_a_change_in_place_is_told_by_what_is_kept(strategy, kept):
    layer = SVFConv2d(4, 6, 3, bias=False, strategy=strategy)
    x = torch.randn(1, 4, 6, 6, requires_grad=True) * 1
    y = layer(x)
    with torch.no_grad():
        {"fold": x, "gram": y, "chain": layer.U}[strategy].add_(1)
    with pytest.raises(RuntimeError, match=f"or {kept}"):
        y.sum().backward()


def test_auto_takes_gram_on_a_tame_spectrum_and_chain_on_a_wild_one():
    conv = nn.Conv2d(16, 32, 3)
    with torch.no_grad():
        nn.init.orthogonal_(conv.weight)
    layer = SVFConv2d.from_conv(conv)
    assert layer.strategy_in_use == "gram" and layer.guarded == 0
    with torch.no_grad():
        layer.S[: layer.rank // 2] = 0
    assert layer.strategy_in_use == "chain"
    with torch.no_grad():
        layer.S.fill_(1)
    assert layer.strategy_in_use == "gram"


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram", "auto"))
def test_compile_fullgraph_equals_eager(strategy):
    torch.manual_seed(0)
    torch._dynamo.reset()
    cases = ("3x3", "1x1 widening stride 2") if strategy == "gram" else ("3x3",)
    for case in cases:
        layer = make(case, strategy=strategy)
        with torch.no_grad():
            layer.S[-1] = 1e-9  # one guarded direction
        compiled = torch.compile(layer, fullgraph=True)
        x = torch.randn(2, layer.in_channels, 8, 8, requires_grad=True)
        for _ in range(2):
            results = []
            for module in (layer, compiled):
                y = module(x)
                results.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.S))])
            for got, expected in zip(*results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                layer.S.mul_(1.1)  # the compiled graph composes the weight anew


def test_compiled_gram_stops_when_its_guard_is_too_small():
    torch._dynamo.reset()
    layer = SVFConv2d(6, 5, 3, strategy="gram")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, 6, 6)
    compiled(x)
    with torch.no_grad():
        layer.S[0] = 0
    with pytest.raises(RuntimeError, match=r"call refresh\(\)"):
        compiled(x)
    layer.refresh()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_copies_are_independent_and_equal():
    layer = SVFConv2d(4, 6, 3)
    x = torch.randn(1, 4, 6, 6)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded = SVFConv2d(4, 6, 3)
    loaded.load_state_dict(layer.state_dict())
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
        loaded,
    )
    with torch.no_grad():
        layer.S.zero_()
    for other in copies:
        assert torch.equal(other(x), expected)


def test_to_dtype_and_meta():
    layer = SVFConv2d(4, 6, 3, strategy="gram")
    x = torch.randn(1, 4, 6, 6)
    expected = layer(x)
    torch.testing.assert_close(layer.double()(x.double()).float(), expected)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
    assert all(tensor.is_floating_point() for tensor in layer.state_dict().values())
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(2, 4, 6, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 6, 4, 4)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([[1.0]], TypeError, "expected a Tensor, got list"),
        (torch.randn(4, 4), ValueError, r"\[N, 4, H, W\].*got \[4, 4\]"),
        (torch.randn(1, 3, 6, 6), ValueError, r"\[N, 4, H, W\].*got \[1, 3, 6, 6\]"),
        (torch.randn(1, 4, 6, 6).double(), TypeError, "torch.float32.*got torch.float64"),
        (torch.ones(1, 4, 6, 6, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.empty(1, 4, 6, 6, device="meta"), ValueError, "on cpu.*got x on meta"),
    ],
)
def test_bad_input(x, error, words):
    with pytest.raises(error, match=words):
        SVFConv2d(4, 6, 3)(x)


def test_bad_construction():
    with pytest.raises(ValueError, match="strategy: expected one of auto.*got 'fast'"):
        SVFConv2d(4, 6, 3, strategy="fast")
    with pytest.raises(TypeError, match="expected an nn.Conv2d, got Linear"):
        SVFConv2d.from_conv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this checkpoint is of the plain layer"):
        SVFConv2d(4, 6, 3).load_state_dict(nn.Conv2d(4, 6, 3).state_dict())


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("strategy", ("fold", "chain", "gram"))
def test_what_follows_may_work_in_place_unless_the_output_is_kept(strategy, memory_format):
    layer = SVFConv2d(4, 9, 1, bias=False, strategy=strategy)  # widening: gram keeps its input
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=memory_format)
    grads = []
    for inplace in (True, False):
        nn.functional.relu(layer(x), inplace=inplace).sum().backward()
        grads.append(layer.S.grad.clone())
        layer.S.grad = None
    assert torch.equal(*grads)
