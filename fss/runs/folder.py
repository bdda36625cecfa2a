"""A training run as its folder shows it, finished or in progress."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from fss.config import TrainConfig
from fss.runs.checkpoint import load_checkpoint
from fss.runs.log import RunLog

_RESULT = (
    "test.miou.mean",
    "test.fb_iou.mean",
    "test.iou",
    "test.step",
    "test.checkpoint",
    "parameters.trained_head",
    "parameters.trained_backbone",
    "saved_bytes_per_step",
    "peak_memory_bytes",
    "step_seconds_median",
    "steps",
    "machine",
    "versions.torch",
    "commit",
)

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_UNWRITABLE |= {errno.ENOTDIR, errno.EEXIST}


class BaseFolder:
    """The folder of a training, of `fss train` or `fss train-base`: its files, how it begins anew.

    Attributes:
        path: of the folder.
        last: the checkpoint to go on from.
        result_file: JSON, there when the training is finished.
        marks: files that only a training leaves there.
        files: all that a new training replaces.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last.pt"
        self.result_file = self.path / "result.json"
        self.marks = [self.last, self.result_file]
        self.files = [self.last, self.result_file]

    def check(self, resume: bool, overwrite: bool) -> None:
        """Check that a training may begin here, or go on.

        Args:
            resume: the training is to go on from `last`.
            overwrite: an earlier one may be replaced.

        Raises:
            FileNotFoundError: nothing to resume.
            ValueError: an earlier training that nobody asked to replace.
        """
        if resume and not self.last.is_file():
            raise FileNotFoundError(
                f"--resume: expected a checkpoint at {self.last}, found none; omit --resume to "
                "begin anew"
            )
        found = [file.name for file in self.marks if file.exists()]
        if found and not resume and not overwrite:
            raise ValueError(
                f"out: {self.path} already holds a run ({', '.join(found)}); go on with --resume, "
                "replace it with --overwrite, or give another --out"
            )

    def clear(self) -> None:
        """Make the folder, without the files of an earlier training."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            file.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove files that a killed process had not finished writing."""
        for path in (*self.path.glob(".*.tmp"), *self.path.glob(".*.part")):
            path.unlink(missing_ok=True)

    def last_good(self) -> str:
        """Return a sentence on the checkpoint to go on from."""
        if self.last.exists():
            return f"{self.last} is from before; --resume goes on."
        return "No checkpoint was written yet."

    @contextmanager
    def explain_unwritable(self) -> Iterator[None]:
        """Say in the user's words that the folder cannot be written.

        Raises:
            OSError: replaces one that does not say which folder and what to do.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            raise OSError(
                f"out: {self.path} cannot be written ({error.strerror}); make room or give another "
                f"--out. {self.last_good()}"
            ) from error


class BaseLearnerFolder(BaseFolder):
    """The folder of a run of `fss train-base`.

    Attributes:
        base: the checkpoint with the highest mIoU, which `model.base_weights` takes.
        log: a CSV table.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.base = self.path / "base.pt"
        self.log = self.path / "log.csv"
        self.files += [self.base, self.log]
        self.marks = self.files


class RunFolder(BaseFolder):
    """The folder of a run of `fss train`.

    Attributes:
        config_file: the settings, YAML.
        best: the checkpoint with the highest validation mIoU.
        train_log, validation_log: CSV tables.
        events: the same for TensorBoard, a folder.
        episodes, curves: pictures, PNG.
        pretrained, adapter: S before the training and after, see `save_run_adapter`.
        score_file: what `fss eval` found on the run's own data.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config_file = self.path / "config.yaml"
        self.best = self.path / "best.pt"
        self.train_log = self.path / "train.csv"
        self.validation_log = self.path / "validation.csv"
        self.events = self.path / "tensorboard"
        self.episodes = self.path / "episodes.png"
        self.curves = self.path / "curves.png"
        self.pretrained = self.path / "pretrained.safetensors"
        self.adapter = self.path / "adapter.safetensors"
        self.score_file = self.path / "eval.json"
        self.marks += [self.train_log]
        self.files += [self.best, self.score_file, self.episodes, self.curves]
        self.files += [self.pretrained, self.adapter]

    def clear(self) -> None:
        """Make the folder, without the files of an earlier run; its logs begin in `open_log`."""
        super().clear()
        shutil.rmtree(self.events, ignore_errors=True)

    def open_log(self, class_names: dict[int, str], step: int = 0) -> RunLog:
        """Open the logs to append to them from a step on; see `RunLog`."""
        return RunLog(self.train_log, self.validation_log, self.events, class_names, step)


@dataclass(frozen=True)
class Run:
    """What a folder of `fss train` holds.

    Attributes:
        folder: of the run.
        name: short, different from the names of the other runs of the report.
        config: its settings.
        result: the content of result.json; None while the run is in progress.
        train, validation: the columns of the logs by name; empty before the first row.
        episodes: its picture of test episodes, PNG, if it drew one.
    """

    folder: Path
    name: str
    config: TrainConfig
    result: dict[str, Any] | None
    train: dict[str, list[float]]
    validation: dict[str, list[float]]
    episodes: bytes | None

    @property
    def step(self) -> int:
        """Steps done, as far as the log tells."""
        return int(self.train["step"][-1]) if self.train else 0

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and mIoU, a fraction, of the best validation so far."""
        if not self.validation:
            return None
        scores = self.validation["miou"]
        place = max(range(len(scores)), key=scores.__getitem__)
        return int(self.validation["step"][place]), scores[place]

    @property
    def trains_singular_values(self) -> bool:
        """Whether it has SVF layers, of which S alone trains."""
        regime = self.config.regime
        return regime.name in ("svf", "rotated_svf") and regime.trained_factors == ("S",)

    def checkpoint(self) -> dict[str, Any] | None:
        """The tested checkpoint, or the last so far; None before the first.

        Raises:
            FileNotFoundError: a finished run without it.
            ValueError: a damaged file.
        """
        if self.result is not None:
            return load_checkpoint(self.folder / self.result["test"]["checkpoint"])
        path = self.folder / "last.pt"
        return load_checkpoint(path) if path.is_file() else None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads the folders of runs; see `Run`.

    Raises:
        FileNotFoundError: no folder, or one without a file that every run has.
        ValueError: a damaged file, or one folder twice.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("runs: expected at least one folder of a run, got none")
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise ValueError(f"runs: expected different folders, got {path} twice")
    return [_read(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def _names(paths: list[Path]) -> list[str]:
    """The last part of each path; of those that share it, as many as it takes to differ."""
    names = []
    for path in paths:
        parts = 1
        while parts < len(path.parts) and any(
            other.parts[-parts:] == path.parts[-parts:] for other in paths if other != path
        ):
            parts += 1
        name = "/".join(path.parts[-parts:])
        names.append("".join(c if c.isprintable() else "\ufffd" for c in name))
    return names


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"run: expected a folder that fss train wrote at {folder}")
    config = _read_config(folder / "config.yaml")
    path = folder / "result.json"
    result = _read_result(path) if path.is_file() else None
    train = _read_table(folder / "train.csv", result is None)
    validation = _read_table(folder / "validation.csv", result is None)
    if result is not None and (not train or train["step"][-1] != result["steps"]):
        raise ValueError(
            f"run: {folder / 'train.csv'} ends at step {train['step'][-1] if train else 0:.0f}, "
            f"but result.json tells of {result['steps']} steps: it was cut, or is of another run"
        )
    return Run(folder, name, config, result, train, validation, _read_episodes(folder, result))


def _read_config(path: Path) -> TrainConfig:
    if not path.is_file():
        raise FileNotFoundError(
            f"run: expected {path}, found none; give folders that fss train wrote"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TrainConfig.from_dict(values)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"run: {path} is not a configuration of fss train: it was cut or is of another "
            f"version ({_first_line(error)})"
        ) from error


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"run: {path} is not JSON, it was cut ({_first_line(error)}); make it again with "
            "fss train --resume"
        ) from error
    for name in _RESULT:
        part = result
        for key in name.split("."):
            if not isinstance(part, dict) or key not in part:
                raise ValueError(
                    f"run: {path}: expected an entry {name}, found none: it was not written by "
                    "fss train, or by another version"
                )
            part = part[key]
    return result


def _read_table(path: Path, running: bool) -> dict[str, list[float]]:
    """The columns of a log; a run in progress may be in the middle of writing the last row."""
    if not path.is_file():
        raise FileNotFoundError(f"run: expected the log {path}, found none")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            text = file.read()
        rows = list(csv.reader(text.splitlines()))
        if running and rows and not text.endswith("\n"):
            del rows[-1]
        header, *rows = rows
        table = [[float(cell or "nan") for cell in row] for row in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"run: {path} is damaged: {_first_line(error) or 'empty'}") from error
    for number, row in enumerate(table, 2):
        if len(row) != len(header):
            raise ValueError(
                f"run: {path}, line {number}: expected {len(header)} values, got {len(row)}: the "
                "file was cut"
            )
    if not rows:
        return {}
    columns = map(list, zip(*table, strict=True))
    return dict(zip(header, columns, strict=True))


def _read_episodes(folder: Path, result: dict[str, Any] | None) -> bytes | None:
    path = folder / "episodes.png"
    if result is None or not path.is_file():
        return None
    content = path.read_bytes()
    try:
        with Image.open(path) as picture:
            picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"run: {path} cannot be read as a picture: it was cut ({_first_line(error)})"
        ) from error
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
