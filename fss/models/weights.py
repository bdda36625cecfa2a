"""Pretrained weights of a backbone, from a file or by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fss.models import vit
from fss.models.backbone import ARCHITECTURES, BACKBONES, Backbone, BasicBlock, build_backbone
from fss.models.state_dict import StateDict, backbone_part, differences, read_state_dict
from fss.models.vgg import VGG, has_batch_norm, own_keys
from fss.models.vit import ViT

_SHAPES = Path(__file__).parents[1] / "weights" / "shapes_resnet18.safetensors"
# Of ImageNet's classes, and SwAV's.
_HEADS = ("fc.", "classifier.", "projection_head.", "prototypes.")


class _Description(NamedTuple):
    """What a state dict tells of the backbone it belongs to."""

    backbone: str
    stem: str
    width: int


def load_backbone(backbone: Backbone, weights: str) -> None:
    """Load pretrained weights into a backbone, all of them or none.

    float16 tensors are cast to the backbone's dtype. Heads (`fc.*`, a VGG's `classifier.*`) and
    `num_batches_tracked` are ignored. Of a larger network its backbone is taken: of Lightning's
    modules, torchvision's segmentation networks, MoCo, DINO. Where the file has the authors' SVF
    layers, `backbone.factors` keeps those of full rank for `apply_regime`.

    Args:
        backbone: from `build_backbone`.
        weights: "none" (stay random); "shapes" (embedded, for the shapes data); "torchvision"
            (ImageNet weights, downloaded by torchvision); or the path of a `.safetensors`, `.pth`
            or `.pt` file with a state dict of torchvision or semseg, of a vision transformer that
            of timm or DINOv2, at the top or in an entry like `state_dict`.

    Raises:
        FileNotFoundError: no such file.
        ImportError: "torchvision" without torchvision.
        ConnectionError: "torchvision" without a network.
        ValueError: a file that cannot be read or does not fit; the message lists what does not.
    """
    if not isinstance(weights, str):
        raise TypeError(f"weights: expected a name or a path, got {type(weights).__name__}")
    if weights == "none":
        return
    if weights == "torchvision":
        read = StateDict(_download(backbone), "conv2")
    else:
        read = read_state_dict(_path(weights))
    read = backbone_part(read, weights)
    rename: Callable[[dict[str, Any]], dict[str, Any]] = dict
    if isinstance(backbone, VGG | ViT):
        rename = own_keys if isinstance(backbone, VGG) else vit.own_keys
    state = rename({key: value for key, value in read.values.items() if not _ignored(key)})
    _check(backbone, state, weights)
    if read.stride_on and backbone.stride_on and read.stride_on != backbone.stride_on:
        raise ValueError(
            f"weights: {weights} has its strides on {read.stride_on}, the backbone on "
            f"{backbone.stride_on}: set stride_on={read.stride_on}"
        )
    # What is missing now are the counters num_batches_tracked.
    backbone.load_state_dict(state, strict=False)
    backbone.factors = rename({k: v for k, v in read.factors.items() if not _ignored(f"{k}.")})


def backbone_of(
    weights: str,
    name: str | None = None,
    stride_on: str | None = None,
    output_stride: int = 8,
) -> Backbone:
    """Build the backbone that weights belong to, and load them.

    Args:
        weights: "shapes", "torchvision" or a file, see `load_backbone`.
        name: of the backbone; by default what the weights tell.
        stride_on: see `build_backbone`; by default what the file says, else conv2.
        output_stride: see `build_backbone`.

    Raises:
        FileNotFoundError, ImportError, ConnectionError, ValueError: see `load_backbone`; weights of
            another backbone than `name`, or of an unknown one.
    """
    if weights == "torchvision":
        if name is None:
            raise ValueError(
                f'backbone: expected one of {", ".join(BACKBONES)} for weights "torchvision", '
                "got nothing"
            )
        backbone = build_backbone(name, stride_on=stride_on or "conv2", output_stride=output_stride)
    else:
        path = _path(weights, "shapes")
        read = backbone_part(read_state_dict(path), weights)
        found = _describe(read.values)
        if found is None or found.backbone not in BACKBONES or name not in (None, found.backbone):
            what = "of no ResNet, VGG or ViT" if found is None else f"of {found.backbone}"
            raise ValueError(
                f"weights: expected those of {name or ' or '.join(BACKBONES)}, {path} has weights "
                f"{what}"
            )
        stride_on = stride_on or read.stride_on or "conv2"
        backbone = build_backbone(found.backbone, found.stem, stride_on, found.width, output_stride)
    load_backbone(backbone, weights)
    return backbone


def backbone_name(backbone: Backbone) -> str:
    """Return the name of a backbone as `build_backbone` takes it."""
    if isinstance(backbone, ViT):
        return backbone.name
    return _describe(backbone.state_dict()).backbone


def _path(weights: str, names: str = "none, shapes") -> Path:
    path = _SHAPES if weights == "shapes" else Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: expected {names}, torchvision or the path of an existing file, got "
            f"{weights!r}; looked for {path.absolute()}"
        )
    return path


def _ignored(key: str) -> bool:
    return key.startswith(_HEADS) or key.endswith("num_batches_tracked")


def _download(backbone: Backbone) -> dict[str, Tensor]:
    name = backbone_name(backbone)
    if isinstance(backbone, ViT):
        raise ValueError(
            f"weights: expected the path of a file of timm's or DINOv2's for {name}, which "
            'torchvision does not have; got "torchvision"'
        )
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            "weights: 'torchvision' needs the package torchvision, which cannot be imported here "
            f"({error}); install it, or give the path of a weights file"
        ) from error
    try:
        return get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(
            progress=True, check_hash=True, weights_only=True
        )
    except OSError as error:
        raise ConnectionError(
            f"weights: torchvision could not download {name} ({error}); connect to the network, "
            "or give the path of a weights file that you have"
        ) from error


def _check(backbone: Backbone, state: dict[str, Any], weights: str) -> None:
    expected = {key: value for key, value in backbone.state_dict().items() if not _ignored(key)}
    positions = state.get("pos_embed")
    if isinstance(backbone, ViT) and isinstance(positions, Tensor) and backbone.fits(positions):
        expected["pos_embed"] = positions  # of a grid of its own, which is taken
    report = differences(expected, state)
    if not report:
        return
    guess = _guess(_describe(expected), _describe(state))
    raise ValueError(f"weights: {weights} does not fit the backbone.{report}\n  {guess}")


def _guess(expected: _Description, got: _Description | None) -> str:
    if got is None:
        return (
            "It has no keys of a ResNet (conv1, bn1, layer1.0.conv1, …), VGG (features.0, …) or "
            "ViT (patch_embed, blocks.0, …): is it the right file?"
        )
    settings = [
        f"{name}={value}"
        for name, value in got._asdict().items()
        if getattr(expected, name) != value
    ]
    if not settings:
        return "Name, stem and width agree: the file seems to be incomplete or changed."
    if got.backbone not in BACKBONES:
        return f"These are weights of {got.backbone}; supported are {', '.join(BACKBONES)}."
    return f"These look like {got.backbone} weights with a {got.stem} stem: set " + ", ".join(
        settings
    )


def _describe(state: dict[str, Any]) -> _Description | None:
    transformer = vit.describe(state)
    if transformer is not None:
        return _Description(transformer[0], "plain", transformer[1])
    vgg = own_keys(state).get("layer0.0.weight")
    if isinstance(vgg, Tensor) and vgg.ndim == 4:
        name = "vgg16_bn" if has_batch_norm(state) else "vgg16"
        return _Description(name, "plain", vgg.shape[0])
    first = state.get("layer1.0.conv1.weight")
    if not isinstance(first, Tensor) or first.ndim == 0:
        return None
    bottleneck = "layer1.0.conv3.weight" in state
    depths = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{n}.")})
        for n in range(1, 5)
    )
    kind = "bottlenecks" if bottleneck else "basic blocks"
    name = f"a ResNet of {'-'.join(map(str, depths))} {kind}"
    for known, architecture in ARCHITECTURES.items():
        if architecture.depths == depths and (architecture.block is not BasicBlock) == bottleneck:
            name = known
    return _Description(name, "deep" if "conv3.weight" in state else "plain", first.shape[0])
