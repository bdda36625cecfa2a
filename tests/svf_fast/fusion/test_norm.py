"""Batch norms that are frozen: they stay so in a training loop, and those of constants fuse."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

import svf_fast
from svf_fast import Fused, SVFBasicBlock, SVFConvBNAct
from svf_fast.fusion.norm import Norm, StaysFrozen
from tests.svf_fast.tolerance import assert_error_within


class Constants(nn.Module):
    """torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int, eps: float = 1e-3):
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        var, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class FixedEps(Constants):
    """DETR's: eps is in the code alone."""

    def __init__(self, channels: int):
        super().__init__(channels)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class NoEps(FixedEps):
    """maskrcnn-benchmark's."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Branching(Constants):
    """detectron2's: another formula where x needs a gradient, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return super().forward(x)
        mean, var = self.running_mean, self.running_var
        return functional.batch_norm(x, mean, var, self.weight, self.bias, False, eps=self.eps)


class Clipping(Constants):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


class Moving(Constants):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.mul_(0.9)
        return super().forward(x)


class OtherVariance(Constants):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var.sqrt() + self.eps)
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), norm(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A stem that is not converted, a unit, a block, a block that does not fuse, and a head."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU())
    model.layer2 = nn.Sequential(nn.Conv2d(6, 6, 3), norm(6), nn.ReLU())
    model.layer3 = nn.Sequential(Block(norm))
    model.layer4 = Block(norm)
    model.layer4.relu = nn.SiLU()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "running_var")]


def converted(model: nn.Module, **options) -> nn.Module:
    return svf_fast.convert(model, progress=False, **options)


def image() -> Tensor:
    return torch.rand(2, 3, 12, 11, generator=torch.Generator().manual_seed(0))


# frozen batch norms in training


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_training_loop_keeps_blocks_fused_and_statistics_as_they_were(kind):
    model, x = converted(network(kind)), image()
    saved = svf_fast.memory_report(model, x.shape).saved_bytes
    state = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    expected = model(x)
    optimizer = torch.optim.SGD(svf_fast.svf_parameters(model), lr=0.0)
    for _ in range(2):
        model.train()
        model(x).square().sum().backward()
        optimizer.step()
        assert model.training and model.layer3[0].training
        assert not any(norm.training for norm in norms(model))
    assert torch.equal(model(x), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not any(m.unfused_reason() for m in model.modules() if isinstance(m, Fused))
    assert svf_fast.memory_report(model, x.shape).saved_bytes == saved


def test_wrapped_copied_and_pickled_models_stay_frozen():
    model, x = converted(network()), image()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
        nn.ModuleDict({"module": copy.deepcopy(model)})["module"],
    ]
    for other in others:
        nn.ModuleList([other]).train()
        assert not any(norm.training for norm in norms(other))
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    compiled = torch.compile(others[0], backend="eager")
    compiled.train()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_trains_follows_the_mode():
    model = network()
    model.layer4.bn1.requires_grad_(True)  # before
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is in no fused block
        converted(model)
    model.stem[1].weight.requires_grad_(True)  # after
    model.train()
    training = [norm for norm in norms(model) if norm.training]
    assert training == [model.stem[1], model.layer4.bn1]
    model.stem[1].requires_grad_(False)
    model.train()
    assert not model.stem[1].training
    assert not any(norm.training for norm in norms(model.eval()))


def test_the_option_lets_all_follow_the_mode():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = converted(network(), keep_norms_frozen=False)
        converted(network().train(), keep_norms_frozen=False)
    before = [type(norm) for norm in norms(network())]
    assert [type(norm) for norm in norms(model)] == before
    model.train()
    assert all(norm.training for norm in norms(model))
    mean = model.layer3[0].bn1.running_mean.clone()
    model(image())
    assert not torch.equal(model.layer3[0].bn1.running_mean, mean)
    assert "uses the batch's statistics" in model.layer3[0].unfused_reason()


@pytest.mark.parametrize(
    "forgotten", [lambda m: m.train(), lambda m: m.requires_grad_(True), lambda m: m.layer3.train()]
)
def test_a_warning_tells_of_what_takes_fused_blocks_apart(forgotten):
    model = network()
    forgotten(model)
    words = r"of the 3 batch norms in fused blocks are not frozen.*model.eval\(\)"
    with pytest.warns(UserWarning, match=words):
        converted(model)


def test_statistics_that_nobody_would_gather_are_not_thrown_away():
    model, x = converted(network()), image()
    expected = model(x)
    with pytest.raises(RuntimeError, match="convert with keep_norms_frozen=False"):
        update_bn([x], model)
    torch.testing.assert_close(model.eval()(x), expected)
    model = converted(network(), keep_norms_frozen=False)
    update_bn([x], model)
    assert not torch.equal(model.eval()(x), expected)


def test_merge_and_a_budget_that_is_not_met_give_the_classes_back():
    plain = [type(module) for module in network().modules()]
    model = converted(network())
    assert sum(isinstance(norm, StaysFrozen) for norm in norms(model)) == len(norms(model))
    assert [type(m) for m in svf_fast.merge(model).modules()] == plain
    model.train()
    assert all(norm.training for norm in norms(model))
    model = network()
    with pytest.raises(ValueError, match="smallest plan"):
        converted(model, memory_budget=1, input_shape=(2, 3, 12, 11))
    assert [type(module) for module in model.modules()] == plain


def test_a_frozen_norm_is_a_leaf_of_a_trace():
    model = converted(network(), fuse=False)
    graph = torch.fx.symbolic_trace(model.stem).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2"]


# batch norms of constants


def frozen(kind: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(6, 6, 1), kind(6), nn.ReLU(), Block(kind)).requires_grad_(False)


CONSTANT = {
    "torchvision": Constants,
    "DETR": FixedEps,
    "maskrcnn-benchmark": NoEps,
    "detectron2": Branching,
    "of another eps": lambda channels: Constants(channels, eps=0.3),
}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("case", CONSTANT)
def test_a_norm_of_constants_fuses(case, training):
    plain = frozen(CONSTANT[case]).train(training)
    x = torch.rand(2, 6, 9, 9)
    reference, truth = plain(x), copy.deepcopy(plain).double()(x.double())
    model = converted(copy.deepcopy(plain), layers=None)
    assert model.unfused_reason() == model[3].unfused_reason() == ""
    assert isinstance(model[3], SVFBasicBlock)
    assert_error_within(model(x), reference, truth, factor=4, magnitude=4 * truth, channel_dim=1)
    exact = converted(copy.deepcopy(plain), layers=None, strategy="reference", fuse=False)
    grads = []
    for each in (copy.deepcopy(model).double(), exact.double()):
        S = list(svf_fast.svf_parameters(each))
        grads.append(torch.autograd.grad(each(x.double()).square().sum(), S))
    for mine, expected in zip(*grads):
        assert (mine - expected).norm() <= 1e-10 * expected.norm()
    with torch.no_grad():  # seen though it is no batch norm of torch's
        for each in (model, plain):
            each[3].bn1.running_var.mul_(4)
            each[1].bias.add_(1)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(svf_fast.merge(model)(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Clipping, Moving, OtherVariance])
def test_a_norm_of_constants_that_computes_something_else_does_not_fuse(kind):
    plain = frozen(kind)
    x = torch.rand(2, 6, 9, 9)
    model = converted(copy.deepcopy(plain), layers=None)
    assert not any(isinstance(module, Fused) for module in model.modules())
    notes = {unit.note for unit in svf_fast.memory_report(model, x.shape).units if unit.layers}
    assert all(f"is of type {kind.__name__}, not a batch norm" in note for note in notes)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert Norm.of(kind(6)) is None


def test_torchvisions_own():
    torchvision = pytest.importorskip("torchvision")
    norm = torchvision.ops.FrozenBatchNorm2d
    model = torchvision.models.resnet18(norm_layer=norm, num_classes=3).requires_grad_(False)
    converted(model, layers=("layer2",)).train()
    assert all(isinstance(block, SVFBasicBlock) for block in model.layer2)
    assert not any(block.unfused_reason() for block in model.layer2)


def test_a_sync_batch_norm_that_was_converted_before_fuses():
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    model, x = converted(copy.deepcopy(plain)), image()
    assert model.layer2.unfused_reason() == model.layer3[0].unfused_reason() == ""
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    unit = SVFConvBNAct(nn.Conv2d(6, 6, 1), copy.deepcopy(plain.layer2[1]))
    assert unit.unfused_reason() == ""


# what a block was read with


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.drop_prob == 0 or not self.training else x * 0


class Switched(Block):
    """Holds a flag, a dropout and a drop path that did nothing when its forward was read."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d)
        self.adds, self.drop, self.path = True, nn.Dropout(0.0), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.path(self.bn2(self.conv2(self.drop(self.relu(self.bn1(self.conv1(x)))))))
        return self.relu(y + x) if self.adds else self.relu(y)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda b: setattr(b.drop, "p", 1.0), "drop.p was 0.0 at conversion and is 1.0 now"),
        (lambda b: setattr(b.path, "drop_prob", 1.0), "path.drop_prob was 0.0 at conversion"),
        (lambda b: setattr(b, "adds", False), "adds was True at conversion and is False now"),
    ],
)
def test_an_attribute_that_changes_after_the_conversion_is_seen(change, reason):
    torch.manual_seed(0)
    plain = nn.Sequential(Switched()).eval().requires_grad_(False)
    model = converted(copy.deepcopy(plain), layers=None).train()
    x = torch.rand(2, 6, 8, 8)
    model(x)
    assert model[0].unfused_reason() == ""
    plain.train()
    for norm in norms(plain):
        norm.eval()
    change(plain[0])
    change(model[0])
    assert model[0].unfused_reason().startswith(reason)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
