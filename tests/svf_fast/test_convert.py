from __future__ import annotations

import copy
import importlib
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import svf_fast
from svf_fast import Fused, SVFBasicBlock, SVFConv2d, SVFLinear
from svf_fast.layers.factored import svf_layers
from svf_fast.svd import Factors


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer2 = nn.Sequential(Residual(8), Residual(8))
        self.layer3 = Residual(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer3(self.layer2(self.stem(x))).mean((2, 3)))


class Basic(Residual):
    """A residual block that can be fused, with a projection of its own."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.project = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.project(x)).relu()


def fusable() -> nn.Sequential:
    """A unit, a block, and a unit and a block in a sequence of their own."""
    torch.manual_seed(0)
    units = [(nn.Conv2d(c, 6, 3), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6)]
    model = nn.Sequential(*units[0], Basic(6), nn.Sequential(*units[1], Basic(6)))
    return model.eval().requires_grad_(False)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def test_convert_and_merge_are_inverse(net):
    x = torch.randn(2, 3, 12, 12)
    before, expected, names = copy.deepcopy(net), net(x), set(net.state_dict())
    assert svf_fast.convert(net, ("layer2", "layer3")) is net
    assert (net(x) - expected).norm() <= 1e-5 * expected.norm()
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in svf_fast.svf_parameters(net)]
    assert len(trainable) == 6
    assert type(net.stem) is nn.Conv2d and type(net.head) is nn.Linear
    with torch.no_grad():
        for S in svf_fast.svf_parameters(net):
            S.mul_(1.5)
    tuned = net(x)
    assert svf_fast.merge(net) is net
    assert (net(x) - tuned).norm() <= 1e-5 * tuned.norm()
    assert set(net.state_dict()) == names
    before.load_state_dict(net.state_dict())
    assert not any(p.requires_grad for p in net.parameters())  # as it was


def test_what_is_not_converted_stays_as_it_is(net):
    net.head.requires_grad_(True)
    svf_fast.convert(net, ("layer2",))
    assert net.head.weight.requires_grad
    assert type(net.layer3.conv1) is nn.Conv2d


def test_the_whole_model_patterns_and_linear(net):
    other = copy.deepcopy(net)
    svf_fast.convert(net, None)
    assert isinstance(net.head, SVFLinear) and isinstance(net.stem, SVFConv2d)
    svf_fast.convert(other, ("layer*.conv1", "layer2.1"))
    assert isinstance(other.layer3.conv1, SVFConv2d) and type(other.layer3.conv2) is nn.Conv2d
    assert isinstance(other.layer2[1].conv2, SVFConv2d)


def test_shared_layers_stay_shared():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    svf_fast.convert(model, None)
    assert model[0] is model[2] and isinstance(model[0], SVFConv2d)
    assert len(list(svf_fast.svf_parameters(model))) == 1
    svf_fast.merge(model)
    assert model[0] is model[2] and type(model[0]) is nn.Conv2d


def test_subclasses_are_converted_where_they_compute_the_same():
    class Named(nn.Conv2d):
        pass

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Named(3, 3, 1), nn.Conv2d(3, 3, 1), Doubled(3, 3, 1), Doubled(3, 3, 1))
    x = torch.randn(1, 3, 4, 4)
    expected = model(x)
    with pytest.warns(UserWarning, match="left as they are: 2 Doubled: its forward ends with mul"):
        svf_fast.convert(model, None)
    kinds = [type(module) for module in model]
    assert kinds == [SVFConv2d, SVFConv2d, Doubled, Doubled]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert "not converted: 2 Doubled: its forward ends with mul" in str(
        svf_fast.memory_report(model, x.shape)
    )
    with pytest.raises(ValueError, match="found none .*2 Doubled: its forward ends with mul"):
        svf_fast.convert(nn.Sequential(Doubled(3, 3, 1), Doubled(3, 3, 1)), None)


def tied(case: str) -> nn.Module:
    if case == "two convolutions":
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
        model[2].weight = model[0].weight
    elif case == "an embedding":
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
    else:  # a layer that is not converted
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
        model[0][0].weight = model[1].weight
    return model


@pytest.mark.parametrize(
    "case, names",
    [
        ("two convolutions", "0.weight and 2.weight"),
        ("an embedding", "0.weight and 1.weight"),
        ("a layer outside", "0.0.weight and 1.weight"),
    ],
)
def test_a_shared_weight_that_comes_apart_is_named(case, names):
    model = tied(case)
    layers = ("1",) if case == "a layer outside" else None
    with pytest.warns(UserWarning, match=f"{names} are one weight, and will be so no longer"):
        svf_fast.convert(model, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv = nn.Conv2d(3, 3, 1)
        svf_fast.convert(nn.Sequential(conv, nn.ReLU(), conv), None)  # one layer, used twice


def test_auto_heeds_an_activation_in_place():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()
    )
    svf_fast.convert(model, None)
    assert [model[0].strategy, model[2].strategy] == ["chain", "auto"]
    model(torch.randn(1, 4, 8, 8)).sum().backward()


def test_mode_is_kept(net):
    svf_fast.convert(net, ("layer2",))
    assert not net.layer2[0].conv1.training


def test_known_factors_are_taken_in_the_place_of_the_weight(net):
    whole = svf_fast.convert(copy.deepcopy(net), ("layer2", "head")).eval()
    with torch.no_grad():
        for S in svf_fast.svf_parameters(whole):
            S.mul_(1.5)
    known = {name: Factors(m.U, m.S, m.V) for name, m in svf_layers(whole).items()}
    for module in net.layer2.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    svf_fast.convert(net, ("layer2", "head"), factors=known).eval()
    assert all(torch.equal(m.S, known[name].S) for name, m in svf_layers(net).items())
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(net(x), whole(x))


def test_factors_must_fit(net):
    with pytest.raises(ValueError, match="factors: expected names of layers to convert, got 'hed'"):
        svf_fast.convert(net, ("head",), factors={"hed": None})
    factors = svf_fast.decompose(torch.randn(3, 5))
    with pytest.raises(ValueError, match="factors: expected U, S, V of shapes .* for 'head', got"):
        svf_fast.convert(net, ("layer2", "head"), factors={"head": factors})
    assert not svf_layers(net)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (("layer9",), "got 'layer9', which fits none of this Net; at its top are stem, layer2"),
        (("layer2.0.bn1",), "found none"),
    ],
)
def test_nothing_to_convert(net, layers, words):
    with pytest.raises(ValueError, match=words):
        svf_fast.convert(net, layers)


def test_refusals(net):
    with pytest.raises(ValueError, match="was it converted"):
        svf_fast.merge(net)
    with pytest.raises(ValueError, match="SVFConv2d.from_conv"):
        svf_fast.convert(nn.Conv2d(1, 1, 1), None)
    svf_fast.convert(net, ("layer2",))
    with pytest.raises(ValueError, match="SVF layers already"):
        svf_fast.convert(net, ("layer2",))


@pytest.mark.parametrize(
    "calls",
    [
        (("0",), ("3",), ("4",)),
        (("4",), ("3",), ("0",)),
        (("3.project", "4.3.project"), ("*.conv1", "4.0"), ("0", "*.conv2")),
        (("0", "4.3"), ("4", "3")),
    ],
    ids=str,
)
def test_in_several_calls_as_in_one(calls):
    once = svf_fast.convert(fusable(), None)
    model = fusable()
    x = torch.randn(2, 3, 13, 13)
    expected = model(x)
    for layers in calls:
        svf_fast.convert(model, layers)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    for part, other in ((model, once), (model[4], once[4])):
        assert part.unfused_reason() == ""
        assert sorted(unit.stage.conv for unit in part._names) == ["0"]
        assert [unit.stage.conv for unit in other._names] == ["0"]
    for block in (model[3], model[4][3]):
        assert isinstance(block, SVFBasicBlock) and block.unfused_reason() == ""
    assert svf_fast.memory_report(model, x.shape).saved_bytes == (
        svf_fast.memory_report(once, x.shape).saved_bytes
    )
    svf_fast.merge(model)
    assert [type(module) for module in model.modules()] == [type(m) for m in fusable().modules()]


@pytest.mark.parametrize(
    "call",
    [
        svf_fast.convert,
        svf_fast.merge,
        svf_fast.follow,
        lambda model: svf_fast.composed(model).__enter__(),
        lambda model: list(svf_fast.svf_parameters(model)),
        lambda model: svf_fast.memory_report(model, (1, 3, 8, 8)),
    ],
    ids=["convert", "merge", "follow", "composed", "svf_parameters", "memory_report"],
)
def test_what_is_no_module_is_told(call):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        call("resnet50")


def test_what_was_converted_without_fusing_stays_unfused():
    model = svf_fast.convert(fusable(), ("3", "4.0"), fuse=False)
    svf_fast.convert(model, ("0",))
    assert not isinstance(model[3], Fused) and not isinstance(model[4], Fused)


def test_a_budget_not_met_leaves_what_an_earlier_call_fused():
    model = svf_fast.convert(fusable(), ("0",))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="smallest plan"):
        svf_fast.convert(model, ("3", "4"), memory_budget=1, input_shape=(2, 3, 13, 13))
    assert [type(module) for module in model.modules()] == before
    assert [unit.stage.conv for unit in model._names] == ["0"] and not model.unfused_reason()


def test_hooks_go_with_a_layer():
    model, seen = fusable(), []
    handle = model[3].conv1.register_forward_hook(lambda module, *_: seen.append(module))
    before = model[3].bn1.register_forward_pre_hook(lambda module, *_: seen.append(module))
    x = torch.randn(1, 3, 13, 13)
    with pytest.raises(ValueError, match="smallest plan"):
        svf_fast.convert(model, None, memory_budget=1, input_shape=x.shape)
    for change in (lambda: svf_fast.convert(model, None), lambda: svf_fast.merge(model)):
        change()
        seen.clear()
        model(x)
        assert seen == [model[3].conv1, model[3].bn1]
    svf_fast.convert(model, None)
    assert "'conv1' has a forward hook" in str(svf_fast.memory_report(model, x.shape))
    handle.remove()
    before.remove()
    seen.clear()
    model(x)
    assert not seen


def test_weights_that_a_hook_computes_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match="1 Conv2d: a hook or parametrization computes its weight"):
        svf_fast.convert(model, None)
    assert type(model[0]) is nn.Conv2d and isinstance(model[1], SVFConv2d)


@pytest.mark.parametrize("fuse", (True, False))
def test_refusals_of_a_fusable_model(fuse):
    plain = fusable()
    with pytest.raises(ValueError, match="was it converted"):
        svf_fast.merge(plain)
    with pytest.raises(ValueError, match="'layer9', which fits none of this Sequential"):
        svf_fast.convert(plain, ("layer9",), fuse=fuse)
    with pytest.raises(ValueError, match="found none \\(it has none at all\\)"):
        svf_fast.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), None, fuse=fuse)
    model = svf_fast.convert(copy.deepcopy(plain), None, fuse=fuse)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="8 layers are SVF layers already"):
        svf_fast.convert(model, None, fuse=not fuse)
    assert [type(module) for module in model.modules()] == kinds
    svf_fast.merge(model)
    with pytest.raises(ValueError, match="was it converted"):
        svf_fast.merge(model)


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize("fuse", (True, False))
def test_checkpoints_of_the_other_kind(fuse, strict):
    plain = fusable()
    model = svf_fast.convert(fusable(), None, fuse=fuse)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint is of the plain layer.*convert after"):
        model.load_state_dict(plain.state_dict(), strict=strict)
    for key in ("3.conv1.U", "3.conv1.S", "0.V"):
        assert torch.equal(model.state_dict()[key], values[key])
    if strict:
        with pytest.raises(RuntimeError, match='Missing key.*"3.conv1.weight"') as error:
            plain.load_state_dict(model.state_dict())
        assert all(f'"3.conv1.{name}"' in str(error.value) for name in "USV")
    else:
        keys = plain.load_state_dict(model.state_dict(), strict=False)
        assert "3.conv1.weight" in keys.missing_keys and "3.conv1.S" in keys.unexpected_keys
    other = svf_fast.convert(fusable(), None, fuse=not fuse)
    other.load_state_dict(model.state_dict())  # fused or not: the same keys


def test_cache_gives_the_same_factors_and_survives_a_broken_file(net, tmp_path):
    cache = tmp_path / "svd"
    first = svf_fast.convert(copy.deepcopy(net), ("layer2",), cache=cache)
    files = sorted(file.name for file in cache.iterdir())
    assert len(files) == 4 and all(name.endswith(".safetensors") for name in files)
    (cache / files[0]).write_bytes(b"cut")
    for _ in range(2):
        again = svf_fast.convert(copy.deepcopy(net), ("layer2",), cache=cache)
        for key, value in first.state_dict().items():
            assert torch.equal(value, again.state_dict()[key])
    assert sorted(file.name for file in cache.iterdir()) == files
    assert (cache / files[0]).stat().st_size > 3


@pytest.mark.parametrize("damage", ["a bit", "another shape", "another dtype", "NaN"])
def test_a_cache_of_other_values_is_not_believed(net, tmp_path, damage):
    """Nothing but the weight itself tells: the file is whole, and found by the weight's hash."""
    from safetensors.torch import load_file, save_file

    svf_fast.convert(copy.deepcopy(net), ("layer2",), cache=tmp_path)
    path = min(tmp_path.iterdir())
    kept = load_file(path)
    if damage == "a bit":
        kept["V"].view(-1).view(torch.int32)[7] ^= 1 << 25
    elif damage == "another shape":
        kept["S"] = kept["S"][:-1].contiguous()
    elif damage == "another dtype":
        kept = {key: value.double() for key, value in kept.items()}
    else:
        kept["S"][0] = torch.nan
    save_file(kept, path)
    x = torch.rand(1, 3, 33, 33)
    expected = copy.deepcopy(net).eval()(x)
    found = svf_fast.convert(copy.deepcopy(net), ("layer2",), cache=tmp_path).eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_real_resnet50_converts_exactly(shared):
    from safetensors.torch import load_file

    weights = load_file(shared / "weights" / "resnet50_imagenet.safetensors")
    for name in ("layer2.0.conv1", "layer3.2.conv2", "layer4.1.conv3"):
        weight = weights[f"{name}.weight"].float()
        conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], padding="same", bias=False)
        conv.weight = nn.Parameter(weight)
        x = torch.randn(1, weight.shape[1], 9, 9).relu()
        expected = conv(x)
        got = SVFConv2d.from_conv(conv)(x)
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
def test_layers_are_decomposed_side_by_side_each_in_one_thread(net, threads, fails, monkeypatch):
    module = importlib.import_module("svf_fast.convert")
    seen, busy = [], threading.Barrier(threads, timeout=60)

    def decompose(weight, groups):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        if len(seen) <= threads:
            busy.wait()  # until as many are at work
        if fails:
            raise ValueError("weight: not this one")
        return original(weight, groups)

    original = module.decompose
    monkeypatch.setattr(module, "decompose", decompose)
    children = list(net.modules())
    if fails:
        with pytest.raises(ValueError, match="not this one"):
            svf_fast.convert(net, None, progress=False)
        assert list(net.modules()) == children
    else:
        svf_fast.convert(net, None, progress=False)
        assert len(seen) == 8
    workers = {worker for worker, _ in seen}
    assert len(workers) == threads
    assert threading.get_ident() not in workers
    assert {count for _, count in seen} == {1}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was(net, bad):
    net.head.weight.data[0, 0] = bad
    children = list(net.modules())
    with pytest.raises(ValueError, match="weight: expected finite values"):
        svf_fast.convert(net, None, progress=False)
    assert list(net.modules()) == children


def sized_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        net[2].weight.mul_(100)
    return net.requires_grad_(False)


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_one_relative_rate_serves_layers_of_every_size(optimizer, kind):
    """A step changes each S by as much of it; of a network scaled by c and 1 / c likewise."""
    changes = []
    for scale in (1.0, 8.0):
        net = sized_net()
        with torch.no_grad():
            net[0].weight.mul_(scale), net[0].bias.mul_(scale), net[2].weight.div_(scale)
        svf_fast.convert(net, None)
        groups = svf_fast.svf_parameter_groups(net, 1e-3, optimizer)
        assert [g["params"][0] for g in groups] == list(svf_fast.svf_parameters(net))
        before = [S.detach().clone() for S in svf_fast.svf_parameters(net)]
        rates = [group["lr"] for group in groups]
        power = {"adam": 1, "sgd": 2}[optimizer]
        assert rates == [pytest.approx(1e-3 * float(S.mean()) ** power) for S in before]
        step = kind(groups, lr=1.0)  # of groups without one
        net(torch.ones(1, 3, 5, 5)).mean().backward()
        step.step()
        after = svf_fast.svf_parameters(net)
        changes.append([(a - b) / b.mean() for a, b in zip(after, before, strict=True)])
        if optimizer == "adam":
            assert all(float(c.abs().max()) == pytest.approx(1e-3, rel=0.02) for c in changes[-1])
    for a, b in zip(*changes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


def test_factors_of_S_share_a_group_with_the_rate_itself():
    net = svf_fast.convert(sized_net(), ["0"], trains="log_scale")
    svf_fast.convert(net, ["2"])
    factors, S = svf_fast.svf_parameter_groups(net, 0.01)
    assert factors == {"params": [net[0].log_scale], "lr": 0.01}
    assert S["params"] == [net[2].S] and S["lr"] == pytest.approx(0.01 * float(net[2].S.mean()))


@pytest.mark.parametrize("trains", ("S", "log_scale"))
def test_what_a_core_has_goes_at_the_rate_of_its_S(trains):
    net = svf_fast.convert(sized_net(), ["0"], trains=trains, core="block:2")
    svf_fast.convert(net, ["2"], trains=trains, core="lowrank:2")
    groups = svf_fast.svf_parameter_groups(net, 0.01, "sgd")
    if trains == "log_scale":
        factors, *groups = groups
        assert factors == {"params": [net[0].log_scale, net[2].log_scale], "lr": 0.01}
    entries, A, B = groups
    S = [[layer.S] if trains == "S" else [] for layer in (net[0], net[2])]
    assert entries["params"] == [*S[0], net[0].off_diagonal]
    assert A["params"] == [net[2].core_A]
    assert B["params"] == [*S[1], net[2].core_B]
    sizes = (net[0].S, net[2].core_A, net[2].S)
    for group, values in zip((entries, A, B), sizes, strict=True):
        assert group["lr"] == pytest.approx(0.01 * float(values.abs().mean()) ** 2)
    every = [*svf_fast.svf_parameters(net)]
    grouped = [p for group in svf_fast.svf_parameter_groups(net, 0.01) for p in group["params"]]
    assert {*map(id, every)} == {*map(id, grouped)} and len(every) == len(grouped) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("1",), TypeError, "lr: expected a number, got '1'"),
        ((True,), TypeError, "lr: expected a number, got True"),
        ((-1.0,), ValueError, "lr: expected a finite number of at least 0, got -1.0"),
        ((float("nan"),), ValueError, "lr: expected a finite number of at least 0, got nan"),
        ((1, "lion"), ValueError, "optimizer: expected one of adam, sgd, got 'lion'"),
    ],
)
def test_relative_rates_are_checked(arguments, error, words):
    net = svf_fast.convert(sized_net(), None)
    with pytest.raises(error, match=words):
        svf_fast.svf_parameter_groups(net, *arguments)


def test_layers_without_relative_rates_are_named():
    with pytest.raises(ValueError, match="model: expected SVF layers, found none"):
        svf_fast.svf_parameter_groups(sized_net(), 0.1)
    net = svf_fast.convert(sized_net(), None)
    with torch.no_grad():
        net[2].S.zero_()
    with pytest.raises(ValueError, match=r"2.S: expected finite values that are not all 0, got"):
        svf_fast.svf_parameter_groups(net, 0.1)
    with pytest.raises(ValueError, match="0.S: expected values, got none on meta"):
        svf_fast.svf_parameter_groups(net.to("meta"), 0.1)
