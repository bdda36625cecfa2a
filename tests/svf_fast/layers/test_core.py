"""Layers with Σ beyond the diagonal: the 2x rule, the guard, what they keep, and how they train."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.ops.test_block import BLOCKS, frozen
from tests.svf_fast.saved_bytes import saved_by
from tests.svf_fast.tolerance import accumulated, assert_error_within

CORES = ("band:1", "block:4", "lowrank:2")
STRATEGIES = ("gram", "chain", "fold")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Both kinds of gram matrix, strides, groups; ranks that blocks of four do not divide.
CONVS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "1x1 narrowing": lambda: nn.Conv2d(12, 5, 1, bias=False),
    "1x1 widening": lambda: nn.Conv2d(6, 12, 1),
    "1x1 widening stride 2": lambda: nn.Conv2d(6, 9, 1, stride=2, bias=False),
    "3x3 stride 2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1),
    "groups 1x1": lambda: nn.Conv2d(6, 16, 1, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1),
    "linear": lambda: nn.Linear(9, 6),
    "linear widening": lambda: nn.Linear(6, 9),
}


def make(case: str, core: str, strategy: str = "auto", **options) -> nn.Module:
    plain = CONVS[case]()
    of = SVFLinear.from_linear if isinstance(plain, nn.Linear) else SVFConv2d.from_conv
    return of(plain, strategy, core=core, **options)


def inputs(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, SVFLinear):
        return torch.randn(3, 70, layer.in_features)
    return torch.randn(3, layer.in_channels, 9, 11)


@torch.no_grad()
def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """Let every core be another than the diagonal that it began as."""
    for layer in svf_layers(model).values():
        size = float(layer.S.abs().mean())
        for part in layer.parts:
            part.copy_(torch.randn_like(part) * by * size)
    return model


def step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None):
    """y, dx and the gradients of all that trains."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad and p.numel())]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


def as_reference(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, svf_fast.Fused):
            module.unfuse()
    for layer in svf_layers(plain).values():
        layer.strategy = "reference"
    return plain


def compare(
    model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None, passes: int = 1
) -> None:
    """The 2x rule: the error of y, dx and every gradient to float64 against that of autograd's.

    passes: layers that a gradient passes, as in the tests of fused blocks.
    """
    plain = as_reference(model)
    results = step(model, x, dtype), step(plain, x, dtype), step(plain.double(), x.double())
    for number, values in enumerate(zip(*results, strict=True)):
        computed = dtype or x.dtype
        size = passes * accumulated(values[2], computed)
        # a channel of inputs that a ReLU cut off leaves zeros
        assert_error_within(
            *values, magnitude=size, dtype=computed, channel_dim=None, name=f"result {number}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("core", CORES)
def test_gradients_within_twice_the_error_of_autograd(core, case, strategy, dtype, poisoned_memory):
    torch.manual_seed(1)
    layer = make(case, core, strategy).to(dtype)
    x = inputs(layer).to(dtype)
    compare(layer, x)
    compare(moved(layer), x)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", ("3x3", "1x1 widening", "groups"))
def test_under_autocast(case, core, poisoned_memory):
    torch.manual_seed(1)
    layer = moved(make(case, core, "gram"))
    compare(layer, inputs(layer), torch.bfloat16)


@pytest.mark.parametrize("core", CORES)
def test_the_definition_against_finite_differences(core):
    torch.manual_seed(1)
    layer = moved(make("groups", core, "reference")).double()
    x = torch.randn(1, 6, 3, 4).double()
    trained = layer.all_trained

    def of(*values):
        names = ("S", *layer.core.parts)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach().clone().requires_grad_() for p in trained)
    assert torch.autograd.gradcheck(of, values)


# What makes Σ hard to invert: in S, off the diagonal, and by training.
def _zero(layer):
    layer.S[0] = 0
    for part in layer.parts:
        part.zero_()


def _tiny(layer):
    layer.S.mul_(torch.logspace(0, -9, len(layer.S)))


def _singular(layer):
    """Let two rows of every Σ be the same as far as it can."""
    core = layer.core.matrix(layer.S, layer.parts)
    if layer.core.kind == "lowrank":
        layer.core_A[:, :, 0], layer.core_B[:, :, 0] = 0, 0
        layer.core_A[:, 1, 0] = 1
        rest = layer.core.matrix(layer.S, layer.parts)
        layer.core_B[:, :, 0] = rest[:, 0] - rest[:, 1]
        return
    for group in core:
        group[1, :2] = group[0, :2]
        group[:2, 2:], group[2:, :2] = 0, 0
    layer.S.copy_(core.diagonal(0, 1, 2).reshape(-1))
    layer.off_diagonal.copy_(layer.core.gradients(core, layer.parts)[1])


def _nearly_singular(layer):
    _singular(layer)
    layer.S.mul_(1 + 1e-5 * torch.randn_like(layer.S))


def _all_zero(layer):
    for part in layer.all_trained:
        part.zero_()


def _large(layer):
    layer.S[-1] = 1e3


HARD = {
    "zero": _zero,
    "tiny": _tiny,
    "singular": _singular,
    "nearly singular": _nearly_singular,
    "all zero": _all_zero,
    "one large": _large,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", ("3x3", "1x1 narrowing", "1x1 widening", "groups", "linear"))
def test_cores_that_cannot_be_inverted(case, core, hard, dtype):
    torch.manual_seed(1)
    layer = moved(make(case, core, "gram"))
    with torch.no_grad():
        HARD[hard](layer)
    layer = layer.to(dtype)
    compare(layer, inputs(layer).to(dtype))
    if hard in ("zero", "singular", "nearly singular"):
        assert layer.guarded


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", ("3x3", "1x1 widening"))
def test_the_guard_follows_what_trains(case, core):
    torch.manual_seed(1)
    layer = make(case, core, "gram")
    x = inputs(layer)
    plans, guarded = [], []
    for _ in range(12):  # through a singular Σ, and past it
        with torch.no_grad():
            layer.S[1] -= 0.2 * layer.singular_values().abs().mean()
            for part in layer.parts:
                part += 0.02 * torch.randn_like(part)
        compare(layer, x)
        plans.append(layer.plan)
        guarded.append(layer.guarded)
    assert any(guarded) and not guarded[-1]
    assert len(set(map(id, plans))) < len(plans)  # the lift of one step serves others


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("write", ("step", "data", "replaced"))
def test_every_change_is_noticed(write, core):
    torch.manual_seed(1)
    layer = moved(make("3x3", core, "gram"))
    x = inputs(layer)
    layer(x)
    name = layer.core.parts[-1]
    part = getattr(layer, name)
    if write == "step":
        with torch.no_grad():
            part.add_(0.5)
    elif write == "data":
        part.data.view(-1)[0] += 0.5
    else:
        setattr(layer, name, nn.Parameter(part.detach() + 0.5))
    compare(layer, x)
    y = layer(x)
    with torch.no_grad():
        getattr(layer, name).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("core", CORES)
def test_a_converted_layer_computes_and_keeps_what_one_with_a_diagonal_does(core, case):
    torch.manual_seed(1)
    plain = CONVS[case]()
    of = SVFLinear.from_linear if isinstance(plain, nn.Linear) else SVFConv2d.from_conv
    for strategy in STRATEGIES:
        ours, diagonal = of(plain, strategy, core=core), of(plain, strategy)
        x = inputs(ours).requires_grad_()
        assert torch.equal(ours(x), diagonal(x))
        assert saved_by(ours, x) == saved_by(diagonal, x)
        ours(x).square().sum().backward()
        diagonal(x).square().sum().backward()
        size = accumulated(diagonal.S.grad, torch.float32).double()
        expected = diagonal.S.grad
        assert_error_within(ours.S.grad, expected, expected.double(), magnitude=size)


@pytest.mark.parametrize("strategy", (*STRATEGIES, "reference"))
@pytest.mark.parametrize("core", CORES)
def test_with_log_scale(core, strategy, poisoned_memory):
    torch.manual_seed(1)
    layer = moved(make("3x3", core, strategy, trains="log_scale"))
    with torch.no_grad():
        layer.log_scale.normal_()
    assert not layer.S.requires_grad and layer.log_scale.requires_grad
    compare(layer, inputs(layer))


# with and without computing again where there is a second convolution
PLACES = [(name, again) for name in BLOCKS for again in (False, True)[: 2 - ("unit" in name)]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("name", "recompute"), PLACES)
def test_fused_blocks(name, recompute, core, strategy, poisoned_memory):
    torch.manual_seed(1)
    block = frozen(BLOCKS[name]())
    model = nn.Sequential(copy.deepcopy(block))
    svf_fast.convert(model, None, strategy, core=core)
    diagonal = svf_fast.convert(nn.Sequential(block), None, strategy)
    for each in (model, diagonal):
        if recompute:
            each[0].recompute = True
    x = torch.randn(2, next(iter(svf_layers(model).values())).in_channels, 9, 9)
    assert torch.equal(model(x), diagonal(x))
    assert saved_by(model, x) == saved_by(diagonal, x)
    reports = [svf_fast.memory_report(each, x.shape) for each in (model, diagonal)]
    assert reports[0].saved_bytes == reports[1].saved_bytes
    compare(moved(model, 0.1), x, passes=3)
    before = step(model, x)
    for _ in range(3):  # from the third pass on the recorded ones run
        assert all(map(torch.equal, before, step(model, x)))
    moved(model, 0.1)
    compare(model, x, passes=3)
    assert not model[0].unfused_reason()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", ("bottleneck downsample", "bottleneck widening", "basic"))
def test_fused_blocks_with_guarded_directions(name, core, poisoned_memory):
    torch.manual_seed(1)
    model = nn.Sequential(frozen(BLOCKS[name]()))
    svf_fast.convert(model, None, "gram", core=core)
    moved(model, 0.1)
    x = torch.randn(2, 6, 9, 9)
    for _ in range(4):
        with torch.no_grad():
            for layer in svf_layers(model).values():
                layer.S[1] *= -0.1
                _zero(layer)
                layer.S[0] = 1e-3 * torch.randn(())
        compare(model, x, passes=3)
        moved(model, 0.02)
        compare(model, x, passes=3)
    assert all(layer.guarded for layer in svf_layers(model).values())


def test_layers_with_cores_of_their_own_in_one_block():
    torch.manual_seed(1)
    model = nn.Sequential(frozen(BLOCKS["bottleneck downsample"]()))
    block = model[0]
    for name, core in (("conv1", "band:1"), ("conv2", "diag"), ("conv3", "lowrank:1")):
        setattr(block, name, SVFConv2d.from_conv(getattr(block, name), core=core))
    svf_fast.convert(model, None, core="block:2")
    assert isinstance(model[0], svf_fast.Fused) and not model[0].unfused_reason()
    compare(moved(model), torch.randn(2, 6, 9, 9), passes=3)


@pytest.mark.parametrize("weak", (False, True))
@pytest.mark.parametrize("name", ("bottleneck", "bottleneck downsample", "basic"))
@pytest.mark.parametrize("core", CORES)
def test_maps_in_8_bits(core, name, weak):
    """Output and dx stay to the bit; the gradients of all of Σ move as those of S alone do."""
    torch.manual_seed(1)
    block, results, saved = frozen(BLOCKS[name]()), {}, {}
    x = torch.randn(
        2, next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels, 17, 19
    )
    for keep in ("exact", "int8"):
        model = nn.Sequential(copy.deepcopy(block))
        svf_fast.convert(model, None, "gram", core=core, keep=keep)
        diagonal = svf_fast.convert(nn.Sequential(copy.deepcopy(block)), None, "gram", keep=keep)
        assert saved_by(model, x) == saved_by(diagonal, x)
        torch.manual_seed(2)
        moved(model, 0.1)
        with torch.no_grad():
            for layer in svf_layers(model).values():
                layer.S[1] *= 1e-3 if weak else 1
        results[keep], saved[keep] = step(model, x), saved_by(model, x)
    assert saved["int8"] < 0.6 * saved["exact"]
    (y, dx, *exact), (y8, dx8, *rounded) = results.values()
    assert torch.equal(y, y8) and torch.equal(dx, dx8)
    for one, other in zip(exact, rounded, strict=True):
        assert 0 < (one - other).norm() < 0.05 * one.norm()


@pytest.mark.parametrize("core", CORES)
def test_16_bit_blocks(core):
    """Over draws, the median error at most twice the paper's layers': as `ops/test_block.py`."""
    mine, theirs = [], []
    for seed in range(15):
        torch.manual_seed(seed)
        model = nn.Sequential(frozen(BLOCKS["bottleneck downsample"]()))
        moved(svf_fast.convert(model, None, core=core), 0.1)
        reference, truth = as_reference(model).to(torch.bfloat16), as_reference(model).double()
        x = torch.randn(3, 6, 9, 11).to(torch.bfloat16)
        exact = step(truth, x.double())
        for network, errors in ((model.to(torch.bfloat16), mine), (reference, theirs)):
            pairs = zip(step(network, x), exact, strict=True)
            errors.append([(value.double() - true).norm() / true.norm() for value, true in pairs])
    mine, theirs = torch.tensor(mine), torch.tensor(theirs)
    assert mine.isfinite().all()
    assert (mine.median(dim=0).values <= 2 * theirs.median(dim=0).values).all()


@pytest.mark.parametrize("core", CORES)
def test_frozen_parts(core):
    """What does not train gets no gradient; the rest gets its own."""
    torch.manual_seed(1)
    for case in ("3x3", "1x1 widening"):
        layer = moved(make(case, core, "gram"))
        layer.S.requires_grad_(False)
        x = inputs(layer)
        compare(layer, x)
        layer(x).sum().backward()
        assert layer.S.grad is None and all(part.grad is not None for part in layer.parts)
        layer.requires_grad_(False)
        assert not layer(x).requires_grad


@pytest.mark.parametrize("core", CORES)
def test_copies_and_files_of_torch(core, tmp_path):
    torch.manual_seed(1)
    layer = moved(make("3x3", core))
    x = inputs(layer)
    expected = step(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(map(torch.equal, expected, step(other, x)))
        with torch.no_grad():
            other.parts[-1].add_(1)
        assert not torch.equal(expected[0], other(x))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh = make("3x3", core)
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert all(map(torch.equal, expected, step(fresh, x)))
    assert f"core={core!r}" in repr(fresh)
    with pytest.raises(ValueError, match="Convert the model with the core of the checkpoint"):
        make("3x3", "diag").load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=f"of a layer with S alone, .* core='{core}'"):
        fresh.load_state_dict(make("3x3", "diag").state_dict())


@pytest.mark.parametrize("core", CORES)
def test_parts_stay_wide(core):
    layer = moved(make("3x3", core)).to(torch.bfloat16)
    assert layer.U.dtype == torch.bfloat16
    assert {part.dtype for part in layer.all_trained} == {torch.float32}
    assert layer.double().parts[0].dtype == torch.float64


@pytest.mark.parametrize("core", CORES)
def test_the_weight_and_the_merged_layer(core):
    torch.manual_seed(1)
    layer = moved(make("groups", core)).double()
    x = inputs(layer).double()
    y = layer(x)
    torch.testing.assert_close(layer.merged()(x), y)
    W = layer.weight
    torch.testing.assert_close(W.detach().as_subclass(torch.Tensor), layer.composed_weight())
    grad = torch.randn_like(y)
    own = torch.autograd.grad(y, layer.all_trained, grad)
    again = nn.functional.conv2d(x, W, layer.bias, padding=1, groups=2)
    for ours, theirs in zip(own, torch.autograd.grad(again, layer.all_trained, grad), strict=True):
        torch.testing.assert_close(ours, theirs)
