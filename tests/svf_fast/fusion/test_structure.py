from __future__ import annotations

import copy
import operator
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

import svf_fast
from svf_fast.fusion.structure import ResidualBlock, StageNames, Unit, examine, find


def everywhere(name: str) -> bool:
    return True


class Basic(nn.Module):
    """What most tests vary: two convolutions, the shortcut is x."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def main(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def shortcut(self, x):
        return x

    def forward(self, x):
        return self.relu(self.main(x) + self.shortcut(x))


class OddNames(nn.Module):
    """Names and order tell nothing; functions instead of modules; the shortcut comes first."""

    def __init__(self):
        super().__init__()
        self.downsample = nn.BatchNorm2d(4)
        self.bn9 = nn.Conv2d(6, 4, 1)
        self.a = nn.ModuleDict({"z": nn.Conv2d(4, 4, 3, 2, 2, 2, groups=2, bias=False)})
        self.conv1 = nn.BatchNorm2d(4, affine=False)
        self.b = nn.Conv2d(4, 8, (1, 3), padding="same")
        self.c = nn.BatchNorm2d(8, eps=0.1)
        self.d = nn.ModuleList([nn.Conv2d(6, 8, 1, 2), nn.BatchNorm2d(8)])

    def forward(self, image):
        way = self.d[1](self.d[0](image))
        y = functional.relu(self.downsample(self.bn9(image)), inplace=True)
        y = self.conv1(self.a["z"](y)).relu_()
        y = self.c(self.b(y))
        return torch.relu(torch.add(way, y))


class ConvNormAct(nn.Module):
    def __init__(self, inputs, outputs, act=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class DropPath(nn.Module):
    def __init__(self, probability):
        super().__init__()
        self.drop_prob = probability

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) > self.drop_prob)


class Helpers(nn.Module):
    """Convolutions within modules of their own, and modules that do nothing at every place."""

    def __init__(self, drop_path=0.0):
        super().__init__()
        self.body = nn.Sequential(
            ConvNormAct(6, 4), nn.Dropout2d(0.0), ConvNormAct(4, 4), ConvNormAct(4, 9, False)
        )
        self.way = nn.Sequential(nn.AvgPool2d(1), nn.Identity(), ConvNormAct(6, 9, False))
        self.drop_path = DropPath(drop_path)
        self.last = nn.ReLU()

    def forward(self, x):
        y = self.drop_path(self.body(x))
        y += self.way(x)
        return self.last(y)


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one, as timm has it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        torch._assert(x.ndim == 4, "images")
        y = functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(y))


def with_(block: nn.Module, **modules: nn.Module) -> nn.Module:
    for name, module in modules.items():
        setattr(block, name, module)
    return block


class NormRelu(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, affine=False)

    def forward(self, x):
        return functional.batch_norm(x, self.running_mean, self.running_var, eps=self.eps).relu()


class OwnActivations(Basic):
    def __init__(self, act=None):
        super().__init__()
        self.bn1 = NormAct(6, act or nn.ReLU())
        self.bn2 = NormAct(6, nn.Identity())

    def main(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))


class OwnNames(Basic):
    def fused_convs(self):
        return 1


def run(block: nn.Module, found: ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    """What the found structure says that a block computes, in evaluation."""

    def stage(of: StageNames, x):
        bn = block.get_submodule(of.bn)
        y = block.get_submodule(of.conv)(x)
        y = functional.batch_norm(
            y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps
        )
        return y.relu() if of.relu else y

    y = way = x
    for of in found.stages:
        y = stage(of, y)
    for name in found.pre:
        way = block.get_submodule(name)(way)
    total = y + (stage(found.shortcut, way) if found.shortcut else way)
    return total.relu() if found.relu else total


def find_block(block: nn.Module) -> ResidualBlock | str:
    blocks, _, reasons = find(nn.ModuleDict({"it": block}), everywhere)
    assert len(blocks) + ("it" in reasons) == 1
    return blocks[0] if blocks else reasons["it"]


BASIC = (StageNames("conv1", "bn1", True), StageNames("conv2", "bn2", False))


@pytest.mark.parametrize(
    "block, stages, pre, shortcut",
    [
        (Basic(), BASIC, (), None),
        (
            OddNames(),
            (
                StageNames("bn9", "downsample", True),
                StageNames("a.z", "conv1", True),
                StageNames("b", "c", False),
            ),
            (),
            StageNames("d.0", "d.1", False),
        ),
        (
            Helpers(),
            (
                StageNames("body.0.conv", "body.0.bn", True),
                StageNames("body.2.conv", "body.2.bn", True),
                StageNames("body.3.conv", "body.3.bn", False),
            ),
            ("way.0",),
            StageNames("way.2.conv", "way.2.bn", False),
        ),
        (OwnActivations(), BASIC, (), None),
        (with_(OwnActivations(), bn1=NormRelu(6)), BASIC, (), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_blocks_are_found_whatever_their_names(block, stages, pre, shortcut):
    for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    found = find_block(block)
    assert found == ResidualBlock("it", stages, pre, shortcut)
    x = torch.randn(2, 6, 5, 7)
    block.eval()
    expected = block(x.clone())
    assert expected.min() == 0 < expected.max()
    assert torch.equal(run(block, found, x), expected)


class Written(Basic):
    """The same with the sum and the ReLU written in some other way."""

    def __init__(self, add, relu):
        super().__init__()
        self.add, self.activation = add, relu

    def forward(self, x):
        y = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.activation(self.add(y, x))


@pytest.mark.parametrize(
    "add, relu",
    [
        (lambda y, x: y + x, nn.ReLU()),
        (lambda y, x: x + y, functional.relu),
        (lambda y, x: operator.iadd(y, x), lambda y: functional.relu(input=y, inplace=True)),
        (lambda y, x: torch.add(x, y), torch.relu),
        (lambda y, x: torch.add(y, other=x), torch.relu_),
        (lambda y, x: y.add(x), lambda y: y.relu()),
        (lambda y, x: y.add_(x), lambda y: y.relu_()),
    ],
)
def test_ways_to_write_sum_and_relu(add, relu):
    assert find_block(Written(add, relu)) == ResidualBlock("it", BASIC, (), None)


# One change to Basic each, and how the reason begins.


class Squeezed(Basic):
    def __init__(self):
        super().__init__()
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sigmoid())

    def main(self, x):
        y = super().main(x)
        return y * self.se(y)


class Activation(Basic):
    def __init__(self, act):
        super().__init__()
        self.relu = act


class OtherActivationAtTheEnd(Basic):
    def forward(self, x):
        return functional.silu(self.main(x) + x)


class NoInnerRelu(Basic):
    def main(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))


class ReluBeforeSum(Basic):
    def main(self, x):
        return self.relu(super().main(x))


class PooledShortcut(Basic):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(1)

    def shortcut(self, x):
        return self.pool(x)


class SlicedShortcut(Basic):
    def shortcut(self, x):
        return x[:, :, ::1]


class ConvolutionAlone(Basic):
    def __init__(self):
        super().__init__()
        self.way = nn.Conv2d(6, 6, 1)

    def shortcut(self, x):
        return self.way(x)


class SharedConvolution(Basic):
    def main(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv1(y))


class UsedTwice(Basic):
    def main(self, x):
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(self.relu(y))) + y


class ReluInPlaceAside(Basic):
    """The ReLU's result is not used, what it overwrote is."""

    def main(self, x):
        y = self.bn1(self.conv1(x))
        self.relu(y)
        return self.bn2(self.conv2(y))


class Aside(Basic):
    def forward(self, x):
        x.mean()
        return super().forward(x)


class SumOverInput(Basic):
    def forward(self, x):
        y = self.main(x)
        x += y
        return self.relu(x)


class WeightedSum(Basic):
    def forward(self, x):
        return self.relu(torch.add(self.main(x), x, alpha=2))


class Stores(Basic):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class Branches(Basic):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class TwoInputs(Basic):
    def forward(self, x, y):
        return self.relu(self.main(x) + y)


class TwoOutputs(Basic):
    def forward(self, x):
        return super().forward(x), x


class OnlyInEvaluation(Basic):
    def main(self, x):
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(y if self.training else self.relu(y)))


class OtherWhenTraining(Basic):
    def __init__(self):
        super().__init__()
        self.bn3 = nn.BatchNorm2d(6)

    def main(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return (self.bn3 if self.training else self.bn2)(self.conv2(y))


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class ForeignNorm(nn.BatchNorm2d):
    def forward(self, x):
        return functional.batch_norm(x, self.running_mean, self.running_var, None, self.bias)


def with_hook(name: str) -> nn.Module:
    block = Basic()
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    return block


def with_forward(name: str) -> nn.Module:
    block = Basic()
    inner = block.get_submodule(name)
    inner.forward = inner.forward
    return block


@pytest.mark.parametrize(
    "block, reason",
    [
        (Squeezed(), "mul stands where a batch norm would fit"),
        (Helpers(drop_path=0.1), "'drop_path' (DropPath) is active"),
        (Activation(nn.SiLU()), "uses SiLU instead of ReLU"),
        (Activation(nn.ReLU6()), "uses ReLU6 instead of ReLU"),
        (OtherActivationAtTheEnd(), "silu stands where its last ReLU would fit"),
        (NoInnerRelu(), "no ReLU follows 'bn1'"),
        (ReluBeforeSum(), "a ReLU stands between 'bn2' and the sum"),
        (PooledShortcut(), "its shortcut pools"),
        (SlicedShortcut(), "getitem stands where"),
        (ConvolutionAlone(), "'way' (Conv2d) stands where a batch norm would fit"),
        (SharedConvolution(), "it calls 'conv1' 2 times"),
        (UsedTwice(), "add stands where a batch norm would fit"),
        (ReluInPlaceAside(), "the output of 'bn1' (BatchNorm2d) is used more than once"),
        (Aside(), "it also uses mean"),
        (SumOverInput(), "it writes its sum over its input"),
        (WeightedSum(), "it calls add in an unusual way"),
        (Stores(), "its forward stores 'kept' on the module"),
        (Branches(), "its forward cannot be traced ("),
        (TwoInputs(), "its forward takes x, y instead of one tensor"),
        (TwoOutputs(), "its forward returns something else than one tensor"),
        (OnlyInEvaluation(), "no ReLU follows 'bn1'"),
        (OtherWhenTraining(), "its forward differs between training and evaluation"),
        (with_hook("conv2"), "'conv2' has a forward hook"),
        (with_hook(""), "it has a forward hook"),
        (with_forward("bn2"), "'bn2' has a forward of its own"),
        (with_(Basic(), bn1=nn.BatchNorm3d(6)), "'bn1' is of type BatchNorm3d, not"),
        (with_(Basic(), bn1=nn.InstanceNorm2d(6, 0, 0.1, True, True)), "'bn1' is of type Instance"),
        (with_(Basic(), bn2=nn.GroupNorm(2, 6), bn3=nn.BatchNorm2d(6)), "'bn2' (GroupNorm) stands"),
        (
            with_(Basic(), bn1=nn.BatchNorm2d(6, track_running_stats=False)),
            "'bn1' keeps no running",
        ),
        (with_(Basic(), bn1=ForeignNorm(6)), "'bn1' (ForeignNorm) is more than a batch norm: "),
        (OwnActivations(nn.GELU()), "'bn1' (NormAct) is more than a batch norm: it calls 'act'"),
        (
            with_(Basic(), conv1=OtherConv(6, 6, 1)),
            "'conv1' is of type OtherConv, not an nn.Conv2d",
        ),
        (
            with_(Basic(), conv1=nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")),
            "'conv1' pads with 'reflect' instead of zeros",
        ),
        (
            with_(Basic(), conv2=nn.Conv2d(6, 6, (2, 3), padding="same")),
            "'conv2' pads one side more than the other",
        ),
        (
            with_(Basic(), conv1=nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))),
            "'conv1' is of type ParametrizedConv2d, not an nn.Conv2d",
        ),
        (with_(Basic(), recompute=3), "it has an attribute 'recompute' of its own"),
        (with_(Basic(), original=nn.Identity()), "it has an attribute 'original' of its own"),
        (OwnNames(), "it has an attribute 'fused_convs' of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reason_why_a_block_does_not_fit(block, reason):
    assert find_block(block).startswith(reason)


def test_a_unit_in_a_sequence_with_a_name_of_ours():
    def sequence(**others: nn.Module) -> nn.Sequential:
        norm = nn.BatchNorm2d(4).eval()
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 1), bn=norm, **others))

    _, units, reasons = find(sequence(other=nn.ReLU()), everywhere)
    assert len(units) == 1 and not reasons
    _, units, reasons = find(sequence(original=nn.ReLU()), everywhere)
    assert not units and reasons["conv"].startswith("it has an attribute 'original' of its own")


def test_the_model_is_left_as_it_was():
    class Draws(Basic):
        def forward(self, x):
            self.count = getattr(self, "count", 0) + 1
            return super().forward(x) * torch.rand(1) + torch.ones(1)

    model = nn.Sequential(Draws(), OwnActivations().eval(), Helpers(0.2), Stores().train())
    attributes = [dict(vars(module)) for module in model.modules()]
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find(model, everywhere)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_only_what_is_chosen():
    model = nn.Sequential()
    model.layer1, model.layer2 = nn.Sequential(Basic(), Basic()), nn.Sequential(Helpers())
    blocks, units, reasons = find(model, lambda name: name.startswith("layer1"))
    assert [block.name for block in blocks] == ["layer1.0", "layer1.1"]
    assert not units and not reasons
    assert blocks[1].convs == ("layer1.1.conv1", "layer1.1.conv2")
    blocks, units, reasons = find(model, lambda name: name.endswith("conv1"))
    assert not blocks and not units
    assert reasons == {
        f"layer1.{index}": "only 1 of its 2 convolutions are chosen" for index in (0, 1)
    }


def test_shared_modules():
    block = Basic()
    blocks, _, reasons = find(nn.Sequential(block, block), everywhere)
    assert [found.name for found in blocks] == ["0", "1"] and not reasons
    one, other = Basic(), Basic()
    other.conv2 = one.conv2
    blocks, _, reasons = find(nn.Sequential(one, other), everywhere)
    assert not blocks
    assert reasons == dict.fromkeys("01", "'conv2' is used twice in the model")


def test_a_block_alone():
    blocks, _, reasons = find(Basic(), everywhere)
    assert [found.name for found in blocks] == [""] and not reasons
    assert examine(Basic()) == blocks[0]
    assert examine(nn.Sequential(nn.Conv2d(1, 1, 1))) == "it has no sum of two maps"


def test_blocks_of_svf_layers():
    model = nn.Sequential(Basic(), Helpers())
    expected = find(model, everywhere)
    assert len(expected[0]) == 2
    svf_fast.convert(model, None, fuse=False)
    assert find(model, everywhere) == expected
    svf_fast.convert(nn.Sequential(other := Basic()), None)
    assert find(other, everywhere) == ([], [], {})  # fused already


def test_units_of_sequentials():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 4, 1), NormAct(4, nn.ReLU()), nn.ReLU6()),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm3d(4),
        nn.Conv2d(4, 4, 1),
        nn.SyncBatchNorm(4),
    )
    blocks, units, reasons = find(model, everywhere)
    assert not blocks
    assert units == [
        Unit("", StageNames("0", "1", True), "2"),
        Unit("", StageNames("3", "4", False), None),
        Unit("", StageNames("11", "12", False), None),
        Unit("6", StageNames("0", "1", True), None),
    ]
    assert reasons == {"9": "'10' is of type BatchNorm3d, not a batch norm of maps"}
    assert find(model, lambda name: name == "3")[1] == [units[1]]
    model[1].register_forward_pre_hook(lambda *_: None)
    model[3].forward = model[3].forward
    _, units, reasons = find(model, everywhere)
    assert [(unit.container, unit.stage.conv) for unit in units] == [("", "11"), ("6", "0")]
    assert reasons["0"] == "'1' has a forward pre hook"
    assert reasons["3"] == "'3' has a forward of its own instead of its class's"


def test_units_outside_of_a_plain_forward_are_left():
    class Skips(nn.Sequential):
        def forward(self, x):
            return self[1](x)

    assert find(Skips(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), everywhere) == ([], [], {})


def test_the_shortcut_of_a_block_that_does_not_fit_is_a_unit():
    class Block(Basic):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

        def forward(self, x):
            return functional.silu(self.main(x) + self.downsample(x))

    blocks, units, reasons = find(nn.Sequential(Block()), everywhere)
    assert not blocks and reasons == {"0": "silu stands where its last ReLU would fit"}
    assert units == [Unit("0.downsample", StageNames("0", "1", False), None)]
