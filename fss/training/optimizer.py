"""The optimizer of few-shot training and its learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn, optim

from fss.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the optimizer groups: the head and, unless it is frozen, the backbone.

    The backbone's learning rate is `backbone_lr`, by default a tenth of the head's; its weight
    decay is `backbone_weight_decay`, by default the head's. The paper names one rate and no decay
    for all regimes, so all share these; a tenth is our reading, see `OptimizerConfig`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if not name.startswith("backbone.")]
    backbone = [p for name, p in trained.items() if name.startswith("backbone.")]
    groups = [
        {
            "name": "head",
            "params": head,
            "lr": config.lr * config.lr_factor,
            "weight_decay": config.weight_decay,
        }
    ]
    if backbone:
        lr, decay = config.backbone_lr, config.backbone_weight_decay
        groups.append(
            {
                "name": "backbone",
                "params": backbone,
                "lr": (config.lr / 10 if lr is None else lr) * config.lr_factor,
                "weight_decay": config.weight_decay if decay is None else decay,
            }
        )
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """Build SGD with momentum, or AdamW, over `parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return optim.SGD(groups, momentum=config.momentum)
    return optim.AdamW(groups)


def build_scheduler(
    optimizer: optim.Optimizer, config: OptimizerConfig, steps: int
) -> optim.lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate lr over steps n, by `config.schedule`.

    cosine: lr·(1 + cos(π·n/steps))/2. poly: lr·(1 - n/steps)^0.9. constant: lr.
    """
    if config.schedule == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "poly":
        return optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def hold_masters(optimizer: optim.Optimizer) -> None:
    """Let an optimizer step float32 masters of 16-bit parameters, which get the rounded values.

    The step itself is often less than half a unit of a parameter's last place, and would be rounded
    away each time. The masters are entries of the optimizer's state; wider parameters have none.
    """
    held: list[tuple[Tensor, Tensor, Tensor | None]] = []  # parameter, its values and gradient

    def narrow() -> Iterator[Tensor]:
        for group in optimizer.param_groups:
            yield from (p for p in group["params"] if p.is_floating_point() and p.itemsize < 4)

    def hold(parameter: Tensor, values: Tensor) -> None:
        gradient = parameter.grad
        held.append((parameter, parameter.data, gradient))
        parameter.grad, parameter.data = None, values
        parameter.grad = None if gradient is None else gradient.float()

    def release() -> None:
        for parameter, values, gradient in held:
            parameter.grad, parameter.data = None, values
            parameter.grad = gradient
        held.clear()

    def before_step(*_: Any) -> None:
        for parameter in narrow():
            if parameter.grad is not None:
                # not in the state while it steps: AdamW takes an empty one as its beginning
                master = optimizer.state[parameter].pop("master", None)
                hold(parameter, parameter.detach().float() if master is None else master)

    @torch.no_grad()
    def after_step(*_: Any) -> None:
        masters = [(parameter, parameter.data) for parameter, *_ in held]
        release()
        for parameter, master in masters:
            parameter.copy_(master)
            optimizer.state[parameter]["master"] = master

    def before_load(*_: Any) -> None:
        for parameter in narrow():  # a state takes the dtype of its parameter
            hold(parameter, parameter.data.float())

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(lambda _: release())
