"""The VGG-16 feature extractor.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015,
configuration D with batch norm; cut into layers as PFENet and BAM do.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from torch import Tensor, nn

from fss.models.pooling import resize
from svf_fast import Factors

# Where layers 0 to 4 begin and end among the children of torchvision's `vgg16_bn().features`; each
# of layers 0 to 3 ends with a max-pool, the last of the network is dropped.
CUTS = (0, 7, 14, 24, 34, 43)
_DEPTHS = (2, 2, 3, 3, 3)

_Value = TypeVar("_Value")


class VGG(nn.Module):
    """VGG-16 with batch norm: `layer0` to `layer4` without the last max-pool and the classifier.

    The max-pools round up, so an image of H×W gives maps of ⌈H/16⌉×⌈W/16⌉ from `layer3` and
    `layer4`: 473 gives 30. Parameters are called as in torchvision, with the layer's name in place
    of `features`: `layer2.14.weight`, see `own_keys`.

    Args:
        width: channels of the first convolutions; 64 in the published network.

    Attributes:
        channels: output channels of layers 1 to 4.
        stride_on: None, no convolution has a stride.
        factors: U, S and V by convolution, where the weights were loaded from SVF layers.
    """

    stride_on = None

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = tuple(width * factor for factor in (1, 2, 4, 8, 8))
        self.factors: dict[str, Factors] = {}
        self.channels = widths[1:]
        in_channels = 3
        for n, (out_channels, depth) in enumerate(zip(widths, _DEPTHS, strict=True)):
            modules: list[nn.Module] = []
            for _ in range(depth):
                modules += [
                    nn.Conv2d(in_channels, out_channels, 3, padding=1),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                ]
                in_channels = out_channels
            if n < 4:
                modules.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
            named = OrderedDict((str(CUTS[n] + i), module) for i, module in enumerate(modules))
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
    renamed = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        index = rest.partition(".")[0]
        if first == "features" and index.isdigit() and int(index) < CUTS[-1]:
            layer = sum(int(index) >= cut for cut in CUTS) - 1
            key = f"layer{layer}.{rest}"
        renamed[key] = value
    return renamed
