"""What `find` sees in the backbones of fss, torchvision and timm (the last two where installed)."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from svf_fast.fusion.structure import StageNames, Unit, find


def everywhere(name: str) -> bool:
    return True


def counts(model: nn.Module) -> tuple[int, int, int]:
    """Blocks, their shortcuts with a convolution, units; and nothing that came close."""
    blocks, units, reasons = find(model, everywhere)
    assert not reasons
    return len(blocks), sum(block.shortcut is not None for block in blocks), len(units)


@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
@pytest.mark.parametrize("stem", ["plain", "deep"])
@pytest.mark.parametrize("name, blocks", [("resnet18", 8), ("resnet50", 16), ("resnet101", 33)])
def test_the_backbones_of_fss(name, blocks, stem, stride_on):
    models = pytest.importorskip("fss.models.backbone")
    model = models.build_backbone(name, stem, stride_on, width=4)
    shortcuts = 3 if (name, stem) == ("resnet18", "plain") else 4
    assert counts(model) == (blocks, shortcuts, 0)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", (8, 3, 0)),
        ("resnet34", (16, 3, 0)),
        ("resnet50", (16, 4, 0)),
        ("resnet101", (33, 4, 0)),
        ("wide_resnet50_2", (16, 4, 0)),
        ("resnext50_32x4d", (16, 4, 0)),
        ("vgg16_bn", (0, 0, 13)),
    ],
)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_models_of_torchvision_and_timm(library, name, expected):
    package = pytest.importorskip(library)
    with torch.device("meta"):
        model = getattr(package.models, name)()
        assert counts(model) == expected


def test_the_average_pooling_of_resnet_d():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        blocks, units, reasons = find(timm.create_model("resnet50d"), everywhere)
    assert len(blocks) == 16 and not reasons
    assert [block.pre for block in blocks if block.shortcut] == [()] + 3 * [("downsample.0",)]
    assert units == [
        Unit("conv1", StageNames("0", "1", True), "2"),
        Unit("conv1", StageNames("3", "4", True), "5"),
    ]


def test_batch_norms_with_their_own_activation():
    timm = pytest.importorskip("timm")
    assert counts(timm.create_model("regnetx_002"))[:2] == (13, 4)


@pytest.mark.parametrize(
    "library, name, blocks, gate",
    [
        ("torchvision", "regnet_x_400mf", 22, None),
        ("torchvision", "regnet_y_400mf", 16, "f.se"),
        ("timm", "regnetx_004", 22, None),
        ("timm", "regnety_004", 16, "se"),
    ],
)
def test_regnets(library, name, blocks, gate):
    package = pytest.importorskip(library)
    found, units, reasons = find(getattr(package.models, name)(), everywhere)
    assert len(found) == blocks and len(units) == 1 and not reasons  # the unit is the stem
    assert {block.gate for block in found} == {gate}
    assert sum(block.shortcut is not None for block in found) == 4


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("seresnet50", {}, "'se' (SEModule) stands where a batch norm would fit"),
        ("resnet50", {"drop_path_rate": 0.1}, "'drop_path' (DropPath) is active"),
        ("resnet50", {"act_layer": "silu"}, "uses SiLU instead of ReLU"),
    ],
)
def test_blocks_of_timm_that_do_not_fit(name, options, reason):
    timm = pytest.importorskip("timm")
    if "act_layer" in options:
        options = {"act_layer": nn.SiLU}
    with torch.device("meta"):
        blocks, _, reasons = find(timm.create_model(name, **options), everywhere)
    assert len(blocks) + len(reasons) == 16 and len(reasons) >= 15
    assert set(reasons.values()) == {reason}


def test_a_resnet_50_takes_well_under_a_second():
    models = pytest.importorskip("fss.models.backbone")
    model = models.build_backbone("resnet50", width=4)
    start = time.process_time()
    find(model, everywhere)
    assert time.process_time() - start < 1  # measured: 0.09
