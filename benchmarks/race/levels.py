"""What is raced: a layer, a block, the backbone, the prior mask, whole training steps.

A level makes networks and inputs from a `Settings` alone, so that another process can make the same
ones. Networks are frozen and in evaluation mode; a peer converts `Level.layers` of one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import fss.models.prior
from benchmarks.race.peers import LAYER_PEERS, PEERS, REGIMES, Layers, Peer
from fss.config import ModelConfig
from fss.models import MODELS, Baseline, build_backbone, load_backbone
from fss.models.backbone import BasicBlock, Bottleneck
from svf_fast import cosine_max
from svf_fast.reference.cosine_max import cosine_max as dense_cosine_max

SVF_LAYERS = ("layer2", "layer3", "layer4")
BASE_CLASSES = 60  # of a fold of COCO-20i
SUPPORTS_AGAIN = "svf_fast, 8 bits, supports computed again"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and kind of the inputs, and the network.

    size: side of the image in px, 8n + 1. batch: images, in a step episodes. shots: of an episode.
    dtype: float32, or bfloat16 or float16 by autocast, or float64. weights: as `load_backbone` has
    it; "none": random ones. stride_on, width: of the backbone.
    """

    size: int = 321
    batch: int = 2
    shots: int = 1
    dtype: str = "float32"
    channels_last: bool = False
    device: str = "cpu"
    backbone: str = "resnet50"
    weights: str = "none"
    stride_on: str = "conv2"
    width: int = 64

    @classmethod
    def of(cls, options: argparse.Namespace, **given: Any) -> Settings:
        """Take the options with the names of fields, of several values the first.

        given: what is not an option. ``batches`` stands for batch.
        """
        named = vars(options)
        if "batches" in named:
            given["batch"] = named["batches"][0]
        names = {field.name for field in dataclasses.fields(cls)} & named.keys()
        values = {name: named[name] for name in names}
        first = {name: x[0] if isinstance(x, list) else x for name, x in values.items()}
        return cls(**first, **given)

    @property
    def map_size(self) -> int:
        """Return the side of the maps of layers 2 to 4."""
        return (self.size - 1) // 8 + 1


def add_step_options(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
    """Add the options of a module that runs steps of peers on a GPU, in several batches."""
    parser.add_argument("--device", default="cuda", help="cpu: to try it out")
    parser.add_argument("--size", type=int, default=641)
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 1])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--weights", default="none")
    parser.add_argument("--stride-on", default="conv2")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--peers", default=";".join(peers))
    parser.add_argument("--svd-cache", type=Path, help="folder of decompositions, kept")


class Inputs(NamedTuple):
    """Arguments of the network and what its output's gradient is, None for a loss."""

    arguments: tuple[Tensor, ...]
    grad_y: Tensor | None = None


class Level:
    """A network and its inputs.

    Attributes:
        name, title: for files and for people.
        groups: what is raced apart from each other.
        peers: that take part.
        layers: that the peers convert; None is all of the network.
        trunk: prefix of their names in the network.
        check_size: side in px for the comparison with float64. Small, so that a ReLU whose
            argument is at rounding is rare: each turns a whole element of the gradient.
    """

    name: str
    title: str
    groups: tuple[str, ...]
    peers: dict[str, Peer] = PEERS
    layers: Layers = None
    trunk = ""
    check_size = 65

    def network(self, settings: Settings, group: str) -> nn.Module:
        raise NotImplementedError

    def inputs(self, settings: Settings, group: str, seed: int = 0) -> Inputs:
        raise NotImplementedError

    def convert(self, network: nn.Module, name: str, cache: Path | None) -> nn.Module:
        return self.peers[name].convert(network, self.layers, cache)

    def units(self, network: nn.Module, compiled: bool) -> list[str]:
        """List the parts of a converted network whose gradients can be judged alone.

        Residual blocks; where torch.compile made one of each of `layers`, those.
        """
        layers = [self.trunk + layer for layer in self.layers or ()]
        if compiled:
            return layers
        return [
            name
            for name, module in network.named_modules()
            if isinstance(module, BasicBlock | Bottleneck)
            and (not layers or any(name.startswith(f"{layer}.") for layer in layers))
        ]

    def owner(self, network: nn.Module, inputs: Inputs) -> nn.Module:
        """Return the module whose parameters and buffers are not counted."""
        return network

    def forward(self, network: nn.Module, inputs: Inputs, name: str) -> Tensor:
        """Return the output, or the loss, of the network that peer `name` made."""
        return network(*inputs.arguments)


# in, out, kernel, dilation, stride
CONVOLUTIONS = {
    "layer2 conv1 256→128 1×1": (256, 128, 1, 1, 1),
    "layer2 conv2 128→128 3×3": (128, 128, 3, 1, 1),
    "layer2 conv3 128→512 1×1": (128, 512, 1, 1, 1),
    "layer2 downsample 256→512 1×1 /2": (256, 512, 1, 1, 2),
    "layer3 conv1 1024→256 1×1": (1024, 256, 1, 1, 1),
    "layer3 conv2 256→256 3×3 d2": (256, 256, 3, 2, 1),
    "layer3 conv3 256→1024 1×1": (256, 1024, 1, 1, 1),
    "layer3 downsample 512→1024 1×1": (512, 1024, 1, 1, 1),
    "layer4 conv1 2048→512 1×1": (2048, 512, 1, 1, 1),
    "layer4 conv2 512→512 3×3 d4": (512, 512, 3, 4, 1),
    "layer4 conv3 512→2048 1×1": (512, 2048, 1, 1, 1),
    "layer4 downsample 1024→2048 1×1": (1024, 2048, 1, 1, 1),
}


class LayerLevel(Level):
    name = "layer"
    title = "One convolution of ResNet-50's layers 2-4"
    groups = tuple(CONVOLUTIONS)
    peers = LAYER_PEERS

    def network(self, settings, group):
        torch.manual_seed(0)
        fan_in, fan_out, kernel, dilation, stride = CONVOLUTIONS[group]
        padding = dilation * (kernel // 2)
        conv = nn.Conv2d(fan_in, fan_out, kernel, stride, padding, dilation, bias=False)
        return _placed(nn.Sequential(conv), settings)

    def inputs(self, settings, group, seed=0):
        fan_in, fan_out, _, _, stride = CONVOLUTIONS[group]
        side = settings.map_size
        return _maps(settings, seed, fan_in, side * stride - stride + 1, fan_out, side)


class BlockLevel(Level):
    name = "block"
    title = "One bottleneck of ResNet-50"
    groups = SVF_LAYERS

    def network(self, settings, group):
        return nn.Sequential(_backbone(settings).get_submodule(group)[1])

    def inputs(self, settings, group, seed=0):
        channels = settings.width * 2 ** (int(group[-1]) + 1)
        return _maps(settings, seed, channels, settings.map_size, channels, settings.map_size)


class BackboneLevel(Level):
    name = "backbone"
    title = "ResNet-50, layers 2-4"
    groups = ("layers 2-4",)
    layers = SVF_LAYERS
    check_size = 33

    def network(self, settings, group):
        backbone = _backbone(settings)
        trunk = nn.Sequential()
        for name in SVF_LAYERS:
            trunk.add_module(name, backbone.get_submodule(name))
        return trunk

    def inputs(self, settings, group, seed=0):
        width, side = settings.width, settings.map_size
        return _maps(settings, seed, 4 * width, 2 * side - 1, 32 * width, side)


class StepLevel(Level):
    """Loss and gradients of the baseline for a batch of episodes, dropout off.

    svf_fast and the bound have `svf_fast.cosine_max` as the prior mask, the others the dense one,
    as published.
    """

    name = "step"
    title = "A training step of the baseline"
    groups = ("step",)
    peers: dict[str, Peer] = PEERS | {SUPPORTS_AGAIN: PEERS["svf_fast, 8 bits"]}
    layers = SVF_LAYERS
    trunk = "backbone."
    check_size = 33

    def network(self, settings, group):
        model = Baseline(_backbone(settings), dropout=0.0)
        return _placed(model, settings)

    def inputs(self, settings, group, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batch, shots, size = settings.batch, settings.shots, settings.size
        query = torch.randn(batch, 3, size, size, generator=generator)
        supports = torch.randn(batch, shots, 3, size, size, generator=generator)
        ramp = torch.linspace(-1, 1, size)
        disc = (ramp[:, None].square() + ramp.square() < 0.4).long()
        device = settings.device
        masks = disc.expand(batch, shots, size, size).contiguous().to(device)
        target = disc.expand(batch, size, size).contiguous().to(device)
        query, supports = _cast(query, settings), _cast(supports, settings)
        return Inputs((query, supports, masks, target))

    def convert(self, network, name, cache):
        backbone = network.backbone
        network.recompute_supports = name == SUPPORTS_AGAIN
        self.peers[name].convert(backbone, self.layers, cache)
        if self.peers[name].trains == "nothing":  # let the gradient pass layers 2-4 all the same
            like = backbone.conv1.weight
            backbone.gradient_wanted = nn.Parameter(like.new_zeros(()))
            backbone.layer1.register_forward_hook(lambda _, __, y: y.requires_grad_())
        return network

    def forward(self, network, inputs, name):
        taken = len(network.inputs)
        episode, targets = inputs.arguments[:taken], inputs.arguments[taken:]
        prior = dense_cosine_max if self.dense_prior(name) else cosine_max
        with mock.patch.object(fss.models.prior, "cosine_max", prior):
            return network.loss(network(*episode), *targets)

    def dense_prior(self, name: str) -> bool:
        return not name.startswith("svf_fast") and self.peers[name].trains != "nothing"


class ModelsLevel(StepLevel):
    """A training step of each few-shot model, in training mode with dropout, in four regimes.

    Freeze and full are what `fss train` makes of them, with `svf_fast.cosine_max`; the paper's
    layers have the dense prior mask. BAM has the 60 base classes of COCO-20i.
    """

    name = "models"
    title = "A training step of each model"
    groups = tuple(MODELS)
    peers = REGIMES

    def network(self, settings, group):
        kind = MODELS[group]
        config = ModelConfig(name=group, base_weights="none" if kind.needs_base_learner else None)
        backbone = _backbone(settings, **kind.backbone_options)
        model = kind.from_config(backbone, config, BASE_CLASSES, settings.shots)
        return _placed(model, settings)

    def inputs(self, settings, group, seed=0):
        query, supports, masks, target = super().inputs(settings, group, seed).arguments
        zeros = torch.zeros(settings.batch, dtype=torch.int64, device=settings.device)
        entries = {
            "query_image": query,
            "support_images": supports,
            "support_masks": masks,
            "query_mask": target,
            "base_class": zeros,
            "query_base_mask": target.clone(),
            "support_base_masks": masks.clone(),
            "query_padding": torch.zeros_like(target, dtype=torch.bool),
            "sampling": zeros,
        }
        kind = MODELS[group]
        return Inputs(tuple(entries[name] for name in (*kind.inputs, *kind.targets)))

    def convert(self, network, name, cache):
        self.peers[name].convert(network.backbone, self.layers, cache)
        return network

    def dense_prior(self, name):
        return name == "official"


# Both convert nothing: they differ in the function that `PriorLevel.forward` takes.
PRIOR_PEERS = {"official": Peer(lambda m, *_: m), "svf_fast": Peer(lambda m, *_: m)}


class PriorLevel(Level):
    """The largest cosines of one shot; nothing of a backbone. Query and support are not counted."""

    name = "prior"
    title = "Prior mask of one shot, query and support not counted"
    groups = ("cosine_max",)
    peers = PRIOR_PEERS

    def network(self, settings, group):
        return nn.Identity()

    def inputs(self, settings, group, seed=0):
        generator = torch.Generator().manual_seed(seed)
        channels, positions = 32 * settings.width, settings.map_size**2
        query, support = (
            torch.randn(settings.batch, channels, positions, generator=generator).relu_()
            for _ in range(2)
        )
        mask = torch.zeros(settings.batch, positions)
        mask[:, positions // 4 : 3 * positions // 4] = 1  # half of it, more than most objects cover
        grad_y = torch.randn(settings.batch, positions, generator=generator)
        device = settings.device
        dtype = getattr(torch, settings.dtype)  # 16-bit maps, as layer 4 leaves them by autocast
        query, support = (_leaf(x.to(device, dtype)) for x in (query, support))
        return Inputs((query, support, mask.to(device, dtype)), grad_y.to(device, dtype))

    def owner(self, network, inputs):
        holder = nn.Module()
        for number, argument in enumerate(inputs.arguments):
            holder.register_buffer(f"argument{number}", argument)
        return holder

    def forward(self, network, inputs, name):
        function = cosine_max if name == "svf_fast" else dense_cosine_max
        return function(*inputs.arguments)


LEVELS = {
    level.name: level
    for level in (
        LayerLevel(),
        BlockLevel(),
        BackboneLevel(),
        StepLevel(),
        ModelsLevel(),
        PriorLevel(),
    )
}


def defaults(level: str) -> Settings:
    """Return one episode for a step, one shot at full size for a prior, else two images."""
    if level == "prior":
        return Settings(size=641, batch=1)
    return Settings(batch=1 if level == "step" else 2)


def autocast(settings: Settings) -> contextlib.AbstractContextManager:
    """Return autocast where the settings ask for a 16-bit dtype."""
    dtype = getattr(torch, settings.dtype)
    if dtype.itemsize > 2:
        return contextlib.nullcontext()
    return torch.autocast(settings.device, dtype)


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a step has gradients for."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _backbone(settings: Settings, **options: Any) -> nn.Module:
    """Build a frozen backbone in evaluation mode; random weights get a batch's statistics.

    Of the arguments of `build_backbone`, `options` are those that a method needs.
    """
    torch.manual_seed(0)
    backbone = build_backbone(
        settings.backbone, stride_on=settings.stride_on, width=settings.width, **options
    ).requires_grad_(False)
    load_backbone(backbone, settings.weights)
    if settings.weights == "none":
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
        backbone.train()(torch.randn(4, 3, 65, 65))
    return _placed(backbone.eval(), settings)


def _maps(
    settings: Settings, seed: int, in_channels: int, side: int, out_channels: int, out_side: int
) -> Inputs:
    """Sample maps as a ReLU leaves them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(settings.batch, in_channels, side, side, generator=generator).relu_()
    grad_y = torch.randn(settings.batch, out_channels, out_side, out_side, generator=generator)
    low = getattr(torch, settings.dtype)
    return Inputs((_leaf(_cast(x, settings)),), _cast(grad_y, settings).to(low))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _dtype(settings: Settings) -> torch.dtype:
    """Return the dtype of parameters and inputs: float32 under autocast."""
    return torch.float64 if settings.dtype == "float64" else torch.float32


def _format(settings: Settings) -> torch.memory_format:
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def _cast(x: Tensor, settings: Settings) -> Tensor:
    x = x.to(settings.device, _dtype(settings))
    return x.contiguous(memory_format=_format(settings)) if x.dim() == 4 else x


def _placed(network: nn.Module, settings: Settings) -> nn.Module:
    return network.to(settings.device, _dtype(settings), memory_format=_format(settings))
