"""The adapters of runs: S of the backbone, with a card of what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import svf_fast
from fss.config import TrainConfig
from fss.models import leaves_adapter


def save_run_adapter(
    path: Path, network: nn.Module, config: TrainConfig, test: dict[str, Any] | None = None
) -> None:
    """Write the backbone's S before training, if S trains, or after it, if nothing else does.

    Where S' trains these are the values of S S'.

    It fits the backbone alone, `network.backbone`, and any other network with the same weights
    under the same names, such as torchvision's.

    Args:
        path: the file.
        network: after `apply_regime`.
        config: of the run.
        test: what `evaluate_seeds` returned, with the "step"; None for the pretrained values.
    """
    trains = any(True for _ in svf_fast.svf_parameters(network))
    if not trains or (test is not None and not leaves_adapter(config.regime)):
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


def adapter_files(
    files: Sequence[str], interpolate: float | None = None, out: str | None = None
) -> str:
    """Describe adapter files as text: a line for each, or everything about a single one.

    Args:
        files: of `svf_fast.save_adapter`.
        interpolate: write (1 - t)·first + t·second of two files of the same backbone, for this t,
            and describe it.
        out: the file for that.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no adapter; other than two of the same backbone to interpolate;
            `interpolate` without `out` or the reverse.
    """
    if (interpolate is None) != (out is None):
        missing = "out" if out is None else "interpolate"
        raise ValueError(f"{missing}: expected with the other of interpolate and out, got nothing")
    adapters = [svf_fast.Adapter.load(file) for file in files]
    if interpolate is not None and out is not None:
        if len(adapters) != 2:
            raise ValueError(f"files: expected two to interpolate, got {len(adapters)}")
        adapters = [svf_fast.interpolate_adapters(*adapters, interpolate)]
        adapters[0].save(out)
        files = [out]
    lines = [f"{file}: {adapter!r}" for file, adapter in zip(files, adapters, strict=True)]
    # as JSON: a stranger's text stays text on a terminal
    cards = [
        [f"{json.dumps(k)[1:-1]}: {json.dumps(v)}" for k, v in a.card.items()] for a in adapters
    ]
    if len(adapters) > 1:
        return "\n".join(" ".join([line, *card]) for line, card in zip(lines, cards, strict=True))
    cores = {name: f", core {own.core}" for name, own in adapters[0].cores.items()}
    layers = [
        f"{name}: {len(values)} values{cores.get(name, '')}"
        for name, values in adapters[0].S.items()
    ]
    also = [f"{name}: {list(values.shape)}" for name, values in adapters[0].also.items()]
    return "\n  ".join([*lines, *cards[0], *layers, *also])
