"""`fss eval`: the score of a run, of the authors' checkpoint, or of matching without training."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import nn

from fss.config import (
    Accelerator,
    Checkpoint,
    DataConfig,
    Folds,
    Resize,
    SourceName,
    TrainConfig,
)
from fss.data import Source, build_source
from fss.evaluation.evaluate import episode_classes, evaluate_seeds
from fss.files import check_writable, write_json
from fss.models import (
    backbone_name,
    build_matching,
    build_model,
    matching_size,
    rebuild_model,
)
from fss.processes import float32_products, launch, lay_out, torchrun_layout
from fss.runs.checkpoint import explain_misfit
from fss.runs.folder import RunFolder
from fss.settings import read_settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PROTOCOLS: dict[str, dict[str, Any]] = {
    "bam": {
        "protocol": "pfenet",
        "shuffle_test": False,
        "resize": "canvas",
        "test_seeds": (510, 365, 382, 322, 988),
        "test_episodes": 1000,
    },
    "pfenet": {
        "protocol": "pfenet",
        "shuffle_test": False,
        "resize": "canvas",
        "test_seeds": (321,),
        "test_episodes": 5000,
    },
    "hsnet": {
        "protocol": "hsnet",
        "shuffle_test": False,
        "resize": "network",
        "test_seeds": (0,),
        "test_episodes": 1000,
    },
}
"""What the published tests choose; PFENet asks for 20000 episodes of COCO."""

# Pascal's names of classes that COCO has under another one, without spaces.
_PASCAL_NAMES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def evaluate_run(
    run: str | None = None,
    official: str | None = None,
    weights: str | None = None,
    backbone: str | None = None,
    stride_on: Literal["conv1", "conv2"] | None = None,
    size: int | None = None,
    episodes: int | None = None,
    seeds: tuple[int, ...] | None = None,
    shots: int | None = None,
    root: str | None = None,
    source: SourceName | None = None,
    fold: int | None = None,
    folds: Folds | None = None,
    train_list: str | None = None,
    val_list: str | None = None,
    min_area: float | None = None,
    drop_small_classes: bool | None = None,
    classes: Literal["novel", "base"] = "novel",
    protocol: Literal["bam", "pfenet", "hsnet"] | None = None,
    checkpoint: Checkpoint = "best",
    batch_size: int | None = None,
    workers: int | None = None,
    resize: Resize | None = None,
    feature_cache: float | None = None,
    accelerator: Accelerator = "auto",
    out: str | None = None,
    episodes_out: str | None = None,
) -> dict:
    """Score a run on test episodes and write the result next to it, or score matching.

    Matching needs no run: each pixel is compared with object and background of the supports, by
    the features of a pretrained backbone, `weights` (`fss.models.Matching`).
    Nothing is trained. What a run would say is then given here or as by default in `fss train`.

    On other data, which `source` names, the classes are those of their fold without the ones that
    training saw, by name: those are not novel to the model, and BAM's base learner, whose classes
    stay those of training, votes against them.

    Args:
        run: folder of a training run, or a checkpoint file in it; or a YAML file with the settings
            of `fss train` that say model, data and fold of an authors' checkpoint.
        official: a checkpoint of the method's authors, with a YAML file as `run`; by default its
            model.official.
        weights: instead of a run: file of a pretrained backbone, "torchvision" or "shapes", see
            `ModelConfig`.
        backbone: of `weights`; by default the one that the file is of.
        stride_on: of `weights`, see `ModelConfig`; by default what the file says, else conv2.
        size: of the input with `weights`, pixels; by default 513, with "shapes" 161.
        episodes: per seed; by default as the run was tested.
        seeds: one evaluation each; by default as the run was tested.
        shots: support photos per episode; by default as trained.
        root: folder of the photos, if they have moved, or of the other data.
        source: other data than those of the run, or the data for `weights`; see `DataConfig`.
        fold: of these data; by default the number of the run's, with `weights` 0.
        folds: of other data that are "coco", "fwb" or "panet".
        train_list: a list of the data, see `DataConfig`.
        val_list: a list of the data, see `DataConfig`.
        min_area: smallest area at which a photo shows a class; by default as trained.
        drop_small_classes: omit classes that have no more than K photos.
        classes: "novel", those of the fold; "base", the others, which training saw.
        protocol: seeds, episodes, order of queries, transform and resize of the published tests
            of "bam", "pfenet" or "hsnet"; options given as well take precedence. HSNet's needs its
            lists (train_list, val_list), and the side stays that of training.
        checkpoint: of the folder, "best" or "last".
        batch_size: episodes at a time; does not change the score.
        workers: processes that load episodes.
        resize: of predictions, see `TrainConfig`; by default as the run was tested.
        feature_cache: GiB of features to keep of recurring photos; does not change the score.
            Matching keeps none.
        accelerator: "auto", "cpu" or "cuda".
        out: JSON file of the result; by default eval.json, or for other data
            eval_SOURCE_foldN.json, in the run's folder or the `out` of the YAML file's settings.
            With `weights` nothing is written by default.
        episodes_out: CSV file of the pixels right and wrong of each episode, for a paired
            comparison.

    Returns what it writes.

    Raises:
        FileNotFoundError: no run, checkpoint or photos there.
        ValueError: a damaged checkpoint, or a setting that does not fit.
    """
    data = {"shots": shots, "root": root, "workers": workers, "min_area": min_area}
    data |= {"train_list": train_list, "val_list": val_list}
    data = _given(data | {"drop_small_classes": drop_small_classes})
    elsewhere = _given({"source": source, "fold": fold, "folds": folds})
    matching = {"weights": weights, "backbone": backbone, "stride_on": stride_on, "size": size}
    if run is None:
        of_runs = {"official": official, "checkpoint": checkpoint if checkpoint != "best" else None}
        tested = _read_weights(data | elsewhere, matching, of_runs)
    else:
        _check_none(matching, f"without a run, {run} brings its own")
        tested = (
            _read_official(Path(run), official, None if source else root)
            if Path(run).suffix in (".yaml", ".yml")
            else _read_run(Path(run), official, checkpoint)
        )
        data = _data_of_run(tested.config.data, data, elsewhere, classes)
    test = {"test_episodes": episodes, "test_seeds": seeds, "batch_size": batch_size}
    test = _given(test | {"resize": resize, "feature_cache": feature_cache})
    with _named_as_here():
        config = _configure(tested.config, data, test, protocol)
    path = Path(out) if out else None
    if path is None and tested.folder is not None:
        path = tested.folder.score_file(source, config.data.fold)

    fabric = _launch(accelerator, config.precision)
    if path is not None and fabric.is_global_zero:
        check_writable(path, "out")
    if episodes_out is not None and fabric.is_global_zero:
        check_writable(Path(episodes_out), "episodes_out")
    photos, described = build_source(config.data), tested.description
    if source is not None:
        described |= {"source": source}
        _check_fold(photos, config.data.fold)
    base: Mapping[int, str] | None = None
    if source is None or run is None:
        base = episode_classes(photos, config.data.fold, novel=False)
    else:
        known = tested.base_classes or _seen(tested.config.data)
        photos, seen = _without_seen(photos, config.data.fold, known)
        described |= {"seen_in_training": seen}
    if protocol is not None:
        described |= {"protocol": protocol}
    network = tested.build(base)
    file = Path(episodes_out) if episodes_out else None
    result = described | _score(network, photos, config, fabric, classes == "novel", file)
    if path is not None and fabric.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    return result


def evaluate_matching(config: TrainConfig, out: Path, episodes_out: Path) -> dict[str, Any]:
    """Score matching by the weights, photos and test of a configuration, and write the result.

    It is the row without training beside runs of these settings: the episodes are theirs.

    Args:
        config: whose model.weights, data and test count; its `to_dict` is the result's "config".
        out: JSON file of the result.
        episodes_out: CSV file, see `write_episodes`.

    Raises:
        FileNotFoundError, ValueError: see `evaluate_run`.
    """
    model, known = config.model, config.model.weights == "shapes"  # which says what it is
    network = build_matching(
        model.weights, None if known else model.backbone, None if known else model.stride_on
    )
    fabric = _launch(config.accelerator, config.precision)
    photos, eager = build_source(config.data), replace(config, graph="off")  # as in `_read_weights`
    scores = _score(network, photos, eager, fabric, True, episodes_out)
    result = {"config": config.to_dict()} | scores
    if fabric.is_global_zero:
        write_json(out, result)
    return result


def _launch(accelerator: str, precision: str) -> Fabric:
    devices, nodes = torchrun_layout() or (1, 1)
    return launch(accelerator, devices, nodes, precision)


def _score(
    network: nn.Module,
    photos: Source,
    config: TrainConfig,
    fabric: Fabric,
    novel: bool,
    episodes_file: Path | None,
) -> dict[str, Any]:
    """Score a network on the test of a configuration; see `evaluate_seeds`."""
    with float32_products(config.tf32):
        return evaluate_seeds(
            fabric.setup(lay_out(network, fabric.device)),
            photos,
            config.data,
            fabric,
            config.test_seeds,
            config.test_episodes,
            config.batch_size,
            novel,
            config.resize,
            config.feature_cache,
            config.graph,
            episodes_file,
        )


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Call the settings of data in errors as the options are called here."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).removeprefix("data.").replace("--data.", "--")) from error


def _data_of_run(
    own: DataConfig, data: dict[str, Any], elsewhere: dict[str, Any], classes: str
) -> dict[str, Any]:
    """Return the settings of the data on which a run is tested that differ from its own."""
    if "source" in elsewhere:
        if classes == "base":
            raise ValueError(
                'classes: expected "novel" on other data, got "base": those are the classes that '
                "training saw, and it saw none of these data"
            )
        # what belongs to the run's own data does not carry over
        data = {"root": None, "train_list": None, "val_list": None, "folds": "fwb"} | data
    elif elsewhere:
        raise ValueError(
            "fold, folds: expected them with --source, for other data; the run was trained on "
            f"fold {own.fold}, where the novel classes of the other folds are base classes"
        )
    return data | elsewhere


def _configure(
    trained: TrainConfig, data: dict[str, Any], test: dict[str, Any], protocol: str | None
) -> TrainConfig:
    """Return the configuration of a test: as trained, then the protocol's, then what is given."""
    values = trained.to_dict() | {"devices": 1, "accumulate": 1}
    values["data"] |= data
    if protocol is not None:
        chosen = dict(PROTOCOLS[protocol])
        if protocol == "pfenet" and values["data"]["source"] == "coco":
            chosen["test_episodes"] = 20000
        values["data"] |= {name: chosen.pop(name) for name in ("protocol", "shuffle_test")}
        values |= chosen
    return TrainConfig.from_dict(values | test)


class _Tested(NamedTuple):
    """What is tested.

    config: of its training; of matching, its data and else defaults.
    build: makes the network, given the names of base classes.
    base_classes: that training saw; None if they are not known, or none were seen.
    folder: of the run, if there is one.
    description: for the result.
    """

    config: TrainConfig
    build: Callable[[Mapping[int, str] | None], nn.Module]
    base_classes: dict[int, str] | None
    folder: RunFolder | None
    description: dict[str, Any]


def _read_weights(
    data: dict[str, Any], matching: dict[str, Any], of_runs: dict[str, Any]
) -> _Tested:
    weights, size = matching["weights"], matching["size"]
    if weights is None:
        raise ValueError(
            "run: expected the folder of a run, or --weights of a pretrained backbone to match "
            "without training, got neither: fss eval RUN [options], or fss eval --weights FILE "
            "--source NAME [options]"
        )
    _check_none(of_runs, "with a run or its settings, weights alone have neither")
    if "source" not in data:
        raise ValueError(
            f"source: expected one of {', '.join(get_args(SourceName))} with --weights, which "
            "bring no data; got nothing"
        )
    size = matching_size(weights) if size is None else size
    # no CUDA graph: the threshold is found on the host
    with _named_as_here():
        config = TrainConfig.from_dict({"data": {**data, "size": size}, "graph": "off"})
    model = build_matching(weights, matching["backbone"], matching["stride_on"])
    description = {
        "model": "matching",
        "trained": "nothing",
        "weights": Path(weights).name,
        "backbone": backbone_name(model.backbone),
        "stride_on": model.backbone.stride_on,
        "size": size,
        "min_area": config.data.min_area,
    }
    return _Tested(config, lambda _: model, None, None, description)


def _read_official(path: Path, official: str | None, root: str | None) -> _Tested:
    settings = read_settings(path)
    model, data = ({**settings.get(part, {})} for part in ("model", "data"))
    model["official"] = official or model.get("official")
    if not model["official"]:
        raise ValueError(
            "official: expected the authors' checkpoint, got nothing; give --official, or "
            f"model.official in {path}; a run is scored by its folder"
        )
    data |= _given({"root": root})
    config = TrainConfig.from_dict({**settings, "model": model, "data": data})
    description = {"checkpoint": Path(model["official"]).name}

    def build(base: Mapping[int, str] | None) -> nn.Module:
        return build_model(config.model, base, config.data.shots)

    return _Tested(config, build, None, RunFolder(config.out), description)


def _read_run(path: Path, official: str | None, checkpoint: str) -> _Tested:
    if official:
        raise ValueError(
            "official: expected a YAML file beside it, that says model, data and fold of the "
            f"authors' checkpoint, got {path}; a run's own checkpoint needs no --official"
        )
    folder, name = RunFolder.find(path, checkpoint)
    state = folder.checkpoint(name)
    # The checkpoint holds the backbone too: no other file is needed.
    none = {"weights": "none", "base_weights": "none", "official": None}
    with explain_misfit(folder.path / name):
        settings = {**state["config"], "model": state["config"]["model"] | none}
        config = TrainConfig.from_dict(settings)
        description = {"checkpoint": name, "step": state["step"]}
        weights, classes = state["model"], state.get("base_classes")

    def build(base: Mapping[int, str] | None) -> nn.Module:
        with explain_misfit(path):
            return rebuild_model(config, weights)

    return _Tested(config, build, classes, folder, description)


def _check_none(options: dict[str, Any], where: str) -> None:
    """Raise ValueError for options that are given, and are for elsewhere."""
    given = _given(options)
    if given:
        raise ValueError(
            f"{', '.join(given)}: expected only {where}; "
            f"got {', '.join(f'{name} {value}' for name, value in given.items())}, omit "
            f"{'it' if len(given) == 1 else 'them'}"
        )


def _check_fold(source: Source, fold: int) -> None:
    if fold >= len(source.folds):
        raise ValueError(
            f"fold: expected 0 to {len(source.folds) - 1} with these data, got {fold}; give --fold"
        )


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _seen(own: DataConfig) -> dict[int, str] | None:
    """Return the base classes of a run's own data, None if these are not available."""
    try:
        return episode_classes(build_source(own), own.fold, novel=False)
    except (OSError, ValueError):
        return None


def _without_seen(
    source: Source, fold: int, base_classes: Mapping[int, str] | None
) -> tuple[Source, list[str] | None]:
    """Remove the novel classes of the fold that training saw; return the source and their names."""
    if base_classes is None:
        return source, None
    known = {_plain(name) for name in base_classes.values()}
    seen = [c for c in source.folds[fold] if _plain(source.class_names[c]) in known]
    names = [source.class_names[c] for c in seen]
    novel = tuple(c for c in source.folds[fold] if c not in seen)
    if not novel:
        raise ValueError(
            f"fold: training saw every class of fold {fold} ({', '.join(names)}), so none is novel "
            "to the model; give another --fold"
        )
    narrowed = copy.copy(source)
    narrowed.folds = (*source.folds[:fold], novel, *source.folds[fold + 1 :])
    return narrowed, names


def _plain(name: str) -> str:
    """Normalize a class's name, so that it is the same in Pascal and in COCO."""
    plain = re.sub(r"[\W_]+", "", name).lower()
    return _PASCAL_NAMES.get(plain, plain)
