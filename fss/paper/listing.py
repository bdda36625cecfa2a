"""Which rows and runs the tables of the paper have, and how far they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from fss.paper.plan import Options, PlannedBaseLearner, PlannedRun, plan
from fss.paper.tables import Row, Table
from fss.settings import merged


def listing(table: Table, options: Options) -> Iterator[str]:
    """Yield lines about the runs of a table: what they are, how far they are, why they cannot run.

    Raises:
        ValueError: see `plan`.
    """
    runs = plan_without_data(table, options)
    yield _heading(table)
    for number, row in enumerate(table.rows, 1):
        own = [run for run in runs if run.row is row]
        for shots in dict.fromkeys(run.shots for run in own):
            folds = [run for run in own if run.shots == shots]
            reason = next((f" ({run.reason})" for run in folds if run.reason), "")
            states = f"folds {_states(folds)}{reason}"
            state = f"quoted: {row.quoted}" if row.quoted else states
            yield f"{number:3d}  {row.run or '–'}, {shots}-shot: {row.label}; {state}"
    bases = list({id(run.base): run.base for run in runs if run.base is not None}.values())
    for name in dict.fromkeys(base.name for base in bases):
        folds_of_base = [base for base in bases if base.name == name]
        yield f"     {name}: base learner that these rows share; folds {_states(folds_of_base)}"


def overview(tables: Sequence[Table], options: Options) -> Iterator[str]:
    """Yield a line for each row of the tables with its state, and one that counts them.

    A row holds if all its runs can be made; what is quoted has none.

    Raises:
        ValueError: see `plan`.
    """
    states: list[str] = []
    runs: list[PlannedRun] = []
    for table in tables:
        planned = plan_without_data(table, options)
        runs += planned
        yield _heading(table)
        for number, row in enumerate(table.rows, 1):
            state, text = _row_state(row, [run for run in planned if run.row is row])
            states.append(state)
            yield f"{number:3d}  {row.label}: {text}"
    counted = [f"{states.count('holds')} hold", f"{states.count('quoted')} are quoted"]
    if "cannot run" in states:
        counted.append(f"{states.count('cannot run')} cannot run")
    yield f"{len(states)} rows: {', '.join(counted)}."
    trainings = {run.folder.path: run for run in runs if run.config is not None}
    bases = {run.base.folder.path: run.base for run in runs if run.base is not None}
    yield (
        f"Trainings that they share: {_finished([*trainings.values()])}; base learners of BAM: "
        f"{_finished([*bases.values()])}."
    )


def plan_without_data(table: Table, options: Options) -> list[PlannedRun]:
    """Plan a table whose data need not be there.

    A placeholder passes for their folder, and another for the images of an epoch, which no line
    shows.
    """
    if not options.scale_down:
        settings = merged({"data": {"root": "photos"}}, options.settings)
        options = dataclasses.replace(options, settings=settings)
    return plan(table, options, count=lambda settings: 10_000)


def _heading(table: Table) -> str:
    return f"{table.name}: {table.title}; {table.data.name}: {table.data.needs}"


def _row_state(row: Row, runs: list[PlannedRun]) -> tuple[str, str]:
    """Return "holds", "quoted" or "cannot run", and the same with what is to be said of it."""
    if row.quoted:
        return "quoted", f"quoted: {row.quoted}"
    reason = next((run.reason for run in runs if run.reason), None)
    if reason:
        return "cannot run", f"cannot run: {row.run}: {reason}"
    return "holds", f"holds; {row.run}: {_finished(runs)}"


def _finished(runs: Sequence[PlannedRun | PlannedBaseLearner]) -> str:
    return f"{sum(run.state == 'finished' for run in runs)} of {len(runs)} finished"


def _states(runs: Sequence[PlannedRun | PlannedBaseLearner]) -> str:
    states = ("finished", "in progress", "not started", "cannot run")
    folds = {state: [str(run.fold) for run in runs if run.state == state] for state in states}
    return ", ".join(f"{state}: {' '.join(found)}" for state, found in folds.items() if found)
