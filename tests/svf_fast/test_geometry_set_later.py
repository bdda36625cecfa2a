"""Networks whose convolutions were changed after construction, as segmentation code dilates them.

What counts is what the network computes now: the plain one in float64 is the truth.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import svf_fast
from svf_fast import Fused, SVFConv2d
from tests.svf_fast.tolerance import assert_error_within

STRATEGIES = ("auto", "reference", "fold", "chain", "gram")


class Block(nn.Module):
    """A bottleneck, of which the second convolution strides."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 2 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def network() -> nn.Sequential:
    """A unit that is pooled, then two stages of blocks."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    model.pool = nn.MaxPool2d(3, 2, 1)
    model.layer3 = nn.Sequential(Block(8, 8, 2), Block(16, 8, 1))
    model.layer4 = nn.Sequential(Block(16, 8, 2), Block(16, 8, 1))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Conv2d, SVFConv2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def by_name(model: nn.Module) -> None:
    """semseg's loop (PSPNet; PFENet and BAM after it)."""
    for stage, dilation in ((model.layer3, 2), (model.layer4, 4)):
        for name, module in stage.named_modules():
            if "conv2" in name:
                module.dilation, module.padding = (dilation, dilation), (dilation, dilation)
                module.stride = (1, 1)
            elif "downsample.0" in name:
                module.stride = (1, 1)


def every_kernel(model: nn.Module) -> None:
    """The loop of segmentation_models_pytorch's encoders (DeepLabV3+)."""
    for conv in convolutions(model.layer4).values():
        kernel = conv.kernel_size[0]
        conv.stride, conv.dilation = (1, 1), (2, 2)
        conv.padding = (kernel // 2 * 2, kernel // 2 * 2)


def numbers_and_lists(model: nn.Module) -> None:
    """What ``functional.conv2d`` takes besides pairs."""
    for conv in convolutions(model.layer3).values():
        if conv.kernel_size == (3, 3):
            conv.stride, conv.padding, conv.dilation = 1, [3, 2], [3, 2]
        else:
            conv.stride, conv.dilation = [1], (1,)
    model.layer4[1].conv2.padding = model.layer4[1].conv2.dilation = 3


def words(model: nn.Module) -> None:
    model.stem[0].padding = "valid"
    model.layer3[0].conv2.stride = model.layer3[0].downsample[0].stride = (1, 1)
    for conv in convolutions(model.layer3).values():
        conv.padding, conv.dilation = "same", (2, 5)


def a_pooled_unit(model: nn.Module) -> None:
    """Nothing after it notices the size of its map."""
    model.stem[0].padding, model.stem[0].stride = (0, 5), (1, 3)


def mirrored(model: nn.Module) -> None:
    """In modes other than zeros nn.Conv2d pads as it was constructed."""
    for conv in (model.stem[0], model.layer4[1].conv2):
        conv.padding_mode, conv.padding, conv.stride = "reflect", (7, 7), (1, 1)


LOOPS = (by_name, every_kernel, numbers_and_lists, words, a_pooled_unit, mirrored)


def check(model: nn.Module, plain: nn.Module, name: str) -> None:
    """The converted model computes what the plain one does, S and x have the plain gradients."""
    x = torch.rand(2, 3, 65, 49, generator=torch.Generator().manual_seed(1))
    truth = copy.deepcopy(plain).double()(x.double())
    reference = plain(x)
    # W is rounded once in the factors, once composed
    assert_error_within(model(x), reference, truth, factor=4, magnitude=4 * truth, name=name)


@pytest.fixture(scope="module", params=LOOPS, ids=lambda loop: loop.__name__)
def loop(request) -> Callable[[nn.Module], None]:
    return request.param


def gradients(model: nn.Module, double: bool) -> list[Tensor]:
    """Of x and, in the order of the layers, of S."""
    x = torch.rand(2, 3, 65, 49, generator=torch.Generator().manual_seed(1))
    x = (x.double() if double else x).requires_grad_()
    model = copy.deepcopy(model).double() if double else model
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return list(torch.autograd.grad((y * weights).sum(), [x, *svf_fast.svf_parameters(model)]))


@pytest.mark.parametrize("fuse", (True, False))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_set_before_the_conversion(loop, strategy, fuse):
    plain = network()
    loop(plain)
    options = {"layers": None, "progress": False}
    model = svf_fast.convert(copy.deepcopy(plain), strategy=strategy, fuse=fuse, **options)
    check(model, plain, f"{loop.__name__}, {strategy}")
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    assert bool(fused) is fuse
    if strategy != "reference" and loop is not mirrored:
        assert not any(module.unfused_reason() for module in fused)
    paper = svf_fast.convert(copy.deepcopy(plain), strategy="reference", fuse=False, **options)
    for actual, exact in zip(gradients(model, True), gradients(paper, True)):
        assert (actual - exact).norm() <= 1e-10 * exact.norm()
    check(svf_fast.merge(model), plain, f"{loop.__name__}, {strategy}, merged")
    for name, conv in convolutions(model).items():
        assert (
            type(conv) is nn.Conv2d and conv.padding_mode == plain.get_submodule(name).padding_mode
        )


@pytest.mark.parametrize("fuse", (True, False))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_set_after_the_conversion(loop, strategy, fuse):
    plain = network()
    model = svf_fast.convert(copy.deepcopy(plain), None, strategy, fuse, progress=False)
    check(model, plain, "before")  # what was read then is not kept
    gradients(model, False)
    loop(plain)
    loop(model)
    check(model, plain, f"{loop.__name__}, {strategy}")
    exact = svf_fast.convert(copy.deepcopy(plain), None, "reference", False, progress=False)
    for actual, truth in zip(gradients(model, True), gradients(exact, True)):
        assert (actual - truth).norm() <= 1e-10 * truth.norm()
    check(svf_fast.merge(model), plain, "merged")


def test_a_copy_and_a_pickle_follow_too(loop):
    plain = network()
    loop(plain)
    model = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        check(other, plain, loop.__name__)


def test_padding_of_a_pickle_from_before_it_followed():
    layer = SVFConv2d(3, 4, (2, 3), padding="same", padding_mode="circular")
    state = layer.__getstate__()
    state["explicit_padding"] = state.pop("_reversed_padding_repeated_twice")
    other = SVFConv2d.__new__(SVFConv2d)
    other.__setstate__(state)
    x = torch.rand(1, 3, 6, 7)
    assert torch.equal(other(x), layer(x)) and "explicit_padding" not in vars(other)


@pytest.mark.parametrize("channels", [4, 1])
def test_a_weight_of_other_channels_than_at_construction(channels):
    """As a stem is made to read RGB-D or gray images, its attributes left as they were."""
    plain = network()
    conv = plain.stem[0]
    conv.weight = nn.Parameter(torch.randn(8, channels, 5, 3), requires_grad=False)
    model = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    x = torch.rand(2, channels, 33, 33)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        svf_fast.convert(svf_fast.merge(model), None, progress=False)


def test_what_torch_refuses_is_refused():
    conv = nn.Conv2d(3, 4, 3, padding="same")
    conv.stride = (2, 2)
    with pytest.raises(RuntimeError, match="same"):
        conv(torch.rand(1, 3, 9, 9))
    with pytest.raises(ValueError, match=r"padding 'same' expects a stride of 1.*got \(2, 2\)"):
        SVFConv2d.from_conv(conv)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), conv)
    with pytest.raises(ValueError, match="padding 'same'"):
        svf_fast.convert(model, None)
    assert type(model[0]) is type(model[1]) is nn.Conv2d


def test_groups_set_after_the_conversion_are_refused():
    layer = SVFConv2d(4, 8, 3, groups=2)
    layer.groups = 4
    with pytest.raises(ValueError, match="groups: expected 2, by which the weight was decomposed"):
        layer(torch.rand(1, 4, 9, 9))
    conv = nn.Conv2d(4, 8, 3)
    conv.groups, conv.weight = 2, nn.Parameter(torch.randn(8, 2, 3, 3))
    x = torch.rand(1, 4, 9, 9)
    torch.testing.assert_close(SVFConv2d.from_conv(conv)(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_batch_norms_eps_set_later():
    plain = network()
    model = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    check(model, plain, "before")
    for changed in (plain, model):
        for norm in (m for m in changed.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eps, norm.momentum = 0.3, 0.7
    check(model, plain, "eps")
