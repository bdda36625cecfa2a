"""The two nodes of a transformer block: the 2x rule, what they keep, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from svf_fast import SVFLinear
from svf_fast.layers.factored import svf_layers
from svf_fast.ops.transformer import Linear, Norm, Rest, after_attention, normalized_linear
from svf_fast.reference import transformer as definition
from tests.svf_fast.tolerance import accumulated, assert_error_within

DTYPES = (torch.float64, torch.float32)
STRATEGIES = ("gram", "chain", "fold")


class Parts(nn.Module):
    """The layers of a block, of C channels; drawn so that no scale or shift is trivial."""

    def __init__(self, channels=12, bias=True, scaled=True, gelu="none", affine=True):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, 1e-6, elementwise_affine=affine)
        self.norm2 = nn.LayerNorm(channels, 1e-6, elementwise_affine=affine)
        self.qkv = SVFLinear(channels, 3 * channels, bias, strategy="reference")
        self.proj = SVFLinear(channels, channels, bias, strategy="reference")
        self.fc1 = SVFLinear(channels, 4 * channels, bias, strategy="reference")
        self.fc2 = SVFLinear(4 * channels, channels, bias, strategy="reference")
        self.scale1 = nn.Parameter(torch.randn(channels)) if scaled else None
        self.scale2 = nn.Parameter(torch.randn(channels)) if scaled else None
        self.gelu = gelu
        for norm in (self.norm1, self.norm2) if affine else ():
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith(".S"))

    def set(self, strategy: str) -> Parts:
        """Set the strategy of all layers."""
        for layer in svf_layers(self).values():
            layer.strategy = strategy
            layer.refresh()
        return self

    def linear(self, layer: SVFLinear, dtype: torch.dtype) -> Linear:
        conv = layer.convolution(dtype)
        assert conv is not None
        return Linear(conv, layer.bias)

    def norm(self, norm: nn.LayerNorm) -> Norm:
        return Norm(norm.weight, norm.bias, norm.eps)

    def rest(self, dtype: torch.dtype) -> Rest:
        layers = (self.linear(each, dtype) for each in (self.proj, self.fc1, self.fc2))
        return Rest(*layers, self.norm(self.norm2), self.scale1, self.scale2, self.gelu)


def queries(parts: Parts, x: Tensor) -> Tensor:
    dtype = parts.qkv.compute_dtype(x, "test")
    return normalized_linear(x, parts.norm(parts.norm1), parts.linear(parts.qkv, dtype))


def rest(parts: Parts, x: Tensor, attended: Tensor, recompute: bool = False) -> Tensor:
    dtype = parts.fc1.compute_dtype(x, "test")
    return after_attention(x, attended, parts.rest(dtype), recompute)


def defined_queries(parts: Parts, x: Tensor) -> Tensor:
    return definition.normalized_linear(x, parts.norm1, parts.qkv)


def defined_rest(parts: Parts, x: Tensor, attended: Tensor, recompute: bool = False) -> Tensor:
    def act(x: Tensor) -> Tensor:
        return functional.gelu(x, approximate=parts.gelu)

    inner = parts.proj, parts.scale1, parts.norm2, parts.fc1, act, parts.fc2, parts.scale2
    return definition.after_attention(x, attended, *inner)


def step(run, parts: Parts, inputs, grad: Tensor, *options) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = run(parts, *inputs, *options)
    trained = [p for p in parts.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, [*inputs, *trained], grad.to(y.dtype), allow_unused=True)
    return [y.detach(), *(g for g in found if g is not None)]


def compare(mine, defined, parts: Parts, strategy: str, inputs, grad: Tensor, *options) -> None:
    """The 2x rule against the paper's layers; a gradient passes up to three long products."""
    dtype = inputs[0].dtype
    reference = copy.deepcopy(parts).set("reference").to(dtype)
    truth = copy.deepcopy(reference).double()
    own = copy.deepcopy(reference).set(strategy)
    exact = step(defined, truth, [x.double() for x in inputs], grad.double())
    expected = step(defined, reference, inputs, grad)
    got = step(mine, own, inputs, grad, *options)
    assert len(got) == len(expected) == len(exact)
    for index, values in enumerate(zip(got, expected, exact, strict=True)):
        assert values[0].dtype == values[1].dtype
        magnitude = 3 * accumulated(values[2], dtype)
        name = f"{strategy} {index}"
        assert_error_within(*values, magnitude=magnitude, channel_dim=None, name=name)


FORMS = {
    "all": {},
    "no bias": {"bias": False},
    "no scale": {"scaled": False},
    "tanh": {"gelu": "tanh"},
    "no affine": {"affine": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_within_twice_the_error_of_the_reference(form, strategy, dtype, poisoned_memory):
    parts = Parts(**FORMS[form])
    x, attended, grad = (torch.randn(3, 7, 12).to(dtype) for _ in range(3))
    compare(queries, defined_queries, parts, strategy, [x], torch.randn(3, 7, 36).to(dtype))
    for recompute in (False, True):
        compare(rest, defined_rest, parts, strategy, [x, attended], grad, recompute)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_16_bit(strategy, dtype):
    """Over draws, the median error of y, dx and each dS at most twice that of the paper's layers.

    Not draw by draw: the dozen values of one dS are a luckier dozen for one of them.
    """
    cases = (queries, defined_queries, 1, 36), (rest, defined_rest, 2, 12)
    for mine, defined, count, channels in cases:
        errors = [], []
        for seed in range(15):
            torch.manual_seed(seed)
            reference = Parts().to(dtype)
            truth, own = copy.deepcopy(reference).double(), copy.deepcopy(reference).set(strategy)
            inputs = [torch.randn(3, 7, 12).to(dtype) for _ in range(count)]
            grad = torch.randn(3, 7, channels).to(dtype)
            exact = step(defined, truth, [x.double() for x in inputs], grad.double())
            for run, parts, found in ((mine, own, 0), (defined, reference, 1)):
                pairs = zip(step(run, parts, inputs, grad), exact, strict=True)
                errors[found].append(
                    [(v.double() - true).norm() / true.norm() for v, true in pairs]
                )
        medians = [torch.tensor(each).median(dim=0).values for each in errors]
        assert (medians[0] <= 2 * medians[1]).all(), medians


@pytest.mark.parametrize("leading", ((5,), (), (2, 3, 4), (0, 4)))
def test_shapes(leading):
    parts = Parts()
    x, attended, grad = (torch.randn(*leading, 12, dtype=torch.float64) for _ in range(3))
    wide = torch.randn(*leading, 36, dtype=torch.float64)
    compare(queries, defined_queries, parts, "gram", [x], wide)
    compare(rest, defined_rest, parts, "gram", [x, attended], grad)


def test_inputs_that_are_not_contiguous():
    parts = Parts()
    x, attended = torch.randn(7, 3, 12).double(), torch.randn(3, 12, 7).double()
    grad = torch.randn(1, 1, 12).double().expand(3, 7, 12)
    inputs = [x.transpose(0, 1), attended.transpose(1, 2)]
    compare(rest, defined_rest, parts, "gram", inputs, grad)
    compare(queries, defined_queries, parts, "gram", inputs[:1], torch.randn(3, 7, 36).double())


@pytest.mark.parametrize("guarded", ("qkv", "proj", "fc1", "fc2"))
def test_tiny_singular_values_are_guarded(guarded):
    """Exact with values of S that ``gram`` must not divide by, 0 among them."""
    parts = Parts()
    layer = getattr(parts, guarded)
    with torch.no_grad():
        layer.S[-3:] = torch.tensor([1e-5, -1e-9, 0.0])
    x, attended, grad = (torch.randn(3, 7, 12) for _ in range(3))
    own = copy.deepcopy(parts).set("gram")
    assert getattr(own, guarded).guarded >= 3
    if guarded == "qkv":
        compare(queries, defined_queries, parts, "gram", [x], torch.randn(3, 7, 36))
        return
    for recompute in (False, True):
        compare(rest, defined_rest, parts, "gram", [x, attended], grad, recompute)


@pytest.mark.parametrize("train", ((), ("fc2",), ("proj",), ("fc1", "fc2")), ids=str)
def test_layers_whose_S_does_not_train(train):
    parts = Parts()
    for name, layer in svf_layers(parts).items():
        layer.S.requires_grad_(name in train)
    x, attended, grad = (torch.randn(3, 7, 12) for _ in range(3))
    compare(rest, defined_rest, parts, "gram", [x, attended], grad)


def test_autocast():
    """Tokens in float32 as the residual stream has them, products in bfloat16."""
    parts = Parts()
    x, attended, grad = (torch.randn(3, 7, 12) for _ in range(3))
    reference, own = (copy.deepcopy(parts).set(s) for s in ("reference", "gram"))
    truth = copy.deepcopy(reference).double()
    wide = torch.randn(3, 7, 36)
    cases = (
        (queries, defined_queries, [x], wide),
        (rest, defined_rest, [x, attended.bfloat16()], grad),
    )
    for mine, defined, inputs, grad_y in cases:
        exact = step(defined, truth, [each.double() for each in inputs], grad_y.double())
        with torch.autocast("cpu", torch.bfloat16):
            got = step(mine, own, inputs, grad_y)
            expected = step(defined, reference, inputs, grad_y)
        for index, values in enumerate(zip(got, expected, exact, strict=True)):
            assert values[0].dtype == values[1].dtype
            magnitude = 3 * accumulated(values[2], torch.bfloat16)
            assert_error_within(
                *values,
                magnitude=magnitude,
                dtype=torch.bfloat16,
                channel_dim=None,
                name=f"autocast {index}",
            )


def kept_by(run, parts: Parts, *inputs) -> int:
    """Numbers that autograd keeps besides parameters and buffers; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*parts.parameters(), *parts.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(parts, *inputs)
    del y
    return sum(tensor.numel() for pointer, tensor in kept.items() if pointer not in own)


def unguarded(channels: int) -> Parts:
    """Layers with singular values that need no guard, which would keep its part of v."""
    parts = Parts(channels)
    for layer in svf_layers(parts).values():
        nn.init.uniform_(layer.S, 1, 1.2)
    return parts.set("gram")


def test_what_they_keep():
    parts, count, channels = unguarded(16), 2 * 9, 16
    x, attended = (torch.randn(2, 9, channels, requires_grad=True) for _ in range(2))
    assert kept_by(queries, parts, x) == count * channels  # x itself
    # x, attended, the input of GELU (4) and the output of fc2
    assert kept_by(rest, parts, x, attended) == 7 * count * channels
    assert kept_by(rest, parts, x, attended, True) == 3 * count * channels
    parts.set("chain")  # v of fc2 in the place of its y; the others' are computed again
    assert kept_by(queries, parts, x) == count * channels
    assert kept_by(rest, parts, x, attended) == 7 * count * channels
    assert kept_by(rest, parts, x, attended, True) == 3 * count * channels
    parts.set("fold")
    assert kept_by(rest, parts, x, attended, True) == 2 * count * channels
    parts.set("reference")
    assert kept_by(defined_rest, parts, x, attended) > 14 * count * channels


def test_what_trains_besides_S_is_refused():
    parts = unguarded(8)
    x, attended = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for name in ("scale1", "norm2.weight", "norm2.bias", "fc1.bias"):
        parameter = parts.get_parameter(name)
        parameter.requires_grad_(True)
        expected = name.replace("norm2", "norm").replace(".", r"\.")
        with pytest.raises(ValueError, match=f"{expected}: expected a frozen tensor"):
            rest(parts, x, attended)
        with torch.no_grad():
            rest(parts, x, attended)
        parameter.requires_grad_(False)
    parts.norm1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"normalized_linear: norm\.weight"):
        queries(parts, x)


def test_no_second_derivative_and_no_silent_change():
    parts = unguarded(8)
    x, attended = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    y = rest(parts, x, attended).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y, parts.fc1.S, create_graph=True)
    for changed in (parts.norm2.weight, parts.scale2, parts.fc2.U, parts.proj.bias):
        y = rest(parts, x, attended).sum()
        with torch.no_grad():
            changed.mul_(1.5)
        with pytest.raises(RuntimeError, match="changed in place"):
            y.backward()
        parts.set("gram")


def test_backward_twice_through_one_graph():
    parts = unguarded(8)
    x, attended = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    y = rest(parts, x, attended).sum()
    first = torch.autograd.grad(y, (x, parts.fc1.S, parts.proj.S), retain_graph=True)
    second = torch.autograd.grad(y, (x, parts.fc1.S, parts.proj.S))
    assert all(map(torch.equal, first, second))


def test_compile_fullgraph():
    torch._dynamo.reset()
    parts = unguarded(8)
    x, attended = (torch.randn(2, 3, 8) for _ in range(2))

    def run(parts, x, attended):
        return rest(parts, x, attended + queries(parts, x)[..., :8])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(
        step(compiled, parts, [x, attended], x), step(run, parts, [x, attended], x), strict=True
    ):
        torch.testing.assert_close(mine, eager)
