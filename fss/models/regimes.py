"""What trains in the backbone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import svf_fast
from fss.config import RegimeConfig
from fss.models.regime_layers import Adapter, FactoredConv2d, ScaledConv2d, random_rotation
from svf_fast import Factors

FACTORS = ("U", "S", "V")


def apply_regime(
    model: nn.Module,
    regime: RegimeConfig,
    factors: Mapping[str, Factors] | None = None,
    progress: bool = True,
) -> None:
    """Freeze `model.backbone` but for what the regime trains, in place; the head is left alone.

    See `RegimeConfig` for what each regime makes of the backbone. All but "rotated_svf" leave it
    computing what it computed before, up to rounding.

    Args:
        model: with a `backbone`.
        regime: what trains.
        factors: U, S and V by the name of their convolution in the backbone, where the state dict
            of a trained network has them: with it nothing is decomposed or rotated. By default
            those of the file that the weights are from, see `load_backbone`.
        progress: show a bar where decomposing takes seconds.

    Raises:
        ValueError: a layer that the backbone does not have, or one without what the regime trains.
    """
    backbone = model.get_submodule("backbone")
    backbone.requires_grad_(False)
    loaded, backbone.factors = getattr(backbone, "factors", {}), {}
    if factors is None and regime.name in ("svf", "svf_scale"):
        factors = loaded
    if regime.name in _COMPOSED or regime.name in ("full", "svf", "rotated_svf"):
        _train_convolutions(backbone, regime, factors, progress)
    elif regime.name == "adapter":
        for layer in _layers(backbone, regime):
            _append_adapter(backbone, layer, regime.adapter_reduction)
    elif regime.name == "bias":
        _train_affine(backbone, regime, ("bias",), (nn.Conv2d, nn.BatchNorm2d))
    if regime.batch_norm != "none":
        kinds = ("weight", "bias") if regime.batch_norm == "both" else (regime.batch_norm,)
        _train_affine(backbone, regime, kinds, (nn.BatchNorm2d,))
    if regime.batch_norm_statistics == "batch":
        _train_statistics(model, backbone, regime)


def trains_singular_values(regime: RegimeConfig) -> bool:
    """Return whether the regime makes SVF layers, of which S alone trains, or S' alone."""
    trained = set(regime.trained_factors)
    return trained == ({"S'"} if regime.name == "svf_scale" else {"S"})


def leaves_adapter(regime: RegimeConfig) -> bool:
    """Return whether an adapter holds all that the regime changes in the pretrained backbone."""
    return (
        regime.name in ("svf", "svf_scale")
        and trains_singular_values(regime)
        and regime.batch_norm == "none"
        and regime.batch_norm_statistics == "frozen"
    )


def convert_backbone(
    backbone: nn.Module, layers: Collection[str], regime: RegimeConfig, **options: Any
) -> None:
    """Make SVF layers that train what the regime says of S, with options of `svf_fast.convert`."""
    trains = "log_scale" if regime.name == "svf_scale" else "S"
    svf_fast.convert(backbone, list(layers), trains=trains, **options)
    if trains == "log_scale":
        backbone.register_load_state_dict_pre_hook(_complete_fingerprints)


def _complete_fingerprints(
    backbone: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Keep the layers' fingerprints where a checkpoint has none: "svf_scale" of older versions."""
    for name, layer in backbone.named_modules():
        if isinstance(layer, svf_fast.SVFConv2d) and f"{prefix}{name}.log_scale" in state:
            state.setdefault(f"{prefix}{name}.fingerprint", layer.fingerprint)


def _train_convolutions(
    backbone: nn.Module,
    regime: RegimeConfig,
    factors: Mapping[str, Factors] | None,
    progress: bool,
) -> None:
    convolutions = _convolutions(backbone, regime)
    if regime.name == "full":
        for convolution in convolutions.values():
            convolution.requires_grad_(True)
        return
    if regime.name == "rotated_svf" and factors is None:
        for convolution in convolutions.values():
            _rotate(convolution)
    known = {
        name: Factors(*(factor.to(convolutions[name].weight) for factor in found))
        for name, found in (factors or {}).items()
        if name in convolutions
    }
    if trains_singular_values(regime):
        convert_backbone(
            backbone,
            convolutions,
            regime,
            strategy=regime.strategy,
            keep=regime.keep,
            factors=known,
            progress=progress,
            keep_norms_frozen=regime.batch_norm_statistics == "frozen",
        )
    elif regime.name in _COMPOSED:
        compose = _COMPOSED[regime.name]
        for name, convolution in convolutions.items():
            layer = compose(convolution, regime.trained_factors, known.get(name))
            backbone.set_submodule(name, layer)


def _factored(
    convolution: nn.Conv2d, trained: tuple[str, ...], known: Factors | None
) -> FactoredConv2d:
    factors = svf_fast.decompose(convolution.weight) if known is None else known
    return FactoredConv2d(convolution, *factors, trained)


def _rotated(
    convolution: nn.Conv2d, trained: tuple[str, ...], known: Factors | None
) -> FactoredConv2d:
    if known is not None:
        return FactoredConv2d(convolution, *known, ("S'",))
    weight = convolution.weight.detach()
    R = random_rotation(len(weight)).to(weight.device)
    turned = (R.mT @ weight.double().flatten(1)).view_as(weight)
    return FactoredConv2d(convolution, R, torch.ones(len(weight)), turned, ("S'",))


_COMPOSED: dict[str, Callable[[nn.Conv2d, tuple[str, ...], Factors | None], nn.Module]] = {
    "svf": _factored,
    "svf_scale": _factored,
    "scale_output": lambda convolution, *_: ScaledConv2d(convolution, "output"),
    "scale_input": lambda convolution, *_: ScaledConv2d(convolution, "input"),
    "rotated_scale": _rotated,
}
"""By regime, the layer that replaces a convolution, given the factors that train."""


@torch.no_grad()
def _rotate(convolution: nn.Conv2d) -> None:
    """Replace the weight by ``U R S Rᵀ Vᵀ``, whose singular vectors are U R and R V."""
    U, S, V = svf_fast.decompose(convolution.weight.double())
    R = random_rotation(len(S)).to(S.device)
    turned = (R.mT @ V.flatten(1)).view_as(V)
    convolution.weight.copy_(svf_fast.compose(U @ R, S, turned))


def _append_adapter(backbone: nn.Module, layer: str, reduction: int) -> None:
    stage = backbone.get_submodule(layer)
    convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
    if not isinstance(stage, nn.Sequential) or not convolutions:
        raise ValueError(
            "regime.layers: expected stages of several layers for adapters to follow, "
            f"{layer!r} is a single {type(stage).__name__}"
        )
    weight = convolutions[-1].weight
    stage.add_module("adapter", Adapter(len(weight), reduction).to(weight))


def _train_affine(
    backbone: nn.Module, regime: RegimeConfig, kinds: tuple[str, ...], types: tuple[type, ...]
) -> None:
    """Train the parameters called `kinds` of the modules of these types in the regime's layers."""
    for layer in _layers(backbone, regime):
        modules = [m for m in backbone.get_submodule(layer).modules() if isinstance(m, types)]
        found = [
            p for m in modules for name, p in m.named_parameters(recurse=False) if name in kinds
        ]
        if not found and regime.layers != ("all",):
            raise ValueError(
                f"regime.layers: expected layers with a {' or '.join(kinds)} of "
                f"{' or '.join(t.__name__ for t in types)} to train, {layer!r} has none"
            )
        for parameter in found:
            parameter.requires_grad_(True)


def _train_statistics(model: nn.Module, backbone: nn.Module, regime: RegimeConfig) -> None:
    """Let the batch norms follow the mode of the model; otherwise they stay in evaluation mode."""
    names = [
        f"{layer}.{name}".rstrip(".")
        for layer in _layers(backbone, regime)
        for name, m in backbone.get_submodule(layer).named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]

    def set_mode(module: nn.Module, inputs: object) -> None:
        # by name: they may have been replaced by synchronized ones since
        for name in names:
            module.get_submodule(f"backbone.{name}").train(module.training)

    model.register_forward_pre_hook(set_mode)


def _layers(backbone: nn.Module, regime: RegimeConfig) -> list[str]:
    """List the regime's layers, or for "all" the backbone's children that have parameters.

    Those that the method has taken out of the backbone are left out.
    """
    children = dict(backbone.named_children())
    if regime.layers == ("all",):
        return [name for name, child in children.items() if any(True for _ in child.parameters())]
    for layer in regime.layers:
        if layer not in children:
            raise ValueError(
                f"regime.layers: expected children of the backbone ({', '.join(children)}) or "
                f"all, got {layer!r}"
            )
    empty = [layer for layer in regime.layers if _is_taken_out(children[layer])]
    if empty and len(empty) == len(regime.layers):
        raise ValueError(
            f"regime.layers: expected a layer that the method runs, it takes {', '.join(empty)} "
            "out of the backbone"
        )
    return [layer for layer in regime.layers if layer not in empty]


def _is_taken_out(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Sequential) and len(layer) == 0


def _convolutions(backbone: nn.Module, regime: RegimeConfig) -> dict[str, nn.Conv2d]:
    """Collect the convolutions of the regime's layers and kernel size, by name in the backbone."""
    chosen: dict[str, nn.Conv2d] = {}
    for layer in _layers(backbone, regime):
        found = {
            f"{layer}.{name}".rstrip("."): module
            for name, module in backbone.get_submodule(layer).named_modules()
            if isinstance(module, nn.Conv2d)
            and regime.kernel in ("all", "x".join(map(str, module.kernel_size)))
        }
        if not found and regime.layers != ("all",):
            kind = "a convolution" if regime.kernel == "all" else f"a {regime.kernel} convolution"
            raise ValueError(f"regime.layers: expected layers with {kind}, {layer!r} has none")
        chosen |= found
    return chosen
