"""Residual blocks that return the sum of their paths: found, exact, and without a ReLU's bits."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import svf_fast
from svf_fast import Fused
from svf_fast.fusion.structure import ResidualBlock, examine
from svf_fast.reference.affine_act import mask_bytes
from tests.svf_fast.fusion import test_structure as structure
from tests.svf_fast.gpu_path import defined, interpreted, on_gpu
from tests.svf_fast.ops import test_block as blocks
from tests.svf_fast.ops.test_block import as_reference, conv, first, frozen, step
from tests.svf_fast.saved_bytes import saved_by


class Bottleneck(blocks.Bottleneck):
    last_relu = False

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out) if self.last_relu else out


class Basic(blocks.Basic):
    last_relu = False

    def forward(self, x):
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        out = out + (x if self.downsample is None else self.downsample(x))
        return functional.relu(out) if self.last_relu else out


class Inverted(nn.Module):
    """Wide within, as MNASNet has it: the first convolution keeps x, which is also the shortcut."""

    last_relu = False

    def __init__(self, channels, width):
        super().__init__()
        self.layers = nn.Sequential(
            *(conv(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(conv(width, width, 3, groups=width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(conv(width, channels), nn.BatchNorm2d(channels)),
        )

    def forward(self, x):
        out = self.layers(x) + x
        return out.relu() if self.last_relu else out


BLOCKS = {
    "bottleneck": lambda: Bottleneck(20, 5, 20, dilation=2),
    "bottleneck downsample": lambda: Bottleneck(6, 5, 20, stride=2),
    "bottleneck pooled": lambda: Bottleneck(6, 5, 20, stride=2, pool=True),
    "bottleneck grouped": lambda: Bottleneck(12, 6, 12, groups=3),
    "bottleneck narrowing": lambda: Bottleneck(20, 5, 10),
    "inverted": lambda: Inverted(6, 10),
    "basic": lambda: Basic(6, 6, bias=True),
    "basic downsample": lambda: Basic(6, 9, stride=2),
}


def plain(name: str, last_relu: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    block.last_relu = last_relu
    return nn.Sequential(frozen(block))


def fused(name: str, last_relu: bool = False, **options) -> nn.Sequential:
    model = svf_fast.convert(plain(name, last_relu), None, progress=False, **options)
    assert isinstance(model[0], Fused) and not model[0].unfused_reason()
    return model


def image(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, first(model).in_channels, 9, 11, dtype=dtype)


def assert_equal(got, expected) -> None:
    """Of float64, to the rounding of a gradient through three layers."""
    assert len(got) == len(expected)
    for mine, exact in zip(got, expected, strict=True):
        assert mine.dtype == torch.float64 and mine.shape == exact.shape
        assert (mine - exact).norm() <= 1e-12 * exact.norm()


# Which modules are such blocks, and which only end in an addition.


@pytest.mark.parametrize("name", BLOCKS)
def test_are_found_and_compute_what_was_found(name):
    model = plain(name)
    found = structure.find_block(model[0])
    assert isinstance(found, ResidualBlock) and not found.relu
    x = image(svf_fast.convert(copy.deepcopy(model), None, fuse=False))
    expected = model(x)
    assert expected.min() < 0 < expected.max()
    assert torch.equal(structure.run(model[0], found, x), expected)
    model[0].last_relu = True
    assert structure.find_block(model[0]).relu


class Written(structure.Basic):
    def __init__(self, add):
        super().__init__()
        self.add, self.nothing = add, nn.Identity()

    def forward(self, x):
        return self.nothing(self.add(self.main(x), x))


@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: y + x,
        lambda y, x: x + y,
        lambda y, x: operator.iadd(y, x),
        lambda y, x: torch.add(x, y),
        lambda y, x: torch.add(y, other=x),
        lambda y, x: y.add_(x),
        lambda y, x: y.add(x),
    ],
)
def test_ways_to_write_the_sum(add):
    found = structure.find_block(Written(add))
    assert found == ResidualBlock("it", structure.BASIC, (), None, relu=False)


class PreActivation(structure.Basic):
    def main(self, x):
        y = self.conv1(functional.relu(self.bn1(x)))
        return self.conv2(functional.relu(self.bn2(y)))

    def forward(self, x):
        return self.main(x) + x


class NormAfterSum(structure.Basic):
    def __init__(self):
        super().__init__()
        self.bn3 = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn3(self.main(x) + x)


class ReluBeforeSum(structure.Basic):
    def forward(self, x):
        return self.relu(self.main(x)) + x


class ReluOfTheSumAside(structure.Basic):
    """It returns what the ReLU overwrote."""

    def forward(self, x):
        y = self.main(x) + x
        self.relu(y)
        return y


class SumOverInput(structure.Basic):
    def forward(self, x):
        y = self.main(x)
        x += y
        return x


class ReluWhenTraining(structure.Basic):
    def forward(self, x):
        y = self.main(x) + x
        return self.relu(y) if self.training else y


class SumAndMap(structure.Basic):
    def forward(self, x):
        y = self.main(x) + x
        return y, self.relu(y)


class TwoPaths(nn.Module):
    """Two convolutions side by side."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(6, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(6, 6), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))


class Repeated(Basic):
    """A sum of which one map is repeated over positions or channels: context, or attention."""

    def __init__(self, out=6, stride=1, pool=None, shortcut=None):
        super().__init__(6, 6, stride)
        self.conv2, self.bn2 = conv(6, out, 3), nn.BatchNorm2d(out)
        if shortcut or pool:
            way = [pool or nn.Identity(), conv(6, shortcut or out), nn.BatchNorm2d(shortcut or out)]
            self.downsample = nn.Sequential(*way)


class Valid(Basic):
    """Its main path leaves one position of nine by nine."""

    def __init__(self):
        super().__init__(6, 6)
        self.conv1 = conv(6, 6, 9, padding=0)


NO_BLOCKS = {
    "pre-activation": (PreActivation(), "'conv2' (Conv2d) stands where a batch norm would fit"),
    "norm": (NormAfterSum(), "'bn3' (BatchNorm2d) stands where its last ReLU would fit"),
    "scaled": (Written(lambda y, x: (y + x) * 0.5), "mul stands where its last ReLU would fit"),
    "moved": (Written(lambda y, x: (y + x) + 0.5), "it calls add in an unusual way"),
    "of three": (Written(lambda y, x: y + x + x), "add stands where a batch norm would fit"),
    "weighted": (Written(lambda y, x: torch.add(y, x, alpha=2)), "it calls add in an unusual way"),
    "of x alone": (Written(lambda y, x: x + x), "its main path has 0 convolutions"),
    "ReLU before": (ReluBeforeSum(), "a ReLU stands between 'bn2' and the sum"),
    "ReLU aside": (ReluOfTheSumAside(), "the output of add is used more than once"),
    "over input": (SumOverInput(), "it writes its sum over its input"),
    "ReLU in training": (ReluWhenTraining(), "its forward differs between training and evaluation"),
    "two outputs": (SumAndMap(), "its forward returns something else than one tensor"),
    "two paths": (TwoPaths(), "its main path has 1 convolutions"),
    "context": (Repeated(pool=nn.AdaptiveAvgPool2d(1)), "its sum is of maps of different shapes"),
    "attention": (Repeated(out=1), "its sum is of maps of different shapes"),
    "shortcut of one": (Repeated(shortcut=1), "its sum is of maps of different shapes"),
    "one position": (Valid(), "its sum is of maps of different shapes"),
}


@pytest.mark.parametrize("name", NO_BLOCKS)
def test_what_only_ends_in_an_addition_stays_as_it_is_and_says_why(name):
    block, reason = copy.deepcopy(NO_BLOCKS[name])
    model = nn.Sequential(frozen(block))
    assert examine(block).startswith(reason)
    x = torch.randn(2, 6, 9, 9)
    expected = model(x.clone())
    svf_fast.convert(model, None, progress=False)
    assert not isinstance(model[0], Fused)
    torch.testing.assert_close(model(x.clone()), expected, rtol=1e-4, atol=1e-4)
    notes = [unit.note for unit in svf_fast.memory_report(model, x.shape).units if unit.layers]
    reason = reason.replace("(Conv2d)", "(SVFConv2d)")
    assert any(note.startswith(f"not fused: {reason}") for note in notes)


def test_what_the_parent_does_to_the_sum_is_not_the_blocks():
    class Scaled(nn.Sequential):
        def forward(self, x):
            return functional.silu(0.5 * self[0](x)) - 1

    plain_model = Scaled(*plain("basic")).double()
    model = svf_fast.convert(copy.deepcopy(plain_model), None, progress=False)
    assert isinstance(model[0], Fused) and not model[0]._names.relu
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    assert_equal(step(model, x), step(as_reference(model), x))
    assert_equal(step(model, x)[:2], step(plain_model, x)[:2])


def test_a_block_of_an_older_pickle_has_its_relu():
    found = ResidualBlock("", structure.BASIC, (), None)
    del found.__dict__["relu"]
    assert pickle.loads(pickle.dumps(found)).relu


# Gradients and what is kept for them.


@pytest.mark.parametrize("strategy", blocks.STRATEGIES)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_the_papers_layers(name, strategy, poisoned_memory):
    model = fused(name, strategy=strategy).double()
    reference = as_reference(model)
    x = image(model, torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    for recompute in (False, True):
        model[0].recompute = recompute
        for given in (x, last, x[..., ::2], x[:1, :, :1]):
            grad = torch.randn_like(reference(given))
            arriving = grad.clone()
            expected = step(reference, given, grad)
            for _ in range(3):  # the third is a recorded pass
                assert_equal(step(model, given, arriving), expected)
            assert torch.equal(arriving, grad)  # others may hold it


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_in_float32_within_twice_the_error_of_the_reference(name):
    model = fused(name)
    blocks.compare(model, image(model), name)


@pytest.mark.parametrize("trains", ("S", "log_scale"))
def test_gradients_without_that_of_x_and_where_nothing_is_kept_of_some(trains):
    model = fused("inverted", trains=trains).double()
    reference, x = as_reference(model), image(model, torch.float64)
    assert_equal(step(model, x), step(reference, x))
    grads = [
        torch.autograd.grad(each(x).sum(), list(svf_fast.svf_parameters(each)))
        for each in (model, reference)
    ]
    assert_equal(*grads)
    for each in (model, reference):
        next(iter(svf_fast.svf_parameters(each))).requires_grad_(False)
    assert_equal(step(model, x), step(reference, x))


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", BLOCKS)
def test_keeps_what_the_block_with_a_relu_does_but_for_its_bits(name, recompute):
    kept = []
    for last_relu in (True, False):
        model = fused(name, last_relu)
        model[0].recompute = recompute
        x = image(model).requires_grad_()
        kept.append(saved_by(model, x))
        units = svf_fast.memory_report(model, x.shape).units
        assert units[0].saved_bytes == saved_by(model, x.detach())
        assert units[0].note == (f"computes {model[0].recomputed} again" if recompute else "")
    assert kept[0] - kept[1] == mask_bytes(model(x).numel())


def test_a_bottleneck_keeps_y1_and_y2():
    model = Bottleneck(64, 16, 64)
    for layer in (model.conv1, model.conv2, model.conv3):
        nn.init.orthogonal_(layer.weight)  # no guarded directions
    model = svf_fast.convert(nn.Sequential(frozen(model)), None, progress=False)
    elements, x = 2 * 16 * 9 * 11, torch.randn(2, 64, 9, 11, requires_grad=True)
    assert saved_by(model, x) == 2 * elements * 4
    assert saved_by(model, x, torch.bfloat16) == 2 * elements * 2
    budget = svf_fast.convert(
        svf_fast.merge(model), None, memory_budget=elements * 4, input_shape=x.shape, progress=False
    )
    assert budget[0].recompute and saved_by(budget, x) == elements * 4


def test_the_sum_may_be_overwritten():
    model = fused("basic").double()
    x = image(model, torch.float64)

    def overwriting(network):
        return nn.Sequential(network, nn.ReLU(inplace=True))

    assert_equal(step(overwriting(model), x), step(overwriting(as_reference(model)), x))


# Whole networks, and what else is done with a converted one.


def build(name: str, **options) -> nn.Module:
    build_backbone = pytest.importorskip("fss.models.backbone").build_backbone
    torch.manual_seed(0)
    model = frozen(build_backbone(name, sums=True, **options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that maps stay of one size through all blocks
            nn.init.uniform_(module.weight, 0.2, 0.6)
    return model


@pytest.mark.parametrize("stem, stride_on", [("plain", "conv1"), ("deep", "conv2")])
@pytest.mark.parametrize("name, count", [("resnet18", 6), ("resnet50", 13)])
def test_all_blocks_of_layers_2_to_4_are_fused(name, count, stem, stride_on):
    model = svf_fast.convert(build(name, width=4, stem=stem, stride_on=stride_on), progress=False)
    found = {name: each for name, each in model.named_modules() if isinstance(each, Fused)}
    assert len(found) == count and not any(each.unfused_reason() for each in found.values())
    assert not any(each._names.relu for each in found.values())
    assert {name.partition(".")[0] for name in found} == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("output_stride", (8, 32))
@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_every_sum_is_read_and_its_relu_goes_on(name, output_stride):
    """As HSNet and DCAMA read them: gradients come from the reader and from the next block."""
    model = build(name, width=4, output_stride=output_stride).double()
    sums = model.block_sums
    svf_fast.convert(model, progress=False)
    reference = as_reference(model)
    x = torch.randn(2, 3, 35, 41, dtype=torch.float64)
    weights = [torch.randn_like(each) for each in sums(x)]
    model.train()  # batch norms stay frozen

    def read(network):
        leaf = x.clone().requires_grad_()
        maps = network.block_sums(leaf)
        total = sum((weight * each).sum() for weight, each in zip(weights, maps, strict=True))
        trained = list(svf_fast.svf_parameters(network))
        total = total + maps[-1].relu().square().sum()
        grads = torch.autograd.grad(total, [leaf, *trained])
        return [*(each.detach() for each in maps), *grads]

    expected = read(reference)
    for _ in range(3):
        assert_equal(read(model), expected)


def test_merge_adapter_copies_and_a_changed_attribute(tmp_path):
    model = build("resnet18", width=4).double()
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    before, other = model(x), copy.deepcopy(model)
    svf_fast.convert(model, progress=False)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(1.1)
    expected = model(x)
    assert not torch.allclose(expected, before)
    svf_fast.save_adapter(model, tmp_path / "a.safetensors")
    svf_fast.load_adapter(other, tmp_path / "a.safetensors")
    assert isinstance(other.layer4[1], Fused)
    for each in (other, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(each(x), expected, rtol=1e-10, atol=1e-10)
    block = model.layer4[1]
    block.last_relu = True
    assert block.unfused_reason() == "last_relu was False at conversion and is True now"
    assert (block(torch.randn(1, 32, 5, 5, dtype=torch.float64)) >= 0).all()
    block.last_relu = False
    merged = svf_fast.merge(model)
    assert not any(isinstance(each, Fused) for each in merged.modules())
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)


def test_compile():
    model = fused("bottleneck").double()
    x = image(model, torch.float64)
    expected = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(step(compiled, x), expected)


def test_without_gradients():
    model = fused("bottleneck")
    x = image(model)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


# The GPU's path.


ON_GPU = ("bottleneck", "bottleneck downsample", "bottleneck odd", "basic")


def on_gpu_shapes(name: str, orthogonal: bool = False) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    made = {
        "bottleneck": lambda: Bottleneck(32, 8, 32, dilation=2),
        "bottleneck downsample": lambda: Bottleneck(16, 8, 32, stride=2),
        "bottleneck odd": lambda: Bottleneck(20, 5, 20),
        "inverted": lambda: Inverted(8, 16),
        "basic": lambda: Basic(8, 8),
    }
    block = frozen(made[name]())
    for module in block.modules():
        if orthogonal and isinstance(module, nn.Conv2d):  # no guarded directions
            nn.init.orthogonal_(module.weight)
    model = svf_fast.convert(nn.Sequential(block), None, progress=False)
    x = torch.randn(2, first(model).in_channels, 9, 7)
    return model, x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "kernels, name",
    [
        (defined, "inverted"),
        *((defined, name) for name in ON_GPU),
        *((interpreted, name) for name in ON_GPU),
    ],
)
def test_the_path_of_a_gpu(name, kernels):
    model, x = on_gpu_shapes(name)
    with on_gpu(kernels()):
        for recompute in (False, True):
            model[0].recompute = recompute
            blocks.compare(model, x, name)


def test_no_pass_over_the_maps_that_a_product_could_carry():
    def never(*arguments):
        raise AssertionError("a pass of its own")

    model, x = on_gpu_shapes("bottleneck", orthogonal=True)
    kernels = defined() | {"affine_act": never, "affine_act_": never, "affine_act_backward": never}
    with on_gpu(kernels) as calls:
        step(model, x)
    del calls["compose_all"]  # once per change of S
    # forward: conv1 and conv3; the gradient that arrives needs no mask
    assert calls == {"pointwise": 2, "activation_gradients": 2}
