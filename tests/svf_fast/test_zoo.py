"""The networks of torchvision and timm, converted and fused as a user would (where installed)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import svf_fast
from svf_fast import Fused, SVFBasicBlock, SVFBottleneck, SVFConv2d
from svf_fast.fusion.blocks import FusedSequential
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.saved_bytes import saved_by

# Every kind of block of both libraries.
SMALL = [
    ("torchvision", "resnet18"),
    ("torchvision", "resnet50"),
    ("torchvision", "vgg16_bn"),
    ("timm", "resnet18"),
    ("timm", "resnet50d"),
    ("timm", "vgg16_bn"),
]
# The same blocks, deeper, wider or grouped: their decompositions take seconds.
LARGE = ["resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d"]
BLOCKS = {
    "resnet18": (8, SVFBasicBlock),
    "resnet34": (16, SVFBasicBlock),
    "resnet50": (16, SVFBottleneck),
    "resnet50d": (16, SVFBottleneck),
    "resnet101": (33, SVFBottleneck),
    "wide_resnet50_2": (16, SVFBottleneck),
    "resnext50_32x4d": (16, SVFBottleneck),
    "vgg16_bn": (1, FusedSequential),
}


def network(library: str, name: str) -> nn.Module:
    """Random weights, and the batch norms of a network that has seen data."""
    torch.manual_seed(0)
    model = getattr(pytest.importorskip(library).models, name)(num_classes=10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = 1.0
    features = model.forward_features if library == "timm" else model
    with torch.no_grad():
        features(torch.randn(4, 3, 65, 65))  # in training mode
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features)
        norm.running_var *= torch.empty(norm.num_features).uniform_(0.7, 1.5)
    return model.eval().requires_grad_(False)


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def fused(model: nn.Module) -> list[Fused]:
    return [module for module in model.modules() if isinstance(module, Fused)]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the output, with respect to x and every S."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((y * weights).sum(), [x, *trained.values()])
    return dict(zip(("x", *trained), found, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module", params=SMALL, ids="-".join)
def case(request, tmp_path_factory) -> tuple[str, nn.Module, Callable[..., nn.Module]]:
    """Name, the plain network, and a function that converts a copy of it."""
    cache = tmp_path_factory.mktemp("svd")
    plain = network(*request.param)
    # a VGG's classifier stays plain: the factors of its one matrix would take 500 MB
    layers = ("features",) if hasattr(plain, "features") else None

    def convert(**options) -> nn.Module:
        model = copy.deepcopy(plain)
        return svf_fast.convert(model, layers, cache=cache, progress=False, **options)

    return request.param[1], plain, convert


def test_fused_and_the_same_to_rounding(case):
    name, plain, convert = case
    model = convert()
    count, kind = BLOCKS[name]
    assert sum(isinstance(module, kind) for module in fused(model)) == count
    assert all(module.unfused_reason() == "" for module in fused(model))
    if name == "vgg16_bn":
        assert len(model.features._names) == 13
        assert sum(isinstance(module, SVFConv2d) for module in model.features) == 13
        assert sum(isinstance(module, nn.MaxPool2d) for module in model.features) == 5
    x = image(65)
    assert distance(model(x), plain(x)) < 2e-5
    factored = {f"{name}." for name in svf_layers(model)}
    before = {key for key in plain.state_dict() if f"{key.rpartition('.')[0]}." not in factored}
    after = {key for key in model.state_dict() if f"{key.rpartition('.')[0]}." not in factored}
    assert before == after
    assert all(torch.equal(model.state_dict()[key], plain.state_dict()[key]) for key in before)


def test_gradients_are_those_of_the_papers_layers(case):
    """To rounding in float64. In float32 a few ReLUs round across zero, in either of the two: then
    elements of a map differ, more the smaller it is, so no closer bound holds for a whole network.
    """
    _, _, convert = case
    model, reference = convert(), convert(strategy="reference", fuse=False)
    x = image(49)
    rounded = gradients(model, x)
    exact, truth = (gradients(m.double(), x.double()) for m in (model, reference))
    assert all(module.unfused_reason() == "" for module in fused(model))
    assert truth.keys() == exact.keys() == rounded.keys()
    for name, value in truth.items():
        assert distance(exact[name], value) < 1e-11, name
        assert distance(rounded[name], value) < 0.05, name


def test_predicted_bytes_are_the_bytes_kept(case):
    _, _, convert = case
    model, x = convert(), image(65)
    report = svf_fast.memory_report(model, x.shape)
    kept = saved_by(model, x)
    assert abs(report.saved_bytes - kept) <= 0.02 * kept
    assert report.saved_bytes < 0.5 * report.reference_bytes


def test_merge_gives_back_the_original(case):
    _, plain, convert = case
    merged = svf_fast.merge(convert())
    assert [type(module) for module in merged.modules()] == [type(m) for m in plain.modules()]
    original = copy.deepcopy(plain)
    for tensor in original.state_dict().values():
        tensor.zero_()
    original.load_state_dict(merged.state_dict())
    x = image(65)
    assert distance(original(x), plain(x)) < 2e-5


@pytest.mark.parametrize("library", ("torchvision", "timm"))
@pytest.mark.parametrize("name", LARGE)
def test_large(name, library):
    plain = network(library, name)
    x = image(33)
    expected = plain(x)
    layers = ("layer1", "layer2", "layer3")  # decomposing layer4 takes longer than all of these
    model = svf_fast.convert(plain, layers, progress=False)
    blocks = [block for layer in layers for block in model.get_submodule(layer)]
    assert len(blocks) == BLOCKS[name][0] - 3
    for block in blocks:
        assert isinstance(block, BLOCKS[name][1]) and block.unfused_reason() == ""
    y = model(x)
    assert distance(y, expected) < 2e-5
    y.square().sum().backward()
    for S in svf_fast.svf_parameters(model):
        assert S.grad.isfinite().all() and S.grad.any()
    kept = saved_by(model, x)
    assert abs(svf_fast.memory_report(model, x.shape).saved_bytes - kept) <= 0.02 * kept


def test_blocks_that_do_not_fit_say_why_and_are_right():
    plain = network("timm", "seresnet50")
    x = image(33)
    expected = plain(x)
    options = {"layers": ("layer3",), "progress": False}
    reference = svf_fast.convert(copy.deepcopy(plain), strategy="reference", fuse=False, **options)
    model = svf_fast.convert(plain, **options)
    assert not any(isinstance(module, SVFBottleneck) for module in model.modules())
    assert distance(model(x), expected) < 2e-5
    notes = {
        unit.name: unit.note for unit in svf_fast.memory_report(model, x.shape).units if unit.layers
    }
    assert notes["layer3.0.conv1"] == (
        "not fused: 'se' (SEModule) stands where a batch norm would fit"
    )
    assert len(set(notes.values())) == 1
    exact, truth = (gradients(m.double(), x.double()) for m in (model, reference))
    for name, value in truth.items():
        assert distance(exact[name], value) < 1e-11, name
