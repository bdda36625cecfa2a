"""A plan of runs: read and checked; its runs, their settings, and what the trials chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.few_shot.rows import Row, check_settings_are
from benchmarks.few_shot.training import as_word, check_matching
from fss.config import TrainConfig
from fss.data import build_source
from fss.files import read_yaml
from fss.settings import check_names, config_file, flat_settings, merged

Settings = dict[str, Any]
Kind = Literal["trial", "final", "untrained"]


@dataclass(frozen=True)
class Stage:
    """A setting of a regime and the values that are tried; the best one is kept.

    Args:
        regime: of the plan.
        setting: dotted name.
        values: tried in turn, by the regime's settings as far as they are chosen; null stands for
            what earlier stages of the regime chose, and is no trial of its own.
        shared: what is chosen holds for the other regimes too, in later stages and the final runs.
    """

    regime: str
    setting: str
    values: tuple[Any, ...]
    shared: bool = False


@dataclass(frozen=True)
class Search:
    """The trials: by the mIoU on base classes, on photos outside the training list.

    Args:
        fold: of the trials; "each" chooses for each fold of the final runs by itself. The base
            classes of a single fold are novel in the others.
        settings: of trials besides.
        stages: one after the other.
    """

    fold: int | Literal["each"] = 0
    settings: Settings = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Final:
    """The runs with the chosen settings.

    Args:
        folds: of each regime.
        seeds: of head and training episodes.
        settings: of these runs besides.
        untrained: sizes of photos, pixels, at which the backbone's pretrained weights are matched
            without training, on the test episodes of these runs.
    """

    folds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (321,)
    settings: Settings = field(default_factory=dict)
    untrained: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is to be run. Settings are those of `fss train`, nested or by dotted name.

    Args:
        config: YAML file of `fss train`, or the name of one that comes with fss.
        regimes: settings of each regime, by its name in the table.
        settings: of all runs.
        search: the trials.
        final: the runs with what was chosen.
    """

    config: str
    regimes: dict[str, Settings]
    settings: Settings = field(default_factory=dict)
    search: Search = field(default_factory=Search)
    final: Final = field(default_factory=Final)

    @property
    def search_folds(self) -> tuple[int, ...]:
        """Return the folds that have trials."""
        if not self.search.stages:
            return ()
        return self.final.folds if self.search.fold == "each" else (self.search.fold,)


class Run(NamedTuple):
    """A run of the plan.

    Args:
        name: of its row and folder.
        kind: "trial" or "final"; "untrained" is a test of matching, which trains nothing.
        regime: of the plan; of matching the name of its row.
        fold: of the data.
        settings: by dotted name; None as long as they wait for the trials before.
    """

    name: str
    kind: Kind
    regime: str
    fold: int
    settings: Settings | None


def read_plan(path: Path, overriding: Settings | None = None) -> Plan:
    """Read a plan and check its keys.

    Args:
        path: a YAML file.
        overriding: settings over the plan's own, for all runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, or one that does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"plan: expected a YAML file at {path}, found none")
    content = _keys(read_yaml(path), Plan, "plan")
    search = _keys(content.get("search", {}), Search, "search")
    final = _keys(content.get("final", {}), Final, "final")
    stages = search.get("stages", [])
    if not isinstance(stages, list):
        raise ValueError(f"search.stages: expected a list, got {stages!r}")
    read = [_keys(stage, Stage, "search.stages") for stage in stages]
    for part in (content, search, final):
        _keys(part.get("settings", {}), None, "settings")
    for regime, settings in _keys(content["regimes"], None, "regimes").items():
        _keys(settings, None, f"regimes.{regime}")
    for stage in read:
        if not isinstance(stage["values"], list) or not stage["values"]:
            raise ValueError(f"search.stages: expected a list of values, got {stage['values']!r}")
        for key in ("regime", "setting"):
            _check_text(stage[key], f"search.stages: {key}")
    _check_text(content["config"], "config")
    plan = Plan(
        **content
        | {
            "search": Search(
                **search
                | {"stages": tuple(Stage(**s | {"values": tuple(s["values"])}) for s in read)}
            ),
            "final": Final(**{k: tuple(v) if isinstance(v, list) else v for k, v in final.items()}),
        }
    )
    plan = _overridden(plan, overriding or {})
    _check_plan(plan)
    return plan


def _keys(values: Any, part: type | None, where: str) -> dict[str, Any]:
    """Return a mapping of a plan; its keys are the fields of a dataclass, if one is given."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys with values, got {values!r:.200}")
    for name in values:
        _check_text(name, where)
    if part is not None:
        fields = {each.name: each for each in dataclasses.fields(part)}
        for name in values:
            if name not in fields:
                raise ValueError(f"{where}: unknown key {name!r}; expected {', '.join(fields)}")
        for name, each in fields.items():
            needed = each.default is dataclasses.MISSING
            if name not in values and needed and each.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: expected {name}, found none")
    return dict(values)


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a name, got {value!r:.200}")


def _overridden(plan: Plan, settings: Settings) -> Plan:
    def over(part: Settings) -> Settings:
        return flat_settings(part) | settings

    return dataclasses.replace(
        plan,
        settings=over(plan.settings),
        search=dataclasses.replace(plan.search, settings=over(plan.search.settings)),
        final=dataclasses.replace(plan.final, settings=over(plan.final.settings)),
    )


def _check_plan(plan: Plan) -> None:
    fold = plan.search.fold
    if fold != "each" and not _is_number(fold):
        raise ValueError(f'search.fold: expected a number or "each", got {fold!r}')
    for name, values in (("folds", plan.final.folds), ("seeds", plan.final.seeds)):
        if not isinstance(values, tuple) or not all(map(_is_number, values)):
            raise ValueError(f"final.{name}: expected a list of numbers, got {values!r}")
    sizes = plan.final.untrained
    if not isinstance(sizes, tuple) or not all(map(_is_number, sizes)):
        raise ValueError(f"final.untrained: expected a list of sizes in pixels, got {sizes!r}")
    if not plan.final.seeds:
        raise ValueError("final.seeds: expected at least one, got none; trials take the first")
    seen: set[str] = set()
    for stage in plan.search.stages:
        if stage.regime not in plan.regimes:
            names = ", ".join(plan.regimes)
            raise ValueError(f"search.stages: expected a regime of {names}; got {stage.regime!r}")
        if None in stage.values and stage.regime not in seen:
            raise ValueError(
                f"search.stages: null stands for what an earlier stage of {stage.regime} chose, "
                "there is none"
            )
        seen.add(stage.regime)
    runs = runs_of(plan, {})
    names = [run.name for run in runs]
    for name in names:
        if name != Path(name).name:
            raise ValueError(
                f"plan: expected regimes that can be part of a file's name, got the run {name!r}"
            )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or not runs:
        got = f"{twice} twice" if twice else "none"
        raise ValueError(f"plan: expected different runs, got {got}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_runs(plan: Plan, paths: Mapping[str, str]) -> None:
    """Check the settings of all runs, trying each value of a stage with the first of the others.

    Raises:
        ValueError: a setting that `fss train` does not have, or whose value does not fit.
    """
    stages = plan.search.stages
    of_regime: dict[str, list[Settings]] = {regime: [{}] for regime in plan.regimes}
    for stage in stages:
        of_regime[stage.regime] += [{stage.setting: v} for v in stage.values if v is not None]
    folder = config_file(plan.config)
    for of_kind in (plan.search.settings, plan.final.settings):
        for regime, tried in of_regime.items():
            for own in tried:
                flat = _settings(plan, of_kind, regime, 0, 0, own) | paths
                values = merged(read_yaml(folder), nested(flat))
                check_names(values, TrainConfig, plan.config)
                try:
                    config = TrainConfig.from_dict(values)
                except TypeError as error:
                    raise ValueError(str(error)) from error
                if config.validation_classes != "base":
                    raise ValueError(
                        'validation_classes: expected "base", which choose the settings, got '
                        f'"{config.validation_classes}"; rows have the novel ones too'
                    )
    for run in runs_of(plan, {}):
        if run.kind == "untrained":
            check_matching(untrained_config(plan, run, paths))


def check_folds(plan: Plan, paths: Mapping[str, str]) -> None:
    """Check that the data have the folds of a plan.

    Raises:
        ValueError, FileNotFoundError: they have fewer; data that cannot be read.
    """
    regime = next(iter(plan.regimes))
    flat = _settings(plan, plan.final.settings, regime, 0, 0, {}) | paths
    values = merged(read_yaml(config_file(plan.config)), nested(flat))
    count = len(build_source(TrainConfig.from_dict(values).data).folds)
    for name, folds in (("search.fold", plan.search_folds), ("final.folds", plan.final.folds)):
        if max(folds, default=0) >= count:
            raise ValueError(
                f"{name}: expected 0 to {count - 1}, as the data have {count} folds; "
                f"got {max(folds)}"
            )


def check_rows(plan: Plan, rows: Mapping[str, Row], out: Path) -> None:
    """Check that finished runs are those of the plan as it is now.

    Raises:
        ValueError: a row with other settings.
    """
    advice = f"give another --out than {out} for a changed plan"
    for run in runs_of(plan, rows):
        if run.name not in rows or run.settings is None:
            continue
        had = rows[run.name]["settings"]
        unset = [key for key in had if key not in run.settings]
        if unset:
            raise ValueError(f"{run.name}: it was made with {', '.join(unset)}; {advice}")
        check_settings_are(run, had, advice)


def runs_of(plan: Plan, rows: Mapping[str, Row]) -> list[Run]:
    """List all runs in their order; settings are known as far as the rows decide them."""
    runs: list[Run] = []
    chosen: dict[int, dict[str, Settings | None]] = {}
    for fold in plan.search_folds:
        trials, chosen[fold] = _search(plan, rows, fold)
        runs += trials
    for seed in plan.final.seeds:
        for fold in plan.final.folds:
            for regime in plan.regimes:
                own: Settings | None = {}
                if plan.search.stages:
                    own = chosen[fold if plan.search.fold == "each" else plan.search.fold][regime]
                if own is not None:
                    own = _settings(plan, plan.final.settings, regime, fold, seed, own)
                runs.append(Run(f"fold{fold}-{regime}-seed{seed}", "final", regime, fold, own))
    for size in plan.final.untrained:
        for fold in plan.final.folds:
            regime = f"nothing trained, {size} px"
            own = _settings(plan, plan.final.settings, None, fold, plan.final.seeds[0], {})
            own["data.size"] = size
            runs.append(Run(f"fold{fold}-untrained-{size}px", "untrained", regime, fold, own))
    return runs


def untrained_config(plan: Plan, run: Run, paths: Mapping[str, str]) -> TrainConfig:
    """Return the settings of a test of matching as `fss train` has them.

    Raises:
        ValueError: a value that does not fit.
    """
    assert run.settings is not None
    values = merged(read_yaml(config_file(plan.config)), nested(run.settings | paths))
    return TrainConfig.from_dict(values)


def chosen_settings(plan: Plan, rows: Mapping[str, Row], fold: int) -> dict[str, Settings | None]:
    """Return by regime what the trials chose for a fold; None where they are not done."""
    if not plan.search.stages:
        return {regime: {} for regime in plan.regimes}
    return _search(plan, rows, fold if plan.search.fold == "each" else plan.search.fold)[1]


def _search(
    plan: Plan, rows: Mapping[str, Row], fold: int
) -> tuple[list[Run], dict[str, Settings | None]]:
    """List the trials of a fold, and return what they chose for each regime."""
    runs: list[Run] = []
    shared: Settings | None = {}
    chosen: dict[str, Settings | None] = {regime: {} for regime in plan.regimes}
    best: dict[str, float] = {}
    for stage in plan.search.stages:
        regime, former = stage.regime, chosen[stage.regime]
        inherited = None if former is None or shared is None else shared | former
        scores: list[tuple[float, Settings]] = []
        complete = inherited is not None
        for value in stage.values:
            if value is None:
                if inherited is not None:
                    scores.append((best[regime], inherited))
                continue
            name = f"trial-fold{fold}-{regime}-{stage.setting.rpartition('.')[2]}={_plain(value)}"
            own = settings = None
            if inherited is not None:
                own = inherited | {stage.setting: value}
                seed = plan.final.seeds[0]
                settings = _settings(plan, plan.search.settings, regime, fold, seed, own)
            runs.append(Run(name, "trial", regime, fold, settings))
            if own is not None and name in rows:
                scores.append((rows[name]["base"]["miou"], own))
            else:
                complete = False
        chosen[regime] = None
        if complete:  # the first of equals, as max does
            best[regime], chosen[regime] = max(scores, key=lambda each: each[0])
        if stage.shared:
            own = chosen[regime]
            if shared is not None:
                shared = None if own is None else shared | {stage.setting: own[stage.setting]}
    for regime, own in chosen.items():
        chosen[regime] = None if own is None or shared is None else shared | own
    return runs, chosen


def _settings(
    plan: Plan, of_kind: Settings, regime: str | None, fold: int, seed: int, chosen: Settings
) -> Settings:
    """Return the settings of a run by dotted name; the later ones win."""
    settings = {"validation_classes": "base", "checkpoint": "last"}
    own = {} if regime is None else plan.regimes[regime]
    for part in (plan.settings, of_kind, own, chosen):
        settings |= flat_settings(part)
    return settings | {"data.fold": fold, "seed": seed, "data.seed": seed}


def nested(flat: Mapping[str, Any]) -> Settings:
    """Return settings by dotted name as nested ones."""
    result: Settings = {}
    for name, value in flat.items():
        for key in reversed(name.split(".")):
            value = {key: value}
        result = merged(result, value)
    return result


def _plain(value: Any) -> str:
    """Return a value as a part of a file name."""
    return as_word(value).translate(str.maketrans(dict.fromkeys(' []"', "") | {"/": "-"}))
