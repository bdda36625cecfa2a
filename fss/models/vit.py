"""Vision transformers as backbones: ViT, DeiT, DINO and DINOv2.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; Oquab et al., "DINOv2: Learning Robust
Visual Features without Supervision", 2024; Darcet et al., "Vision Transformers Need Registers",
2024. State-dict keys are timm's, with a layer's name in place of `blocks`, see `own_keys`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from svf_fast import Factors

_LAYERS = 4
_EPS = 1e-6

_Value = TypeVar("_Value")


class ViTArchitecture(NamedTuple):
    """The shape of a vision transformer.

    patch: side of a patch in pixels. grid: patches along a side of the pictures it was trained on.
    scaled: whether its branches are multiplied by a trained vector (LayerScale).
    """

    depth: int
    heads: int
    patch: int = 16
    grid: int = 14
    scaled: bool = False
    registers: int = 0


_SIZES = {"tiny": (12, 3), "small": (12, 6), "base": (12, 12), "large": (24, 16)}

VITS = {
    **{f"vit_{size}_patch16": ViTArchitecture(*shape) for size, shape in _SIZES.items()},
    **{
        f"vit_{size}_patch14_{kind}dinov2": ViTArchitecture(*shape, 14, 37, True, registers)
        for kind, registers in (("", 0), ("reg4_", 4))
        for size, shape in _SIZES.items()
        if size != "tiny"
    },
}


class Attention(nn.Module):
    """Multi-head self-attention; the queries, keys and values come from one linear layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T, C] to [B, T, C]."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between them, four times as wide within."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiplies each channel by a number of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """`m = x + ls1(attn(norm1(x)))`, then `m + ls2(mlp(norm2(m)))`."""

    def __init__(self, channels: int, heads: int, scaled: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, _EPS)
        self.attn = Attention(channels, heads)
        self.ls1 = LayerScale(channels) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(channels, _EPS)
        self.mlp = MLP(channels)
        self.ls2 = LayerScale(channels) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T, C] to [B, T, C]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map of each patch."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to maps [B, C, H/patch, W/patch]."""
        return self.proj(images)


class ViT(nn.Module):
    """A vision transformer without its head; `layer1` to `layer4` are a quarter of its blocks each.

    Its maps [B, C, h, w] are the patches' tokens after the last norm, as of DINOv2's intermediate
    layers; class and register tokens run with them and are left out. Images whose sides are no
    multiples of the patch are resized to the nearest: 473 to 476 with patches of 14, which gives
    maps of 34×34. Positions are resized to any grid as timm does: bicubic, antialiased.

    Args:
        name: of `VITS`.
        width: channels of a head; 64 in every published one.

    Attributes:
        name: as `build_backbone` takes it.
        channels: output channels of layers 1 to 4, all alike.
        stride_on: None, as of a VGG.
        factors: empty; no file of these has SVF layers of the authors'.
    """

    stride_on = None
    any_size = True  # of images: no maps at a stride of 8 must align

    def __init__(self, name: str, width: int = 64) -> None:
        super().__init__()
        self.name = name
        depth, heads, patch, grid, scaled, registers = VITS[name]
        channels = heads * width
        self.patch, self.channels = patch, (channels,) * _LAYERS
        self.factors: dict[str, Factors] = {}
        self.patch_embed = PatchEmbed(channels, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, channels)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, channels))
        for n in range(_LAYERS):
            numbers = range(n * depth // _LAYERS, (n + 1) * depth // _LAYERS)
            named = OrderedDict((str(i), Block(channels, heads, scaled)) for i in numbers)
            self.add_module(f"layer{n + 1}", nn.Sequential(named))
        self.norm = nn.LayerNorm(channels, _EPS)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return how many patches images [B, 3, H, W] have, down and across."""
        height, width = (max(1, round(side / self.patch)) for side in images.shape[-2:])
        return height, width

    def tokens(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the input of `layer1` [B, 1 + registers + h·w, C]."""
        grid = self.grid(images)
        size = tuple(self.patch * side for side in grid)
        if images.shape[-2:] != size:
            images = functional.interpolate(images, size, mode="bilinear", antialias=True)
        patches = self.patch_embed(images).flatten(2).mT
        positions = self.positions(grid).to(patches.dtype)
        prefix = (self.cls_token + positions[:, :1]).to(patches.dtype)
        parts = [prefix.expand(len(images), -1, -1)]
        if self.reg_token is not None:
            parts.append(self.reg_token.to(patches.dtype).expand(len(images), -1, -1))
        return torch.cat([*parts, patches + positions[:, 1:]], dim=1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Compute the positions of the class token and of a grid [1, 1 + h·w, C]."""
        own = math.isqrt(self.pos_embed.shape[1])
        if grid == (own, own):
            return self.pos_embed
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        known = of_patches.mT.unflatten(2, (own, own)).float()
        resized = functional.interpolate(known, grid, mode="bicubic", antialias=True)
        return torch.cat([of_class, resized.flatten(2).mT.to(of_class.dtype)], dim=1)

    def early(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the tokens that leave `layer2`."""
        return self.layer2(self.layer1(self.tokens(images)))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images [B, 3, H, W] to the maps of layers 2, 3 and 4.

        Other backbones leave layer 4 to be computed from the map of layer 3. Here it needs the
        class token, which no map has.
        """
        grid, low = self.grid(images), self.early(images)
        middle = self.layer3(low)
        high = self.layer4(middle)
        return self._map(low, grid), self._map(middle, grid), self._map(high, grid)

    def levels(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to the maps of `layer3` and of each block of `layer4`."""
        grid = self.grid(images)
        tokens = [self.layer3(self.early(images))]
        for block in self.layer4:
            tokens.append(block(tokens[-1]))
        return [self._map(each, grid) for each in tokens]

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the map of `layer4`."""
        return self.features(images)[2]

    def _map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = self.norm(tokens)[:, -grid[0] * grid[1] :]
        return patches.mT.unflatten(2, grid)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        found = state_dict.get(f"{prefix}pos_embed")
        if isinstance(found, Tensor) and found.shape != self.pos_embed.shape and self.fits(found):
            positions = self.pos_embed
            empty = positions.new_empty(found.shape)
            self.pos_embed = nn.Parameter(empty, requires_grad=positions.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def fits(self, positions: Tensor) -> bool:
        """Tell whether these may be its positions: of a class token and a square grid."""
        shape = positions.shape
        if len(shape) != 3 or shape[0] != 1 or shape[2] != self.channels[0] or shape[1] < 2:
            return False
        return math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def is_vit(names: dict[str, Any]) -> bool:
    """Tell whether a state dict is a vision transformer's."""
    return "patch_embed.proj.weight" in names


def own_keys(state: dict[str, _Value]) -> dict[str, _Value]:
    """Rename timm's and DINOv2's keys to those of `ViT`, with a position for the class token.

    `blocks.N` becomes `layerM.N`. DINOv2's own files may have their blocks in chunks,
    `blocks.C.N`, and call registers `register_tokens`. `mask_token`, which training alone uses, and
    timm's classifier `head` are left out. Where positions are those of patches alone (timm with
    registers), the class token has its own already.
    """
    numbers = [_number(key) for key in state if key.startswith("blocks.")]
    depth = 1 + max((number for number in numbers if number is not None), default=0)
    renamed: dict[str, _Value] = {}
    for key, value in state.items():
        number = _number(key) if key.startswith("blocks.") else None
        if key == "mask_token" or key.startswith("head."):
            continue
        if number is not None:
            layer = next(n for n in range(_LAYERS) if number < (n + 1) * depth // _LAYERS)
            rest = key.split(".")[2:]
            rest = rest[1:] if rest[0].isdigit() else rest
            key = ".".join([f"layer{layer + 1}", str(number), *rest])
        elif key == "register_tokens":
            key = "reg_token"
        renamed[key] = _with_class(value) if key == "pos_embed" else value  # type: ignore[assignment]
    return renamed


def _number(key: str) -> int | None:
    """Return the number of the block that a parameter of `blocks` is in; chunks do not count."""
    first, second = (key.split(".") + ["", ""])[1:3]
    if not first.isdigit():
        return None
    return int(second) if second.isdigit() else int(first)


def _with_class(positions: Any) -> Any:
    """Put a position of zeros for the class token before those of patches alone."""
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return positions
    count = positions.shape[1]
    if count > 1 and math.isqrt(count) ** 2 == count:
        return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return positions


def describe(state: dict[str, Any]) -> tuple[str, int] | None:
    """Return the name of the vision transformer that a state dict is of, and its head's channels.

    Takes heads of 64 channels for granted, which a state dict does not tell. None if it is of no
    vision transformer.
    """
    weight = state.get("patch_embed.proj.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 4:
        return None
    own = own_keys(state)
    blocks = {tuple(key.split(".")[:2]) for key in own if key.startswith("layer")}
    scaled = any(key.endswith(".ls1.gamma") for key in own)
    registers = own["reg_token"].shape[1] if isinstance(own.get("reg_token"), Tensor) else 0
    channels, patch = weight.shape[0], weight.shape[-1]
    for name, architecture in VITS.items():
        depth, heads, known_patch, _, known_scaled, known_registers = architecture
        shape = depth, 64 * heads, known_patch, known_scaled, known_registers
        if shape == (len(blocks), channels, patch, scaled, registers):
            return name, 64
    extras = [f"{registers} registers"] if registers else []
    extras += ["LayerScale"] if scaled else []
    more = f" with {' and '.join(extras)}" if extras else ""
    return f"a ViT of {len(blocks)} blocks, {channels} channels and patches of {patch}{more}", 64
