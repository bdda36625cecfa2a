"""A row of each finished run of a plan: written, read, tabulated and drawn."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import tables
from fss.config import TrainConfig
from fss.files import parse_json, read_text, write_json
from fss.report.curves import Panel, plot_panels
from fss.report.plot import write_png
from fss.report.runs import ReportedRun
from fss.runs.folder import RunFolder
from fss.settings import flat_settings
from fss.training.provenance import provenance

if TYPE_CHECKING:
    from benchmarks.few_shot.planned import Plan, Run, Settings

MIB = 2**20
CURVE = ("step", "train_miou", "miou", "fb_iou")
PATHS = (("data", "root"), ("data", "train_list"), ("data", "val_list"))
PATHS += (("model", "weights"), ("model", "base_weights"), ("model", "official"))

Row = dict[str, Any]


class Stopwatch:
    """Seconds that a run took, kept in a file, so that a killed process does not lose them.

    Of a session that was killed, what came after the last checkpoint does not count: it is done
    again.

    Args:
        file: that keeps them, JSON; gone once the run has its row.
        folder: of the run.

    Attributes:
        seconds: so far.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self._file, self._folder = file, RunFolder(folder)
        self.seconds = 0.0
        if file.is_file():
            kept = parse_json(read_text(file), file)
            self.seconds = kept["seconds"]
            if kept["begun"] is not None:
                written = (self._folder.last, self._folder.result_file)
                ends = [path.stat().st_mtime for path in written if path.is_file()]
                self.seconds += max([0.0, *(end - kept["begun"] for end in ends)])

    def start(self) -> None:
        """Begin a session."""
        self._begun = time.time()
        self._keep(self._begun)

    def stop(self) -> None:
        """End the session."""
        self.seconds += time.time() - self._begun
        self._keep(None)

    def forget(self) -> None:
        """Remove the file."""
        self._file.unlink()

    def _keep(self, begun: float | None) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {"seconds": self.seconds, "begun": begun})


def row_of(run: Run, result: Mapping[str, Any], folder: RunFolder, seconds: float) -> Row:
    """Return the row of a finished run, plain values; of a path only its last part.

    Args:
        run: of the plan.
        result: its result.json.
        folder: its folder, of which the curve is read.
        seconds: that it took.

    Raises:
        ValueError: a result with other settings than the run's.
    """
    check_settings_are(run, flat_settings(result["config"]), "remove its folder")
    test = result["test"]
    curve = {name: folder.logs()[1][name] for name in CURVE}
    at = curve["step"].index(test["step"])
    config = json.loads(json.dumps(result["config"]))
    config["out"] = run.name
    for part, key in PATHS:
        if config[part][key] is not None:
            config[part][key] = Path(config[part][key]).name
    return {
        **{name: getattr(run, name) for name in ("name", "kind", "regime", "fold")},
        "seed": config["seed"],
        "settings": run.settings,
        "base": {"miou": curve["miou"][at], "fb_iou": curve["fb_iou"][at]},
        "novel": {name: test[name] for name in ("miou", "fb_iou", "iou", "episodes")},
        "tested": {name: test[name] for name in ("checkpoint", "step", "seeds")},
        "curve": curve,
        "minutes": seconds / 60,
        **{
            name: result[name]
            for name in (
                "steps",
                "epoch_images",
                "step_seconds_median",
                "saved_bytes_per_step",
                "peak_memory_bytes",
                "parameters",
                "machine",
                "versions",
                "commit",
            )
        },
        "config": config,
    }


def row_of_matching(run: Run, result: Mapping[str, Any], seconds: float) -> Row:
    """Return the row of a test of matching, from the result of `fss eval --weights`.

    Args:
        run: of the plan.
        result: of the evaluation.
        seconds: that it took.
    """
    tested = {name: result[name] for name in ("weights", "backbone", "stride_on", "size", "seeds")}
    return {
        **{name: getattr(run, name) for name in ("name", "kind", "regime", "fold", "settings")},
        "novel": {name: result[name] for name in ("miou", "fb_iou", "iou", "episodes")},
        "tested": tested,
        "minutes": seconds / 60,
        "commit": provenance(torch.device("cpu"))["commit"],
    }


def check_settings_are(run: Run, had: Mapping[str, Any], what_to_do: str) -> None:
    """Raise ValueError unless what was made has the settings of the run as the plan is now."""
    now = json.loads(json.dumps(run.settings))
    texts = [
        f"{key} {had.get(key)} instead of {now[key]}" for key in now if had.get(key) != now[key]
    ]
    if texts:
        raise ValueError(f"{run.name}: it was made with {', '.join(texts)}; {what_to_do}")


def read_rows(out: Path) -> dict[str, Row]:
    """Read the rows of all finished runs, by name.

    Raises:
        ValueError: a file that is no row.
    """
    rows: dict[str, Row] = {}
    for path in sorted((out / "rows").glob("*.json")):
        row = parse_json(read_text(path), path)
        if not isinstance(row, dict) or not {"kind", "regime"} <= row.keys():
            raise ValueError(
                f"{path}: expected the row of a finished run, got {row!r:.80}; remove the file to "
                "have it made again"
            )
        rows[path.stem] = row
    return rows


def estimate(rows: Mapping[str, Row], run: Run) -> float:
    """Return the minutes that a run may take, from the slowest finished one like it; else 0.

    Like it is one of its kind and regime; else of its kind; else any.
    """
    every = list(rows.values())
    of_kind = [row for row in every if row["kind"] == run.kind]
    like = [row for row in of_kind if row["regime"] == run.regime]
    return max((row["minutes"] for row in like or of_kind or every), default=0.0)


def table(
    plan: Plan,
    runs: Sequence[Run],
    rows: Mapping[str, Row],
    chosen: Mapping[int, Mapping[str, Settings | None]],
    arguments: str,
) -> str:
    """Return what the finished runs scored, what the trials chose, and how all was run.

    Args:
        plan, runs, rows: the plan, its runs and their rows by name.
        chosen: by fold and regime; None where the trials are not done.
        arguments: of the command that ran them, without paths.
    """
    first = next(rows[run.name] for run in runs if run.name in rows and run.kind != "untrained")
    finals = [run for run in runs if run.kind in ("final", "untrained")]
    _check_episodes(finals, rows)
    trials = [run for run in runs if run.kind == "trial"]
    parts = []
    if finals:
        parts += [_finals(plan, finals, rows, chosen), _about_finals(plan, finals, rows)]
    if trials:
        parts += [_trials(trials, rows, chosen), _about_trials(plan, trials, rows)]
    config, machine = first["config"], first["machine"]
    data, model = config["data"], config["model"]
    parts.append(
        f"{model['name']}, {model['backbone']}, {data['source']}, {data['shots']}-shot, "
        f"{data['size']} px, batch {config['batch_size']}, {config['steps']} steps each. Base: "
        "base classes on photos outside the training list, at the step that is tested. "
        f"{sum(run.name in rows for run in runs)} of {len(runs)} runs are done."
    )
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    commits = sorted({str(rows[run.name]["commit"]) for run in runs if run.name in rows})
    parts.append(f"{processor}, torch {first['versions']['torch']}, commit {', '.join(commits)}.")
    parts.append(f"    python -m benchmarks.few_shot.plan {arguments}")
    return "\n\n".join(parts) + "\n"


def _finals(
    plan: Plan,
    finals: Sequence[Run],
    rows: Mapping[str, Row],
    chosen: Mapping[int, Mapping[str, Settings | None]],
) -> str:
    folds = plan.final.folds
    head = ["regime", "trains in the backbone"]
    head += [f"fold {fold}, novel" for fold in folds]
    head += [*["mean", "FB-IoU"][: 2 if len(folds) > 1 else 0], *(f"fold {f}, base" for f in folds)]
    head += ["s/step", "saved MiB", "minutes"]
    lines = []
    untrained = [run.regime for run in finals if run.kind == "untrained"]
    for regime in dict.fromkeys([*untrained, *plan.regimes]):
        own = [
            [rows[run.name] for run in finals if run[2:4] == (regime, fold) and run.name in rows]
            for fold in folds
        ]
        every = [row for of_fold in own for row in of_fold]
        whole = all(own)
        trained = [row for row in every if row["kind"] == "final"]
        cells = [regime, "0" if regime in untrained else "–"]
        if trained:
            cells[1] = f"{trained[0]['parameters']['trained_backbone']:,}"
        cells += [_spread(of_fold) for of_fold in own]
        if len(folds) > 1:
            for metric in ("miou", "fb_iou"):
                means = [statistics.fmean(_scores(of_fold, metric)) for of_fold in own if of_fold]
                cells.append(f"{100 * statistics.fmean(means):.1f}" if whole else "–")
        for of_fold in own:
            base = [row["base"]["miou"] for row in of_fold if row["kind"] == "final"]
            cells.append(f"{100 * statistics.fmean(base):.1f}" if base else "–")
        if trained:
            seconds = statistics.median(row["step_seconds_median"] for row in trained)
            saved = max(row["saved_bytes_per_step"] for row in trained)
            cells += [f"{seconds:.2f}", f"{saved / MIB:.0f}"]
        else:
            cells += ["–"] * 2
        cells.append(f"{statistics.fmean(row['minutes'] for row in every):.1f}" if every else "–")
        lines.append(cells)
    return tables.table(head, lines)


def _check_episodes(finals: Sequence[Run], rows: Mapping[str, Row]) -> None:
    """Raise ValueError unless all runs of a fold were tested on as many episodes of each class."""
    tested: dict[int, tuple[str, Any]] = {}
    for run in finals:
        if run.name in rows:
            own = rows[run.name]["novel"]["episodes"]
            name, first = tested.setdefault(run.fold, (run.name, own))
            if own != first:
                raise ValueError(
                    f"{run.name}: expected the test episodes of {name}, {first}; got {own}"
                )


def _scores(rows: Iterable[Row], metric: str) -> list[float]:
    return [row["novel"][metric]["mean"] for row in rows]


def _spread(rows: Sequence[Row]) -> str:
    """Format the novel mIoU of a fold; its spread is over training seeds, or the test's of one."""
    if not rows:
        return "–"
    means = _scores(rows, "miou")
    std = statistics.stdev(means) if len(means) > 1 else rows[0]["novel"]["miou"]["std"]
    spread = "" if std is None else f" ± {100 * std:.1f}"
    return f"{100 * statistics.fmean(means):.1f}{spread}"


def _about_finals(plan: Plan, finals: Sequence[Run], rows: Mapping[str, Row]) -> str:
    done = [rows[run.name] for run in finals if run.name in rows and run.kind == "final"]
    if not done:
        return "No run with the chosen settings is done yet."
    config, seeds = done[0]["config"], len(plan.final.seeds)
    over = f"{seeds} training seeds" if seeds > 1 else "the seeds of the test, of one training"
    text = (
        f"mIoU in percent; {config['test_episodes']} novel episodes for each of "
        f"{len(config['test_seeds'])} seeds; ± the standard deviation over {over}."
    )
    if any(run.kind == "untrained" for run in finals):
        text += " Nothing trained: matching of the pretrained backbone on the same episodes."
    return text


def _trials(
    trials: Sequence[Run],
    rows: Mapping[str, Row],
    chosen: Mapping[int, Mapping[str, Settings | None]],
) -> str:
    head = ["fold", "regime", "tried", "mIoU, base", "FB-IoU, base", "mIoU, novel", "minutes"]
    lines = []
    for run in trials:
        text = run.name.split("-", 3)[3]
        row = rows.get(run.name)
        if row is None:
            lines.append([str(run.fold), run.regime, text, *["–"] * 4])
            continue
        best = chosen[run.fold][run.regime]
        kept = best is not None and all(row["settings"].get(k) == v for k, v in best.items())
        scores = (row["base"]["miou"], row["base"]["fb_iou"], row["novel"]["miou"]["mean"])
        cells = [f"{100 * score:.2f}" for score in scores]
        shown = f"**{text}**" if kept else text
        lines.append([str(run.fold), run.regime, shown, *cells, f"{row['minutes']:.1f}"])
    return tables.table(head, lines)


def _about_trials(plan: Plan, trials: Sequence[Run], rows: Mapping[str, Row]) -> str:
    counts = {regime: sum(run.regime == regime for run in trials) for regime in plan.regimes}
    numbers = ", ".join(f"{regime} {count}" for regime, count in counts.items())
    done = [rows[run.name] for run in trials if run.name in rows]
    episodes = ""
    if done:
        config = done[0]["config"]
        count = config["test_episodes"] * len(config["test_seeds"])
        episodes = f" {config['validation_episodes']} episodes of base classes, {count} of novel."
    text = (
        f"In bold what the base classes chose; the novel classes chose nothing. Trials: {numbers}."
        f"{episodes}"
    )
    others = set(plan.final.folds) - {plan.search.fold}
    if plan.search.fold != "each" and others:
        text += (
            f" Trials were made on fold {plan.search.fold} alone, whose base classes include the "
            f"novel classes of fold {', '.join(map(str, sorted(others)))}."
        )
    return text


def draw_curves(
    regimes: Iterable[str], runs: Sequence[Run], rows: Mapping[str, Row], name: Path
) -> list[Path]:
    """Draw mIoU in training and in validation against steps: a picture per fold, regimes in panels.

    As the paper's Figures 2 and 3, but validated on base classes. Of several seeds the first is
    drawn. Returns the paths, NAME-foldN.png.
    """
    finals = [run for run in runs if run.kind == "final"]
    paths = []
    for fold in dict.fromkeys(run.fold for run in finals):
        panels = []
        for regime in regimes:
            run = next(run for run in finals if run[2:4] == (regime, fold))
            row = rows.get(run.name)
            shown = None if row is None else _reported(row)
            panels.append(Panel(f"{regime}, fold {fold}", shown, missing="not done yet"))
        if any(panel.run for panel in panels):
            paths.append(name.with_name(f"{name.name}-fold{fold}.png"))
            write_png(plot_panels(panels), paths[-1])
    return paths


def _reported(row: Row) -> ReportedRun:
    config = TrainConfig.from_dict(row["config"])
    folder = RunFolder(row["name"])
    return ReportedRun(folder, row["name"], config, {"steps": row["steps"]}, {}, row["curve"])
