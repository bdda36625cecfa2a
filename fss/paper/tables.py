"""The experiments of the paper's tables: files in fss/configs/paper, and the runs they stand for.

A table is a YAML file `T16.yaml`: a `title`, the `data` file of its data set (pascal, coco), the
`metric` (miou, the default, or fb_iou) and `rows`, all that the paper prints, in its order. Or it
is `means_of` another table, whose rows the paper prints there without their folds. A row has

    label       as the table calls it
    run         the name of its training in runs.yaml; rows of any table with the same name share it
    quoted      instead of a run: why there is none
    episodes    test episodes, where others than the run's own
    note        what a reader of the numbers must know
    paper       the paper's numbers in percent by shots: those of folds 0 to 3 and their mean, or
                the mean alone if no table has its folds

A run in runs.yaml has

    regime      a file of fss/configs/regimes
    recipe      one of the data file's recipes; by default the paper's own
    config      instead of both: a file of fss/configs, the recipe of a method's authors
    settings    what else differs from the defaults of `fss train`; steps may be a list by fold
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fss.config import DataConfig, ModelConfig, TrainConfig
from fss.files import read_yaml
from fss.models import MODELS
from fss.settings import FOLDER, check_names, merged, read_settings
from fss.training.base_learner import BaseLearnerConfig, BaseLearnerData

FOLDS = 4
# The settings of a model that are those of its base learner too.
_BACKBONE = ("backbone", "stem", "stride_on", "width", "weights")
# The settings of the data, besides the † filter, on which the number of listed images depends.
_LISTING = ("source", "train_list", "folds", "min_area")


class Published(NamedTuple):
    """The paper's numbers of a row, in percent: by fold where it gives them, and the mean."""

    folds: tuple[float, ...] | None
    mean: float


@dataclass(frozen=True)
class DataSet:
    """What the tables of a data set share: see fss/configs/paper/pascal.yaml."""

    name: str
    needs: str
    epochs: int
    images: dict[str, list[int]]
    base_learner: dict[str, Any]
    settings: dict[str, Any]
    recipes: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A row of a table, see this module; `settings` are those of its run, with regime and recipe.

    Either `run` is None or `quoted`.
    """

    label: str
    run: str | None
    quoted: str | None
    settings: dict[str, Any]
    episodes: int | None
    note: str | None
    paper: dict[int, Published]


@dataclass(frozen=True)
class Table:
    """A table of the paper, see this module; `folder` is the one of its file."""

    name: str
    title: str
    metric: str
    data: DataSet
    rows: tuple[Row, ...]
    folder: Path


def default_folder() -> Path:
    """Return the folder of the tables that come with the package."""
    return FOLDER / "paper"


def table_names(folder: Path) -> list[str]:
    """List the tables of a folder in the paper's order.

    Raises:
        FileNotFoundError: no table there.
    """
    names = [path.stem for path in folder.glob("T*.yaml")]
    if not names:
        raise FileNotFoundError(
            f"tables: expected files like T16.yaml in {folder}, found none; omit --tables for "
            "those of the paper"
        )
    return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name))


def load_table(name: str, folder: Path) -> Table:
    """Read and check a table, its data file, its runs and their regimes.

    Raises:
        ValueError: no table of that name; a key that is not known, a number that cannot be.
    """
    known = table_names(folder)
    found = [table for table in known if table.lower() == name.lower()]
    if not found:
        raise ValueError(
            f"table: expected one of {', '.join(known)}, or a figure such as F3; got {name!r}"
        )
    path = folder / f"{found[0]}.yaml"
    values = _read(path)
    if "means_of" in values:
        return _means(found[0], values, path)
    _check_keys(values, {"title", "data", "rows"}, {"metric"}, str(path))
    metric = values.get("metric", "miou")
    if metric not in ("miou", "fb_iou"):
        raise ValueError(f"{path}: metric: expected miou or fb_iou, got {metric!r}")
    data = _data_set(folder / f"{values['data']}.yaml")
    if not isinstance(values["rows"], list) or not values["rows"]:
        raise ValueError(f"{path}: rows: expected a list of rows, got {values['rows']!r}")
    runs = _read(folder / "runs.yaml")
    rows = tuple(_row(row, runs, data, path) for row in values["rows"])
    return Table(found[0], values["title"], metric, data, rows, folder)


def _means(name: str, values: dict[str, Any], path: Path) -> Table:
    """Return a table of which another one has the folds, as that other one under its name."""
    _check_keys(values, {"means_of"}, set(), str(path))
    other = values["means_of"]
    known = table_names(path.parent)
    if other not in known or "means_of" in _read(path.with_name(f"{other}.yaml")):
        raise ValueError(
            f"{path}: means_of: expected one of {', '.join(known)} with rows of its own; "
            f"got {other!r}"
        )
    table = load_table(other, path.parent)
    return dataclasses.replace(table, name=name, title=f"{table.title} (means of {table.name})")


Count = Callable[[dict[str, Any]], int]
"""Counts the training images that are listed with the settings of `DataConfig`."""


def run_values(
    table: Table,
    row: Row,
    shots: int,
    fold: int,
    overrides: dict[str, Any],
    count: Count | None = None,
) -> dict[str, Any]:
    """Return the configuration of one run, as the values of `TrainConfig.from_dict`.

    The number of steps is the paper's number of epochs, unless `overrides` gives one. A setting
    model.base_weights concerns BAM alone, and `{data}`, `{backbone}` and `{fold}` in it are filled
    in.

    Args:
        table, row, shots, fold: which run.
        overrides: settings over those of the row.
        count: counts the images of an epoch where no published number fits.

    Raises:
        ValueError: an epoch whose length is not known.
    """
    values = merged(merged(table.data.settings, row.settings), overrides)
    values = merged(values, {"data": {"fold": fold, "shots": shots}, "model": {}})
    values["model"] = _with_base_learner(values["model"], table.data, fold)
    if isinstance(values.get("steps"), list):
        values["steps"] = values["steps"][fold]
    if "steps" not in values:
        images = published_images(table.data, values["data"])
        if images is None and count is None:
            filtered = values["data"].get("exclude_novel", True)
            raise ValueError(
                f"steps: {table.data.name} has no number of {'' if filtered else 'un'}filtered "
                "training images in its file that fits these settings, so the length of an epoch "
                "is not known; give steps in --settings"
            )
        images = count(values["data"]) if images is None else images
        batch = values.get("batch_size", TrainConfig.batch_size)
        values["steps"] = table.data.epochs * (images // batch)
    return values


def published_images(data: DataSet, settings: dict[str, Any]) -> int | None:
    """Return how many training images the published lists have; None where that is not known.

    Other lists, folds or areas than the published ones have numbers of their own.

    Args:
        data: the data set.
        settings: of `DataConfig`, with the fold.
    """
    own = {field.name: field.default for field in dataclasses.fields(DataConfig)} | {
        "source": data.settings["data"]["source"]
    }
    if any(settings.get(name, own[name]) != own[name] for name in _LISTING):
        return None
    filtered = settings.get("exclude_novel", own["exclude_novel"])
    images = data.images.get("filtered" if filtered else "unfiltered")
    return images[settings["fold"]] if images else None


def base_values(table: Table, row: Row, fold: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `BaseLearnerConfig` for the base learner of a row of BAM.

    All rows with a backbone share it: it depends on the table's data set and the backbone alone,
    and on those `overrides` that `fss train-base` has a setting for. The number of steps is BAM's
    number of epochs of all photos of the published list, unless `overrides` gives one.
    """
    names = {field.name for field in dataclasses.fields(BaseLearnerConfig)} - {"data", "model"}
    values = {name: value for name, value in overrides.items() if name in names}
    source = table.data.settings["data"]["source"]
    data = {"source": source} | overrides.get("data", {}) | {"fold": fold, "shots": 1}
    model = merged(row.settings, overrides).get("model", {})
    model = {name: model[name] for name in _BACKBONE if name in model}
    batch = values.get("batch_size", BaseLearnerConfig.batch_size)
    bams = table.data.base_learner
    steps = bams["epochs"] * (bams["images"] // batch)
    parts = {"data": BaseLearnerData(**data), "model": ModelConfig(**model)}
    return {"steps": steps, **bams["settings"], **values, **parts}


def needs_base_learner(model: dict[str, Any]) -> bool:
    """Tell whether the settings of a model name one with a base learner."""
    kind = MODELS.get(model.get("name", ModelConfig.name))
    return kind is not None and kind.needs_base_learner


def _with_base_learner(model: dict[str, Any], data: DataSet, fold: int) -> dict[str, Any]:
    path = model.get("base_weights")
    if not needs_base_learner(model):
        return {name: value for name, value in model.items() if name != "base_weights"}
    if path is None:
        return model
    backbone = model.get("backbone", ModelConfig.backbone)
    try:
        path = path.format(data=data.name.lower(), backbone=backbone, fold=fold)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            "model.base_weights: expected a path, perhaps with {data}, {backbone} and {fold}; got "
            f"{path!r}"
        ) from error
    return model | {"base_weights": path}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent.name}: expected a file {path}, found none")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected values by name, got {values!r:.200}")
    return values


def _data_set(path: Path) -> DataSet:
    keys = {field.name for field in dataclasses.fields(DataSet)}
    values = _read(path)
    _check_keys(values, keys, set(), str(path))
    for kind, images in values["images"].items():
        if kind not in ("filtered", "unfiltered") or len(images) != FOLDS or min(images) < 1:
            raise ValueError(
                f"{path}: images: expected filtered or unfiltered with {FOLDS} numbers, got "
                f"{kind}: {images}"
            )
    _check_keys(values["base_learner"], {"epochs", "images", "settings"}, set(), str(path))
    check_names(values["base_learner"]["settings"], BaseLearnerConfig, str(path))
    for settings in (values["settings"], *values["recipes"].values()):
        check_names(settings, TrainConfig, str(path))
    return DataSet(**values)


def _row(values: Any, runs: dict[str, Any], data: DataSet, path: Path) -> Row:
    where = f"{path}: {values.get('label', values) if isinstance(values, dict) else values}"
    quoted = isinstance(values, dict) and "quoted" in values
    optional = {"note"} if quoted else {"note", "episodes"}
    _check_keys(values, {"label", "paper", "quoted" if quoted else "run"}, optional, where)
    settings = {} if quoted else _run_settings(values["run"], runs, data, path)
    episodes = values.get("episodes")
    if episodes is not None and (not isinstance(episodes, int) or episodes < 1):
        raise ValueError(f"{where}: episodes: expected a number from 1 on, got {episodes!r}")
    if quoted and not (isinstance(values["quoted"], str) and values["quoted"].strip()):
        raise ValueError(f"{where}: quoted: expected a reason, got {values['quoted']!r}")
    if not isinstance(values["paper"], dict) or not values["paper"]:
        raise ValueError(f"{where}: paper: expected numbers by shots, got {values['paper']!r}")
    paper = {
        _shots(shots, where): _published(numbers, where)
        for shots, numbers in values["paper"].items()
    }
    return Row(
        values["label"],
        values.get("run"),
        values.get("quoted"),
        settings,
        episodes,
        values.get("note"),
        paper,
    )


def _run_settings(run: Any, runs: dict[str, Any], data: DataSet, path: Path) -> dict[str, Any]:
    """Return the settings of a run of runs.yaml: its recipe's, its regime's and its own."""
    where = f"{path.with_name('runs.yaml')}: {run}"
    if not isinstance(run, str) or run not in runs:
        raise ValueError(
            f"{path}: run: expected one of runs.yaml beside it, which has the regime, recipe and "
            f"settings of each; got {run!r}"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", run):
        raise ValueError(f"{where}: expected the name of a folder, got {run!r}")
    values, configs = runs[run], path.parent.parent
    if isinstance(values, dict) and "config" in values:
        _check_keys(values, {"config"}, {"settings"}, where)
        found = _recipe_of_authors(configs / f"{values['config']}.yaml", data)
    else:
        _check_keys(values, {"regime"}, {"recipe", "settings"}, where)
        recipe = values.get("recipe")
        if recipe is not None and recipe not in data.recipes:
            known = ", ".join(data.recipes)
            raise ValueError(f"{where}: recipe: expected one of {known}, got {recipe!r}")
        regime = read_settings(configs / "regimes" / f"{values['regime']}.yaml")
        found = merged(data.recipes.get(recipe, {}), regime)
    own = values.get("settings", {})
    check_names(own, TrainConfig, where)
    steps = own.get("steps")
    if isinstance(steps, list) and len(steps) != FOLDS:
        raise ValueError(f"{where}: steps: expected {FOLDS} numbers, one a fold; got {steps}")
    return merged(found, own)


def _recipe_of_authors(path: Path, data: DataSet) -> dict[str, Any]:
    """Read a file of `fss train` without what says where photos, networks and results lie.

    What the file leaves to the defaults of `fss train` does so over the data file's settings.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    left = {name: defaults[name] for name in data.settings if name != "data"}
    values = left | read_settings(path)
    values["data"] = {n: v for n, v in values.get("data", {}).items() if n != "root"}
    values["model"] = {n: v for n, v in values.get("model", {}).items() if n != "base_weights"}
    return {name: value for name, value in values.items() if name != "out"}


def _shots(shots: Any, where: str) -> int:
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise ValueError(f"{where}: paper: expected a number of shots, got {shots!r}")
    return shots


def _published(numbers: Any, where: str) -> Published:
    values = numbers if isinstance(numbers, list) else [numbers]
    good = all(isinstance(value, (int, float)) and 0 <= value <= 100 for value in values)
    if not good or len(values) not in (1, FOLDS + 1):
        raise ValueError(
            f"{where}: paper: expected percentages, a mean or those of folds 0 to {FOLDS - 1} and "
            f"the mean; got {numbers!r}"
        )
    return Published(tuple(values[:-1]) or None, values[-1])


def _check_keys(values: Any, required: set[str], optional: set[str], where: str) -> None:
    got = set(values) if isinstance(values, dict) else set()
    missing, unknown = sorted(required - got), sorted(map(str, got - required - optional))
    if missing or unknown:
        raise ValueError(
            f"{where}: expected {', '.join(sorted(required))}"
            + (f" and perhaps {', '.join(sorted(optional))}" if optional else "")
            + (f"; missing {', '.join(missing)}" if missing else "")
            + (f"; unknown {', '.join(unknown)}" if unknown else "")
        )


def table_of_runs(name: str, title: str, data: str, runs: dict[str, str], folder: Path) -> Table:
    """Make a table of some runs of runs.yaml, without numbers of the paper.

    Args:
        name: of the table, and of its file in messages.
        title: of the table.
        data: the name of its data set's file.
        runs: the label of each run.
        folder: of the files.

    Raises:
        ValueError: a run that is not in runs.yaml.
    """
    data_set, described = _data_set(folder / f"{data}.yaml"), _read(folder / "runs.yaml")
    path = folder / f"{name}.yaml"
    rows = []
    for run, label in runs.items():
        settings = _run_settings(run, described, data_set, path)
        unknown = dict.fromkeys((1, 5), Published(None, math.nan))
        rows.append(Row(label, run, None, settings, None, None, unknown))
    return Table(name, title, "miou", data_set, tuple(rows), folder)
