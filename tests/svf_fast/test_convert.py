from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear


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


def test_subclasses_are_left_alone():
    class Standardised(nn.Conv2d):
        pass

    model = nn.Sequential(Standardised(3, 3, 1), nn.Conv2d(3, 3, 1))
    svf_fast.convert(model, None)
    assert type(model[0]) is Standardised


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
