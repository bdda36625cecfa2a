"""Runs of a written plan: settings are chosen on base classes, then tested.

    python -m benchmarks.few_shot.plan benchmarks/few_shot/pascal.yaml --out runs/pascal \
        --root ../shared/data/pascal --weights ../shared/weights/resnet50_imagenet.safetensors \
        --minutes 60
    python -m benchmarks.few_shot.plan benchmarks/few_shot/pascal.yaml --out runs/pascal --table

The first command is repeated until nothing is pending. It may be killed at any time: a run goes on
from its last checkpoint, a finished one has its row in OUT/rows and is not made again. Given again
beside itself, on another GPU for example, it takes the runs that no other process is at. The second
makes table and curves from the rows. Options like --data.size=161 or --steps=300 change the plan
for all runs of an OUT; the keys of a plan are those of `Plan`.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from benchmarks.few_shot import rows as rows_of_runs
from benchmarks.few_shot.planned import (
    Plan,
    Run,
    Settings,
    check_folds,
    check_rows,
    check_runs,
    chosen_settings,
    nested,
    read_plan,
    runs_of,
    untrained_config,
)
from benchmarks.few_shot.rows import Row, Stopwatch, estimate, read_rows
from benchmarks.few_shot.training import as_word, held_out, make_run, score_matching
from fss.data.folder import LISTS
from fss.files import read_yaml, write_json
from fss.runs.folder import RunFolder
from fss.settings import config_file, flat_settings, merged

ROOT = Path(__file__).resolve().parents[2]
WAITING = 5.0  # seconds between two looks for a run that no other process holds


def main() -> int:
    options, extra = _arguments()
    out = Path(options.out).resolve()  # runs begin in the repository
    try:
        plan = read_plan(Path(options.plan), _overriding(extra))
        given = {"data.root": options.root, "model.weights": options.weights}
        paths = {name: _absolute(path) for name, path in given.items() if path is not None}
        check_runs(plan, paths)
        if options.table is not None:
            rows = read_rows(out)
            check_rows(plan, rows, out)
            words = shlex.join([_in_repository(Path(options.plan)), *extra])
            print(write_table(plan, rows, Path(options.table or out / "table"), words))
            return 0
        check_folds(plan, paths)
        out.mkdir(parents=True, exist_ok=True)
        return run_plan(plan, out, paths, options.minutes)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(options.plan).name}: {error}") from error


def run_plan(plan: Plan, out: Path, paths: Mapping[str, str], minutes: float = math.inf) -> int:
    """Run what is pending, as far as it fits; return 0 when all is done, else 1.

    Args:
        plan: of the runs.
        out: folder of runs and rows.
        paths: settings that are paths, which rows do not keep.
        minutes: after which the present run is stopped, to go on another time. A new one is begun
            only if, by the time of finished ones, it ends before.
    """
    deadline = time.monotonic() + 60 * minutes
    (out / "rows").mkdir(exist_ok=True)
    waits = False
    try:
        while pending := pending_runs(plan, out):
            with _taken(pending, out) as run:
                left = (deadline - time.monotonic()) / 60
                if left <= 0:
                    break
                if run is None:
                    if not waits:
                        print("waiting for runs of other processes", flush=True)
                    waits = True
                    time.sleep(WAITING)
                    continue
                waits = False
                if not _begun(out, run) and estimate(read_rows(out), run) > left:
                    break
                if not _finished(plan, run, out, paths, deadline):
                    break
    finally:
        print(status(plan, out))
    return 1 if pending_runs(plan, out) else 0


def _finished(plan: Plan, run: Run, out: Path, paths: Mapping[str, str], deadline: float) -> bool:
    """Make a run and its row, or go on with it; tell whether it ended before the deadline."""
    assert run.settings is not None
    watch = Stopwatch(out / "times" / f"{run.name}.json", out / run.name)
    watch.start()
    if root := _view_root(plan, paths):
        paths = {**paths, "data.root": str(_view(root, run.fold, out))}
    folder = out / run.name
    if run.kind == "untrained":
        result = score_matching(folder, untrained_config(plan, run, paths), deadline)
    else:
        words = {name: as_word(value) for name, value in {**run.settings, **paths}.items()}
        config = str(config_file(plan.config).resolve())
        result = make_run(config, folder, words, deadline=deadline)
    watch.stop()
    if result is None:
        return False
    if run.kind == "untrained":
        row = rows_of_runs.row_of_matching(run, result, watch.seconds)
    else:
        row = rows_of_runs.row_of(run, result, RunFolder(folder), watch.seconds)
    write_json(out / "rows" / f"{run.name}.json", row)
    watch.forget()
    return True


def pending_runs(plan: Plan, out: Path) -> list[Run]:
    """List the runs without a row, those that were begun first."""
    rows = read_rows(out)
    check_rows(plan, rows, out)
    left = [run for run in runs_of(plan, rows) if run.name not in rows]
    return sorted(left, key=lambda run: not _begun(out, run))


def _begun(out: Path, run: Run) -> bool:
    return RunFolder(out / run.name).state != "not started"


def status(plan: Plan, out: Path) -> str:
    """Say what is done, running and pending."""
    rows = read_rows(out)
    runs = runs_of(plan, rows)
    left = [run for run in runs if run.name not in rows]
    running = [run for run in left if _begun(out, run)]
    pending = [run for run in left if run not in running]
    took = sum(rows[run.name]["minutes"] for run in runs if run.name in rows)
    expected = [estimate(rows, run) for run in left]
    lines = [f"done: {len(runs) - len(left)} of {len(runs)} runs, {took:.1f} minutes"]
    lines += [f"running, goes on with the same command: {run.name}" for run in running]
    if pending:
        names = ", ".join(run.name for run in pending)
        lines.append(f"pending: {len(pending)} ({names})")
    if left and all(expected):
        lines.append(f"expected: {sum(expected):.0f} minutes from the begin of what is left")
    return "\n".join(lines)


def write_table(plan: Plan, rows: Mapping[str, Row], name: Path, words: str) -> str:
    """Write NAME.json, NAME.md and a picture of curves per fold; return the table.

    Args:
        plan, rows: of the runs.
        name: path of the files without their ending.
        words: of the command that ran the plan, without paths of this machine.
    """
    runs = runs_of(plan, rows)
    if not any(run.name in rows for run in runs if run.kind != "untrained"):
        raise ValueError("--table: expected at least one finished run, found none; run the plan")
    chosen = {fold: chosen_settings(plan, rows, fold) for fold in plan.final.folds}
    for fold in plan.search_folds:
        chosen.setdefault(fold, chosen_settings(plan, rows, fold))
    name.parent.mkdir(parents=True, exist_ok=True)
    table = rows_of_runs.table(plan, runs, rows, chosen, words)
    finished = {run.name: rows[run.name] for run in runs if run.name in rows}
    write_json(name.with_suffix(".json"), {"plan": dataclasses.asdict(plan), "rows": finished})
    name.with_suffix(".md").write_text(table)
    for path in rows_of_runs.draw_curves(plan.regimes, runs, rows, name):
        table += f"curves: {path}\n"
    return table


def _view_root(plan: Plan, paths: Mapping[str, str]) -> str | None:
    """Return the folder of photos that needs lists by `held_out`, None for other data."""
    config = merged(read_yaml(config_file(plan.config)), nested(flat_settings(plan.settings)))
    root = paths.get("data.root", config["data"].get("root"))
    if config["data"].get("source", "folder") != "folder" or root is None:
        return None
    return None if (Path(root) / LISTS).is_dir() else str(root)


def _in_repository(path: Path) -> str:
    """Return a path from the root of the repository; of another file its name."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _absolute(path: str) -> str:
    """Return where a path leads from here; what is no path as it is, "torchvision" for one."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _overriding(extra: Sequence[str]) -> Settings:
    settings: Settings = {}
    for word in extra:
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and equals):
            raise ValueError(f"{word}: expected a setting as --NAME=VALUE, or an option of --help")
        try:
            settings[name[2:]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{word}: expected a value as in YAML, {value!r} is none") from error
    return settings


def _view(root: str, fold: int, out: Path) -> Path:
    """Return the photos of a fold by `held_out`; one process makes them at a time."""
    with (out / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return held_out(root, fold, out / f"photos-fold{fold}")


@contextmanager
def _taken(runs: Sequence[Run], out: Path) -> Iterator[Run | None]:
    """Hold the first run that can begin and no other process holds; None where there is none.

    It is free again when this process ends, however it does.
    """
    (out / "locks").mkdir(exist_ok=True)
    for run in runs:
        if run.settings is None:
            continue
        with (out / "locks" / run.name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if not (out / "rows" / f"{run.name}.json").exists():  # finished by another meanwhile
                yield run
                return
    yield None


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="--NAME=VALUE sets a setting of all runs."
    )
    parser.add_argument("plan", help="YAML file")
    parser.add_argument("--out", required=True, help="folder of the runs and their rows")
    parser.add_argument("--root", help="data.root of all runs")
    parser.add_argument("--weights", help="model.weights of all runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="by default until all done")
    parser.add_argument(
        "--table",
        nargs="?",
        const="",
        metavar="NAME",
        help="run nothing: write table and curves of the finished runs to NAME.json, NAME.md and "
        "NAME-foldN.png; by default OUT/table",
    )
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
