"""The optimizer of few-shot training and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn, optim

from fss.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the optimizer groups: the head, the backbone unless it is frozen, and a transformer.

    The backbone's learning rate is `backbone_lr`, by default a tenth of the head's; its weight
    decay is `backbone_weight_decay`, by default the head's. The paper names one rate and no decay
    for all regimes, so all share these; a tenth is our reading, see `OptimizerConfig`. What the
    method calls its transformer is apart if `transformer_lr` is given, its biases without decay
    unless `transformer_bias_decay`.

    Raises:
        ValueError: `transformer_lr` for a method without a transformer; nothing that trains.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            f"regime: expected one that trains something, {type(model).__name__} has no parameters "
            'beside its backbone, which the regime freezes; take another, such as "svf" or "full", '
            "or test the model as it is"
        )
    prefixes = tuple(getattr(model, "transformer", ())) if config.transformer_lr else ()
    if config.transformer_lr and not prefixes:
        raise ValueError(
            f"optimizer.transformer_lr: expected nothing, {type(model).__name__} has no "
            f"transformer; got {config.transformer_lr}"
        )
    apart = [name for name in trained if name.startswith(prefixes)] if prefixes else []
    backbone = [p for name, p in trained.items() if name.startswith("backbone.")]
    head = [p for n, p in trained.items() if not n.startswith("backbone.") and n not in apart]
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
    decayed = config.transformer_bias_decay
    biases = [] if decayed else [name for name in apart if name.endswith("bias")]
    for name, names, decay in (
        ("transformer", [n for n in apart if n not in biases], config.transformer_weight_decay),
        ("transformer biases", biases, 0.0),
    ):
        params = [trained[n] for n in names]
        if params:
            group = {"params": params, "lr": config.transformer_lr, "weight_decay": decay}
            groups.append({"name": name, **group})
    return groups


class SGDAndAdamW(optim.Optimizer):
    """SGD, and AdamW for the groups whose name begins with "transformer", in one optimizer.

    Args:
        groups: of `parameter_groups`.
        options: of SGD.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        sgd, adamw = ([g for g in groups if _is_transformer(g) == which] for which in (False, True))
        self._parts = (optim.SGD(sgd, **options), optim.AdamW(adamw))
        super().__init__([g for part in self._parts for g in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both, which share state and groups with this one."""
        for part, which in zip(self._parts, (False, True), strict=True):
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if _is_transformer(g) == which]
            part.step()


def _is_transformer(group: dict[str, Any]) -> bool:
    return str(group["name"]).startswith("transformer")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """Build SGD with momentum, or AdamW, over `parameter_groups`; a transformer has AdamW."""
    groups = parameter_groups(model, config)
    if config.name == "adamw":
        return optim.AdamW(groups)
    options = {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.transformer_lr:
        return SGDAndAdamW(groups, **options)
    return optim.SGD(groups, **options)


def build_scheduler(
    optimizer: optim.Optimizer, config: OptimizerConfig, steps: int
) -> optim.lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate lr over steps n, by `config.schedule`.

    cosine: lr·(1 + cos(π·n/steps))/2. poly: lr·(1 - n/steps)^0.9. step: lr, a tenth of it after a
    third of the steps, a hundredth after two. constant: lr. A transformer may have another one.
    """
    if config.transformer_lr and config.transformer_schedule not in (None, config.schedule):
        names = (
            config.transformer_schedule if _is_transformer(g) else config.schedule
            for g in optimizer.param_groups
        )
        return optim.lr_scheduler.LambdaLR(optimizer, [_FACTORS[str(n)](steps) for n in names])
    if config.schedule == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "poly":
        return optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    if config.schedule == "step":
        return optim.lr_scheduler.LambdaLR(optimizer, _FACTORS["step"](steps))
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


# The factor of the learning rate at step n, by schedule and number of steps.
_FACTORS: dict[str, Callable[[int], Callable[[int], float]]] = {
    "cosine": lambda steps: lambda n: (1 + math.cos(math.pi * n / steps)) / 2,
    "poly": lambda steps: lambda n: max(0.0, 1 - n / steps) ** 0.9,
    "step": lambda steps: lambda n: 0.1 ** (3 * n // steps),
    "constant": lambda steps: lambda n: 1.0,
}


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
