"""The folder of a training: its files, what they hold, how a training begins anew in it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fss.config import TrainConfig
from fss.files import parse_json, read_text, read_yaml
from fss.models import FewShotModel, rebuild_model
from fss.runs.checkpoint import explain_misfit, load_checkpoint
from fss.runs.log import RunLog, read_log

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_UNWRITABLE |= {errno.ENOTDIR, errno.EEXIST}


class BaseFolder:
    """The folder of a training, of `fss train` or `fss train-base`.

    Attributes:
        path: of the folder.
        last: the checkpoint to go on from.
        result_file: JSON, there when the training is finished.
        marks: files that only a training leaves there.
        files: all that a new training replaces.
        entries: what every result has, by dotted name.
        command: that writes the folder.
    """

    entries: tuple[str, ...]
    command: str

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last.pt"
        self.result_file = self.path / "result.json"
        self.marks = [self.last, self.result_file]
        self.files = [self.last, self.result_file]

    @property
    def state(self) -> str:
        """Tell how far the training is: "not started", "in progress" or "finished"."""
        if self.result_file.is_file():
            return "finished"
        return "in progress" if self.last.is_file() else "not started"

    def result(self) -> dict[str, Any]:
        """Read what the training found in the end.

        Raises:
            FileNotFoundError: a training that is not finished.
            ValueError: a damaged file, or one of another program.
        """
        path = self.result_file
        try:
            result = parse_json(read_text(path), path)
        except ValueError as error:
            raise ValueError(
                f"run: {error}; it is truncated, make it again with --resume"
            ) from error
        for name in self.entries:
            part = result
            for key in name.split("."):
                if not isinstance(part, dict) or key not in part:
                    raise ValueError(
                        f"run: {path}: expected an entry {name}, found none: it was not written by "
                        f"{self.command}, or by another version"
                    )
                part = part[key]
        return result

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

    entries = ("miou", "config")
    command = "fss train-base"

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
        test_episodes: a CSV table of the test's episodes, see `fss.evaluation.evaluate`.
        pretrained, adapter: S before the training and after, for `svf_fast.Adapter`.
    """

    command = "fss train"
    entries = (
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
        "config",
    )

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config_file = self.path / "config.yaml"
        self.best = self.path / "best.pt"
        self.train_log = self.path / "train.csv"
        self.validation_log = self.path / "validation.csv"
        self.events = self.path / "tensorboard"
        self.episodes = self.path / "episodes.png"
        self.curves = self.path / "curves.png"
        self.test_episodes = self.path / "test_episodes.csv"
        self.pretrained = self.path / "pretrained.safetensors"
        self.adapter = self.path / "adapter.safetensors"
        self.marks += [self.train_log]
        self.files += [self.best, self.score_file(), self.episodes, self.curves]
        self.files += [self.pretrained, self.adapter, self.test_episodes]

    def clear(self) -> None:
        """Make the folder, without the files of an earlier run; its logs begin in `open_log`."""
        super().clear()
        for scores in ("eval_*_fold*.json", "test-*.json"):
            for file in self.path.glob(scores):
                file.unlink()
        shutil.rmtree(self.events, ignore_errors=True)

    def open_log(self, class_names: dict[int, str], step: int = 0) -> RunLog:
        """Open the logs to append to them from a step on; see `RunLog`."""
        return RunLog(self.train_log, self.validation_log, self.events, class_names, step)

    def logs(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Read the columns of training and of validation by name; see `read_log`."""
        growing = self.state != "finished"
        return read_log(self.train_log, growing), read_log(self.validation_log, growing)

    def config(self) -> TrainConfig:
        """Read the settings of the run.

        Raises:
            FileNotFoundError: no folder of a run.
            ValueError: a damaged file, or one of another version.
        """
        path = self.config_file
        if not path.is_file():
            raise FileNotFoundError(
                f"run: expected the settings of a run at {path}, found none; give a folder that "
                "fss train wrote"
            )
        try:
            return TrainConfig.from_dict(read_yaml(path))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"run: {path} is not a configuration of fss train: it is truncated or of another "
                f"version ({next(iter(str(error).splitlines()), '')})"
            ) from error

    @classmethod
    def find(cls, run: str | Path, checkpoint: str = "best") -> tuple[RunFolder, str]:
        """Return the folder of a run, and the file name of a checkpoint in it.

        Args:
            run: the folder, or the checkpoint itself.
            checkpoint: of the folder, "best" or "last".
        """
        path = Path(run)
        return (cls(path), f"{checkpoint}.pt") if path.is_dir() else (cls(path.parent), path.name)

    def checkpoint(self, name: str) -> dict[str, Any]:
        """Read a checkpoint by its file name; see `load_checkpoint`."""
        return load_checkpoint(self.path / name)

    def network(self, name: str) -> tuple[FewShotModel, TrainConfig]:
        """Build the network of a checkpoint with its weights, unfused; return the settings too.

        It needs no other file and decomposes nothing.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: a damaged one.
        """
        content = self.checkpoint(name)
        with explain_misfit(self.path / name):
            config = TrainConfig.from_dict(content["config"])
            return rebuild_model(config, content["model"], as_trained=False), config

    def score_file(self, source: str | None = None, fold: int | None = None) -> Path:
        """Return where `fss eval` writes a score: on the run's own data, or on others."""
        return self.path / ("eval.json" if source is None else f"eval_{source}_fold{fold}.json")

    def test_file(self, episodes: int) -> Path:
        """Return where `fss reproduce` writes a score of so many test episodes."""
        return self.path / f"test-{episodes}.json"
