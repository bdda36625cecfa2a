"""Feature extractors: ResNets with dilated last layers, VGG-16, and vision transformers.

He et al., "Deep Residual Learning for Image Recognition", 2016; dilation as in Yu et al., "Dilated
Residual Networks", 2017. State-dict keys are torchvision's; the deep stem adds those of semseg.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

import svf_fast
from fss.models.vgg import VGG
from fss.models.vit import VITS, ViT


class Architecture(NamedTuple):
    """A ResNet's block class and its number of blocks in layers 1 to 4."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    The stride is on conv1, the dilation on both. Without `last_relu` the sum is returned.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        self.last_relu = last_relu
        self.conv1 = _conv3x3(in_channels, width, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + shortcut
        return self.relu(out) if self.last_relu else out


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the output has 4·`width` channels.

    The dilation is on conv2; the stride on conv2 (torchvision, semseg) or conv1 (Caffe, Keras).
    Without `last_relu` the sum of both paths is returned.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        last_relu: bool = True,
        stride_on: str = "conv2",
    ) -> None:
        super().__init__()
        self.last_relu = last_relu
        stride1, stride2 = (stride, 1) if stride_on == "conv1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride2, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + shortcut
        return self.relu(out) if self.last_relu else out


class SumStage(nn.Sequential):
    """Blocks without their last ReLU: what goes from one to the next, and out, is activated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sums(x)[-1].relu()

    def sums(self, x: Tensor) -> list[Tensor]:
        """Compute the sum of each block before its last ReLU."""
        maps: list[Tensor] = []
        for name, block in self.named_children():
            if name == "adapter":  # of a regime: it follows the last block's sum
                maps[-1] = block(maps[-1])
            else:
                maps.append(block(_activate(maps[-1], block) if maps else x))
        return maps


def _activate(total: Tensor, block: nn.Module) -> Tensor:
    """Apply the ReLU before a block. A fused one does not keep what it reads: signs are enough."""
    return svf_fast.relu(total) if isinstance(block, svf_fast.Fused) else total.relu()


ARCHITECTURES = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
}

# Stride and dilation of layers 1 to 4 for each output stride.
_GEOMETRY = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}


class ResNet(nn.Module):
    """A ResNet without its classifier: stem, then `layer1` to `layer4`, each callable.

    With output stride 8 an image of H×W gives maps of ((H-1)/8 + 1)×((W-1)/8 + 1) from `layer2`,
    `layer3` and `layer4` when (H-1) and (W-1) are multiples of 8: 473 gives 60.

    Args:
        architecture: the block class and the depth of each layer.
        stem: "plain", one 7×7 convolution, or "deep", three 3×3 ones of width, width and 2·width.
        stride_on: the bottleneck convolution that carries the stride, "conv1" or "conv2".
        width: channels of the plain stem; layer n has `width`·2^(n-1)·expansion channels.
        output_stride: 8, 16 or 32; removed strides become dilation of every 3×3 convolution.
        sums: whether the blocks end in the sum of their paths, for `block_sums`.
        last_relu: whether the last block of layer 4 ends in a ReLU.
        late_dilation: whether the first block of a layer has the dilation of the layer before, as
            torchvision's ResNets have it.

    Attributes:
        channels: output channels of layers 1 to 4.
        stride_on: "conv1" or "conv2" for bottlenecks, None for basic blocks.
        factors: U, S and V by convolution, where the weights were loaded from SVF layers.
    """

    def __init__(
        self,
        architecture: Architecture,
        stem: str = "plain",
        stride_on: str = "conv2",
        width: int = 64,
        output_stride: int = 8,
        sums: bool = False,
        last_relu: bool = True,
        late_dilation: bool = False,
    ) -> None:
        super().__init__()
        self.deep_stem = stem == "deep"
        if self.deep_stem:
            self.conv1 = _conv3x3(3, width, 2, 1)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = _conv3x3(width, width, 1, 1)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = _conv3x3(width, 2 * width, 1, 1)
            self.bn3 = nn.BatchNorm2d(2 * width)
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        block, depths = architecture
        in_channels = 2 * width if self.deep_stem else width
        layers, before = [], 1
        for n, (depth, (stride, dilation)) in enumerate(
            zip(depths, _GEOMETRY[output_stride], strict=True)
        ):
            dilations = [before if late_dilation else dilation] + [dilation] * (depth - 1)
            shape = in_channels, width * 2**n, stride, dilations
            layers.append(_layer(block, *shape, stride_on, sums))
            before = dilation
            in_channels = width * 2**n * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.layer4[-1].last_relu = last_relu and not sums
        self.factors: dict[str, svf_fast.Factors] = {}
        self.channels = tuple(width * 2**n * block.expansion for n in range(4))
        self.stride_on = stride_on if block is Bottleneck else None

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the input of `layer1`, at a quarter of the resolution."""
        out = self.relu(self.bn1(self.conv1(images)))
        if self.deep_stem:
            out = self.relu(self.bn2(self.conv2(out)))
            out = self.relu(self.bn3(self.conv3(out)))
        return self.maxpool(out)

    def early(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the output of `layer2`."""
        return self.layer2(self.layer1(self.stem(images)))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, H, W] to the outputs of `layer2` and `layer3`."""
        layer2 = self.early(images)
        return layer2, self.layer3(layer2)

    def block_sums(self, images: Tensor, first: int = 2) -> list[Tensor]:
        """Map images [B, 3, H, W] to the sum of each block before its last ReLU.

        Of a backbone that was built with `sums`. `first` is the layer of the first block; the last
        is layer 4's.
        """
        x = self.stem(images)
        maps: list[Tensor] = []
        for n, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            if n < first:
                x = stage(x)
            else:
                maps += stage.sums(_activate(maps[-1], stage[0]) if maps else x)
        return maps

    def levels(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to the outputs of `layer3` and of each block of `layer4`."""
        maps = [self.features(images)[1]]
        for name, block in self.layer4.named_children():
            out = block(maps[-1])
            if name == "adapter":  # of a regime: the last block's map is what leaves it
                maps[-1] = out
            else:
                maps.append(out)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the output of `layer4`."""
        return self.layer4(self.features(images)[1])


Backbone = ResNet | VGG | ViT
"""What a few-shot model runs on: `features`, `layer4`, `levels` and `channels` are all it uses.

The `features` of a ResNet or VGG are layers 2 and 3, and `layer4` maps the latter to layer 4; those
of a ViT are layers 2, 3 and 4.
"""

CONVOLUTIONAL = (*ARCHITECTURES, "vgg16_bn", "vgg16")
BACKBONES = (*CONVOLUTIONAL, *VITS)


def build_backbone(
    name: str,
    stem: str = "plain",
    stride_on: str = "conv2",
    width: int = 64,
    output_stride: int = 8,
    sums: bool = False,
    last_relu: bool = True,
    late_dilation: bool = False,
    vgg_dilation: int | None = None,
) -> Backbone:
    """Build a randomly initialized backbone by name; the arguments are those of `ResNet`.

    `stride_on` concerns bottlenecks only (resnet50, resnet101): a basic block strides on conv1.
    A VGG has `width`, `last_relu` and, as its `dilation`, `vgg_dilation`, without which its output
    stride is 16. A vision transformer has `width`, the channels of a head.

    Raises:
        ValueError: an unknown name or option, or a width below 1.
        TypeError: a width that is not an integer.
    """
    _check_choice("backbone", name, BACKBONES)
    _check_choice("stem", stem, ("plain", "deep"))
    _check_choice("stride_on", stride_on, ("conv1", "conv2"))
    _check_choice("output_stride", output_stride, tuple(_GEOMETRY))
    if not isinstance(width, int) or isinstance(width, bool):
        raise TypeError(f"width: expected an integer, got {width!r}")
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    if name not in ARCHITECTURES:
        if stem != "plain":
            raise ValueError(f"stem: expected plain, {name} has no other; got {stem!r}")
        if name in VITS:
            return ViT(name, width)
        return VGG(width, name == "vgg16_bn", vgg_dilation, last_relu)
    form = stem, stride_on, width, output_stride, sums, last_relu, late_dilation
    return ResNet(ARCHITECTURES[name], *form)


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False
    )


def _layer(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    stride: int,
    dilations: list[int],
    stride_on: str,
    sums: bool,
) -> nn.Sequential:
    options: dict[str, Any] = {"stride_on": stride_on} if block is Bottleneck else {}
    options["last_relu"] = not sums
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    first, *rest = dilations
    blocks = [block(in_channels, width, stride, first, downsample, **options)]
    blocks += [block(out_channels, width, 1, dilation, **options) for dilation in rest]
    return SumStage(*blocks) if sums else nn.Sequential(*blocks)


def _check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{argument}: expected one of {listed}; got {value!r}")
