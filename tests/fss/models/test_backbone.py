import pytest
import torch
from torch import nn

import svf_fast
from fss.models import build_backbone
from tests.svf_fast.saved_bytes import saved_by


@pytest.mark.parametrize("stem", ["plain", "deep"])
@pytest.mark.parametrize("name, expansion", [("resnet18", 1), ("resnet50", 4), ("resnet101", 4)])
def test_features_at_output_stride_8(name, expansion, stem):
    backbone = build_backbone(name, stem=stem, width=4).eval()
    with torch.no_grad():
        layer2, layer3 = backbone.features(torch.randn(2, 3, 161, 129))
        layer4 = backbone.layer4(layer3)
    assert layer2.shape == (2, 8 * expansion, 21, 17)
    assert layer3.shape == (2, 16 * expansion, 21, 17)
    assert layer4.shape == (2, 32 * expansion, 21, 17)
    assert backbone.channels == tuple(4 * expansion * 2**n for n in range(4))


@pytest.mark.parametrize(
    "output_stride, size", [(8, [60, 60, 60]), (16, [60, 30, 30]), (32, [60, 30, 15])]
)
@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
def test_473_pixels(output_stride, size, stride_on):
    backbone = build_backbone(
        "resnet50", width=1, output_stride=output_stride, stride_on=stride_on
    ).eval()
    with torch.no_grad():
        layer2, layer3 = backbone.features(torch.randn(1, 3, 473, 473))
        layer4 = backbone.layer4(layer3)
    assert [maps.shape[-1] for maps in (layer2, layer3, layer4)] == size


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_3x3_convolution_of_layers_3_and_4_is_dilated(name):
    backbone = build_backbone(name, width=4)
    for layer, dilation in ((backbone.layer2, 1), (backbone.layer3, 2), (backbone.layer4, 4)):
        convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert convs
        assert {conv.dilation for conv in convs} == {(dilation, dilation)}
        assert {conv.padding for conv in convs} == {(dilation, dilation)}
    strides = [m.stride for m in backbone.layer4.modules() if isinstance(m, nn.Conv2d)]
    assert set(strides) == {(1, 1)}


@pytest.mark.parametrize(
    ("output_stride", "expected"), [(8, [1, 1, 1, 2, 2, 4]), (16, [1, 1, 1, 1, 1, 2])]
)
def test_the_first_block_may_keep_the_dilation_of_the_layer_before(output_stride, expected):
    """As torchvision dilates: of layers 2 to 4 the first block and the second."""
    backbone = build_backbone("resnet18", width=2, output_stride=output_stride, late_dilation=True)
    layers = (backbone.layer2, backbone.layer3, backbone.layer4)
    assert [block.conv2.dilation[0] for layer in layers for block in layer] == expected
    plain = build_backbone("resnet18", width=2, output_stride=output_stride)
    assert backbone.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
def test_the_stride_is_where_it_was_asked(stride_on):
    backbone = build_backbone("resnet50", stride_on=stride_on, width=4)
    strided = {
        name
        for name, m in backbone.layer2.named_modules()
        if isinstance(m, nn.Conv2d) and m.stride == (2, 2)
    }
    assert strided == {f"0.{stride_on}", "0.downsample.0"}


def test_keys():
    plain = set(build_backbone("resnet50", width=4).state_dict())
    deep = set(build_backbone("resnet50", stem="deep", width=4).state_dict())
    assert {key for key in deep - plain if "num_batches" not in key} == {
        f"{name}{n}.{tensor}"
        for n in (2, 3)
        for name, tensors in (
            ("conv", ("weight",)),
            ("bn", ("weight", "bias", "running_mean", "running_var")),
        )
        for tensor in tensors
    }
    assert plain < deep
    assert "layer3.5.bn3.running_var" in plain
    assert "layer4.0.downsample.1.bias" in plain
    assert not any(key.startswith("fc") for key in plain)


def test_deep_stem_widths():
    backbone = build_backbone("resnet50", stem="deep")
    shapes = [tuple(getattr(backbone, f"conv{n}").weight.shape[:2]) for n in (1, 2, 3)]
    assert shapes == [(64, 3), (64, 64), (128, 64)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
def test_equals_torchvision(name, stride_on):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    theirs = getattr(models, name)(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.3, 0.6)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    if name == "resnet50" and stride_on == "conv1":
        for layer in (theirs.layer2, theirs.layer3, theirs.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    ours = build_backbone(name, stride_on=stride_on, output_stride=32).eval()
    ours.load_state_dict(state)
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).flatten(1), theirs(images))


def test_trains_like_any_module():
    backbone = build_backbone("resnet18", width=4).train()
    before = backbone.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 33, 33)).mean().backward()
    assert backbone.bn1.training
    assert not torch.equal(backbone.bn1.running_mean, before)
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"name": "resnet34"},
            ValueError,
            "backbone: .*resnet101, vgg16_bn, vgg16, vit_tiny_patch16, .*; got 'resnet",
        ),
        ({"stem": "wide"}, ValueError, "stem: expected one of plain, deep; got 'wide'"),
        (
            {"stride_on": "conv3"},
            ValueError,
            "stride_on: expected one of conv1, conv2; got 'conv3'",
        ),
        ({"width": 0}, ValueError, "width: expected at least 1, got 0"),
        ({"width": 1.5}, TypeError, "width: expected an integer, got 1.5"),
        ({"output_stride": 4}, ValueError, "output_stride: expected one of 8, 16, 32; got 4"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        build_backbone(**{"name": "resnet18", **options})


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_block_sums_are_what_the_last_relu_of_each_block_sees(name):
    torch.manual_seed(0)
    plain = build_backbone(name, width=4, output_stride=32).double().eval()
    summing = build_backbone(name, width=4, output_stride=32, sums=True).double().eval()
    summing.load_state_dict(plain.state_dict())
    images, seen = torch.randn(2, 3, 40, 56).double(), []
    last = "bn3" if name == "resnet50" else "bn2"

    def record(block, inputs, out):
        path = paths.pop()
        shortcut = inputs[0] if block.downsample is None else block.downsample(inputs[0])
        seen.append((path + shortcut, out))

    paths = []
    for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        for block in layer:
            getattr(block, last).register_forward_hook(lambda _, __, out: paths.append(out))
            block.register_forward_hook(record)
    out = plain(images)
    sums = summing.block_sums(images, first=1)
    assert len(sums) == len(seen) == {"resnet18": 8, "resnet50": 16}[name]
    for mine, (expected, activated) in zip(sums, seen, strict=True):
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(mine.relu(), activated)
        assert (mine < 0).any()
    later = summing.block_sums(images)
    assert len(later) == len(sums) - len(plain.layer1)
    assert all(map(torch.equal, later, sums[len(plain.layer1) :]))
    torch.testing.assert_close(summing(images), out)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_block_sums_of_singular_values(name, fuse):
    """The sums of the plain network, and the gradients of S, fused or not."""
    torch.manual_seed(0)
    backbone = build_backbone(name, width=4, output_stride=32, sums=True).double().eval()
    backbone.requires_grad_(False)
    images = torch.randn(2, 3, 40, 56).double()
    expected = backbone.block_sums(images)
    weights = [torch.randn_like(each) for each in expected]
    svf_fast.convert(backbone, ["layer2", "layer3", "layer4"], fuse=fuse)
    found = backbone.block_sums(images)
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
    S = list(svf_fast.svf_parameters(backbone))
    loss = sum((each * weight).sum() for each, weight in zip(found, weights, strict=True))
    gradients = torch.autograd.grad(loss, S)
    step = 1e-5
    for factor, gradient in zip(S[::5], gradients[::5], strict=True):
        values = []
        for sign in (1, -1):
            factor.data[0] += sign * step
            sums = backbone.block_sums(images)
            values.append(sum((s * w).sum() for s, w in zip(sums, weights, strict=True)).item())
            factor.data[0] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient[0].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_fused_blocks_that_end_in_a_sum_keep_little_more_than_others():
    """Of the ReLU between them a bit a value, of the sums that go out nothing."""

    class Sums(nn.Module):
        def __init__(self, sums: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            options = {"sums": True} if sums else {}
            backbone = build_backbone("resnet50", width=16, output_stride=32, **options)
            self.backbone, self.sums = backbone.eval().requires_grad_(False), sums
            svf_fast.convert(self.backbone)

        def forward(self, x):
            return self.backbone.block_sums(x, 1) if self.sums else self.backbone(x)

    images = torch.randn(1, 3, 97, 97)
    with_sums, with_relu = (saved_by(Sums(sums), images) for sums in (True, False))
    assert with_relu / 2 < with_sums < 1.05 * with_relu


@torch.no_grad()
def test_adapters_follow_the_last_sum_of_a_layer():
    backbone = build_backbone("resnet18", width=4, output_stride=32, sums=True).eval()
    images = torch.randn(1, 3, 40, 40)
    before = backbone.block_sums(images)
    backbone.layer3.add_module("adapter", nn.Identity())
    after = backbone.block_sums(images)
    assert len(after) == len(before) and all(map(torch.equal, before, after))
    backbone.layer3.adapter = nn.LeakyReLU(0.5)
    changed = [not torch.equal(a, b) for a, b in zip(before, backbone.block_sums(images))]
    assert changed == [False, False, False, True, False, False]
