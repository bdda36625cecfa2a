"""Modules of one's own that call convolution, batch norm and ReLU; what is not fused has a note."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import svf_fast
from svf_fast.fusion.blocks import FusedChain
from svf_fast.fusion.structure import Chain, StageNames, find
from tests.svf_fast.fusion.test_structure import Basic
from tests.svf_fast.saved_bytes import saved_by
from tests.svf_fast.tolerance import assert_error_within


class Conv(nn.Module):
    """As YOLOv5 and many others have it."""

    def __init__(self, act: nn.Module | None = None):
        super().__init__()
        self.c = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.act = act or nn.ReLU(inplace=True)
        self.n = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.n(self.c(x)))


class DoubleConv(nn.Module):
    """Of a U-Net, with functions for modules, dropout, a pool, and parts in a list."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1)])
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6, eps=0.1)})
        self.dropout, self.pool = nn.Dropout2d(0.3), nn.MaxPool2d(2)

    def forward(self, image: Tensor) -> Tensor:
        y = functional.relu(self.norms["a"](self.convs[0](image)), inplace=True)
        return self.pool(self.dropout(self.norms["b"](self.convs[1](y)).relu()))


class Wide(nn.Module):
    """Pads before, and ends with a convolution without batch norm."""

    def __init__(self):
        super().__init__()
        self.pad, self.first = nn.ReflectionPad2d(1), nn.Conv2d(6, 6, 3)
        self.bn, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.nothing = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.nothing(self.bn(self.first(self.pad(x)))))


def stage(conv: str, bn: str, relu: bool = True) -> StageNames:
    return StageNames(conv, bn, relu)


CHAINS = {
    "conv": (Conv, {"": (stage("c", "n"),)}),
    "other activation": (lambda: Conv(nn.SiLU(True)), {"": (stage("c", "n", False), "act")}),
    "double": (
        DoubleConv,
        {
            "": (
                stage("convs.0", "norms.a"),
                stage("convs.1", "norms.b"),
                "dropout",
                "pool",
            )
        },
    ),
    "wide": (
        Wide,
        {
            "": ("pad", stage("first", "bn", False), "last"),
        },
    ),
}


def frozen(model: nn.Module) -> nn.Module:
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("strategy", ("auto", "fold", "chain", "gram"))
@pytest.mark.parametrize("case", CHAINS)
def test_a_module_of_ones_own_is_fused(case, strategy):
    torch.manual_seed(0)
    make, steps = CHAINS[case]
    plain = frozen(make())
    blocks, found, reasons = find(plain, lambda _: True)
    assert not blocks and not reasons
    assert found == [Chain(name, of) for name, of in steps.items()]
    x = torch.rand(2, 6, 9, 10)
    reference, truth = plain(x), copy.deepcopy(plain).double()(x.double())
    model = svf_fast.convert(copy.deepcopy(plain), None, strategy)
    fused = [module for module in model.modules() if isinstance(module, FusedChain)]
    assert len(fused) == len(steps) and not any(part.unfused_reason() for part in fused)
    assert_error_within(model(x), reference, truth, factor=4, magnitude=4 * truth, channel_dim=1)
    paper = svf_fast.convert(copy.deepcopy(plain), None, "reference", fuse=False)
    grads = []
    for each in (copy.deepcopy(model).double(), paper.double()):
        image = x.double().requires_grad_()
        parameters = [image, *svf_fast.svf_parameters(each)]
        grads.append(torch.autograd.grad(each(image).square().sum(), parameters))
    for mine, exact in zip(*grads):
        assert (mine - exact).norm() <= 1e-10 * exact.norm()
    report = svf_fast.memory_report(model, x.shape)
    assert abs(report.saved_bytes - saved_by(model, x)) <= 0.02 * report.saved_bytes
    assert report.saved_bytes < report.reference_bytes
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert isinstance(other, FusedChain)
        torch.testing.assert_close(other(x), model(x))
    merged = svf_fast.merge(model)
    assert [type(module) for module in merged.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(merged(x), reference, rtol=1e-4, atol=1e-4)


def test_what_changes_later_runs_as_its_own_forward():
    torch.manual_seed(0)
    plain = nn.Sequential(frozen(Conv(nn.SiLU())), frozen(DoubleConv()))
    model = svf_fast.convert(copy.deepcopy(plain), None)
    x = torch.rand(2, 6, 9, 9)
    model(x)
    seen: list[str] = []
    model[0].act.register_forward_hook(lambda *_: seen.append("act"))  # called as it is
    model(x)
    assert seen == ["act"] and model[0].unfused_reason() == ""
    handle = model[0].n.register_forward_hook(lambda *_: seen.append("n"))
    assert model[0].unfused_reason() == "n has a hook"
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert seen == ["act", "n", "act"]
    handle.remove()
    for each in (model, plain):
        each[0].act = nn.Tanh()
    assert "act was SiLU at conversion and is Tanh now" in model[0].unfused_reason()
    for each in (model, plain):
        each[1].norms["b"].eps = 2.0
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert model[1].unfused_reason() == ""


class Branching(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else x


class Functional(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.n(self.c(x)))


class Flags(Conv):
    def forward(self, x: Tensor, norm: bool = True) -> Tensor:
        return super().forward(x)


class UsedTwice(Conv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.n(y) * y


class Collects(Conv):
    """Keeps its maps in a list, in which a trace must leave nothing."""

    def __init__(self):
        super().__init__()
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.maps.append(y)
        return y


class Apart(nn.Module):
    """The convolution is called by one module, the batch norm by another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv2d(6, 6, 3)), nn.Sequential(nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


NOTES = {
    "Branching": (Branching(), "c", "Branching.forward calls it: its forward cannot be traced ("),
    "Functional": (Functional(), "c", "Functional.forward calls it: silu stands where a module"),
    "Flags": (Flags(), "c", "Flags.forward calls it: it does not map one tensor to one"),
    "UsedTwice": (UsedTwice(), "c", "UsedTwice.forward calls it: mul stands where a module"),
    "Collects": (Collects(), "c", "Collects.forward calls it: its forward stores 'maps' on the"),
    "Apart": (Apart(), "a.0", "b.0 follows, but not in an nn.Sequential, a residual"),
    "traced": (
        fx.symbolic_trace(nn.Sequential(Conv(), DoubleConv())),
        "0.c",
        "GraphModule.forward calls it: convert the network before it is traced",
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_convolution_before_a_norm_that_stays_unfused_has_a_note(case):
    model, conv, note = NOTES[case]
    plain = frozen(copy.deepcopy(model))
    model = svf_fast.convert(copy.deepcopy(plain), None)
    assert not any(isinstance(module, FusedChain) for module in model.modules())
    x = torch.rand(2, 6, 9, 9)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    if case == "Branching":  # on the value of x, which shapes have not
        return
    if case == "Collects":
        assert len(model.maps) == 1
    units = {unit.name: unit.note for unit in svf_fast.memory_report(model, x.shape).units}
    assert units[conv].startswith(f"not fused: {note}")


def test_a_chain_that_is_chosen_in_part():
    model = frozen(nn.Sequential(DoubleConv()))
    svf_fast.convert(model, ("0.convs.0",))
    assert find(model, lambda name: name == "0.convs.0")[2] == {
        "0.convs.0": "DoubleConv.forward calls it: only 1 of its 2 stages are chosen"
    }
    assert not isinstance(model[0], FusedChain)
    svf_fast.convert(model, ("0.convs.1",))
    assert isinstance(model[0], FusedChain) and model[0].unfused_reason() == ""


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.stage = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), Conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(self.norm(self.stem(x)).relu())


def test_a_network_stays_of_its_class_and_its_stem_has_a_note():
    model = frozen(Network())
    svf_fast.convert(model, None)
    assert type(model) is Network and isinstance(model.stage, FusedChain)
    units = {unit.name: unit.note for unit in svf_fast.memory_report(model, (1, 6, 9, 9)).units}
    assert units["stem"].startswith("not fused: norm follows, but not in an nn.Sequential")
    assert units["stage"] == ""


def test_a_forward_that_writes_to_a_buffer_writes_nothing_while_it_is_read():
    class Counts(Basic):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(()))

        def forward(self, x):
            self.mean.mul_(0.9)
            return x

    class Kept(Basic):
        def __init__(self):
            super().__init__()
            self.moves = Moves()

        def shortcut(self, x):
            return self.moves(x)

    model = nn.Sequential(Counts(), Kept())
    blocks, _, reasons = find(model, lambda _: True)
    assert not blocks and reasons.keys() == {"0", "1"}
    assert model[0].count == 0 and model[1].moves.mean == 1


def test_a_network_that_torchvision_traced():
    torchvision = pytest.importorskip("torchvision")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    extract = extraction.create_feature_extractor
    resnet = torchvision.models.resnet
    plain = frozen(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=2))
    x = torch.rand(1, 3, 33, 33)
    expected = plain(x)
    before = svf_fast.convert(extract(copy.deepcopy(plain), ["layer1", "fc"]), ("layer1",))
    torch.testing.assert_close(before(x)["fc"], expected, rtol=1e-4, atol=1e-4)
    notes = {unit.note for unit in svf_fast.memory_report(before.eval(), x.shape).units}
    assert any("calls it: convert the network before it is traced" in note for note in notes)
    model = svf_fast.convert(copy.deepcopy(plain), ("layer1",))
    leaves = [svf_fast.SVFBasicBlock]
    after = extract(model, ["layer1", "fc"], tracer_kwargs={"leaf_modules": leaves})
    torch.testing.assert_close(after(x)["fc"], expected, rtol=1e-4, atol=1e-4)
    assert after.layer1.get_submodule("0").unfused_reason() == ""
