"""The main job: train models in several regimes, over folds and training seeds, and tabulate.

Each run is an ``fss train`` process of its own; a finished one is kept, an interrupted one resumed,
so the command can be repeated until all runs exist. The table has the folds with all their runs.
Writes NAME.json, NAME.md and NAME.png:

    python -m benchmarks.few_shot.regimes --config demo --folds 0 --results runs/demo/regimes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import files
from benchmarks.few_shot.training import make_run, score_elsewhere
from fss.files import write_json
from fss.runs.folder import RunFolder

MIB = 2**20
COLORS = {"freeze": "#7f7f7f", "svf": "#0072B2", "full": "#E69F00"}  # Okabe-Ito


class Run(NamedTuple):
    """What tells one run from another."""

    model: str
    regime: str
    fold: int
    seed: int


def main() -> int:
    options, extra = _arguments()
    planned = [
        Run(model, regime, fold, seed)
        for seed in options.seeds
        for fold in options.folds
        for model in options.models
        for regime in options.regimes
    ]
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    with ThreadPoolExecutor(options.at_once) as pool:
        found = list(pool.map(lambda run: _result(options, extra, run, deadline), planned))
    runs = {run: result for run, result in zip(planned, found, strict=True) if result}
    unfinished = [run for run in planned if run not in runs]
    for run in unfinished:
        print(f"{_folder(options, run).name}: not ended; the same command goes on")
    options.folds = [fold for fold in options.folds if fold not in {run.fold for run in unfinished}]
    runs = {run: result for run, result in runs.items() if run.fold in options.folds}
    if not runs:
        return 1
    rows = [
        _row(options, runs, model, regime) for model in options.models for regime in options.regimes
    ]
    base = Path(options.results)
    base.parent.mkdir(parents=True, exist_ok=True)
    command = files.command()
    compact = [{**run._asdict(), **result} for run, result in runs.items()]
    summary = {"command": command, "rows": rows, "runs": compact}
    write_json(base.with_suffix(".json"), summary)
    table = _table(options, runs, rows, command)
    base.with_suffix(".md").write_text(table)
    _picture(options, rows, base.with_suffix(".png"))
    print(table)
    print(f"picture: {base.with_suffix('.png')}")
    first = Run(options.models[0], options.regimes[-1], options.folds[0], options.seeds[0])
    print(f"episodes: {RunFolder(_folder(options, first)).episodes}")
    return 1 if unfinished else 0


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="as for `fss train`")
    parser.add_argument("--models", nargs="+", default=["baseline"])
    parser.add_argument("--regimes", nargs="+", default=["freeze", "svf", "full"])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[321], help="of head and episodes")
    parser.add_argument("--out", default="runs/regimes", help="folder of the runs")
    parser.add_argument("--at-once", type=int, default=1, help="runs; several slow each other")
    parser.add_argument(
        "--seconds", type=float, help="after which runs are stopped; another call goes on with them"
    )
    parser.add_argument("--results", required=True, help="path of the results without its ending")
    parser.add_argument(
        "--only",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="a setting of one model or regime alone, {fold} in it is replaced; repeatable",
    )
    parser.add_argument(
        "--elsewhere",
        metavar="ARGUMENTS",
        help="of `fss eval`: other data that each run is tested on too; they name a --source and a "
        "--fold",
    )
    return parser.parse_known_args()


def _folder(options: argparse.Namespace, run: Run) -> Path:
    return Path(options.out) / f"{run.model}-{run.regime}-fold{run.fold}-seed{run.seed}"


def _result(
    options: argparse.Namespace, extra: list[str], run: Run, deadline: float | None
) -> dict | None:
    settings = {
        "model.name": run.model,
        "regime.name": run.regime,
        "data.fold": str(run.fold),
        "seed": str(run.seed),
        "data.seed": str(run.seed),
    }
    for name, setting in options.only:
        if name in (run.model, run.regime):
            key, _, value = setting.partition("=")
            settings[key] = value.replace("{fold}", str(run.fold))
    if deadline is not None and time.monotonic() > deadline:
        return None
    return make_run(options.config, _folder(options, run), settings, extra, deadline)


def _row(options: argparse.Namespace, runs: dict[Run, dict], model: str, regime: str) -> dict:
    """Summarize one model and regime per fold and over folds, with the spread over seeds.

    The seeds are those of training; where there is one, those of the test episodes.
    """
    results = {run: result for run, result in runs.items() if run[:2] == (model, regime)}
    row: dict = {"model": model, "regime": regime}
    for metric in ("miou", "fb_iou"):
        folds = []  # [fold][seed]
        for fold in options.folds:
            values = [
                results[Run(model, regime, fold, seed)]["test"][metric]["values"]
                for seed in options.seeds
            ]
            folds.append([statistics.fmean(v) for v in values] if len(values) > 1 else values[0])
        means = [statistics.fmean(values) for values in zip(*folds, strict=True)]
        row[metric] = {
            "folds": [statistics.fmean(values) for values in folds],
            "folds_std": [_std(values) for values in folds],
            "values": means,
            "mean": statistics.fmean(means),
            "std": _std(means),
        }
    every = list(results.values())
    if options.elsewhere:
        scores = [
            score_elsewhere(_folder(options, run), options.elsewhere)["miou_sampled"]["mean"]
            for run in results
        ]
        row["elsewhere"] = {"mean": statistics.fmean(scores), "std": _std(scores)}
    row["saved_bytes"] = max(result["saved_bytes_per_step"] for result in every)
    row["step_seconds"] = statistics.median(result["step_seconds_median"] for result in every)
    row["peak_memory_bytes"] = max(result["peak_memory_bytes"] for result in every)
    row["trained_backbone"] = every[0]["parameters"]["trained_backbone"]
    return row


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(
    options: argparse.Namespace, runs: dict[Run, dict], rows: list[dict], command: str
) -> str:
    first = next(iter(runs.values()))
    config, test, machine = first["config"], first["test"], first["machine"]
    several = len(options.models) > 1
    folds = "".join(f" fold {fold} |" for fold in options.folds)
    compared = options.regimes[0]
    elsewhere = bool(options.elsewhere)
    lines = [
        f"{'| model ' * several}| regime | trains in the backbone |{folds} mIoU, novel "
        f"| − {compared} | FB-IoU |{' mIoU, other data |' * elsewhere} saved MiB | s/step |",
        "| --- " * several + "| --- | ---: |" + " ---: |" * (len(options.folds) + 5 + elsewhere),
    ]
    for row in rows:
        miou, fb, other = row["miou"], row["fb_iou"], row.get("elsewhere")
        more = f" {100 * other['mean']:.1f} ± {100 * other['std']:.1f} |" if other else ""
        per_fold = "".join(f" {100 * value:.1f} |" for value in miou["folds"])
        lines.append(
            f"| {row['model']} " * several + f"| {row['regime']} | {row['trained_backbone']:,} |"
            f"{per_fold} **{100 * miou['mean']:.1f}** ± {100 * miou['std']:.1f} | "
            f"{_difference(rows, row, compared)} | "
            f"{100 * fb['mean']:.1f} ± {100 * fb['std']:.1f} |{more} "
            f"{row['saved_bytes'] / MIB:.0f} | {row['step_seconds']:.2f} |"
        )
    gpu = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    over = (
        f"± the standard deviation over {len(options.seeds)} training seeds"
        if len(options.seeds) > 1
        else "± the standard deviation over them"
    )
    lines += [
        "",
        f"{config['model']['backbone']}, {config['data']['shots']}-shot, "
        f"{config['data']['size']} px, batch {config['batch_size']}, {config['steps']} steps each; "
        f"{test['episodes_per_seed']} novel episodes for each of {len(test['seeds'])} seeds, "
        f"{over}; the column after it is the difference, seed by seed. Saved: bytes autograd keeps "
        "for one step." + _of_elsewhere(options, next(iter(runs))),
        f"{gpu}, torch {first['versions']['torch']}, commit {first['commit']}.",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def _of_elsewhere(options: argparse.Namespace, run: Run) -> str:
    if not options.elsewhere:
        return ""
    result = score_elsewhere(_folder(options, run), options.elsewhere)
    classes = sum(count > 0 for count in result["episodes"].values())
    return (
        f" Other data: {result['source']}, fold {result['fold']}, "
        f"{result['episodes_per_seed']} episodes for each of {len(result['seeds'])} seeds; mean "
        f"over the {classes} classes that these showed."
    )


def _difference(rows: list[dict], row: dict, regime: str) -> str:
    """Format the difference in mIoU to another regime of the same model, paired by seed."""
    if row["regime"] == regime:
        return "–"
    other = next(r for r in rows if (r["model"], r["regime"]) == (row["model"], regime))
    values = [a - b for a, b in zip(row["miou"]["values"], other["miou"]["values"], strict=True)]
    return f"{100 * statistics.fmean(values):+.1f} ± {100 * _std(values):.1f}"


def _picture(options: argparse.Namespace, rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    scores, costs = figure.subplots(1, 2, width_ratios=(2, 1))
    if len(options.models) > 1:
        groups = options.models
    else:
        groups = [f"fold {fold}" for fold in options.folds]
        groups += ["mean"] * (len(groups) > 1)
    width = 0.8 / len(options.regimes)
    for index, regime in enumerate(options.regimes):
        own = [row for row in rows if row["regime"] == regime]
        if len(options.models) > 1:
            values = [row["miou"]["mean"] for row in own]
            errors = [row["miou"]["std"] for row in own]
        else:
            miou = own[0]["miou"]
            more = len(groups) > len(options.folds)
            values = miou["folds"] + [miou["mean"]] * more
            errors = miou["folds_std"] + [miou["std"]] * more
        shift = (index - (len(options.regimes) - 1) / 2) * width
        bars = scores.bar(
            [group + shift for group in range(len(groups))],
            [100 * value for value in values],
            0.92 * width,
            yerr=[100 * error for error in errors],
            capsize=2,
            color=COLORS.get(regime, "#009E73"),
            label=regime,
        )
        labels = [f"{100 * value:.1f}" for value in values]
        scores.bar_label(bars, labels, padding=1, fontsize=7)
    scores.set_xticks(range(len(groups)), groups)
    scores.set_ylabel("mIoU on novel classes, %")
    scores.legend(frameon=False, ncols=len(options.regimes), loc="upper right")
    scores.set_ylim(0, scores.get_ylim()[1] * 1.2)
    _draw_costs(costs, rows)
    for axes in (scores, costs):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_costs(axes: Axes, rows: list[dict]) -> None:
    """Draw a dot per model and regime: time of a step, and saved bytes."""
    markers = dict(zip(dict.fromkeys(row["model"] for row in rows), "osD^v", strict=False))
    for row in rows:
        seconds, saved = row["step_seconds"], row["saved_bytes"] / MIB
        color = COLORS.get(row["regime"], "#009E73")
        axes.scatter([seconds], [saved], s=45, color=color, marker=markers[row["model"]])
        if len(markers) == 1:
            axes.annotate(
                row["regime"], (seconds, saved), xytext=(6, 6), textcoords="offset points"
            )
    if len(markers) > 1:
        for model, marker in markers.items():
            axes.scatter([], [], s=45, color="#555555", marker=marker, label=model)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_xlabel("time of a step, s")
    axes.set_ylabel("saved for the backward pass, MiB")
    axes.set_xlim(0, 1.35 * max(row["step_seconds"] for row in rows))
    axes.set_ylim(0, 1.25 * max(row["saved_bytes"] for row in rows) / MIB)


if __name__ == "__main__":
    sys.exit(main())
