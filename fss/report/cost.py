"""Memory and time of runs, as measured, and of a step next to the paper's layers, as counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

import svf_fast
from fss.models import FewShotModel
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

MIB = 2**20
_WEIGHTS = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def readable(value: float | None) -> str:
    """Format a number with three digits or all before the point; "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def measured(run: ReportedRun) -> dict[str, float | None]:
    """Return saved and peak MiB and ms of a step; of a run in progress, as far as logged."""
    if run.result is None:
        seconds = run.train.get("step_seconds", [])
        memory = run.train.get("peak_memory_bytes", [])
        return {
            "saved_mib": None,
            "peak_mib": max(memory) / MIB if memory else None,
            "step_ms": 1000 * sorted(seconds)[len(seconds) // 2] if seconds else None,
        }
    saved, seconds = run.result["saved_bytes_per_step"], run.result["step_seconds_median"]
    return {
        "saved_mib": None if saved is None else saved / MIB,
        "peak_mib": run.result["peak_memory_bytes"] / MIB,
        "step_ms": None if seconds is None else 1000 * seconds,
    }


def draw_measured(runs: Sequence[ReportedRun], folder: Path) -> Plot:
    """Draw bars of what the runs measured: saved bytes, peak memory, time of a step."""
    panels = (
        ("saved_mib", "saved for backward\n(MiB per step)"),
        ("peak_mib", "peak memory (MiB)"),
        ("step_ms", "time of a step, median (ms)"),
    )
    with figure_style():
        figure = new_figure(10.4, 0.32 * len(runs) + 0.95, names_instead(run.name for run in runs))
        grid = figure.subplots(1, len(panels), sharey=True)
        for axes, (key, label) in zip(grid, panels, strict=True):
            for number, run in enumerate(runs):
                value = measured(run)[key]
                shown = 0.0 if value is None or not math.isfinite(value) else value
                axes.barh(number, shown, 0.62, color=series_style(number)["color"])
                axes.annotate(
                    readable(value),
                    (shown, number),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                )
            axes.set_xlabel(label)
            axes.margins(x=0.22)
            axes.set_xlim(left=0)
            axes.grid(True, axis="x")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        grid[0].set_yticks(range(len(runs)), [run.name for run in runs])
        grid[0].invert_yaxis()
    return save_plot(figure, folder, "measured", "Saved bytes, peak memory and time of a step")


def step_memory(run: ReportedRun, network: FewShotModel) -> Any:
    """Predict from shapes what one process keeps of a training step for its backward pass.

    Without the loss. A network with a base learner is taken in evaluation mode, where it needs no
    targets.
    """
    config = run.config
    devices = config.devices if isinstance(config.devices, int) else 1
    batch = max(1, config.batch_size // config.accumulate // devices)
    shape = (batch * (1 + config.data.shots), 3, config.data.size, config.data.size)
    step = _Step(network.to(_WEIGHTS.get(config.precision, torch.float32)), config.data.shots)
    step.train(not network.needs_base_learner)
    try:
        return svf_fast.memory_report(step, shape, _AUTOCAST.get(config.precision))
    finally:
        network.float().eval()


class _Step(nn.Module):
    """A network that takes the photos of a step as one tensor."""

    def __init__(self, network: FewShotModel, shots: int) -> None:
        super().__init__()
        self.network = network
        self.shots = shots

    def forward(self, photos: Tensor) -> Tensor:
        """Map photos [B·(1 + shots), 3, H, W], the B queries first, to logits [B, 2, H, W]."""
        batch = len(photos) // (1 + self.shots)
        masks = torch.ones(
            (len(photos), *photos.shape[-2:]), dtype=torch.int64, device=photos.device
        )
        inputs = {
            "query_image": photos[:batch],
            "support_images": photos[batch:].unflatten(0, (batch, self.shots)),
            "support_masks": masks[batch:].unflatten(0, (batch, self.shots)),
            "query_mask": masks[:batch],
        }
        return self.network(*(inputs.get(name) for name in self.network.inputs)).logits


def memory_rows(report: Any) -> list[dict[str, Any]]:
    """Sum a memory report by stage of the network: bytes and FLOPs, with the paper's."""
    stages: dict[str, dict[str, Any]] = {}
    for unit in report.units:
        parts = unit.name.removeprefix("network.").removeprefix("backbone.").split(".")
        stage = parts[0] if unit.layers else "all other layers"
        row = stages.setdefault(stage, {"stage": stage, "strategies": {}} | dict.fromkeys(_SUMS, 0))
        for name in _SUMS:
            row[name] += getattr(unit, name)
        if unit.strategy:
            row["strategies"][unit.strategy] = row["strategies"].get(unit.strategy, 0) + 1
    return list(stages.values())


_SUMS = ("saved_bytes", "reference_bytes", "flops", "reference_flops")


def draw_counted(reports: Mapping[str, Any], folder: Path) -> Plot:
    """Draw bars by stage, svf_fast over the paper's layers: MiB kept, FLOP of the SVF layers.

    Args:
        reports: of `svf_fast.memory_report`, by what they are of.
        folder: for the files.
    """
    rows = {name: memory_rows(report) for name, report in reports.items()}
    stages = list(dict.fromkeys(row["stage"] for own in rows.values() for row in own))
    with figure_style():
        figure = new_figure(10.4, 0.8 * len(rows) + 1.35)
        memory, work = figure.subplots(1, 2, sharey=True)
        ticks: list[tuple[float, str]] = []
        for place, (name, own) in enumerate(rows.items()):
            prefix = f"{name}: " if len(rows) > 1 else ""
            for offset, kind, keys in (
                (0.0, "svf_fast", ("saved_bytes", "flops")),
                (0.42, "the paper's layers", ("reference_bytes", "reference_flops")),
            ):
                y = 1.15 * place + offset
                ticks.append((y, f"{prefix}{kind}"))
                for axes, key, unit in ((memory, keys[0], MIB), (work, keys[1], 1e9)):
                    _draw_stack(axes, y, own, key, unit, stages, label=place == 0 and offset == 0)
        memory.set_yticks([y for y, _ in ticks], [text for _, text in ticks])
        memory.invert_yaxis()
        memory.set_xlabel("kept for backward (MiB per step)")
        work.set_xlabel("arithmetic of the SVF layers (GFLOP per step)")
        for axes in (memory, work):
            axes.margins(x=0.16)
            axes.set_xlim(left=0)
            axes.grid(True, axis="x")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        legend_above(figure, memory, 5)
    text = "What a step keeps and computes, with svf_fast and with the paper's layers, by stage"
    return save_plot(figure, folder, "counted", text)


def _draw_stack(
    axes: Any,
    y: float,
    rows: list[dict[str, Any]],
    key: str,
    unit: float,
    stages: list[str],
    label: bool,
) -> None:
    left = 0.0
    for row in rows:
        value = row[key] / unit
        # shades of their own: the colors of series stand for runs
        number, last = stages.index(row["stage"]), max(1, len(stages) - 2)
        other = row["stage"] == "all other layers"
        axes.barh(
            y,
            value,
            0.36,
            left=left,
            color=INK if other else mpl.colormaps["viridis"](0.25 + 0.5 * number / last),
            alpha=0.35 if other else 1,
            linewidth=0,
            label=row["stage"] if label else None,
        )
        left += value
    axes.annotate(readable(left), (left, y), xytext=(4, 0), textcoords="offset points", va="center")
