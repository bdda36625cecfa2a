"""Fused blocks and units: the 2x rule, what they keep, and every case that must not be fused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import svf_fast
from svf_fast import Fused, SVFBasicBlock, SVFBottleneck, SVFConv2d, SVFConvBNAct
from svf_fast.layers.factored import svf_layers
from svf_fast.reference.block import block as definition
from tests.svf_fast.saved_bytes import saved_by
from tests.svf_fast.tolerance import accumulated, assert_error_within

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STRATEGIES = ("gram", "chain", "fold")


def conv(in_channels, out_channels, kernel=1, **options) -> nn.Conv2d:
    options = {"bias": False, **options}
    if kernel == 3:
        options = {"padding": options.get("dilation", 1), **options}
    return nn.Conv2d(in_channels, out_channels, kernel, **options)


class Bottleneck(nn.Module):
    def __init__(self, channels, width, out, stride=1, dilation=1, groups=1, pool=False):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width), nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, dilation=dilation, groups=groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, out), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != out:
            shrink = [nn.AvgPool2d(stride, stride, ceil_mode=True)] if pool else []
            projection = conv(channels, out, stride=1 if pool else stride)
            self.downsample = nn.Sequential(*shrink, projection, nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Basic(nn.Module):
    def __init__(self, channels, out, stride=1, bias=False):
        super().__init__()
        self.conv1 = conv(channels, out, 3, stride=stride, bias=bias)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, 3, bias=bias), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, stride=stride), nn.BatchNorm2d(out))

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + (x if self.downsample is None else self.downsample(x)))


def unit(bn_relu=True):
    layers = [conv(6, 9, 3, bias=True), nn.BatchNorm2d(9)]
    return nn.Sequential(*layers, nn.ReLU()) if bn_relu else nn.Sequential(*layers)


# Both residual shapes with every kind of shortcut, and the units of plain networks.
BLOCKS = {
    "bottleneck": lambda: Bottleneck(20, 5, 20, dilation=2),
    "bottleneck downsample": lambda: Bottleneck(6, 5, 20, stride=2),
    "bottleneck pooled": lambda: Bottleneck(6, 5, 20, stride=2, pool=True),
    "bottleneck grouped": lambda: Bottleneck(12, 6, 12, groups=3),
    "bottleneck narrowing": lambda: Bottleneck(20, 5, 10),
    "bottleneck widening": lambda: Bottleneck(6, 5, 20),
    "basic": lambda: Basic(6, 6, bias=True),
    "basic downsample": lambda: Basic(6, 9, stride=2),
    "unit": unit,
    "unit without ReLU": lambda: unit(False),
}


def frozen(module: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics of a trained net: a weight of 0 and negative ones too."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            norm.weight.data[0] = 0
    return module.eval().requires_grad_(False)


def fused(name: str, strategy: str = "auto", recompute: bool = False) -> nn.Module:
    model = nn.Sequential(frozen(BLOCKS[name]()))
    svf_fast.convert(model, None, strategy=strategy)
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute
    assert any(isinstance(module, Fused) for module in model.modules())
    return model


def first(model: nn.Module) -> SVFConv2d:
    return next(iter(svf_layers(model).values()))


def as_reference(model: nn.Module) -> nn.Module:
    """The same network with the paper's layers, nothing fused."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, Fused):
            module.unfuse()
    for layer in svf_layers(plain).values():
        layer.strategy = "reference"
        layer.refresh()
    return plain


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor | None = None):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    grad = torch.ones_like(y) if grad is None else grad.to(y.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]


def compare(model: nn.Module, x: torch.Tensor, name: str) -> None:
    """The 2x rule against the network of the paper's layers, in float64 the truth.

    An element whose pre-activation is at rounding may take the other side of its ReLU in any of the
    three: the gradient that arrives there is set to zero, and inner ones are part of the error of
    both. 16-bit blocks round at every layer, so their ReLUs differ in many places.
    """
    reference = as_reference(model)
    truth = copy.deepcopy(reference).double()
    grad = torch.randn(truth(x.double()).shape, dtype=torch.float64)
    grad = torch.where(truth(x.double()).abs() < 0.05, 0, grad).to(x.dtype)
    exact, expected = step(truth, x.double(), grad), step(reference, x, grad)
    got = step(model, x, grad)
    assert len(got) == len(exact) == len(expected)
    for index, values in enumerate(zip(got, expected, exact, strict=True)):
        magnitude = 3 * accumulated(values[2], x.dtype)  # a gradient passes three layers
        what = f"{name} {('y', 'dx')[index] if index < 2 else f'dS {index - 2}'}"
        assert_error_within(*values, magnitude=magnitude, channel_dim=None, name=what)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_within_twice_the_error_of_the_reference(name, strategy, dtype, poisoned_memory):
    model = fused(name, strategy).to(dtype)
    x = torch.randn(3, first(model).in_channels, 9, 11)
    for recompute in (False, True):
        for module in model.modules():
            if hasattr(module, "recompute"):
                module.recompute = recompute
        compare(model, x.to(dtype), f"{name} {strategy}")
        compare(model, x.to(dtype).contiguous(memory_format=torch.channels_last), name)
        compare(model, x.to(dtype)[..., ::2], f"{name} sliced")


def test_masks_where_a_shape_is_of_both_memory_formats():
    """One channel or position is contiguous and channels_last at once; its neighbours are not."""
    stem = frozen(nn.Sequential(conv(1, 9, 3), nn.BatchNorm2d(9)))
    layer = nn.Sequential(SVFConvBNAct(*stem, strategy="chain"))
    one_channel = torch.randn(2, 9, 8, 1).permute(0, 3, 1, 2)
    to_one_position = torch.randn(2, 6, 2, 2).contiguous(memory_format=torch.channels_last)
    cases = (layer, one_channel), (fused("bottleneck downsample", "chain"), to_one_position)
    for model, x in cases:
        model, x = model.double(), x.double()
        reference = as_reference(model)
        grad = torch.randn(reference(x).shape)
        for mine, true in zip(step(model, x, grad), step(reference, x, grad), strict=True):
            torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("bottleneck", "bottleneck downsample", "basic", "unit"))
def test_16_bit(name, dtype):
    """Over draws, the median error of y, dx and each dS at most twice that of the paper's layers.

    Not draw by draw: where one of them rounds across a ReLU's zero and the other does not, the
    error of a small map is any multiple of the other's.
    """
    mine, theirs = [], []
    for seed in range(15):
        torch.manual_seed(seed)
        model = fused(name)
        reference, truth = as_reference(model).to(dtype), as_reference(model).double()
        x = torch.randn(3, first(model).in_channels, 9, 11).to(dtype)
        grad = torch.randn(truth(x.double()).shape)
        exact = step(truth, x.double(), grad)
        for network, errors in ((model.to(dtype), mine), (reference, theirs)):
            pairs = zip(step(network, x, grad), exact, strict=True)
            errors.append([(value.double() - true).norm() / true.norm() for value, true in pairs])
    mine, theirs = torch.tensor(mine), torch.tensor(theirs)
    assert mine.isfinite().all()
    assert (mine.median(dim=0).values <= 2 * theirs.median(dim=0).values).all()


def test_a_bottleneck_keeps_y1_y2_and_bits():
    model = frozen(Bottleneck(64, 16, 64))
    for layer in (model.conv1, model.conv2, model.conv3):
        nn.init.orthogonal_(layer.weight)  # no guarded directions
    SVFBottleneck.from_block(model)
    elements = 2 * 16 * 9 * 11
    bits = 4 * elements // 64 * 8 + 16
    x = torch.randn(2, 64, 9, 11, requires_grad=True)
    assert saved_by(model, x) == 2 * elements * 4 + bits
    model.recompute = True
    assert saved_by(model, x) == elements * 4 + bits
    model.recompute = False
    assert saved_by(model, x, torch.bfloat16) == 2 * elements * 2 + bits
    assert saved_by(as_reference(nn.Sequential(model)), x) > 8 * (2 * elements * 4 + bits)


@pytest.mark.parametrize("name", ("bottleneck", "bottleneck downsample", "basic downsample"))
def test_computes_the_definition(name):
    model = fused(name)
    plain = as_reference(model).double()[0]
    count = 3 if name.startswith("bottleneck") else 2
    stages = [
        (getattr(plain, f"conv{n}"), getattr(plain, f"bn{n}"), True) for n in range(1, count + 1)
    ]
    x = torch.randn(2, first(model).in_channels, 9, 11)
    expected = definition(x.double(), stages, plain.downsample or nn.Identity())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_relu_passes_what_eager_passes():
    """The masks are those of the plain block but where the pre-activation is at rounding."""
    block = frozen(Bottleneck(64, 16, 64))
    x = torch.randn(2, 64, 13, 13)
    plain = block.double()(x.double())
    mine = SVFBottleneck.from_block(block.float())(x)
    differing = (mine > 0) != (plain > 0)
    assert plain[differing].abs().max() < 1e-5 if differing.any() else True
    assert 0.2 < (mine > 0).float().mean() < 0.8


def test_conv_bn_act_with_a_given_residual():
    torch.manual_seed(3)
    sequence = frozen(unit())
    layer = SVFConvBNAct(sequence[0], sequence[1])
    plain = as_reference(nn.ModuleList([layer]))[0].double()
    x = torch.randn(2, 6, 7, 9)
    residual = torch.randn(2, 9, 7, 9)
    for extra in (None, residual):
        for relu in (True, False):
            results = []
            for module, dtype in ((layer, torch.float32), (plain, torch.float64)):
                module.relu = relu
                inputs = [x.to(dtype).requires_grad_()]
                if extra is not None:
                    inputs.append(extra.to(dtype).requires_grad_())
                grads = torch.autograd.grad(
                    module(*inputs).square().sum(), [*inputs, module.conv.S]
                )
                results.append(grads)
            for mine, exact in zip(*results, strict=True):
                assert (mine - exact).norm() < 1e-5 * exact.norm()


def unfusable(change):
    def case():
        model = fused("bottleneck")
        change(model[0])
        return model

    return case


def hook(module):
    module.conv2.register_forward_hook(lambda *_: None)


REASONS = {
    "bn2 uses the batch's statistics": unfusable(lambda b: setattr(b.bn2, "training", True)),
    "bn1 trains": unfusable(lambda b: b.bn1.weight.requires_grad_()),
    "conv2 has a hook": unfusable(hook),
    "conv3 computes as 'reference'": unfusable(lambda b: setattr(b.conv3, "strategy", "reference")),
    "conv1 is a Conv2d": unfusable(lambda b: setattr(b, "conv1", conv(20, 5))),
    "relu was ReLU at conversion and is SiLU now": unfusable(
        lambda b: setattr(b, "relu", nn.SiLU())
    ),
    "downsample was missing at conversion": unfusable(
        lambda b: setattr(b, "downsample", frozen(nn.Sequential(conv(20, 20))))
    ),
    "bn2 was BatchNorm2d at conversion and is Identity now": unfusable(
        lambda b: setattr(b, "bn2", nn.Identity().eval())
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_runs_module_by_module_where_it_must(reason):
    model = REASONS[reason]()
    for layer in svf_layers(model).values():
        layer.refresh()
    x = torch.randn(2, 20, 9, 9)
    assert model[0].unfused_reason().startswith(reason)
    plain = copy.deepcopy(model)
    plain[0].unfuse()
    assert torch.equal(model(x), plain(x))
    note = svf_fast.memory_report(model, x.shape)
    assert any(f"not fused: {reason}" in row.note for row in note.units)


def test_a_sequence_whose_modules_change():
    model = fused("unit")
    x = torch.randn(2, 6, 9, 9)
    model[0][2] = nn.SiLU()
    assert model[0].unfused_reason() == "2 is no longer a ReLU"
    assert torch.equal(model(x), functional.silu(model[0][1](model[0][0](x))))
    model[0][1] = nn.Identity().eval()
    assert torch.equal(model(x), functional.silu(model[0][0](x)))


def test_slices_and_deletions_of_a_sequence():
    plain = frozen(nn.Sequential(*unit(), conv(9, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Tanh()))
    model = svf_fast.convert(copy.deepcopy(plain), None)
    x = torch.randn(2, 6, 9, 9)
    for part in (slice(3), slice(5), slice(0, 7), slice(0, 2), slice(0, 0)):
        torch.testing.assert_close(model[part](x), plain[part](x), rtol=1e-4, atol=1e-4)
        assert model[part].unfused_reason() == ""
    assert [len(model[:end]._names) for end in (7, 5, 3, 2)] == [2, 1, 1, 0]
    assert len(model._names) == 2 and model[3] is model.get_submodule("3")
    for index in (6, 5, 0):
        del model[index], plain[index]
        h = x if index else torch.randn(2, 9, 9, 9)
        torch.testing.assert_close(model(h), plain(h), rtol=1e-4, atol=1e-4)
    assert "no longer there" in model.unfused_reason()
    model.insert(0, nn.Tanh())
    plain.insert(0, nn.Tanh())
    torch.testing.assert_close(model(h), plain(h), rtol=1e-4, atol=1e-4)
    assert [type(m) for m in svf_fast.merge(model).modules()] == [type(m) for m in plain.modules()]


def test_a_module_that_stands_in_a_sequence_twice():
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    layers = [conv(6, 6, 3), nn.BatchNorm2d(6), relu, pool, conv(6, 6, 3), nn.BatchNorm2d(6), relu]
    plain = frozen(nn.Sequential(*layers, pool, nn.Softplus(), relu))
    x = torch.randn(2, 6, 9, 9)
    expected = plain(x)
    model = svf_fast.convert(plain, None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not model.unfused_reason()


def test_hooks_on_the_block_itself_still_run():
    block = frozen(Bottleneck(20, 5, 20))
    model = svf_fast.convert(nn.Sequential(block), None)
    seen = []
    handle = model[0].register_forward_hook(lambda module, *_: seen.append(module))
    model(torch.randn(1, 20, 5, 5))
    assert seen == [block] and not block.unfused_reason()
    handle.remove()
    svf_fast.merge(model)
    assert type(block) is Bottleneck


@pytest.mark.parametrize("name", BLOCKS)
def test_merge_gives_back_the_class_and_the_keys(name):
    plain = nn.Sequential(frozen(BLOCKS[name]()))
    model = svf_fast.convert(copy.deepcopy(plain), None)
    outside = {key for key in model.state_dict() if key.rpartition(".")[2] not in "USV"}
    changed = {
        key for key in plain.state_dict() if key.removesuffix("weight") + "U" in model.state_dict()
    }
    assert set(plain.state_dict()) - changed <= outside
    x = torch.randn(2, first(model).in_channels, 9, 9)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    merged = svf_fast.merge(model)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(merged.state_dict())
    again = svf_fast.convert(merged, None)
    assert any(isinstance(module, Fused) for module in again.modules())


@pytest.mark.parametrize("name", ("bottleneck", "basic", "unit"))
def test_copies_and_pickles(name):
    model = fused(name, recompute=True)
    x = torch.randn(1, first(model).in_channels, 5, 5)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), expected)
        assert any(isinstance(m, Fused) and not m.unfused_reason() for m in other.modules())


@pytest.mark.parametrize("name", ("bottleneck", "unit"))
def test_follows_what_is_written_to_its_modules(name):
    """A block is read once; whatever is written since, however, counts."""
    model = fused(name)
    x = torch.randn(2, first(model).in_channels, 9, 9)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))

    def new(tensor):
        return nn.Parameter(tensor + 0.1, requires_grad=False)

    changes = {
        "in place": lambda: norm.running_mean.add_(0.1),
        "through data": lambda: norm.running_var.data.mul_(1.1),
        "another tensor": lambda: setattr(norm, "weight", new(norm.weight)),
        "eps": lambda: setattr(norm, "eps", 0.1),
        "S": lambda: first(model).S.data.mul_(1.1),
        "cast and back": lambda: model.double().float(),
    }
    before = model(x)
    assert torch.equal(model(x), before)
    for what, change in changes.items():
        with torch.no_grad():
            change()
        y = model(x)
        assert not torch.allclose(y, before) or what == "cast and back", what
        torch.testing.assert_close(y, as_reference(model)(x), rtol=1e-4, atol=1e-4, msg=what)
        before = y


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", ("bottleneck", "basic downsample"))
def test_checkpoint_and_accumulation(name, reentrant):
    model = fused(name)
    x = torch.randn(2, first(model).in_channels, 9, 9)
    _, dx, *expected = step(model, x)
    x.requires_grad_()
    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(x.grad, 2 * dx)
    for parameter, once in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)


def test_autocast():
    model = fused("bottleneck downsample")
    truth = as_reference(model).double()
    x = torch.randn(2, 6, 9, 11)
    exact = step(truth, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, x)
        eager = step(as_reference(model), x)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    for mine, theirs, true in zip(got, eager, exact, strict=True):
        assert (mine - true).norm() < 3 * (theirs - true).norm()


def test_without_gradients():
    model = fused("bottleneck")
    x = torch.randn(2, 20, 9, 9)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x.requires_grad_()
    y = model(x)
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(as_reference(model).double()(x.double()).sum(), x)
    torch.testing.assert_close(grad, exact.float(), rtol=1e-4, atol=1e-4)


def test_first_block_without_a_gradient_of_its_input():
    model = fused("bottleneck downsample")
    x = torch.randn(2, 6, 9, 9)
    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(model(x).sum(), trained)
    expected = step(model, x, torch.ones(1, 20, 5, 5).expand(2, -1, -1, -1))[2:]
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_changed_tensor_and_a_second_derivative_are_refused():
    model = fused("bottleneck widening")
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    source = x * 1
    y = model(source)
    source.add_(1)
    with pytest.raises(RuntimeError, match="changed in place, .* or its input, by"):
        y.sum().backward()
    y = model(x)
    y.mul_(2)  # the output is not kept
    y.sum().backward()
    with pytest.raises(RuntimeError, match="fused block: expected .* without create_graph=True"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_empty_batch():
    model = fused("bottleneck")
    x = torch.randn(0, 20, 9, 9, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 20, 9, 9)
    y.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SVFBottleneck.from_block(3), TypeError, "expected an nn.Module, got int"),
        (
            lambda: SVFBottleneck.from_block(frozen(Basic(6, 6))),
            ValueError,
            "expected 3 convolutions beside the shortcut, got 2",
        ),
        (
            lambda: SVFBasicBlock.from_block(nn.Sequential(conv(2, 2))),
            ValueError,
            "cannot be fused: it has no sum",
        ),
        (
            lambda: SVFBasicBlock.from_block(fused("basic")[0]),
            ValueError,
            "expected a block to fuse, got a fused SVFBasic",
        ),
        (lambda: SVFConvBNAct(nn.Linear(1, 1), None), TypeError, "conv: expected an nn.Conv2d"),
        (lambda: SVFConvBNAct(conv(2, 3), nn.ReLU()), TypeError, "bn: expected an nn.BatchNorm2d"),
        (
            lambda: SVFConvBNAct(conv(2, 3), nn.BatchNorm2d(3).eval())(torch.randn(1, 2, 3, 3), 3),
            TypeError,
            "residual: expected a tensor or None, got int",
        ),
        (
            lambda: SVFConvBNAct(conv(2, 3), nn.BatchNorm2d(2)),
            ValueError,
            "bn: expected 3 features, the channels of conv, got 2",
        ),
        (
            lambda: fused("bottleneck")(torch.randn(1, 7, 5, 5)),
            ValueError,
            r"expected x of shape \[N, 20, H, W\], got \[1, 7, 5, 5\]",
        ),
        (
            lambda: fused("bottleneck")(torch.randn(1, 20, 5, 5).double()),
            TypeError,
            "expected x of torch.float32",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_modules_that_stand_twice_in_a_sequence():
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    layers = [conv(3, 6, 3), nn.BatchNorm2d(6), relu, pool, conv(6, 7, 3), nn.BatchNorm2d(7), relu]
    model = frozen(nn.Sequential(*layers, pool))
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    svf_fast.convert(model, None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model[0].register_forward_hook(lambda *_: None)  # the first unit runs module by module
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ({"padding_mode": "circular"}, {"padding": "same"}), ids=str)
def test_padding_that_a_convolution_cannot_do(options):
    plain = nn.Sequential(
        nn.Conv2d(3, 4, (2, 3), **{"padding": 1, **options}), nn.BatchNorm2d(4), nn.ReLU()
    )
    frozen(plain)
    layer = SVFConvBNAct(plain[0], plain[1])
    assert not layer.bn.training
    assert layer.unfused_reason() == "conv pads x in a pass of its own"
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


def test_plain_convolutions_are_converted_by_from_block():
    block = frozen(Bottleneck(20, 5, 20))
    assert SVFBottleneck.from_block(block, strategy="chain") is block
    assert isinstance(block, SVFBottleneck) and isinstance(block, Bottleneck)
    assert all(isinstance(c, SVFConv2d) for c in (block.conv1, block.conv2, block.conv3))
    assert block.conv1.strategy == "chain"
