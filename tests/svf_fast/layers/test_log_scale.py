"""Layers of which s' of S·exp(s') trains: the 2x rule, what they keep, and how they train."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import svf_fast
from fss.models.regime_layers import FactoredConv2d
from svf_fast import SVFConv2d, SVFLinear
from svf_fast.layers.factored import svf_layers
from tests.svf_fast import small_model
from tests.svf_fast.ops.test_block import BLOCKS, frozen
from tests.svf_fast.saved_bytes import saved_by
from tests.svf_fast.tolerance import accumulated, assert_error_within

STRATEGIES = ("gram", "chain", "fold", "reference")
# Both kinds of gram matrix, a stride, groups; linear layers are 1×1 convolutions of these.
CONVS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "1x1 widening": lambda: nn.Conv2d(4, 9, 1, stride=2, bias=False),
    "groups": lambda: nn.Conv2d(6, 8, 3, groups=2),
}


def moved(model: nn.Module) -> nn.Module:
    """Let s' be something else than 0, some of it far from it: then directions are guarded."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for log_scale in svf_fast.svf_parameters(model):
            log_scale.copy_(torch.randn(len(log_scale), generator=generator))
            log_scale[0] = -6
    return model


def same_values(ours: nn.Module, trained: nn.Module) -> None:
    """Let layers that train S, pretrained as `ours`, compute with the same values."""
    for a, b in zip(svf_layers(ours).values(), svf_layers(trained).values(), strict=True):
        assert torch.equal(a.S, b.S)
        b.assign(a.singular_values())


def step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None):
    """y, dx and ds' of each layer."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [x, *svf_fast.svf_parameters(model)]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


def as_reference(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, svf_fast.Fused):
            module.unfuse()
    for layer in svf_layers(plain).values():
        layer.strategy = "reference"
    return plain


def compare(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """The 2x rule: the error of y, dx and ds' to float64 against that of autograd's own."""
    plain = as_reference(model)
    results = step(model, x, dtype), step(plain, x, dtype), step(plain.double(), x.double())
    for number, values in enumerate(zip(*results, strict=True)):
        computed = dtype or x.dtype
        size = accumulated(values[2], computed)
        assert_error_within(*values, magnitude=size, dtype=computed, name=f"result {number}")


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
@pytest.mark.parametrize("case", CONVS)
def test_gradients_within_twice_the_error_of_autograd(case, strategy, dtype, poisoned_memory):
    torch.manual_seed(1)
    model = nn.Sequential(SVFConv2d.from_conv(CONVS[case](), strategy, trains="log_scale"))
    wide = dtype == torch.float64
    x = torch.randn(3, model[0].in_channels, 9, 11)
    model, x = (model.double(), x.double()) if wide else (model, x)
    compare(model, x, None if wide else dtype)
    compare(moved(model), x, None if wide else dtype)
    assert strategy != "gram" or model[0].guarded


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_a_fused_bottleneck(strategy, recompute, poisoned_memory):
    torch.manual_seed(1)
    block = frozen(BLOCKS["bottleneck downsample"]())
    model = nn.Sequential(copy.deepcopy(block))
    svf_fast.convert(model, None, strategy, trains="log_scale")
    model[0].recompute = recompute
    x = torch.randn(2, 6, 9, 9)
    compare(moved(model), x)
    before = step(model, x)
    for _ in range(3):  # from the third pass on the recorded ones run
        assert all(map(torch.equal, before, step(model, x)))
    trained = svf_fast.convert(nn.Sequential(block), None, strategy)
    trained[0].recompute = recompute
    assert not model[0].unfused_reason()
    same_values(model, trained)
    assert saved_by(model, x) == saved_by(trained, x)
    reports = [svf_fast.memory_report(each, x.shape) for each in (model, trained)]
    assert reports[0].saved_bytes == reports[1].saved_bytes
    trains = 8 * sum(len(log_scale) for log_scale in svf_fast.svf_parameters(model))
    assert reports[0].factor_bytes - reports[1].factor_bytes == trains


@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_the_outputs_and_saved_bytes_are_those_of_training_S(strategy):
    ours = moved(small_model.converted(strategy=strategy, trains="log_scale"))
    trained = small_model.converted(strategy=strategy)
    same_values(ours, trained)
    x = small_model.images()
    y, dx, *grads = step(ours, x)
    expected = step(trained, x)
    assert torch.equal(y, expected[0]) and torch.equal(dx, expected[1])
    for layer, grad, grad_S in zip(svf_layers(ours).values(), grads, expected[2:], strict=True):
        torch.testing.assert_close(grad, grad_S * layer.singular_values())
    assert saved_by(ours, x) == saved_by(trained, x)


def test_W_is_composed_once_per_change():
    model, x = small_model.converted(strategy="gram", trains="log_scale"), small_model.images()
    made = [layer.values.made for layer in svf_layers(model).values()]
    model(x)
    first = [each[torch.float32].weight for each in made]
    model(x)
    again = [each[torch.float32].weight for each in made]
    assert all(a is b for a, b in zip(first, again, strict=True))
    y = moved(model)(x)
    assert not any(a is each[torch.float32].weight for a, each in zip(first, made, strict=True))
    torch.testing.assert_close(y, as_reference(model)(x))
    for layer in svf_layers(model).values():  # past the version counter, and of the frozen S
        layer.log_scale.data.fill_(0.3)
        layer.S.mul_(2)
    torch.testing.assert_close(model(x), as_reference(model)(x))
    torch.testing.assert_close(svf_fast.merge(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_is_that_of_a_composed_weight(strategy):
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 5, 3, padding=1)
    ours = SVFConv2d.from_conv(conv, strategy, trains="log_scale")
    theirs = FactoredConv2d(conv, *svf_fast.decompose(conv.weight), ("S'",))
    x = torch.randn(2, 6, 7, 7)
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})):
        optimizers = [
            kind([each.log_scale], lr=0.03, weight_decay=0.01, **options) for each in (ours, theirs)
        ]
        for _ in range(5):
            for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(ours.log_scale, theirs.log_scale, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours.log_scale.abs().min() > 0.05


def test_weight_decay_pulls_to_the_pretrained_network():
    layer = moved(nn.Sequential(SVFConv2d(4, 4, 3, trains="log_scale")))[0]
    optimizer = torch.optim.AdamW([layer.log_scale], lr=0.1, weight_decay=5.0)
    for _ in range(20):
        layer.log_scale.grad = torch.zeros_like(layer.log_scale)
        optimizer.step()
    torch.testing.assert_close(layer.singular_values(), layer.S, rtol=1e-4, atol=0)


def test_no_step_changes_a_sign():
    conv = nn.Conv2d(4, 4, 3)
    layer = SVFConv2d.from_conv(conv, trains="log_scale")
    with torch.no_grad():
        layer.S[3] = 0
    x = torch.randn(2, 4, 6, 6)
    for lr in (30.0, -60.0):
        layer.log_scale.grad = None
        y = layer(x)
        y.square().mean().backward()
        assert y.isfinite().all() and layer.log_scale.grad.isfinite().all()
        assert layer.log_scale.grad[3] == 0
        with torch.no_grad():
            layer.log_scale -= lr * layer.log_scale.grad.sign()
        values = layer.singular_values()
        assert (values[:3] > 0).all() and values[3] == 0


def test_state_dict_pickle_and_copies():
    ours, x = moved(small_model.converted(trains="log_scale")), small_model.images()
    expected, state = ours(x), ours.state_dict()
    layer = ours[0]
    keys = {"U", "S", "V", "log_scale", "bias", "fingerprint"}
    assert {key.removeprefix("0.") for key in state if key.startswith("0.")} == keys
    assert [p.requires_grad for p in (layer.log_scale, layer.S)] == [True, False]
    assert isinstance(layer.log_scale, nn.Parameter) and not isinstance(layer.S, nn.Parameter)
    for assign in (False, True):
        other = small_model.converted(trains="log_scale")
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), expected)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other[0].log_scale.add_(0.1)
        assert not torch.equal(other(x), expected)
    assert torch.equal(ours(x), expected)


def test_a_checkpoint_of_the_other_kind():
    ours, theirs = small_model.converted(trains="log_scale"), small_model.converted()
    with pytest.raises(ValueError, match=r"0\.S: .* of a layer that trains S, but .* trains='S'"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"0\.log_scale: .* one here trains S\. Convert .*trains="):
        theirs.load_state_dict(ours.state_dict())


def test_a_layer_of_an_older_version_trains_S():
    layer = SVFConv2d(3, 4, 1)
    state = layer.__getstate__()
    state["_parameters"] = {k: v for k, v in state["_parameters"].items() if k != "log_scale"}
    del state["trains"]
    older = SVFConv2d.__new__(SVFConv2d)
    older.__setstate__(state)
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(older(x), layer(x)) and older.log_scale is None


def test_dtypes_stay_wide():
    model = moved(small_model.converted(trains="log_scale"))
    expected = [layer.singular_values() for layer in svf_layers(model).values()]
    model.half()
    for layer, values in zip(svf_layers(model).values(), expected, strict=True):
        assert (layer.U.dtype, layer.S.dtype) == (torch.float16, torch.float32)
        assert layer.log_scale.dtype == torch.float32
        assert torch.equal(layer.singular_values(), values)
    narrow = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(narrow, assign=True)
    for layer in svf_layers(model).values():
        assert {layer.S.dtype, layer.log_scale.dtype} == {torch.float32}
        assert isinstance(layer.log_scale, nn.Parameter) and not layer.S.requires_grad
    model.double()
    assert {p.dtype for p in svf_fast.svf_parameters(model)} == {torch.float64}


@pytest.mark.parametrize(
    "make",
    [
        lambda: SVFConv2d(2, 2, 1, trains="s"),
        lambda: SVFConv2d.from_conv(nn.Conv2d(2, 2, 1), trains="s"),
        lambda: SVFLinear.from_linear(nn.Linear(2, 2), trains="s"),
        lambda: small_model.converted(trains="s"),
    ],
)
def test_what_trains_is_checked(make):
    with pytest.raises(ValueError, match="trains: expected one of S, log_scale, got 's'"):
        make()


def test_repr_says_what_trains():
    assert "strategy='auto', trains='log_scale'" in repr(SVFConv2d(2, 2, 1, trains="log_scale"))
    assert "trains='log_scale'" in repr(SVFLinear(2, 2, trains="log_scale"))
    assert "trains" not in repr(SVFLinear(2, 2))


def test_transforms_are_refused_but_by_the_reference():
    layer = SVFLinear(3, 3, trains="log_scale")

    def loss(log_scale: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"log_scale": log_scale}, torch.ones(2, 3)).sum()

    with pytest.raises(RuntimeError, match="expected no transform of torch.func"):
        torch.func.grad(loss)(layer.log_scale.detach())
    layer.strategy = "reference"
    (expected,) = torch.autograd.grad(layer(torch.ones(2, 3)).sum(), layer.log_scale)
    torch.testing.assert_close(torch.func.grad(loss)(layer.log_scale.detach()), expected)


def test_the_weight_that_others_read():
    layer = moved(nn.Sequential(SVFLinear(4, 3, trains="log_scale")))[0]
    assert torch.allclose(layer.weight, layer.merged().weight)
    (grad,) = torch.autograd.grad(layer.weight.square().sum(), layer.log_scale)
    torch.testing.assert_close(grad, 2 * layer.singular_values() ** 2)


def test_inference_mode_before_training():
    model, x = moved(small_model.converted(trains="log_scale")), small_model.images()
    expected = step(copy.deepcopy(model), x)
    moved(model)
    with torch.inference_mode():
        model(x)
    assert all(map(torch.equal, step(model, x), expected))
    model.requires_grad_(False)
    torch.testing.assert_close(model(x), expected[0])
    assert saved_by(model, x) == 0


@pytest.mark.parametrize("strategy", ("gram", "chain"))
def test_compiled(strategy):
    layer = moved(nn.Sequential(SVFConv2d(4, 6, 3, strategy=strategy, trains="log_scale")))
    x = torch.randn(2, 4, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = step(layer, x)  # which guards what the present values need
        torch.testing.assert_close(step(compiled, x), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            layer[0].log_scale.mul_(0.9)
