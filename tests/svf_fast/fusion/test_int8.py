"""Fused blocks that keep 8 bits: the same output and dL/dx, dL/dS within bfloat16's error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import Fused, SVFBottleneck, SVFConvBNAct
from svf_fast.budget import BudgetError
from svf_fast.fusion.blocks import FusedChain, FusedSequential
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.fusion.test_block_on_gpu import BLOCKS as ON_GPU
from tests.svf_fast.fusion.test_block_on_gpu import converted
from tests.svf_fast.fusion.test_block_on_gpu import image as gpu_image
from tests.svf_fast.gpu_path import interpreted, on_gpu
from tests.svf_fast.ops.test_block import (
    BLOCKS,
    STRATEGIES,
    Basic,
    Bottleneck,
    as_reference,
    conv,
    first,
    frozen,
    step,
    unit,
)
from tests.svf_fast.saved_bytes import saved_by
from tests.svf_fast.tolerance import assert_error_within

FORMATS = (torch.contiguous_format, torch.channels_last)


def in_8_bits(model: nn.Module, on: bool = True) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Fused | SVFConvBNAct):
            module.keeps_int8 = on
    return model


def fused(name: str, strategy: str = "auto", **options) -> nn.Module:
    return svf_fast.convert(nn.Sequential(frozen(BLOCKS[name]())), None, strategy, **options)


def compare(exact: nn.Module, coded: nn.Module, x: torch.Tensor, name: str) -> None:
    """Output and dL/dx to the bit; dL/dS by the 2x rule of the paper's layers in bfloat16.

    Blocks of a few channels with ReLUs: their bfloat16 gradients differ by flipped signs, which
    8 bits never do, so this bound is loose. `test_gradients_of_a_layer_by_the_bound` has the tight
    one.
    """
    grad = torch.randn_like(exact(x))
    y, dx, *_ = step(exact, x, grad)
    y8, dx8, *dS8 = step(coded, x, grad)
    assert torch.equal(y, y8) and torch.equal(dx, dx8), name
    truth = as_reference(exact).double()
    true_dS = step(truth, x.double(), grad)[2:]
    low = as_reference(exact).bfloat16()
    low_dS = step(low, x.bfloat16(), grad)[2:]
    for index, found in enumerate(zip(dS8, low_dS, true_dS, strict=True)):
        what = f"{name} dS {index}"
        assert_error_within(*found, dtype=torch.bfloat16, channel_dim=None, name=what)


@pytest.mark.parametrize("memory_format", FORMATS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_dx_are_exact(name, strategy, memory_format, poisoned_memory):
    exact = fused(name, strategy)
    coded = in_8_bits(copy.deepcopy(exact))
    x = torch.randn(3, first(exact).in_channels, 19, 21).contiguous(memory_format=memory_format)
    for recompute in (False, True):
        for module in (*exact.modules(), *coded.modules()):
            if hasattr(module, "recompute"):
                module.recompute = recompute
        compare(exact, coded, x, f"{name} {strategy}")


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("bottleneck downsample", "basic downsample", "unit"))
def test_output_and_dx_in_other_dtypes(name, dtype):
    exact = fused(name).to(dtype)
    coded = in_8_bits(copy.deepcopy(exact))
    x = torch.randn(3, first(exact).in_channels, 19, 21).to(dtype)
    grad = torch.randn_like(exact(x))
    y, dx, *dS = step(exact, x, grad)
    y8, dx8, *dS8 = step(coded, x, grad)
    assert torch.equal(y, y8) and torch.equal(dx, dx8)
    for mine, true in zip(dS8, dS, strict=True):
        error = (mine.double() - true.double()).norm() / true.double().norm()
        assert 0 < error < 0.03  # coded, and no more than that


@pytest.mark.parametrize("layout", FORMATS, ids=("contiguous", "channels_last"))
def test_gradients_of_a_layer_by_the_bound(layout):
    """|error of dS_r| <= Σ_p |u_r·g_p| Σ_c |u_cr| step_c / 2 / |S_r|, whatever the numbers."""
    torch.manual_seed(0)
    bn = frozen(nn.Sequential(nn.BatchNorm2d(24)))[0]
    bn.weight.data[0] = 1.0
    unit = SVFConvBNAct(conv(24, 24, 3), bn, strategy="gram")
    nn.init.orthogonal_(unit.conv.merged().weight)
    x = torch.randn(2, 24, 17, 15).contiguous(memory_format=layout)
    layer = unit.conv
    with torch.no_grad():
        layer.S.copy_(torch.linspace(0.5, 2, 24))  # no guarded directions
    y = layer(x).detach()
    grad = torch.randn_like(y)
    _, _, exact = step(unit, x, grad)
    unit.keeps_int8 = True
    _, _, coded = step(unit, x, grad)
    z = bn(y)
    g = grad * (z > 0) * (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None]
    U = layer.U.double()
    along = torch.einsum("cr,nchw->nrhw", U, g.double()).abs().sum(dim=(2, 3))  # [N, R]
    step_of = (y.amax(dim=(2, 3)) - y.amin(dim=(2, 3))).double() / 254
    bound = (along * (step_of @ U.abs())).sum(dim=0) / 2 / layer.S.double().abs()
    error = (coded - exact).double().abs()
    assert (error > 0).all() and (error <= bound).all()
    assert error.norm() < 0.02 * exact.norm()  # they do not all add up


@pytest.mark.parametrize("side", ("y", "x"))
def test_guarded_directions_stay_exact(side):
    """Of y and of x: their v is kept as it is."""
    torch.manual_seed(0)
    model = frozen(Bottleneck(24, 12, 48))  # conv1 reads y, conv3 and the shortcut x
    model = svf_fast.convert(nn.Sequential(model), None, "gram")
    layer = model[0].conv1 if side == "y" else model[0].conv3
    with torch.no_grad():
        layer.S.copy_(torch.linspace(1, 2, 12))
        layer.S[[2, 7]] = torch.tensor([1e-6, 0.0])
    assert layer.guarded == 2 and layer.plan.tail.tolist() == [[2, 7]]
    x = torch.randn(2, 24, 15, 13)
    grad = torch.randn_like(model(x))
    exact = dict(zip(svf_layers(model), step(model, x, grad)[2:], strict=True))
    coded = dict(zip(svf_layers(model), step(in_8_bits(model), x, grad)[2:], strict=True))
    name = "0.conv1" if side == "y" else "0.conv3"
    assert torch.equal(coded[name][[2, 7]], exact[name][[2, 7]])
    assert not torch.equal(coded[name][:2], exact[name][:2])


def test_bytes_of_a_bottleneck():
    model = frozen(Bottleneck(64, 16, 64))
    for layer in (model.conv1, model.conv2, model.conv3):
        nn.init.orthogonal_(layer.weight)  # no guarded directions
    SVFBottleneck.from_block(model).keeps_int8 = True
    elements = 2 * 16 * 9 * 11
    bits, grid = 4 * elements // 64 * 8 + 16, 3 * 2 * 16 * 4
    x = torch.randn(2, 64, 9, 11, requires_grad=True)
    assert saved_by(model, x) == 2 * (elements + grid) + bits
    assert saved_by(model, x, torch.bfloat16) == 2 * (elements + grid) + bits
    model.recompute = True  # y1, of which y2 is made again, as it is
    assert saved_by(model, x) == 4 * elements + bits


def test_bytes_of_a_shortcut_and_of_maps_too_small():
    model = frozen(Bottleneck(8, 6, 64, stride=2))
    for layer in (model.conv1, model.conv2, model.conv3, model.downsample[0]):
        nn.init.orthogonal_(layer.weight)
    model = in_8_bits(svf_fast.convert(nn.Sequential(model), None, "gram"))
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    sampled, bits = 8 * 8, (8 * 8 * 64) // 64 * 8 + 16
    expected = 16 * 16 * 6 + 12 * 6 + sampled * 6 + 12 * 6 + sampled * 8 + 12 * 8 + bits
    assert saved_by(model, x) == expected
    small = torch.randn(1, 8, 3, 3, requires_grad=True)  # y2, y3: of 4 positions, no codes
    y1, rest = 9 * 6 + 12 * 6, 4 * (4 * 6 + 4 * 8)
    assert saved_by(model, small) == y1 + rest + (4 * 64) // 64 * 8 + 16
    y, dx, *dS = step(model, small)
    y_exact, dx_exact, *exact = step(in_8_bits(model, False), small)
    assert torch.equal(y, y_exact) and torch.equal(dx, dx_exact)
    assert [torch.equal(*pair) for pair in zip(dS, exact, strict=True)] == [False, True, True, True]


def test_recorded_passes_and_compiled_ones():
    """As the passes themselves compute, to the bit, recorded; compiled, to rounding."""
    model = in_8_bits(fused("bottleneck downsample"))
    x = torch.randn(2, 6, 12, 10)
    grad = torch.randn_like(model(x))
    for _ in range(4):
        expected = step(copy.deepcopy(model), x, grad)
        assert all(map(torch.equal, step(model, x, grad), expected))
        with torch.no_grad():
            for S in svf_fast.svf_parameters(model):
                S.mul_(1.01)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for mine, true in zip(step(compiled, x, grad), step(model, x, grad), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ON_GPU)
def test_on_the_path_of_a_gpu(name):
    exact = converted(name)
    coded = in_8_bits(copy.deepcopy(exact))
    x = gpu_image(exact)
    with on_gpu(interpreted()) as calls:
        grad = torch.randn_like(exact(x))
        y, dx, *dS = step(exact, x, grad)
        assert not calls["quantize"]
        y8, dx8, *dS8 = step(coded, x, grad)
        assert calls["quantize"]
    torch.testing.assert_close(y8, y, rtol=0, atol=0)
    torch.testing.assert_close(dx8, dx, rtol=0, atol=0)
    for mine, true in zip(dS8, dS, strict=True):
        assert (mine - true).norm() < 0.05 * true.norm()


@pytest.mark.parametrize("core", ("band:1", "block:3", "lowrank:2"))
@pytest.mark.parametrize("name", ("bottleneck downsample", "basic downsample"))
def test_beyond_the_diagonal(name, core):
    exact = fused(name, core=core)
    with torch.no_grad():
        for layer in svf_layers(exact).values():
            for part in layer.parameters():
                part.add_(0.02 * torch.randn_like(part))
    coded = in_8_bits(copy.deepcopy(exact))
    x = torch.randn(3, first(exact).in_channels, 25, 27)
    grad = torch.randn_like(exact(x))
    y, dx, *trained = step(exact, x, grad)
    y8, dx8, *trained8 = step(coded, x, grad)
    assert torch.equal(y, y8) and torch.equal(dx, dx8)
    for mine, true in zip(trained8, trained, strict=True):
        assert 0 < (mine - true).norm() < 0.05 * true.norm()


def test_convert_sets_what_it_fuses():
    model = nn.Sequential(frozen(BLOCKS["basic"]()), frozen(BLOCKS["unit"]()))
    svf_fast.convert(model, ("0",), keep="int8")
    assert model[0].keeps_int8 and not isinstance(model[1], Fused)
    svf_fast.convert(model, ("1",))
    assert isinstance(model[1], FusedSequential) and not model[1].keeps_int8
    report = svf_fast.memory_report(model, (2, 6, 16, 16))
    notes = {unit.name: unit.note for unit in report.units if unit.layers}
    assert notes == {"0": "keeps 8 bits", "1": ""}
    assert saved_by(model, torch.randn(2, 6, 16, 16)) == report.saved_bytes
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[0].keeps_int8 and not again[1].keeps_int8
    svf_fast.merge(model)
    assert not any("keeps_int8" in vars(module) for module in model.modules())


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = conv(6, 9, 3), nn.BatchNorm2d(9), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def test_what_cannot_keep_8_bits_is_told():
    with pytest.warns(UserWarning, match="keep='int8': nothing that was converted keeps 8 bits"):
        svf_fast.convert(nn.Sequential(nn.Linear(4, 4)), None, keep="int8")


def test_a_chain_and_a_unit_of_its_own():
    chain = svf_fast.convert(nn.Sequential(frozen(Calls())), None)
    assert isinstance(chain[0], FusedChain)
    stem = frozen(nn.Sequential(conv(6, 9, 3), nn.BatchNorm2d(9)))
    alone = nn.Sequential(SVFConvBNAct(*stem))
    x = torch.randn(2, 6, 15, 13)
    for model in (chain, alone):
        compare(copy.deepcopy(model), in_8_bits(model), x, type(model[0]).__name__)
        restored = pickle.loads(pickle.dumps(model))
        assert restored[0].keeps_int8
    shortcut = torch.randn(2, 9, 15, 13)
    y = alone[0](x, shortcut)
    in_8_bits(alone, False)
    assert torch.equal(y, alone[0](x, shortcut))


def test_refusals_leave_the_model_as_it_was():
    model = nn.Sequential(frozen(BLOCKS["basic"]()))
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    for options, message in (
        ({"keep": "int4"}, "keep: expected 'exact', 'int8' or 'auto', got 'int4'"),
        ({"keep": "int8", "fuse": False}, "keep: expected 'exact' with fuse=False, got 'int8'"),
        ({"keep": "auto"}, "keep: expected a memory_budget with 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            svf_fast.convert(model, None, **options)
    with pytest.raises(BudgetError):
        budget = {"memory_budget": 1, "input_shape": (2, 6, 16, 16)}
        svf_fast.convert(model, None, keep="int8", **budget)
    after = {name: vars(module).copy() for name, module in model.named_modules()}
    assert {name: set(own) for name, own in after.items()} == {
        name: set(own) for name, own in before.items()
    }
    assert not any(isinstance(module, Fused) for module in model.modules())


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return frozen(nn.Sequential(Bottleneck(64, 48, 64), Basic(64, 64), Bottleneck(64, 64, 64)))


def test_a_budget_takes_8_bits_before_it_recomputes():
    shape = (1, 64, 19, 17)
    sizes = {
        keep: svf_fast.memory_report(svf_fast.convert(blocks(), None, keep=keep), shape).saved_bytes
        for keep in ("exact", "int8")
    }
    x = torch.randn(shape)
    for budget, coded in ((sizes["exact"], 0), (sizes["exact"] - 1, 1), (sizes["int8"], 3)):
        options = {"memory_budget": budget, "input_shape": shape}
        model = svf_fast.convert(blocks(), None, keep="auto", **options)
        assert saved_by(model, x) <= budget
        assert sum(module.keeps_int8 for module in model) == coded
        assert not any(module.recompute for module in model)
    with pytest.raises(BudgetError) as error:
        less = {"memory_budget": sizes["int8"] - 1, "input_shape": shape}
        svf_fast.convert(blocks(), None, keep="auto", **less)
    assert error.value.smallest == sizes["int8"]


class Skip(nn.Module):
    """A block and a head that keep the same map, whose bytes count for the first."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = conv(8, 64, 3), Bottleneck(64, 8, 128)
        self.head = conv(64, 4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.block(x).mean() + self.head(x).mean()


def test_a_budget_holds_where_others_keep_what_a_block_keeps():
    """Taken out of a block's bytes, a shared map is in another's: no plan may go by sums alone."""
    shape = (2, 8, 24, 24)

    def build(**options) -> nn.Module:
        torch.manual_seed(0)
        model = frozen(Skip())
        model.head.requires_grad_(True)
        return svf_fast.convert(model, ("block",), "gram", **options)

    x, sizes = torch.randn(shape), {}
    for keep in ("exact", "int8"):
        sizes[keep] = svf_fast.memory_report(build(keep=keep), shape).saved_bytes
    assert sizes["int8"] > 0.7 * sizes["exact"]  # its x stays alive
    met = 0
    for budget in range(sizes["exact"], sizes["exact"] // 4, -7001):
        options = {"keep": "auto", "memory_budget": budget, "input_shape": shape}
        try:
            model = build(**options)
        except BudgetError as error:
            smallest = error.smallest
            assert budget < smallest
            continue
        assert saved_by(model, x) <= budget
        met += 1
    assert met > 1
    model = build(keep="auto", memory_budget=smallest, input_shape=shape)
    assert saved_by(model, x) <= smallest


def test_a_later_budget_leaves_the_rounding_of_others_as_it_is():
    ample = {"memory_budget": "1GiB", "input_shape": (2, 6, 16, 16)}
    for before, then in (("exact", "int8"), ("int8", "exact")):
        model = nn.Sequential(frozen(BLOCKS["basic"]()), frozen(BLOCKS["basic"]()))
        svf_fast.convert(model, ("0",), keep=before)
        svf_fast.convert(model, ("1",), keep=then, **ample)
        assert [block.keeps_int8 for block in model] == [before == "int8", then == "int8"]


def test_a_slice_keeps_as_the_whole():
    model = svf_fast.convert(frozen(nn.Sequential(*unit(), *unit_of(9))), None, keep="int8")
    assert isinstance(model, FusedSequential) and model.keeps_int8
    part = model[:3]
    assert isinstance(part, FusedSequential) and part.keeps_int8
    stem = nn.Sequential(SVFConvBNAct(*frozen(unit(False))), conv(9, 4))
    assert svf_fast.convert(stem, None, keep="int8")[0].keeps_int8


def unit_of(channels: int) -> nn.Sequential:
    return nn.Sequential(conv(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())


def test_a_graph_of_the_exact_block_is_not_one_of_the_coded():
    model = fused("bottleneck")
    model(torch.randn(1, 20, 5, 5))
    exact = model[0].constants_key()
    model[0].keeps_int8 = True
    assert exact and model[0].constants_key() != exact
