"""The main job: train one configuration in several regimes over several folds, and tabulate.

Each run is an ``fss train`` process of its own; a finished one is kept, an interrupted one resumed,
so the command can be repeated until all are there. Writes NAME.json, NAME.md and NAME.png:

    python benchmarks/regimes.py --config demo --folds 0 --results runs/demo/regimes
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MIB = 2**20
COLOURS = {"freeze": "#7f7f7f", "svf": "#0072B2", "full": "#E69F00"}  # Okabe-Ito


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="as for `fss train`")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--regimes", nargs="+", default=["freeze", "svf", "full"])
    parser.add_argument("--out", default="runs/regimes", help="folder of the runs")
    parser.add_argument("--results", required=True, help="path of the results without its ending")
    parser.add_argument(
        "--only",
        nargs=2,
        action="append",
        default=[],
        metavar=("REGIME", "KEY=VALUE"),
        help="a setting of one regime alone; repeatable",
    )
    options, settings = parser.parse_known_args()
    runs = {
        (regime, fold): _run(options, settings, regime, fold)
        for fold in options.folds
        for regime in options.regimes
    }
    base = Path(options.results)
    base.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + shlex.join(sys.argv)
    summary = {"command": command, "rows": _rows(options, runs), "runs": _compact(runs)}
    base.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    table = _table(options, runs, summary["rows"], command)
    base.with_suffix(".md").write_text(table)
    _picture(options, summary["rows"], base.with_suffix(".png"))
    print(table)
    print(f"picture: {base.with_suffix('.png')}")
    print(f"episodes: {_folder(options, options.regimes[-1], options.folds[0]) / 'episodes.png'}")
    return 0


def _folder(options: argparse.Namespace, regime: str, fold: int) -> Path:
    return Path(options.out) / f"{regime}-fold{fold}"


def _run(options: argparse.Namespace, settings: list[str], regime: str, fold: int) -> dict:
    """The result of one run, made now unless it is there already."""
    folder = _folder(options, regime, fold)
    result = folder / "result.json"
    if not result.is_file():
        own = [f"--{item}" for name, item in options.only if name == regime]
        command = [sys.executable, "-m", "fss.cli", "train", "--config", options.config]
        command += [f"--data.fold={fold}", f"--regime.name={regime}", f"--out={folder}"]
        command += [*settings, *own]
        if (folder / "last.pt").is_file():
            command.append("--resume")
        print(f"\n[{regime}, fold {fold}] fss {shlex.join(command[3:])}", flush=True)
        status = subprocess.run(command).returncode
        if status:
            raise SystemExit(f"regimes: the run of {regime}, fold {fold}, ended with {status}")
    return json.loads(result.read_text())


def _rows(options: argparse.Namespace, runs: dict) -> list[dict]:
    """One row a regime: per fold and over folds, with the spread over episode seeds."""
    rows = []
    for regime in options.regimes:
        results = [runs[regime, fold] for fold in options.folds]
        row: dict = {"regime": regime}
        for metric in ("miou", "fb_iou"):
            folds = [result["test"][metric]["values"] for result in results]
            means = [statistics.fmean(values) for values in zip(*folds, strict=True)]
            row[metric] = {
                "folds": [statistics.fmean(values) for values in folds],
                "folds_std": [_std(values) for values in folds],
                "mean": statistics.fmean(means),
                "std": _std(means),
            }
        row["saved_bytes"] = max(result["saved_bytes_per_step"] for result in results)
        row["step_seconds"] = statistics.median(r["step_seconds_median"] for r in results)
        row["peak_memory_bytes"] = max(result["peak_memory_bytes"] for result in results)
        row["trained_backbone"] = results[0]["parameters"]["trained_backbone"]
        rows.append(row)
    return rows


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _compact(runs: dict) -> list[dict]:
    return [{"regime": regime, "fold": fold, **result} for (regime, fold), result in runs.items()]


def _table(options: argparse.Namespace, runs: dict, rows: list[dict], command: str) -> str:
    first = next(iter(runs.values()))
    config, test, machine = first["config"], first["test"], first["machine"]
    folds = "".join(f" fold {fold} |" for fold in options.folds)
    lines = [
        f"| regime | trains in the backbone |{folds} mIoU, novel | FB-IoU | saved MiB | s/step |",
        "| --- | ---: |" + " ---: |" * (len(options.folds) + 4),
    ]
    for row in rows:
        miou, fb = row["miou"], row["fb_iou"]
        per_fold = "".join(f" {100 * value:.1f} |" for value in miou["folds"])
        lines.append(
            f"| {row['regime']} | {row['trained_backbone']:,} |{per_fold} "
            f"**{100 * miou['mean']:.1f}** ± {100 * miou['std']:.1f} | "
            f"{100 * fb['mean']:.1f} ± {100 * fb['std']:.1f} | "
            f"{row['saved_bytes'] / MIB:.0f} | {row['step_seconds']:.2f} |"
        )
    gpu = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    lines += [
        "",
        f"{config['model']['backbone']}, {config['data']['shots']}-shot, "
        f"{config['data']['size']} px, batch {config['batch_size']}, {config['steps']} steps each; "
        f"{test['episodes_per_seed']} novel episodes for each of {len(test['seeds'])} seeds, ± the "
        "standard deviation over them. Saved: bytes autograd keeps for one step.",
        f"{gpu}, torch {first['versions']['torch']}, commit {first['commit']}.",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def _picture(options: argparse.Namespace, rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    scores, costs = figure.subplots(1, 2, width_ratios=(2, 1))
    groups = [f"fold {fold}" for fold in options.folds]
    if len(groups) > 1:
        groups.append("mean")
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        miou = row["miou"]
        values, errors = list(miou["folds"]), list(miou["folds_std"])
        if len(groups) > len(values):
            values.append(miou["mean"])
            errors.append(miou["std"])
        at = [g + (index - (len(rows) - 1) / 2) * width for g in range(len(groups))]
        colour = COLOURS.get(row["regime"], "#009E73")
        bars = scores.bar(
            at,
            [100 * value for value in values],
            0.92 * width,
            yerr=[100 * error for error in errors],
            capsize=2,
            color=colour,
            label=row["regime"],
        )
        labels = [f"{100 * value:.0f}" for value in values]
        scores.bar_label(bars, labels, padding=1, fontsize=7)
        saved, seconds = row["saved_bytes"] / MIB, row["step_seconds"]
        costs.scatter([seconds], [saved], s=60, color=colour)
        offset = (6, -14) if index % 2 else (6, 6)  # neighbours above and below their dots
        costs.annotate(row["regime"], (seconds, saved), xytext=offset, textcoords="offset points")
    scores.set_xticks(range(len(groups)), groups)
    scores.set_ylabel("mIoU on novel classes, %")
    scores.legend(frameon=False, ncols=len(rows), loc="upper right")
    scores.set_ylim(0, scores.get_ylim()[1] * 1.15)
    costs.set_xlabel("time of a step, s")
    costs.set_ylabel("saved for the backward pass, MiB")
    costs.set_xlim(0, 1.35 * max(row["step_seconds"] for row in rows))
    costs.set_ylim(0, 1.2 * max(row["saved_bytes"] for row in rows) / MIB)
    for axes in (scores, costs):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
