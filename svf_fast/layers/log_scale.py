"""S·exp(s'): the singular values of a layer of which s' trains and the pretrained S is frozen.

Source: SVF (Sun et al. 2022), Table 23 and appendix D.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svf_fast.layers.values import gathered

if TYPE_CHECKING:
    from svf_fast.layers.factored import Factored

TRAINS = ("S", "log_scale")
_LARGEST = 80.0  # exp of it, and of its negative, is an ordinary float32


def check_trains(trains: str) -> None:
    """Check that this is one of the parameters that a layer can train."""
    if trains not in TRAINS:
        raise ValueError(f"trains: expected one of {', '.join(TRAINS)}, got {trains!r}")


def scaled(S: Tensor, log_scale: Tensor) -> Tensor:
    """Compute ``S ⊙ exp(s')``, detached, as an ordinary tensor even in inference mode."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return log_scale.detach().exp() * S.detach()
    return log_scale.detach().exp().mul_(S.detach())


def scale_together(layers: Sequence[Factored]) -> None:
    """Compute what layers on one GPU keep of ``S ⊙ exp(s')``, in its place, in a few launches.

    In place, because tables of addresses and CUDA graphs refer to it.
    """
    kept = [(x.values.S_in_use, x.S, x.trained) for x in layers if x.trains == "log_scale"]
    there = [(to, S, log_scale) for to, S, log_scale in kept if to is not None]
    if not there:
        return
    with torch.inference_mode(False), torch.no_grad():
        to, S, log_scale = (list(column) for column in zip(*there, strict=True))
        torch._foreach_copy_(to, torch._foreach_mul(S, torch._foreach_exp(log_scale)))


def log_scale_of(values: Tensor, S: Tensor) -> Tensor:
    """Compute the s' of ``values = S ⊙ exp(s')`` in float64; 0 where both are 0."""
    values, S = values.to(S.device, torch.float64), S.double()
    return torch.where(values == S, 0.0, (values / S).log())


def out_of_reach(values: Mapping[str, Tensor], layers: Mapping[str, Factored]) -> str:
    """Tell of the first layer for which values are not S·exp(s') of any s'; "" if there is none.

    Those are values of the other sign than S, values 0 where S is not and the reverse, and values
    beyond any use: ``|s'| > 80``. Layers that train S can have any.
    """
    chosen = {name: layer for name, layer in layers.items() if layer.trains == "log_scale"}
    if not chosen:
        return ""
    S = torch.cat([gathered(layer.S) for layer in chosen.values()]).cpu()  # in one copy
    for name, own in zip(chosen, S.split([x.S.numel() for x in chosen.values()]), strict=True):
        wrong = (~(log_scale_of(values[name], own).abs() <= _LARGEST)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            return (
                f"{name}.S: expected values of the sign of the pretrained S, as S·exp(s') has "
                f"them, got {float(values[name][at]):.3g} at {at} where it is {float(own[at]):.3g} "
                f"({len(wrong)} such of {len(own)}); convert the model with trains='S', which "
                "reaches any value"
            )
    return ""
