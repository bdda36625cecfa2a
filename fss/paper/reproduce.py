"""A table of the paper: its runs, made or resumed, next to the paper's numbers."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fss.config import TrainConfig, free_settings
from fss.evaluation.score import evaluate_run
from fss.files import atomic_write, parse_json, read_text, write_json
from fss.paper.compare import BaseRun, Run, compared_rows, markdown
from fss.paper.tables import (
    FOLDS,
    Row,
    Table,
    base_values,
    default_folder,
    load_table,
    run_values,
    table_names,
)
from fss.runs.checkpoint import check_same, explain_misfit
from fss.settings import merged, read_settings
from fss.training.base_learner import BaseLearnerConfig, plain, train_base
from fss.training.loop import INTERRUPTED, Stopped, flat_settings
from fss.training.run import train

# What may differ between a finished run and the one that is asked for: not what was measured.
_FREE = free_settings(TrainConfig, "finished")
_BASE_FREE = free_settings(BaseLearnerConfig, "finished")
# What the settings of all rows must not say, and what says it.
_OWN = {
    "data.fold": "give --folds",
    "data.shots": "give --shots",
    "out": "give --out",
    "regime": "it is what rows differ in",
}
_FAILURES = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError)


@dataclass
class Options:
    """Which runs of a table, where, and with which settings over those of the table.

    Args:
        rows: names of runs, or numbers of rows from 1; all of them by default.
        folds: by default 0 to 3.
        shots: by default those of the table.
        out: folder of the runs and of the table's results.
        settings: over those of every row, nested as in a YAML file of `fss train`.
        scale_down: sets those of scale_down.yaml, next to the tables, under `settings`: a small
            network on small photos for a few steps.
    """

    rows: Sequence[str] = ()
    folds: Sequence[int] = ()
    shots: Sequence[int] = ()
    out: str = "runs/paper"
    settings: dict[str, Any] = field(default_factory=dict)
    scale_down: bool = False


def plan(table: Table, options: Options) -> list[Run]:
    """The runs of a table in its order, those that cannot be made with their reason.

    Raises:
        ValueError: a row, fold or number of shots that the table does not have; photos that nobody
            named.
    """
    rows = _chosen_rows(table, options.rows)
    _check_within("folds", options.folds, range(FOLDS))
    _check_within("shots", options.shots, sorted({n for row in table.rows for n in row.paper}))
    overrides = options.settings
    _check_free(overrides)
    if options.scale_down:
        overrides = merged(read_settings(table.folder / "scale_down.yaml"), overrides)
    if overrides.get("data", {}).get("root") and "source" not in options.settings.get("data", {}):
        source = table.data.settings["data"]["source"]
        overrides = merged(overrides, {"data": {"source": source}})
    bases: dict[Path, BaseRun] = {}
    return [
        _plan_run(table, row, shots, fold, overrides, options, bases)
        for row in rows
        for shots in row.paper
        if not options.shots or shots in options.shots
        for fold in options.folds or range(FOLDS)
    ]


def reproduce(
    table: Table, options: Options, evaluate: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Makes or resumes the runs of a table one after the other, and compares it with the paper.

    A finished run is kept. BAM's base learners are runs too, made when a row first needs one,
    unless the settings name model.base_weights. A run that fails does not end the others: it stands
    in the table with its error. Writes NAME.json and NAME.md in the folder `options.out`, also when
    it is interrupted.

    Args:
        table: of the paper.
        options: which runs, and how.
        evaluate: scores a run's checkpoint on other test episodes, see `evaluate_run`.

    Returns what NAME.json holds, with the text of NAME.md as "markdown".

    Raises:
        ValueError: see `plan`; photos that nobody named; a folder with runs of other settings.
        Stopped: after ctrl-C or SIGTERM; the message says how to go on.
    """
    runs = plan(table, options)
    folder = _folder(options)
    for run in runs:
        if run.config is not None:
            _check_settings(run)
    try:
        for run in runs:
            if run.config is not None:
                _make(run, options, evaluate)
    except KeyboardInterrupt as stop:
        _write(table, options, runs, folder)
        raise Stopped(
            f"{str(stop).partition(';')[0] or 'stopped'}; what is finished is in "
            f"{folder / table.name}.md, the same command goes on",
            getattr(stop, "status", INTERRUPTED),
        ) from stop
    return _write(table, options, runs, folder)


def listing(table: Table, options: Options) -> Iterator[str]:
    """Lines about the runs of a table: what they are, whether they are there, why not."""
    runs = plan(table, _with_a_root(options))
    yield f"{table.name}: {table.title}; {table.data.name}: {table.data.needs}"
    for number, row in enumerate(table.rows, 1):
        own = [run for run in runs if run.row is row]
        for shots in dict.fromkeys(run.shots for run in own):
            folds = [run for run in own if run.shots == shots]
            reason = next((f" ({run.reason})" for run in folds if run.reason), "")
            name = row.run or "–"
            yield f"{number:3d}  {name}, {shots}-shot: {row.label}; folds {_states(folds)}{reason}"
    bases = {run.base.folder: run.base for run in runs if run.base is not None}
    for name in dict.fromkeys(folder.parent.name for folder in bases):
        own_bases = [base for folder, base in bases.items() if folder.parent.name == name]
        yield f"     {name}: base learner of these rows of BAM; folds {_states(own_bases)}"


def reproduce_table(
    table: str | None = None,
    list: bool = False,
    rows: Sequence[str] = (),
    folds: Sequence[int] = (),
    shots: Sequence[int] = (),
    out: str = "runs/paper",
    scale_down: bool = False,
    settings: str | None = None,
    tables: str | None = None,
    **overrides: Any,
) -> str:
    """Make or resume the runs of a table of the paper and compare it with the paper's numbers.

    Args:
        table: T1 to T24; without one, all of them are listed.
        list: only list the runs and their states.
        rows: names of runs or numbers of rows, as `--list` shows them; by default all.
        folds: of 0 to 3; by default all.
        shots: of 1 and 5; by default all that the table has.
        out: folder of the runs, which tables share, and of the results NAME.md and NAME.json.
        scale_down: a small network on small photos for a few steps, to try a table on a CPU.
        settings: YAML file of settings of `fss train` over those of every row.
        tables: folder of the tables' files; by default those of the package.
        overrides: settings by part, over the file's.

    Returns the text to print.

    Raises:
        FileNotFoundError: no tables there.
        ValueError: an unknown table, row, fold or setting; no `data.root`.
        KeyboardInterrupt: after ctrl-C; the message says how to go on.
    """
    folder = Path(tables) if tables else default_folder()
    values = merged(read_settings(Path(settings)) if settings else {}, overrides)
    options = Options(rows, folds, shots, out, values, scale_down)
    names = [table] if table is not None else table_names(folder)
    if list or table is None:
        return "\n".join(
            line for name in names for line in listing(load_table(name, folder), options)
        )
    return reproduce(load_table(table, folder), options, evaluate_run)["markdown"]


def _states(runs: Sequence[Run | BaseRun]) -> str:
    states = ("finished", "begun", "not begun", "cannot run")
    folds = {state: [str(run.fold) for run in runs if run.state == state] for state in states}
    return ", ".join(f"{state}: {' '.join(found)}" for state, found in folds.items() if found)


def _with_a_root(options: Options) -> Options:
    """A list needs no photos: without a folder of them it takes any name for one."""
    named = "root" in options.settings.get("data", {}) or options.scale_down
    settings = options.settings if named else merged(options.settings, {"data": {"root": "photos"}})
    return Options(
        options.rows, options.folds, options.shots, options.out, settings, options.scale_down
    )


def _folder(options: Options) -> Path:
    return Path(options.out) / "scaled-down" if options.scale_down else Path(options.out)


def _chosen_rows(table: Table, names: Sequence[str]) -> list[Row]:
    numbered = {str(number): row for number, row in enumerate(table.rows, 1)}
    for name in names:
        if name not in numbered and name not in {row.run for row in table.rows}:
            known = ", ".join(f"{n} {row.run or row.label}" for n, row in numbered.items())
            raise ValueError(f"rows: expected names or numbers of {known}; got {name!r}")
    return [r for n, r in numbered.items() if not names or n in names or r.run in names]


def _check_within(name: str, got: Sequence[int], known: Sequence[int]) -> None:
    wrong = [value for value in got if value not in known]
    if wrong:
        expected = ", ".join(map(str, known))
        raise ValueError(f"{name}: expected numbers of {expected}; got {wrong[0]}")


def _check_free(settings: dict[str, Any]) -> None:
    """Raises ValueError for a setting that rows and options have in hand."""
    flat = flat_settings(settings, _FREE)
    for name, instead in _OWN.items():
        if any(one == name or one.startswith(f"{name}.") for one in flat) or name in settings:
            raise ValueError(f"settings: {name} is not for all rows to have; {instead}")


def _plan_run(
    table: Table,
    row: Row,
    shots: int,
    fold: int,
    overrides: dict[str, Any],
    options: Options,
    bases: dict[Path, BaseRun],
) -> Run:
    name = table.data.name.lower()
    folder = _folder(options) / name / str(row.run) / f"{shots}shot-fold{fold}"
    run = Run(row, shots, fold, folder)
    if row.run is None:
        run.reason = "quoted by the paper from another method"
        return run
    try:
        values = run_values(table, row, shots, fold, overrides)
        model = values["model"]
        if model.get("name") == "bam" and not (model.get("base_weights") or model.get("official")):
            run.base = _plan_base(table, row, fold, overrides, folder.parents[1], bases)
            values["model"] = model | {"base_weights": str(run.base.folder)}
        run.config = TrainConfig.from_dict(values | {"out": str(folder)})
    except (ValueError, TypeError) as error:
        if str(error).startswith("data.root:"):
            raise ValueError(
                f"data.root: expected the folder of {table.data.name}, got nothing; give "
                f"--data.root, {table.data.needs}, or --scale-down for a try on embedded photos"
            ) from error
        run.reason = str(error)
    return run


def _plan_base(
    table: Table,
    row: Row,
    fold: int,
    overrides: dict[str, Any],
    out: Path,
    bases: dict[Path, BaseRun],
) -> BaseRun:
    values = base_values(table, row, fold, overrides)
    folder = out / f"base-{values['model'].backbone}" / f"fold{fold}"
    config = BaseLearnerConfig(**values, out=str(folder))
    return bases.setdefault(folder, BaseRun(fold, folder, config))


def _check_settings(run: Run) -> None:
    """Raises ValueError where a folder holds a finished run of other settings."""
    assert run.config is not None
    _check_finished(run.folder, run.config.to_dict(), _FREE, _run_settings)
    if run.base is not None:
        _check_finished(run.base.folder, plain(run.base.config), _BASE_FREE, _base_settings)


def _check_finished(
    folder: Path,
    config: dict[str, Any],
    free: set[str],
    settings: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    path = folder / "result.json"
    if path.is_file():
        with explain_misfit(path):
            stored = settings(parse_json(read_text(path), path)["config"])
        check_same(flat_settings(stored, free), flat_settings(config, free), path)


def _run_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of settings that are newer than the result."""
    return TrainConfig.from_dict(stored).to_dict()


def _base_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """As `_run_settings`, of a base learner."""
    return plain(BaseLearnerConfig.from_dict(stored))


def _make(run: Run, options: Options, evaluate: Callable[..., dict[str, Any]]) -> None:
    """Trains or resumes a run and takes its result; a failure becomes its reason."""
    config = run.config
    assert config is not None
    path = run.folder / "result.json"
    print(f"\n{run.row.label}, {run.shots}-shot, fold {run.fold}: {run.state}", file=sys.stderr)
    try:
        if not path.is_file():
            if run.base is not None:
                _make_base(run.base)
            begun = (run.folder / "last.pt").is_file()
            train(config, resume=begun, overwrite=not begun)
        result = parse_json(read_text(path), path)
        run.test = result["test"]
        run.source = {name: result[name] for name in ("machine", "versions", "commit")}
        if run.row.episodes is not None:
            run.test = _test_again(run, options, evaluate)
    except _FAILURES as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise  # the other processes may still be in the middle of this run
        run.reason = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
        print(f"{run.row.label}: {run.reason}", file=sys.stderr)


def _make_base(base: BaseRun) -> None:
    """Trains or resumes a base learner; one that failed once is not tried again."""
    if base.reason is not None:
        raise RuntimeError(base.reason)
    if base.state == "finished":
        return
    print(f"base learner {base.folder}: {base.state}", file=sys.stderr)
    begun = base.state == "begun"
    try:
        train_base(base.config, resume=begun, overwrite=not begun)
    except _FAILURES as error:
        base.reason = f"base learner {base.folder}: {error}"
        raise RuntimeError(base.reason) from error


def _test_again(
    run: Run, options: Options, evaluate: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """The score on as many episodes as the row says: of a scaled down run, in proportion."""
    config, episodes = run.config, run.row.episodes
    assert config is not None and episodes is not None
    if options.scale_down:
        episodes = episodes * config.test_episodes // TrainConfig.test_episodes
    path = run.folder / f"test-{episodes}.json"
    if not path.is_file():
        score = evaluate(
            str(run.folder),
            episodes=episodes,
            root=config.data.root,
            checkpoint=config.checkpoint,
            accelerator=config.accelerator,
        )
        write_json(path, score)
    return parse_json(read_text(path), path)


def _write(table: Table, options: Options, runs: list[Run], folder: Path) -> dict[str, Any]:
    rows = list(compared_rows(table, runs))
    made = next((run for run in runs if run.test is not None), None)
    result: dict[str, Any] = {
        "table": table.name,
        "title": table.title,
        "metric": table.metric,
        "data": table.data.name,
        "scaled_down": _scale(made) if options.scale_down and made else options.scale_down,
        "rows": rows,
        "base_learners": _base_scores(runs),
        "settings": flat_settings(options.settings, _FREE),
        "source": made.source if made else None,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    text = "\n".join(markdown(result)) + "\n"
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{table.name}.json", result)
        with atomic_write(folder / f"{table.name}.md") as file:
            file.write(text.encode())
    return {**result, "markdown": text}


def _base_scores(runs: list[Run]) -> dict[str, dict[int, float]]:
    """mIoU in percent of the base learners that are there, by name and fold."""
    scores: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.base is not None and run.base.state == "finished":
            folder = run.base.folder
            miou = parse_json(read_text(folder / "result.json"), folder)["miou"]
            scores.setdefault(folder.parent.name, {})[run.fold] = 100 * miou
    return scores


def _scale(run: Run) -> str:
    config = run.config
    assert config is not None
    model, data = config.model, config.data
    return (
        f"{model.backbone} of width {model.width}, {data.source}, {data.size} px, {config.steps} "
        f"steps of {config.batch_size}, {config.test_episodes} test episodes"
    )
