"""A table or figure of the paper: its runs, made or resumed, next to the paper's, or drawn."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fss.config import TrainConfig, free_settings
from fss.evaluation.score import evaluate_run
from fss.files import atomic_write, parse_json, read_text, write_json
from fss.paper.compare import compared_rows, markdown
from fss.paper.figures import (
    Figure,
    draw_figure,
    figure_names,
    figure_options,
    is_figure,
    load_figure,
)
from fss.paper.listing import listing, overview, plan_without_data
from fss.paper.plan import Options, PlannedBaseLearner, PlannedRun, plan
from fss.paper.runs import (
    FAILURES,
    check_made,
    conclude_when_stopped,
    failed,
    is_first_process,
    make,
)
from fss.paper.tables import Table, default_folder, load_table, table_names
from fss.settings import flat_settings, merged, read_settings


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
    draw: bool = False,
    **overrides: Any,
) -> str:
    """Make or resume the runs of a table or figure of the paper; compare with its numbers, or draw.

    Args:
        table: T1 to T24, or a figure, F2 to F12; without one, all rows of all tables are listed
            with their state, and the figures.
        list: only list the runs and how far they are.
        rows: names of runs or numbers of rows, as `--list` shows them; by default all.
        folds: of 0 to 3; by default all, for a figure 0.
        shots: of 1 and 5; by default all that the table has, for a figure 1.
        out: folder of the runs, which tables share, and of the results: NAME.md and NAME.json of
            tables, NAME.png and NAME.svg of figures.
        scale_down: a small network on small photos for a few steps, to try a table on a CPU.
        settings: YAML file of settings of `fss train` over those of every row.
        tables: folder of the tables' files; by default those of the package.
        draw: train nothing; draw a figure from the runs that are there, and say what is missing.
        overrides: settings by part, over the file's.

    Returns the text to print.

    Raises:
        FileNotFoundError: no tables there.
        ValueError: an unknown table, row, fold or setting; no data.root given.
        Stopped: after ctrl-C or SIGTERM; the message says how to go on.
    """
    folder = Path(tables) if tables else default_folder()
    values = merged(read_settings(Path(settings)) if settings else {}, overrides)
    options = Options(rows, folds, shots, out, values, scale_down)
    if table is None:
        tables_there = [load_table(name, folder) for name in table_names(folder)]
        figures = [load_figure(name, folder) for name in figure_names(folder)]
        lines = [f"{figure.name}: {figure.table.title}" for figure in figures]
        return "\n".join([*overview(tables_there, options), *lines])
    if is_figure(table):
        figure, options = load_figure(table, folder), figure_options(options)
        if list:
            return "\n".join(listing(figure.table, options))
        return reproduce_figure(figure, options, train_missing=not draw)
    if draw:
        raise ValueError(f"draw: expected a figure, F2 to F12, got {table!r}")
    if list:
        return "\n".join(listing(load_table(table, folder), options))
    return reproduce(load_table(table, folder), options)["markdown"]


def reproduce(table: Table, options: Options) -> dict[str, Any]:
    """Make or resume the runs of a table one after the other, and compare it with the paper.

    A finished run is kept. BAM's base learners are runs too, made when a row first needs one,
    unless the settings name model.base_weights. A run that fails does not end the others: it stands
    in the table with its error. Writes NAME.json and NAME.md in the folder `options.out`, also when
    it is interrupted.

    Returns what NAME.json holds, with the text of NAME.md as "markdown".

    Raises:
        ValueError: see `plan`; a folder with runs of other settings.
        Stopped: after ctrl-C or SIGTERM; the message says how to go on.
    """
    runs = plan(table, options)
    _make_all(runs, options, lambda: _write(table, options, runs), f"{table.name}.md")
    return _write(table, options, runs)


def reproduce_figure(figure: Figure, options: Options, train_missing: bool = True) -> str:
    """Make or resume the runs of a figure, and draw it from all that are there.

    Args:
        figure: to draw.
        options: see `figure_options`; `rows` chooses what is trained.
        train_missing: else it is drawn from what is there.

    Returns lines on its runs and files.

    Raises:
        ValueError, Stopped: see `reproduce`.
    """
    runs = plan_without_data(figure.table, dataclasses.replace(options, rows=()))

    def draw() -> str:
        return draw_figure(figure, runs, options) if is_first_process() else ""

    if train_missing:
        chosen = plan(figure.table, options)
        _make_all(chosen, options, draw, f"{figure.name}.png")
        reasons = {run.row.run: run.reason for run in chosen}
        for run in runs:
            run.reason = reasons.get(run.row.run, run.reason)
    return draw()


def _make_all(
    runs: Sequence[PlannedRun], options: Options, conclude: Callable[[], Any], file: str
) -> None:
    """Make or resume runs one after the other; when interrupted, conclude with what is there."""
    for run in runs:
        for one in (run, run.base):
            if one is not None and one.config is not None and run.config is not None:
                check_made(one.folder, one.config)
    with conclude_when_stopped(conclude, options.folder / file):
        # finished ones first, so that a table that is written early has them all
        for run in sorted(runs, key=lambda run: run.state != "finished"):
            if run.config is not None:
                _make(run, run.config, options)


def _make(run: PlannedRun, config: TrainConfig, options: Options) -> None:
    """Train or resume a run and take its result; on failure, store the message in `run.reason`."""
    print(f"\n{run.row.label}, {run.shots}-shot, fold {run.fold}: {run.state}", file=sys.stderr)
    try:
        if run.base is not None and run.state != "finished":
            _make_base(run.base)
        make(run.folder, config)
        result = run.folder.result()
        run.test = result["test"]
        run.source = {name: result[name] for name in ("machine", "versions", "commit")}
        if run.row.episodes is not None:
            run.test = _test_again(run, config, run.row.episodes, options.scale_down)
    except FAILURES as error:
        run.reason = failed(error)
        print(f"{run.row.label}: {run.reason}", file=sys.stderr)


def _make_base(base: PlannedBaseLearner) -> None:
    """Train or resume a base learner; one that failed once is not tried again."""
    if base.reason is not None:
        raise RuntimeError(base.reason)
    if base.state == "finished":
        return
    print(f"base learner {base.config.out}: {base.state}", file=sys.stderr)
    try:
        make(base.folder, base.config)
    except FAILURES as error:
        base.reason = f"base learner {base.config.out}: {error}"
        raise RuntimeError(base.reason) from error


def _test_again(
    run: PlannedRun, config: TrainConfig, episodes: int, scaled_down: bool
) -> dict[str, Any]:
    """Score as many episodes as the row says; for a scaled down run, in proportion."""
    if scaled_down:
        episodes = episodes * config.test_episodes // TrainConfig.test_episodes
    path = run.folder.test_file(episodes)
    if path.is_file():
        return parse_json(read_text(path), path)
    return evaluate_run(
        config.out,
        episodes=episodes,
        root=config.data.root,
        checkpoint=config.checkpoint,
        accelerator=config.accelerator,
        out=str(path),
    )


def _write(table: Table, options: Options, runs: list[PlannedRun]) -> dict[str, Any]:
    """Write NAME.json and NAME.md, in one process only; return what `reproduce` returns."""
    made = next((run for run in runs if run.test is not None), None)
    result: dict[str, Any] = {
        "table": table.name,
        "title": table.title,
        "metric": table.metric,
        "data": table.data.name,
        "scaled_down": _scale(made) if options.scale_down and made else options.scale_down,
        "rows": [*compared_rows(table, runs)],
        "base_learners": _base_scores(runs),
        "settings": flat_settings(options.settings, free_settings(TrainConfig, "finished")),
        "source": made.source if made else None,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    text = "\n".join(markdown(result)) + "\n"
    if is_first_process():
        options.folder.mkdir(parents=True, exist_ok=True)
        write_json(options.folder / f"{table.name}.json", result)
        with atomic_write(options.folder / f"{table.name}.md") as file:
            file.write(text.encode())
    return {**result, "markdown": text}


def _base_scores(runs: list[PlannedRun]) -> dict[str, dict[int, float]]:
    """Collect the mIoU, in percent, of the finished base learners by name and fold."""
    scores: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.base is not None and run.base.state == "finished":
            miou = run.base.folder.result()["miou"]
            scores.setdefault(run.base.name, {})[run.fold] = 100 * miou
    return scores


def _scale(run: PlannedRun) -> str:
    """Say how small a run is."""
    config = run.config
    assert config is not None
    model, data = config.model, config.data
    return (
        f"{model.backbone} of width {model.width}, {data.source}, {data.size} px, {config.steps} "
        f"steps of {config.batch_size}, {config.test_episodes} test episodes"
    )
