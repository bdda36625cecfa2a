from __future__ import annotations

import pytest
import torch
from torch import nn

import svf_fast
from tests.svf_fast.saved_bytes import saved_by


class Block(nn.Module):
    """A bottleneck with a projection, or, if not `fits`, one that the fused path cannot run."""

    def __init__(self, channels: int, width: int, out: int, fits: bool = True):
        super().__init__()
        self.reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.spatial = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.expand = nn.Conv2d(width, out, 1, bias=False)
        self.project = nn.Conv2d(channels, out, 1, stride=2, bias=False)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (width, width, out, out)))
        self.act = nn.ReLU() if fits else nn.SiLU()

    def forward(self, x):
        y = self.act(self.norms[0](self.reduce(x)))
        y = self.act(self.norms[1](self.spatial(y)))
        return torch.relu(self.norms[2](self.expand(y)) + self.norms[3](self.project(x)))


def network(fits: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(8, 4, 16, fits),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).requires_grad_(False)


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", ({}, {"fuse": False}, {"strategy": "reference"}), ids=str)
@pytest.mark.parametrize("fits", (True, False))
def test_predicted_bytes_are_the_bytes_kept(fits, options, dtype):
    """Of the whole network, what its other layers keep included: to the byte."""
    model = svf_fast.convert(network(fits).eval(), None, **options)
    with torch.no_grad():
        model[4].spatial.S[-1] = 0  # a guarded direction
    x = torch.randn(2, 3, 19, 21)
    report = svf_fast.memory_report(model, x.shape, dtype)
    assert report.saved_bytes == saved_by(model, x, dtype) > 0
    reference = svf_fast.convert(network(fits).eval(), None, strategy="reference", fuse=False)
    assert report.reference_bytes == saved_by(reference, x, dtype) >= report.saved_bytes


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram"))
def test_bytes_of_each_layer(strategy):
    model = nn.Sequential(
        nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 12, 1, bias=False)
    )
    svf_fast.convert(model, None, strategy=strategy)
    report = svf_fast.memory_report(model, (2, 6, 9, 9))
    x = 4 * 2 * 6 * 9 * 9
    middle = 4 * 2 * 4 * 5 * 5
    # in order: what conv 0 keeps, what conv 1 keeps and conv 0 does not
    expected = {
        "reference": (2 * middle, 3 * middle),  # nothing in conv 0 needs x
        "fold": (x, middle),
        "chain": (middle, middle),
        "gram": (middle, 0),  # y of conv 0 is x of conv 1
    }[strategy]
    assert tuple(unit.saved_bytes for unit in report.units[:2]) == expected
    assert [unit.strategy.partition("+")[0] for unit in report.units] == [strategy, strategy, ""]
    assert report.units[0].output_shape == (2, 4, 5, 5)


def test_table():
    model = svf_fast.convert(network().eval(), None)
    report = svf_fast.memory_report(model, (2, 3, 19, 21))
    names = [unit.name for unit in report.units]
    assert names == ["", "4", "8", "other layers"]  # the unit in the nn.Sequential, block, head
    assert report.units[0].layers == ("0",)
    model = svf_fast.convert(network(fits=False).eval(), ("4",))
    lines = str(svf_fast.memory_report(model, (2, 3, 19, 21))).splitlines()
    assert lines[0].split()[:3] == ["layer", "strategy", "output"]
    assert any("4.reduce" in line and "2×4×9×10" in line for line in lines)
    assert any("not fused: uses SiLU instead of ReLU" in line for line in lines)
    assert lines[-2].startswith("total")


class ConvNeXtBlock(nn.Module):
    """As torchvision's CNBlock and timm's ConvNeXtBlock compute it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.fc2(torch.nn.functional.gelu(self.fc1(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


def test_a_convnext_block_says_why_it_is_not_fused_and_keeps_a_narrow_map_a_layer():
    torch.manual_seed(0)
    model = nn.Sequential(ConvNeXtBlock(8)).eval().requires_grad_(False)
    svf_fast.convert(model, None)
    x = torch.randn(2, 8, 9, 7)
    report = svf_fast.memory_report(model, x.shape)
    units = {unit.name: unit for unit in report.units}
    assert units["0.conv_dw"].note == (
        "not fused: 0.norm (LayerNorm) follows, which computes its statistics from each map; only "
        "those of a frozen batch norm are constants"
    )
    assert [units[f"0.{name}"].strategy for name in ("conv_dw", "fc1", "fc2")] == 3 * ["gram"]
    # y of the depthwise convolution, x of the first linear layer, y of the second
    assert [units[f"0.{name}"].saved_bytes for name in ("conv_dw", "fc1", "fc2")] == 3 * [x.nbytes]
    # GELU keeps its input, four times as wide; LayerNorm its own, copied, with mean and deviation
    assert report.units[-1].saved_bytes == 4 * x.nbytes + x.nbytes + 2 * x[:, 0].nbytes
    assert report.saved_bytes == saved_by(model, x)


def test_the_model_still_works_after_its_report():
    model = svf_fast.convert(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), None)
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    full = svf_fast.memory_report(model, x.shape)
    assert full.saved_bytes > 0
    assert torch.equal(model(x), expected)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


@pytest.mark.parametrize("shared", ("layer", "block", "parameter"))
def test_what_stands_at_two_places(shared):
    """Its bytes are right, and it is left as it was: with its values, not with shapes alone."""
    if shared == "layer":
        conv = nn.Conv2d(4, 4, 3, padding=1)
        model = nn.Sequential(conv, nn.Tanh(), conv)
    elif shared == "block":
        block = Block(4, 3, 4)
        model = nn.Sequential(block, nn.Tanh(), block)
    else:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(5, 5), nn.Linear(5, 5))
        model[2].weight = model[1].weight
    svf_fast.convert(model.eval().requires_grad_(False), ("0",))
    x = torch.randn(2, 4, 7, 7)
    expected = model(x)
    assert svf_fast.memory_report(model, x.shape).saved_bytes == saved_by(model, x)
    assert torch.equal(model(x), expected)


def test_flops_of_a_bottleneck_are_those_of_the_design():
    """Per position, in units of C² multiplications: the paper's chain 20 + 20, gram 17 + 17 + 3."""
    C, size = 16, 10
    model = nn.Sequential(
        nn.Conv2d(4 * C, C, 1, bias=False),
        nn.Conv2d(C, C, 3, padding=1, bias=False),
        nn.Conv2d(C, 4 * C, 1, bias=False),
    )
    for conv in model:
        nn.init.orthogonal_(conv.weight)
    svf_fast.convert(model, None, strategy="gram")
    report = svf_fast.memory_report(model, (1, 4 * C, size, size))
    unit = 2 * C * C * size * size
    assert report.reference_flops == 40 * unit
    assert report.flops == 37 * unit


@pytest.mark.parametrize("core", ("band:1", "lowrank:2"))
def test_a_core_costs_what_is_read_off_besides(core):
    """Of FLOPs nothing with gram; of bytes nothing but its parameters, Σ and its inverse."""
    C, size = 16, 10
    layers = [nn.Conv2d(4 * C, C, 1, bias=False), nn.Conv2d(C, 4 * C, 1, bias=False)]
    for conv in layers:
        nn.init.orthogonal_(conv.weight)
    shape, unit = (1, 4 * C, size, size), 2 * C * C * size * size
    found = {}
    for name, strategy in (("diag", "gram"), (core, "gram"), (core, "chain"), (core, "reference")):
        model = nn.Sequential(
            *[svf_fast.SVFConv2d.from_conv(c, strategy, core=name) for c in layers]
        )
        report = svf_fast.memory_report(model, shape)
        found[name, strategy] = report
        assert report.saved_bytes == saved_by(model, torch.randn(shape))
    gram = found[core, "gram"]
    assert gram.flops == found["diag", "gram"].flops == 18 * unit
    assert gram.saved_bytes == found["diag", "gram"].saved_bytes
    assert gram.reference_flops == found[core, "reference"].flops == (20 + 6) * unit
    assert found[core, "chain"].flops == (20 + 5) * unit
    parts = {"band:1": 2 * (C - 1), "lowrank:2": 4 * C}[core]
    beside = gram.factor_bytes - found["diag", "gram"].factor_bytes
    assert beside == 2 * 4 * (parts + 2 * C * C)


def test_refusals():
    with pytest.raises(ValueError, match="was it converted"):
        svf_fast.memory_report(nn.Linear(1, 1), (1, 1))


BLOCK = (2, 12, 33, 35)


def test_a_budget_is_met_at_the_least_cost():
    free = svf_fast.memory_report(svf_fast.convert(blocks(), None), BLOCK)
    lean = svf_fast.convert(blocks(), None)
    for block in lean:
        block.recompute = True
    smallest = svf_fast.memory_report(lean, BLOCK)
    assert smallest.saved_bytes < free.saved_bytes
    for budget in (free.saved_bytes, free.saved_bytes - 1, smallest.saved_bytes):
        model = svf_fast.convert(blocks(), None, memory_budget=budget, input_shape=BLOCK)
        report = svf_fast.memory_report(model, BLOCK)
        x = torch.randn(BLOCK)
        assert saved_by(model, x) == report.saved_bytes <= budget
        again = [block.recompute for block in model]
        assert any(again) == (budget < free.saved_bytes)
        assert all(again) == (budget == smallest.saved_bytes)
        assert free.flops <= report.flops <= smallest.flops
        for block, row in zip(model, report.units, strict=False):
            assert block.recompute == (row.note == "computes spatial again")


def test_a_budget_is_met_by_blocks_beside_a_stem():
    """The usual cut of a backbone: its children in one sequence, of which the stem is a unit."""

    def build(**options) -> nn.Sequential:
        torch.manual_seed(0)
        stem = (nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        model = nn.Sequential(*stem, blocks()).eval().requires_grad_(False)
        return svf_fast.convert(model, None, **options)

    shape = (2, 3, 33, 35)
    free = svf_fast.memory_report(build(), shape).saved_bytes
    model = build(memory_budget=free - 1, input_shape=shape)
    assert any(block.recompute for block in model[3])
    assert saved_by(model, torch.randn(shape)) < free


def test_a_budget_that_cannot_be_met_leaves_the_model_as_it_was():
    model = blocks()
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"expected at least .* smallest plan needs, got 1.00 KiB"):
        svf_fast.convert(model, None, memory_budget="1KiB", input_shape=BLOCK)
    assert model.state_dict().keys() == before.keys()
    assert [type(module) for module in model.modules()] == [type(m) for m in blocks().modules()]
    for arguments in ({"memory_budget": "1GiB"}, {"input_shape": BLOCK}):
        with pytest.raises(ValueError, match="expected with the other of memory_budget and input"):
            svf_fast.convert(model, None, **arguments)
    with pytest.raises(ValueError, match="memory size: expected a number"):
        svf_fast.convert(model, None, memory_budget="a lot", input_shape=BLOCK)
    # another shape than the model takes
    with pytest.raises(ValueError, match="expected x of shape"):
        svf_fast.convert(model, None, memory_budget="1GiB", input_shape=(2, 5, 33, 35))
    assert type(model[0].reduce) is nn.Conv2d
    assert svf_fast.convert(model, None) is model


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    stages = (Block(12, 6, 16), Block(16, 4, 16), Block(16, 8, 16))
    return nn.Sequential(*stages).eval().requires_grad_(False)


@pytest.mark.parametrize("fuse", (True, False))
def test_a_report_leaves_nothing_of_itself_in_the_model(fuse):
    """Before the first pass and after it: the fake values of a report are no values."""
    model = svf_fast.convert(network(True).eval(), None, fuse=fuse)
    x = torch.randn(2, 3, 19, 21)
    svf_fast.memory_report(model, x.shape)
    first = model(x)
    svf_fast.memory_report(model, x.shape)
    again = model(x)
    assert type(first) is type(again) is torch.Tensor and torch.equal(first, again)
    again.sum().backward()
    assert all(type(S.grad) is torch.Tensor for S in svf_fast.svf_parameters(model))


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram"))
def test_resident_bytes_are_those_that_stay(strategy):
    """After a pass: the distinct storages that layers hold; no direction is guarded."""
    model = nn.Sequential(Block(12, 6, 24, True)).eval().requires_grad_(False)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        nn.init.orthogonal_(conv.weight)  # no guarded direction
    svf_fast.convert(model, None, strategy=strategy)
    report = svf_fast.memory_report(model, (2, 12, 9, 9))
    model(torch.randn(2, 12, 9, 9)).sum().backward()
    storages = {}
    for layer in svf_fast.layers.factored.svf_layers(model).values():
        held = [layer.U, layer.V, layer.S]
        for made in layer.values.made.values():
            held += [made.weight, made.scaled]
        for _, _, constants in layer.plan.constants.values():
            held += constants
        for tensor in held:
            if tensor is not None and tensor.dim() > 0:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    assert report.factor_bytes == sum(storages.values())
