"""What is said of a state dict that is of another layer than the one that it is loaded into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from svf_fast.ops.core import PARTS

if TYPE_CHECKING:
    from svf_fast.layers.factored import Factored


def explain_other_layer(module: Factored, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Raise ValueError for the plain layer's, and for one that trains something else."""
    if f"{prefix}weight" in state_dict and f"{prefix}S" not in state_dict:
        raise ValueError(
            f"{prefix}weight: this checkpoint is of the plain layer, but the model here was "
            "converted to U, S, V. Load it first and call svf_fast.convert after."
        )
    if f"{prefix}S" not in state_dict:
        return
    has_scale = f"{prefix}log_scale" in state_dict
    if has_scale != (module.trains == "log_scale"):
        other = "log_scale" if has_scale else "S"
        raise ValueError(
            f"{prefix}{other}: this checkpoint is of a layer that trains {other}, but the one here "
            f"trains {module.trains}. Convert the model with trains={other!r} and load it again; "
            "svf_fast.save_adapter and load_adapter carry the values from one to the other."
        )
    own = {name: part.shape for name, part in zip(module.core.parts, module.parts, strict=True)}
    there = {f: state_dict[f"{prefix}{f}"].shape for f in PARTS if f"{prefix}{f}" in state_dict}
    if own != there:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in there.items())
        raise ValueError(
            f"{prefix}S: this checkpoint is of a layer with {got or 'S alone'}, but the one here "
            f"has core={str(module.core)!r}. Convert the model with the core of the checkpoint; "
            "svf_fast.load_adapter takes an adapter of S alone for every core."
        )
