"""What training did to the singular values (the paper's Figures 6 and 8 to 12)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import svf_fast
from fss.models import MODELS, build_model
from fss.report.plot import (
    INK,
    Plot,
    figure_style,
    legend_above,
    new_figure,
    save_plot,
    series_style,
)
from fss.report.runs import ReportedRun, names_instead

LARGEST = 30
"""Singular values of each convolution that the paper's Figures 8 to 11 show."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one layer, the pretrained ones in descending order.

    Attributes:
        layer: its name in the backbone.
        kernel: height and width; none of a linear layer.
        component: [R], number of the singular vectors in U and V.
        before, after: [R], pretrained and trained.
    """

    layer: str
    kernel: tuple[int, ...]
    component: Tensor
    before: Tensor
    after: Tensor

    @property
    def size(self) -> str:
        """Say the size of its kernel, like 3×3; of a linear layer that it is one."""
        return "×".join(map(str, self.kernel)) or "linear"

    @property
    def difference(self) -> Tensor:
        """Return the change [R] of each value, trained less pretrained, float64."""
        return self.after.double() - self.before.double()

    @property
    def change(self) -> Tensor:
        """Return the change [R] in percent of each pretrained value; a pretrained 0 gives NaN."""
        before = self.before.double()
        change = 100 * (self.after.double() / before - 1)
        return torch.where(before == 0, torch.nan, change)


def read_spectra(run: ReportedRun, state: Mapping[str, Any]) -> list[Spectrum]:
    """Read the spectra of all decomposed layers of a run, in the network's order.

    Trained are S, or S exp(s') where the regime scales a frozen S or S as well. The pretrained
    values are that frozen S, or come from pretrained.safetensors, which `fss train` writes; for
    other runs from the backbone's weights file, where that is still there: with W's singular
    vectors, S_r = u_rᵀ W v_r.

    Args:
        run: of a regime that trains the singular values alone.
        state: the model's part of a checkpoint.

    Raises:
        FileNotFoundError: the pretrained values are nowhere; the message names both places.
        ValueError: a damaged file, or one that does not belong to the run.
    """
    path = run.folder.pretrained
    names = [key.removesuffix(".S") for key in state if key.endswith(".S")]
    if "S" not in run.config.regime.trained_factors:
        before = {name: state[f"{name}.S"] for name in names}
    else:
        before = _kept(path, names) if path.is_file() else _from_weights(run, state, names, path)
    spectra = []
    for name in names:
        after = state[f"{name}.S"]
        if f"{name}.log_scale" in state:
            after = after * state[f"{name}.log_scale"].exp()
        if before[name].shape != after.shape:
            raise ValueError(
                f"run: {path}: {name} has {len(before[name])} singular values, the checkpoint "
                f"{len(after)}: they are of different runs"
            )
        order = before[name].argsort(descending=True, stable=True)
        kernel = tuple(state[f"{name}.V"].shape[2:])
        layer = name.removeprefix("backbone.")
        spectra.append(Spectrum(layer, kernel, order, before[name][order], after[order]))
    return spectra


def _kept(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        values = svf_fast.Adapter.load(path).S
    except ValueError as error:
        raise ValueError(f"run: {path} cannot be read, it is truncated ({error})") from error
    kept = {name: values.get(name.removeprefix("backbone.")) for name in names}
    missing = [name for name, S in kept.items() if S is None]
    if missing:
        raise ValueError(
            f"run: {path}: expected the singular values of {missing[0]}, found none: it is of "
            "another run"
        )
    return {name: S for name, S in kept.items() if S is not None}


def _from_weights(
    run: ReportedRun, state: Mapping[str, Any], names: Sequence[str], path: Path
) -> dict[str, Tensor]:
    model = run.config.model
    learned = MODELS[model.name].needs_base_learner
    source = model.official or (model.base_weights if learned else model.weights)
    hint = (
        f"run: expected the pretrained singular values in {path}, found none, and the weights that "
        f"training began with ({source}) "
    )
    if source != "shapes" and not Path(str(source)).exists():
        raise FileNotFoundError(f"{hint}are missing")
    backbone = replace(model, name="baseline", base_weights=None, official=None)
    if learned or model.official:
        raise FileNotFoundError(f"{hint}are not a backbone's alone")
    weights = build_model(backbone).state_dict()
    before = {}
    for name in names:
        weight = weights[f"{name}.weight"].double().flatten(1)
        U, V = state[f"{name}.U"].double(), state[f"{name}.V"].double().flatten(1)
        S = (U * (weight @ V.mT)).sum(0)
        if (U * S @ V - weight).norm() > 1e-4 * weight.norm():
            raise FileNotFoundError(f"{hint}are others by now")
        before[name] = S.float()
    return before


def default_layers(spectra: Sequence[Spectrum]) -> list[str]:
    """Choose, as the paper, the last 3×3 and the last 1×1 convolution of layer 3.

    Where layer 3 was not converted, those of the last converted stage. If there is neither, its
    last convolution.
    """
    stages = [spectrum.layer.partition(".")[0] for spectrum in spectra]
    stage = "layer3" if "layer3" in stages else stages[-1]
    own = [s for s, place in zip(spectra, stages, strict=True) if place == stage]
    last = {kernel: last_of_blocks(own, stage, kernel)[-1:] for kernel in ((3, 3), (1, 1))}
    return [*last[3, 3], *last[1, 1]] or [own[-1].layer]


def last_of_blocks(spectra: Sequence[Spectrum], stage: str, kernel: tuple[int, int]) -> list[str]:
    """List the last convolution of this size of each block of a stage.

    That of a shortcut only where the stage has no other of this size.
    """
    own = [s.layer for s in spectra if s.layer.split(".")[0] == stage and s.kernel == kernel]
    inner = [layer for layer in own if "downsample" not in layer] or own
    return list({tuple(layer.split(".")[:2]): layer for layer in inner}.values())


def draw_largest(runs: Mapping[int, list[Spectrum]], names: Sequence[str], folder: Path) -> Plot:
    """Draw the change of the 30 largest singular values of every layer, a small panel each.

    Args:
        runs: spectra by the number of the run.
        names: of all runs.
        folder: for the files.
    """
    layers = list(dict.fromkeys(s.layer for spectra in runs.values() for s in spectra))
    figure = plot_largest(runs, names, layers, min(6, len(layers)), percent=True)
    text = f"Change of the {LARGEST} largest singular values of each convolution, in percent"
    return save_plot(figure, folder, "singular-values", text)


def plot_largest(
    runs: Mapping[int, list[Spectrum]],
    names: Sequence[str],
    layers: Sequence[str],
    columns: int,
    percent: bool = False,
) -> Figure:
    """Plot the change of the 30 largest singular values of these layers, a panel each."""
    rows = math.ceil(len(layers) / columns)
    with figure_style():
        height = 1.25 if columns > 3 else 2.2
        figure = new_figure(10.4, height * rows + 0.75, names_instead(names))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        panels = dict(zip(layers, grid.flat, strict=False))
        for axes in grid.flat[len(layers) :]:
            axes.set_visible(False)
        for number, spectra in runs.items():
            for spectrum in spectra:
                if spectrum.layer in panels:
                    axes = panels[spectrum.layer]
                    _draw_change(axes, spectrum, percent, number, names[number])
                    axes.set_title(
                        _title(spectrum),
                        fontsize=7.5 if columns > 3 else 9,
                        fontweight="normal",
                    )
        for place, axes in enumerate(grid.flat):
            axes.axhline(0, color=INK, linewidth=0.7)
            axes.grid(True, axis="y")
            axes.set_xticks([1, 10, 20, LARGEST])
            axes.tick_params(labelbottom=place + columns >= len(layers), labelsize=8)
        figure.supxlabel("rank r of the pretrained singular value, 1 the largest", fontsize=9)
        figure.supylabel("change of S_r (%)" if percent else "change of S_r", fontsize=9)
        if len(runs) > 1:
            legend_above(figure, grid[0, 0])
    return figure


def _draw_change(axes: Axes, spectrum: Spectrum, percent: bool, number: int, label: str) -> None:
    style = series_style(number)
    change = (spectrum.change if percent else spectrum.difference)[:LARGEST]
    ranks = range(1, len(change) + 1)
    axes.vlines(ranks, 0, change, color=style["color"], alpha=0.35, linewidth=1)
    dots = {"linestyle": "", "markersize": 2.4, "marker": style["marker"]}
    axes.plot(ranks, change, color=style["color"], label=label, **dots)


def draw_all(runs: Mapping[int, list[Spectrum]], names: Sequence[str], folder: Path) -> Plot:
    """Draw all singular values of the layers that the paper shows; see `default_layers`."""
    layers = default_layers(next(iter(runs.values())))
    text = f"All singular values of {' and '.join(layers)}, before and after training"
    return save_plot(plot_values(runs, names, layers), folder, "singular-values-all", text)


def plot_values(
    runs: Mapping[int, list[Spectrum]],
    names: Sequence[str],
    layers: Sequence[str],
    largest: int | None = None,
) -> Figure:
    """Plot singular values of these layers, a column each: before and after, below the change.

    Args:
        runs: spectra by the number of the run.
        names: of all runs.
        layers: names in the backbone.
        largest: so many of each layer; by default all.
    """
    with figure_style():
        figure = new_figure(10.4, 4.6, names_instead(names))
        grid = figure.subplots(2, len(layers), squeeze=False, sharex="col")
        for (values, changes), layer in zip(grid.T, layers, strict=True):
            found = {
                number: spectrum
                for number, spectra in runs.items()
                for spectrum in spectra
                if spectrum.layer == layer
            }
            for place, (number, spectrum) in enumerate(found.items()):
                before, after = spectrum.before[:largest], spectrum.after[:largest]
                style = series_style(number)
                ranks = range(1, len(before) + 1)
                marker = "" if largest is None else style["marker"]
                if place == 0:
                    values.set_title(_title(spectrum))
                    values.plot(
                        ranks,
                        before,
                        color=INK,
                        linewidth=2.6,
                        alpha=0.45,
                        marker=marker,
                        label="before",
                    )
                line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.1}
                line |= {"marker": marker, "markersize": 3}
                values.plot(ranks, after, label=f"after: {names[number]}", **line)
                changes.plot(ranks, spectrum.difference[:largest], **line)
            changes.axhline(0, color=INK, linewidth=0.7)
            changes.set_xlabel("rank r of the pretrained singular value, 1 the largest")
            values.grid(True)
            changes.grid(True)
        grid[0, 0].set_ylabel("singular value S_r")
        grid[1, 0].set_ylabel("change of S_r")
        legend_above(figure, grid[0, 0])
    return figure


def change_rows(spectra: Sequence[Spectrum]) -> list[dict[str, Any]]:
    """List rank, and root mean square, lowest and highest change in percent, of each layer."""
    rows = []
    for spectrum in spectra:
        change = spectrum.change[~spectrum.change.isnan()]
        if len(change):
            rows.append(
                {
                    "layer": spectrum.layer,
                    "kernel": spectrum.size,
                    "rank": len(spectrum.before),
                    "rms": float(change.square().mean().sqrt()),
                    "lowest": float(change.min()),
                    "highest": float(change.max()),
                }
            )
    return rows


def _title(spectrum: Spectrum) -> str:
    """Return a title as short as panels are narrow."""
    layer = spectrum.layer.replace(".downsample.0", ".downsample")
    return f"{layer} {spectrum.size}"
