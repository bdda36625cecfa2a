"""The runs of a table of the paper: which there are, where they lie and how far they are."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fss.config import DataConfig, TrainConfig
from fss.data import Source, build_episodes, build_source
from fss.paper.tables import (
    FOLDS,
    Count,
    Row,
    Table,
    base_values,
    needs_base_learner,
    run_values,
)
from fss.runs.folder import BaseLearnerFolder, RunFolder
from fss.settings import merged, read_settings
from fss.training.base_learner import BaseLearnerConfig

# What the settings of all rows must not say, and what says it.
_OWN = {
    "data.fold": "give --folds",
    "data.shots": "give --shots",
    "out": "give --out",
    "regime": "rows differ by it",
}


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

    @property
    def folder(self) -> Path:
        """Return the folder of the runs: scaled down ones have their own."""
        return Path(self.out) / "scaled-down" if self.scale_down else Path(self.out)


@dataclass
class PlannedBaseLearner:
    """The training of a base learner, which rows and tables share; `reason` is why it failed."""

    fold: int
    folder: BaseLearnerFolder
    config: BaseLearnerConfig
    reason: str | None = None

    @property
    def name(self) -> str:
        """Return the name that the base learners of all folds share."""
        return self.folder.path.parent.name

    @property
    def state(self) -> str:
        """Tell how far it is; see `RunFolder.state`."""
        return self.folder.state


@dataclass
class PlannedRun:
    """One training of a row, or the reason why there is none; with its result once it has one."""

    row: Row
    shots: int
    fold: int
    folder: RunFolder
    config: TrainConfig | None = None
    base: PlannedBaseLearner | None = None
    reason: str | None = None
    test: dict[str, Any] | None = None
    source: dict[str, Any] | None = None

    @property
    def state(self) -> str:
        """Tell how far it is, see `RunFolder.state`; or that it is "quoted" or "cannot run"."""
        if self.row.run is None:
            return "quoted"
        return self.folder.state if self.reason is None else "cannot run"


def plan(table: Table, options: Options, count: Count | None = None) -> list[PlannedRun]:
    """Return the runs of a table in its order, those that cannot be made with their reason.

    Args:
        table: of the paper.
        options: which runs, and where.
        count: counts the images of an epoch where no published number fits; by default in the
            user's own data.

    Raises:
        FileNotFoundError: data to count in are missing.
        ValueError: a row, fold or number of shots that the table does not have; no data.root given.
    """
    rows = _chosen_rows(table, options.rows)
    _check_within("folds", options.folds, range(FOLDS))
    _check_within("shots", options.shots, sorted({n for row in table.rows for n in row.paper}))
    _check_own(options.settings)
    overrides = options.settings
    if options.scale_down:
        overrides = merged(read_settings(table.folder / "scale_down.yaml"), overrides)
    if overrides.get("data", {}).get("root") and "source" not in options.settings.get("data", {}):
        source = table.data.settings["data"]["source"]
        overrides = merged(overrides, {"data": {"source": source}})
    folder = options.folder / table.data.name.lower()
    bases: dict[Path, PlannedBaseLearner] = {}
    count = count or EpochCounter(table.data.name)
    return [
        _plan_run(table, row, shots, fold, overrides, folder, bases, count)
        for row in rows
        for shots in row.paper
        if not options.shots or shots in options.shots
        for fold in options.folds or range(FOLDS)
    ]


class EpochCounter:
    """Counts the listed training images in the user's own data, and says so, once for each fold.

    Args:
        name: of the data set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._counts: dict[str, int] = {}
        self._sources: dict[str, Source] = {}

    def __call__(self, settings: dict[str, Any]) -> int:
        """Return the number of images with the settings of `DataConfig`.

        Raises:
            FileNotFoundError, ValueError: see `build_source` and `EpisodeDataset`.
        """
        config = DataConfig(**settings)
        found = f"{dataclasses.replace(config, fold=0, shots=1, exclude_novel=False)}"
        listed = f"{dataclasses.replace(config, shots=1)}"
        if listed not in self._counts:
            source = self._sources.get(found) or build_source(config)
            self._sources = {found: source}
            self._counts[listed] = build_episodes(config, "train", 1, 0, source).epoch
            kind = "with" if config.exclude_novel else "without"
            print(
                f"{self.name}, fold {config.fold}, {kind} the † filter: an epoch has "
                f"{self._counts[listed]} training photos, counted in your data; no published "
                "number fits these settings",
                file=sys.stderr,
            )
        return self._counts[listed]


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


def _check_own(settings: dict[str, Any]) -> None:
    """Check that no setting is among those that rows or options already set."""
    for name, instead in _OWN.items():
        part, _, last = name.rpartition(".")
        if last in (settings.get(part, {}) if part else settings):
            raise ValueError(f"settings: {name} cannot be set for all rows; {instead}")


def _plan_run(
    table: Table,
    row: Row,
    shots: int,
    fold: int,
    overrides: dict[str, Any],
    folder: Path,
    bases: dict[Path, PlannedBaseLearner],
    count: Count,
) -> PlannedRun:
    out = folder / str(row.run) / f"{shots}shot-fold{fold}"
    run = PlannedRun(row, shots, fold, RunFolder(out))
    if row.run is None:
        run.reason = f"quoted: {row.quoted}"
        return run
    try:
        values = run_values(table, row, shots, fold, overrides, count)
        model = values["model"]
        brought = model.get("base_weights") or model.get("official")
        if needs_base_learner(model) and not brought:
            run.base = _plan_base(table, row, fold, overrides, folder, bases)
            values["model"] = model | {"base_weights": run.base.config.out}
        run.config = TrainConfig.from_dict(values | {"out": str(out)})
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
    folder: Path,
    bases: dict[Path, PlannedBaseLearner],
) -> PlannedBaseLearner:
    values = base_values(table, row, fold, overrides)
    out = folder / f"base-{values['model'].backbone}" / f"fold{fold}"
    config = BaseLearnerConfig(**values, out=str(out))
    return bases.setdefault(out, PlannedBaseLearner(fold, BaseLearnerFolder(out), config))
