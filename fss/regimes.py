"""What trains in the backbone, and with which optimizer settings."""

from __future__ import annotations

from typing import Any

from torch import nn, optim

import svf_fast
from fss.config import OptimizerConfig, RegimeConfig


def apply_regime(model: nn.Module, regime: RegimeConfig) -> None:
    """Freezes `model.backbone` but for what the regime trains, in place; the head is left alone.

    freeze: nothing trains. svf: the convolutions of `layers` are converted, their singular values
    train. full: the weights of the same convolutions train. The affine parameters of the batch
    norms are frozen in all three: the paper's Table 16 lists them apart from the weights.

    Raises:
        ValueError: a layer that the backbone does not have, or one without a convolution.
    """
    backbone = model.get_submodule("backbone")
    backbone.requires_grad_(False)
    if regime.name == "svf":
        svf_fast.convert(backbone, layers=regime.layers, strategy=regime.strategy)
    elif regime.name == "full":
        for layer in regime.layers:
            for convolution in _convolutions(backbone, layer):
                convolution.requires_grad_(True)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Optimizer groups: the head and, unless it is frozen, the backbone.

    The backbone's learning rate is `backbone_lr`, by default a tenth of the head's, as the
    published SVF code has it for S; its weight decay is `backbone_weight_decay`, by default the
    head's.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if not name.startswith("backbone.")]
    backbone = [p for name, p in trained.items() if name.startswith("backbone.")]
    groups = [
        {"name": "head", "params": head, "lr": config.lr, "weight_decay": config.weight_decay}
    ]
    if backbone:
        lr, decay = config.backbone_lr, config.backbone_weight_decay
        groups.append(
            {
                "name": "backbone",
                "params": backbone,
                "lr": config.lr / 10 if lr is None else lr,
                "weight_decay": config.weight_decay if decay is None else decay,
            }
        )
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """SGD with momentum, or AdamW, over `parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return optim.SGD(groups, momentum=config.momentum)
    return optim.AdamW(groups)


def build_scheduler(
    optimizer: optim.Optimizer, config: OptimizerConfig, steps: int
) -> optim.lr_scheduler.LRScheduler:
    """The learning rate of step n of `steps`: lr·(1 + cos(π·n/steps))/2, or lr when constant."""
    if config.schedule == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def _convolutions(backbone: nn.Module, layer: str) -> list[nn.Conv2d]:
    children = dict(backbone.named_children())
    if layer not in children:
        raise ValueError(
            f"regime.layers: expected children of the backbone ({', '.join(children)}), "
            f"got {layer!r}"
        )
    convolutions = [m for m in children[layer].modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"regime.layers: expected layers with convolutions, {layer!r} has none")
    return convolutions
