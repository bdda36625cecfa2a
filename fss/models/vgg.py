"""The VGG-16 feature extractor.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015,
configuration D with or without batch norm; cut into layers as PFENet and BAM do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from torch import Tensor, nn

from fss.models.pooling import resize
from svf_fast import Factors

# Where layers 0 to 4 begin and end among the children of torchvision's `vgg16().features`, and of
# `vgg16_bn().features`; each of layers 0 to 3 ends with a max-pool, the last of the network is
# dropped.
PLAIN_CUTS = (0, 5, 10, 17, 24, 30)
CUTS = (0, 7, 14, 24, 34, 43)
_DEPTHS = (2, 2, 3, 3, 3)

_Value = TypeVar("_Value")


class VGG(nn.Module):
    """VGG-16: `layer0` to `layer4` without the last max-pool and the classifier.

    The max-pools round up, so an image of H×W gives maps of ⌈H/16⌉×⌈W/16⌉ from `layer3` and
    `layer4`: 473 gives 30. With `dilation` they are DeepLab's instead (Chen et al. 2015), of 3×3
    positions, and the fourth has no stride: maps of ⌈H/8⌉×⌈W/8⌉. Parameters are called as in
    torchvision, with the layer's name in place of `features`: `layer2.14.weight`, see `own_keys`.

    Args:
        width: channels of the first convolutions; 64 in the published network.
        batch_norm: whether each convolution is followed by a batch norm.
        dilation: of the convolutions of `layer4`; None is 1, with max-pools of 2×2.
        last_relu: whether `layer4` ends in a ReLU.

    Attributes:
        channels: output channels of layers 1 to 4.
        cuts: where the layers begin and end among torchvision's modules.
        stride_on: None, no convolution has a stride.
        factors: U, S and V by convolution, where the weights were loaded from SVF layers.
    """

    stride_on = None

    def __init__(
        self,
        width: int = 64,
        batch_norm: bool = True,
        dilation: int | None = None,
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        widths = tuple(width * factor for factor in (1, 2, 4, 8, 8))
        self.factors: dict[str, Factors] = {}
        self.channels = widths[1:]
        self.cuts = CUTS if batch_norm else PLAIN_CUTS
        in_channels = 3
        for n, (out_channels, depth) in enumerate(zip(widths, _DEPTHS, strict=True)):
            spread = dilation or 1 if n == 4 else 1
            modules: list[nn.Module] = []
            for _ in range(depth):
                modules.append(
                    nn.Conv2d(in_channels, out_channels, 3, padding=spread, dilation=spread)
                )
                modules += [nn.BatchNorm2d(out_channels)] if batch_norm else []
                modules.append(nn.ReLU(inplace=True))
                in_channels = out_channels
            if n < 4 and dilation is None:
                modules.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
            elif n < 4:
                modules.append(nn.MaxPool2d(3, stride=2 if n < 3 else 1, padding=1))
            elif not last_relu:
                modules.pop()
            named = OrderedDict((str(self.cuts[n] + i), each) for i, each in enumerate(modules))
            self.add_module(f"layer{n}", nn.Sequential(named))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def early(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the output of `layer2`."""
        return self.layer2(self.layer1(self.layer0(images)))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, H, W] to the outputs of `layer2`, resized, and `layer3`."""
        layer2 = self.early(images)
        layer3 = self.layer3(layer2)
        return resize(layer2, layer3.shape[-2:]), layer3

    def levels(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to the outputs of `layer3` and `layer4`."""
        middle = self.features(images)[1]
        return [middle, self.layer4(middle)]

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the output of `layer4`."""
        return self.layer4(self.features(images)[1])


def own_keys(state: dict[str, _Value]) -> dict[str, _Value]:
    """Rename `features.n` of torchvision's VGG-16 to `VGG`'s `layerm.n` in a state dict."""
    cuts = CUTS if has_batch_norm(state) else PLAIN_CUTS
    renamed = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        index = rest.partition(".")[0]
        if first == "features" and index.isdigit() and int(index) < cuts[-1]:
            layer = sum(int(index) >= cut for cut in cuts) - 1
            key = f"layer{layer}.{rest}"
        renamed[key] = value
    return renamed


def stage_names(stages: Sequence[str]) -> dict[str, str]:
    """Map the names of a plain VGG's parameters in a model to those of code that numbers its
    modules within each stage, given the beginnings of its names of the five stages."""
    return {
        f"backbone.layer{n}.{start + i}.{kind}": f"{stages[n]}{i}.{kind}"
        for n, (start, end) in enumerate(pairwise(PLAIN_CUTS))
        for i in range(0, end - start, 2)
        for kind in ("weight", "bias")
    }


def has_batch_norm(names: Iterable[str]) -> bool:
    """Return whether a VGG has batch norms, by its parameters' names here or in torchvision."""
    # the second convolution: behind a ReLU, or behind a batch norm and a ReLU
    return not any(name.startswith(("features.2.", "layer0.2.")) for name in names)
