"""Runs of `fss train` and tests of `fss eval` as processes of their own; what is done is kept."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import run
from fss.config import DataConfig, TrainConfig
from fss.data import FolderSource
from fss.files import atomic_write
from fss.runs.folder import RunFolder

SAVING = 20.0  # seconds that a stopped run has to finish its step and save


def make_run(
    config: str,
    folder: Path,
    settings: Mapping[str, str],
    extra: Sequence[str] = (),
    deadline: float | None = None,
) -> dict | None:
    """Return the result of a run; train it now unless its result exists.

    Args:
        config: YAML file of `fss train`.
        folder: of the run.
        settings: of this run by dotted name.
        extra: further arguments of `fss train`, before the settings.
        deadline: of `time.monotonic`; a run that has not ended by then saves and stops, to go on
            another time, and what it prints goes to a file beside its folder.

    Returns None for a run that has not ended.

    Raises:
        SystemExit: the run failed.
    """
    run_folder = RunFolder(folder)
    if run_folder.state != "finished":
        command = [sys.executable, "-m", "fss.cli", "train", "--config", config, *extra]
        command += [f"--{name}={value}" for name, value in settings.items()]
        command.append(f"--out={folder}")
        # one that stopped before its first checkpoint has nothing to go on from
        command.append("--resume" if run_folder.state == "in progress" else "--overwrite")
        print(f"\n[{folder.name}] fss {shlex.join(command[3:])}", flush=True)
        if deadline is None:
            status: int | None = subprocess.run(command).returncode
        else:
            log = folder.with_name(f"{folder.name}.log")
            status = run(command, log, deadline - time.monotonic(), SAVING).status
        if status is None:
            return None
        if status:
            raise SystemExit(f"{folder}: the run ended with {status}; run again to go on")
    return run_folder.result()


def score_elsewhere(folder: Path, arguments: str) -> dict:
    """Return the result of `fss eval` on other data; evaluate now unless it exists.

    Args:
        folder: of the run.
        arguments: of `fss eval` after the run, as one would type them; they name --source and
            --fold.

    Raises:
        SystemExit: the evaluation failed.
    """
    words = shlex.split(arguments)
    source, fold = (words[words.index(name) + 1] for name in ("--source", "--fold"))
    result = RunFolder(folder).score_file(source, int(fold))
    if not result.is_file():
        command = [sys.executable, "-m", "fss.cli", "eval", str(folder), *words]
        print(f"\n[{folder.name}] fss {shlex.join(command[3:])}", flush=True)
        status = subprocess.run(command).returncode
        if status:
            raise SystemExit(f"{folder}: the evaluation ended with {status}")
    return json.loads(result.read_text())


def as_word(value: Any) -> str:
    """Return a value as fss reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def check_matching(config: TrainConfig) -> None:
    """Raise ValueError for settings with which `score_matching` cannot test the same episodes."""
    model, data = config.model, config.data
    if model.weights == "none":
        raise ValueError(
            "final.untrained: expected model.weights of a pretrained backbone, which is all that "
            'matching has, got "none"'
        )
    for name in ("protocol", "shuffle_test"):
        value, default = getattr(data, name), getattr(DataConfig, name)
        if value != default:
            raise ValueError(
                f"final.untrained: expected data.{name} {default}, got {value}, which fss eval "
                "--weights does not have"
            )


def score_matching(folder: Path, config: TrainConfig, deadline: float) -> dict | None:
    """Return the result of `fss eval --weights`: the backbone's weights matched, nothing trained.

    Args:
        folder: of the result; what is printed goes to a file beside it.
        config: of runs, on whose test episodes the weights are tested.
        deadline: of `time.monotonic`, at which the test is stopped.

    Returns None for one that was stopped.

    Raises:
        SystemExit: the test failed.
    """
    data, model = config.data, config.model
    options: dict[str, Any] = {
        "weights": model.weights,
        "backbone": model.backbone,
        "stride_on": model.stride_on,
        "size": data.size,
        "episodes": config.test_episodes,
        "seeds": config.test_seeds,
        "resize": config.resize,
        "accelerator": config.accelerator,
    }
    same = ("source", "root", "fold", "folds", "train_list", "val_list", "shots", "min_area")
    options |= {name: getattr(data, name) for name in (*same, "drop_small_classes", "workers")}
    if data.source != "coco":
        del options["folds"]
    file = folder / "eval.json"
    command = [sys.executable, "-m", "fss.cli", "eval"]
    command += [
        f"--{name}={as_word(value)}" for name, value in options.items() if value is not None
    ]
    command.append(f"--out={file}")
    print(f"\n[{folder.name}] fss {shlex.join(command[3:])}", flush=True)
    log = folder.with_name(f"{folder.name}.log")
    status = run(command, log, deadline - time.monotonic()).status
    if status:
        raise SystemExit(f"{folder}: the test ended with {status}; {log} says why")
    return None if status is None else json.loads(file.read_text())


def held_out(root: str, fold: int, view: Path) -> Path:
    """Make a view of a folder of photos that validates base classes on photos not trained on.

    Without lists a photo may be in training and in validation. Here the training list has the
    photos without any of the fold's novel classes, which are all that the † filter leaves, and the
    other list has the rest, which are all that can be tested on: training and test stay as they
    were.
    """
    source = FolderSource(root)
    novel = set(source.folds[fold])
    view.mkdir(parents=True, exist_ok=True)
    for name in ("JPEGImages", "SegmentationClass", "classes.json"):
        target = Path(os.path.relpath(source.root / name, view))
        if not (view / name).exists():
            (view / name).symlink_to(target)
    lists = view / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {"train": [], "val": []}
    for index in range(len(source)):
        shown = novel & source.class_areas(index).keys()
        names["val" if shown else "train"].append(Path(source.name(index)).stem)
    for name, stems in names.items():
        with atomic_write(lists / f"{name}.txt") as file:  # another process may read it
            file.write("".join(f"{stem}\n" for stem in stems).encode())
    return view
