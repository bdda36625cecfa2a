"""What the tables of a report say of runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fss.config import TrainConfig, free_settings
from fss.report.cost import measured
from fss.report.plot import series_style
from fss.report.runs import ReportedRun
from fss.settings import flat_settings

# What may differ between runs of which a mean makes sense: folds and seeds, places and speed.
_FREE = free_settings(TrainConfig, "mean")


def facts(runs: Sequence[ReportedRun]) -> list[tuple[str, str]]:
    """List what was run as pairs of name and value; differing values stand side by side."""

    def each(value: Callable[[ReportedRun], object]) -> str:
        known = dict.fromkeys(str(found) for run in runs if (found := value(run)) is not None)
        return " · ".join(known) or "not known before the end of a run"

    return [
        ("Data", each(lambda run: f"{run.config.data.source}, fold {run.config.data.fold}")),
        ("Machine", each(_machine)),
        ("Episodes", each(lambda run: f"{run.config.data.shots}-shot, {run.config.data.size} px")),
        ("Commit", each(_commit)),
        ("Model", each(lambda run: f"{run.config.model.name}, {run.config.model.backbone}")),
        ("Test", each(_test)),
        ("Steps", each(lambda run: f"{run.config.steps:,}, batch {run.config.batch_size}")),
        ("Seed", each(lambda run: run.config.seed)),
    ]


def _commit(run: ReportedRun) -> str | None:
    return run.result and (run.result["commit"] or "none: not run from a checkout")


def _machine(run: ReportedRun) -> str | None:
    if run.result is None:
        return None
    machine = run.result["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    device = machine.get("gpu") or f"{machine['cpu']}, {threads}"
    return f"{device}, torch {run.result['versions']['torch']}"


def regime_in_words(run: ReportedRun) -> str:
    """Say what trains in the backbone."""
    regime = run.config.regime
    if not regime.reads_layers:
        return regime.name
    parts = [regime.name, "/".join(regime.layers)]
    if regime.kernel != "all":
        parts.append(regime.kernel)
    if regime.factors is not None:
        parts.append("factors " + ("".join(regime.factors) or "none"))
    if regime.batch_norm != "none":
        parts.append(f"batch norm {regime.batch_norm}")
    if regime.batch_norm_statistics == "batch":
        parts.append("batch norm statistics of the batch")
    return ", ".join(parts)


def _test(run: ReportedRun) -> str:
    seeds = ", ".join(map(str, run.config.test_seeds))
    return f"{run.config.test_episodes:,} episodes for each of the seeds {seeds}"


def result_row(run: ReportedRun, number: int) -> dict[str, Any]:
    """Return a row of the table of results; None where a run in progress has no number yet."""
    result = run.result or {}
    test = result.get("test", {})
    parameters = result.get("parameters", {})
    return {
        "name": run.name,
        "color": series_style(number)["color"],
        "regime": regime_in_words(run),
        "running": run.result is None,
        "step": test.get("step", run.step),
        "steps": run.config.steps,
        "best": run.best,
        "miou": test.get("miou"),
        "fb_iou": test.get("fb_iou"),
        "interval": _interval(test),
        "backbone": parameters.get("trained_backbone"),
        "head": parameters.get("trained_head"),
        **measured(run),
    }


def mean_rows(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Average the tested runs that differ in fold or seed alone, with standard deviation."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        if run.result is not None:
            kept = flat_settings(run.config.to_dict(), _FREE)
            groups.setdefault(str(kept), []).append(run)
    rows = []
    for group in groups.values():
        if len(group) < 2:
            continue
        folds = sorted({run.config.data.fold for run in group})
        rows.append(
            {
                "name": f"mean of {', '.join(run.name for run in group)}",
                "of": f"{len(group)} runs, fold {', '.join(map(str, folds))}",
                "miou": _over(group, "miou"),
                "fb_iou": _over(group, "fb_iou"),
            }
        )
    return rows


def _over(runs: Sequence[ReportedRun], metric: str) -> dict[str, float]:
    values = [run.result["test"][metric]["mean"] for run in runs if run.result]
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values)}


def _interval(test: dict[str, Any]) -> str:
    """Format the 95 % interval of mIoU in percent: over seeds or, of a single one, episodes."""
    if not test:
        return ""
    mean, half = test["miou"]["mean"], test["miou"].get("ci95")
    if half is not None:
        return f"{100 * (mean - half):.1f} to {100 * (mean + half):.1f} (seeds)".replace("-", "−")
    bounds = (test.get("bootstrap") or [[]])[0]
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} (episodes)" if bounds else ""


def differences(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """List the settings that are not the same in all runs, with the value of each."""
    flat = [flat_settings(run.config.to_dict()) for run in runs]
    names = dict.fromkeys(name for values in flat for name in values if name != "out")
    rows = [(name, [str(values.get(name, "–")) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def setting_in_words(run: ReportedRun) -> str:
    """Say what the memory of a step depends on."""
    config = run.config
    words = [config.model.name, config.model.backbone, f"{config.data.size} px"]
    words += [f"{config.data.shots}-shot", f"batch {config.batch_size}", config.precision]
    if config.accumulate > 1:
        words.append(f"in {config.accumulate} parts")
    if config.regime.strategy != "auto":
        words.append(config.regime.strategy)
    return ", ".join([*words, regime_in_words(run)])


def percent(spread: dict[str, Any] | None) -> str:
    """Format mean and standard deviation of fractions in percent; "–" for None."""
    if spread is None:
        return "–"
    std = spread.get("std")
    return f"{100 * spread['mean']:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
