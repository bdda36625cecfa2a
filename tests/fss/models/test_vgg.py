import copy
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svf_fast
from fss.models import build_backbone, load_backbone
from fss.models.vgg import own_keys

# configuration D: the published order of convolutions and max-pools
CONVS = [(3, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 4), (4, 8)] + 5 * [(8, 8)]


def _vgg(width=4):
    return build_backbone("vgg16_bn", width=width)


def _randomise(backbone):
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone.eval()


def _torchvision_state(backbone):
    """The keys that torchvision's vgg16_bn has."""
    state = {}
    for key, value in backbone.state_dict().items():
        state["features." + key.partition(".")[2]] = value.clone()
    return state


@pytest.mark.parametrize("size, expected", [(473, 30), (321, 21), (33, 3), (1, 1)])
def test_max_pools_round_up(size, expected):
    backbone = _vgg(width=1).eval()
    with torch.no_grad():
        layer2, layer3 = backbone.features(torch.randn(1, 3, size, size))
        layer4 = backbone.layer4(layer3)
    assert layer2.shape == (1, 4, expected, expected)
    assert layer3.shape == layer4.shape == (1, 8, expected, expected)
    assert backbone.channels == (2, 4, 8, 8)


def test_layers_are_slices_of_configuration_d():
    backbone = _vgg(width=4)
    names = {name for name, _ in backbone.named_children()}
    assert names == {"layer0", "layer1", "layer2", "layer3", "layer4"}
    indices = [[int(i) for i, _ in layer.named_children()] for layer in backbone.children()]
    cuts = [(0, 7), (7, 14), (14, 24), (24, 34), (34, 43)]
    assert indices == [list(range(*cut)) for cut in cuts]
    convs = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convs] == [
        (3 if i == 0 else 4 * a, 4 * b) for i, (a, b) in enumerate(CONVS)
    ]
    assert all(m.bias is not None and m.padding == (1, 1) for m in convs)
    assert sum(isinstance(m, nn.MaxPool2d) for m in backbone.modules()) == 4


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_torchvision_keys_load(tmp_path, form):
    source, target = _randomise(_vgg()), _vgg()
    state = _torchvision_state(source)
    assert {"features.0.weight", "features.41.running_var", "features.28.bias"} <= state.keys()
    state |= {"classifier.0.weight": torch.zeros(3, 4), "classifier.0.bias": torch.zeros(3)}
    path = tmp_path / f"vgg.{form}"
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    load_backbone(target, str(path))
    for a, b in zip(source.state_dict().values(), target.state_dict().values()):
        assert torch.equal(a, b)


def test_another_backbone_is_recognised(tmp_path):
    torch.save(_torchvision_state(_vgg()), tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="like vgg16_bn weights.*set backbone=vgg16_bn"):
        load_backbone(build_backbone("resnet18", width=4), str(tmp_path / "vgg.pth"))
    with pytest.raises(ValueError, match="like vgg16_bn weights.*set width=4"):
        load_backbone(_vgg(width=6), str(tmp_path / "vgg.pth"))
    torch.save(build_backbone("resnet18", width=4).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="like resnet18 weights.*set backbone=resnet18"):
        load_backbone(_vgg(), str(tmp_path / "resnet.pth"))


def test_what_is_missing_is_named(tmp_path):
    state = _torchvision_state(_vgg())
    del state["features.17.weight"]
    torch.save(state | {"features.44.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError) as error:
        load_backbone(_vgg(), str(tmp_path / "vgg.pth"))
    assert "1 missing: layer2.17.weight" in str(error.value)
    assert "1 unexpected: features.44.weight" in str(error.value)


def test_torchvision_by_name(monkeypatch):
    source, target = _randomise(_vgg()), _vgg()
    asked = []

    class FakeTorchvision:
        def get_model_weights(self, name):
            asked.append(name)
            return {"IMAGENET1K_V1": self}

        def get_state_dict(self, **_):
            return _torchvision_state(source) | {"classifier.6.bias": torch.zeros(2)}

    monkeypatch.setitem(sys.modules, "torchvision", FakeTorchvision())
    monkeypatch.setitem(sys.modules, "torchvision.models", FakeTorchvision())
    load_backbone(target, "torchvision")
    assert asked == ["vgg16_bn"]
    assert torch.equal(source.layer4.get_submodule("40").weight, target.layer4[6].weight)


def test_a_deep_stem_is_refused():
    with pytest.raises(ValueError, match="stem: expected plain, vgg16_bn has no other; got 'deep'"):
        build_backbone("vgg16_bn", stem="deep", width=4)


def test_convert_fuses_every_unit():
    plain = _randomise(_vgg()).requires_grad_(False)
    converted = svf_fast.convert(copy.deepcopy(plain), progress=False).eval()
    layers = [converted.layer2, converted.layer3, converted.layer4]
    assert [len(layer._names) for layer in layers] == [3, 3, 3]
    assert all(layer.unfused_reason() == "" for layer in layers)
    images = torch.randn(2, 3, 49, 65)
    for a, b in zip(plain.features(images), converted.features(images)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(images), converted(images), rtol=1e-4, atol=1e-5)
    converted(images).sum().backward()
    assert all(bool(S.grad.any()) for S in svf_fast.svf_parameters(converted))


def test_equals_torchvision():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    theirs = _randomise(models.vgg16_bn(weights=None))
    for module in theirs.features:
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = True
    ours = _vgg(width=64).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier")}
    ours.load_state_dict(own_keys(state))
    images = torch.randn(1, 3, 49, 49)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.features[:43](images))
