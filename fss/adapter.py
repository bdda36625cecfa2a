"""The adapters of runs: S of the backbone, with a card of what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

import svf_fast
from fss.config import RegimeConfig, TrainConfig


def save_run_adapter(
    path: Path, network: nn.Module, config: TrainConfig, test: dict[str, Any] | None = None
) -> None:
    """Writes the backbone's S, where it is all that trains there; else does nothing.

    It fits the backbone alone, `network.backbone`, and any other network with the same weights
    under the same names, such as torchvision's.

    Args:
        path: the file.
        network: after `apply_regime`.
        config: of the run.
        test: what `evaluate_seeds` returned, with the "step"; None for the pretrained values.
    """
    if not _is_adapter(config.regime):
        return
    model, data = config.model, config.data
    card: dict[str, Any] = {
        "backbone": model.backbone,
        "weights": Path(model.official or model.base_weights or model.weights).name,
        "layers": list(config.regime.layers),
        "data": data.source,
        "fold": data.fold,
        "shots": data.shots,
        "model": model.name,
        "steps": 0,
    }
    if test is not None:
        card |= {"steps": test["step"], "metric": {"mIoU": test["miou"]["mean"]}}
    svf_fast.save_adapter(network.get_submodule("backbone"), path, card)


def show_adapters(files: tuple[str, ...]) -> str:
    """What is in adapter files: a line each, and the card of a single one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file, or one that is no adapter.
    """
    if not files:
        raise ValueError("files: expected adapter files, got none")
    adapters = [svf_fast.Adapter.load(file) for file in files]
    lines = [f"{file}: {adapter!r}" for file, adapter in zip(files, adapters, strict=True)]
    if len(adapters) == 1:
        (adapter,) = adapters
        lines += [f"  {key}: {json.dumps(value)}" for key, value in adapter.card.items()]
        lines += [f"  {name}: {len(values)} values" for name, values in adapter.S.items()]
        return "\n".join(lines)
    for number, adapter in enumerate(adapters):
        facts = ", ".join(f"{json.dumps(k)[1:-1]} {json.dumps(v)}" for k, v in adapter.card.items())
        lines[number] += f" {facts}" if facts else ""
    return "\n".join(lines)


def interpolate_files(first: str, second: str, t: float, out: str) -> str:
    """Writes the adapter (1 - t)·first + t·second.

    Args:
        first: adapter file.
        second: adapter file of the same backbone and layers.
        t: 0 gives the first, 1 the second; beyond, it extrapolates.
        out: the file to write.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no adapter, adapters of different backbones, t not finite.
    """
    a, b = (svf_fast.Adapter.load(file) for file in (first, second))
    svf_fast.interpolate_adapters(a, b, t).save(out)
    return show_adapters((out,))


def _is_adapter(regime: RegimeConfig) -> bool:
    return (
        regime.name == "svf"
        and regime.trained_factors == ("S",)
        and regime.batch_norm == "none"
        and regime.batch_norm_statistics == "frozen"
    )
