"""What a fused forward depends on besides its tensors; changes of it are seen."""

from __future__ import annotations

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svf_fast
from svf_fast import Fused
from svf_fast.fusion.attributes import snapshot


class Scale(nn.Module):
    def forward(self, x, k=1):
        return x * k


class Chain(nn.Module):
    """conv, batch norm and ReLU, which several settings may take away."""

    def __init__(self, **scaled: int) -> None:
        super().__init__()
        self.conv, self.bn, self.scale = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Scale()
        self.scaled = scaled
        self._flag, self.steps, self.config = True, ["relu"], SimpleNamespace(relu=True)
        self.drop_prob = None
        self.act = functools.partial(F.relu)

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self._flag and self.config.relu and self.steps[0] == "relu":
            x = self.act(x)
        if self.drop_prob is not None:
            x = x * self.drop_prob
        return self.scale(x, **self.scaled) if self.scaled else self.scale(x)


class Positional(Chain):
    def forward(self, x):
        return self.scale(F.relu(self.bn(self.conv(x))), 3)


class Before(Chain):
    def forward(self, x):
        return F.relu(self.bn(self.conv(self.scale(x, 4))))


class Constants(nn.Module):
    """A batch norm of buffers, with settings of its own."""

    def __init__(self, channels: int, leaky: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.leaky, self._e, self.eps = leaky, eps, 1e-5
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0),
            ("running_var", 1),
        ):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):
        scale = self.weight / (self.running_var + self._e).sqrt()
        x = (x - self.running_mean[:, None, None]) * scale[:, None, None]
        x = x + self.bias[:, None, None]
        return F.leaky_relu(x, 0.3) if self.leaky else x


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act, self.slope = nn.ReLU(), None

    def forward(self, x):
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        x = F.batch_norm(x, *tensors, self.training, 0.1, self.eps)
        return self.act(x) if self.slope is None else F.leaky_relu(x, self.slope)


class Block(nn.Module):
    """A basic block whose first batch norm has a ReLU of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2 = BatchNormAct(3), nn.BatchNorm2d(3)
        self._scale = 1.0

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        y = y if self._scale == 1.0 else self._scale * y
        return F.relu(x + y)


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for inner in module.modules():
        if hasattr(inner, "running_var"):
            inner.running_mean.uniform_(-0.3, 0.3)
            inner.running_var.uniform_(0.5, 1.5)
    return nn.Sequential(module).eval().requires_grad_(False)


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got(x), expected(x), rtol=1e-4, atol=1e-5)


def fused(model: nn.Module) -> list[Fused]:
    return [module for module in model.modules() if isinstance(module, Fused)]


@pytest.mark.parametrize(
    "module", [Chain(k=3), Positional(), Before()], ids=lambda m: type(m).__name__
)
def test_a_part_called_with_more_than_a_map_is_not_fused_away(module):
    model = drawn(module)
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None)
    assert_same(model, plain)
    assert not fused(model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("other", [{"leaky": True}, {"eps": 0.5}])
def test_each_norm_of_constants_is_judged_by_itself(other, order):
    norms = [Constants(8), Constants(8, **other)]
    first, second = (norms[index] for index in order)
    model = drawn(nn.Sequential(nn.Conv2d(3, 8, 3), first, nn.Conv2d(8, 8, 3), second))
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None)
    assert_same(model, plain)
    ((only,),) = [list(sequence._names) for sequence in fused(model)]
    assert only.stage.bn == ("1" if order == (0, 1) else "3")


CHANGES = [
    (lambda: Chain(), lambda m: setattr(m[0], "_flag", False), "_flag was True at conversion"),
    (lambda: Chain(), lambda m: m[0].steps.insert(0, "none"), "steps is not what it was"),
    (lambda: Chain(), lambda m: setattr(m[0].config, "relu", False), "config is not what it was"),
    (lambda: Chain(), lambda m: setattr(m[0], "drop_prob", 0.5), "drop_prob was None"),
    (lambda: Chain(), lambda m: setattr(m[0], "act", F.silu), "act is not what it was"),
    (lambda: Block(), lambda m: setattr(m[0], "_scale", 0.5), "_scale was 1.0"),
    (lambda: Block(), lambda m: setattr(m[0].bn1, "act", nn.SiLU()), "bn1.act was ReLU"),
    (lambda: Block(), lambda m: setattr(m[0].bn1, "slope", 0.3), "bn1.slope was None"),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct(8)),
        lambda m: setattr(m[0][1], "act", nn.SiLU()),
        "1: act was ReLU",
    ),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct(8)),
        lambda m: m[0][1].act.register_forward_hook(lambda module, args, out: 2 * out),
        "1: act has a hook",
    ),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        lambda m: m[0].__setitem__(1, drawn(BatchNormAct(8))[0]),
        "1 is a BatchNormAct, which it was not",
    ),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Constants(8)),
        lambda m: setattr(m[0][1], "leaky", True),
        "not a batch norm",
    ),
]


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize(("build", "change", "reason"), CHANGES, ids=[c[2] for c in CHANGES])
def test_what_changes_after_the_conversion_is_seen(build, change, reason, used_before):
    model = drawn(build())
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None)
    (unit,) = fused(model)
    assert not unit.unfused_reason()
    if used_before:
        assert_same(model, plain)
    change(model)
    change(plain)
    assert_same(model, plain)
    assert reason in unit.unfused_reason()


def with_two_relus() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct(8), nn.ReLU())


def test_a_relu_may_follow_a_norms_own():
    model = drawn(with_two_relus())
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None)
    assert [unit.unfused_reason() for unit in fused(model)] == [""]
    assert_same(model, plain)
    assert_same(model[0][:2], plain[0][:2])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "_flag", False),
        lambda m: setattr(m[0].config, "relu", False),
        lambda m: m[0].steps.insert(0, "none"),
    ],
)
def test_what_changes_before_it_is_compiled_is_seen(change):
    model = drawn(Chain())
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None)
    change(model)
    change(plain)
    torch._dynamo.reset()
    assert_same(torch.compile(model, backend="aot_eager"), plain)


@pytest.mark.parametrize("build", [Chain, Block, with_two_relus])
def test_what_is_fused_compiles_in_one_graph(build):
    model = drawn(build())
    plain = copy.deepcopy(model)
    svf_fast.convert(model, None)
    assert not fused(model)[0].unfused_reason()
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True), plain)


@pytest.mark.parametrize("build", [Chain, Block, with_two_relus])
def test_a_copy_is_fused_as_the_original(build):
    model = drawn(build())
    svf_fast.convert(model, None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (unit,) = fused(other)
        assert not unit.unfused_reason()
        assert_same(other, model)


def test_snapshots():
    values = [None, 1, 2.5, float("nan"), "a", [1, [2]], {"a": {1, 2}}, SimpleNamespace(x=[1])]
    assert [snapshot(v) for v in values] == [snapshot(v) for v in copy.deepcopy(values)]
    looped: list = []
    looped.append(looped)
    assert snapshot(looped) == snapshot(looped)
    assert snapshot([1]) != snapshot((1,)) and snapshot(F.relu) != snapshot(F.silu)
