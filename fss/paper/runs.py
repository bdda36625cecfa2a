"""Runs of a table, made or resumed one after the other; what is there is checked before."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fss.config import ModelConfig, TrainConfig
from fss.runs.checkpoint import check_same_settings, read_checkpoint
from fss.runs.folder import BaseFolder
from fss.training.base_learner import BaseLearnerConfig, train_base
from fss.training.loop import INTERRUPTED, Stopped
from fss.training.run import train

FAILURES = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError)
"""What a run may fail with; it does not end the others."""


def check_made(folder: BaseFolder, config: TrainConfig | BaseLearnerConfig) -> None:
    """Check that a run, finished or not, has the settings that are asked for.

    A damaged checkpoint is left to the training that would go on from it.

    Raises:
        ValueError: each difference.
    """
    if folder.state == "finished":
        stored = folder.result()["config"]
        check_same_settings(stored, config, "finished", folder.result_file)
        check_same_files(stored, config, folder.result_file)
    elif folder.state == "in progress":
        try:
            state = read_checkpoint(folder.last)
        except ValueError:
            return
        if isinstance(state, dict) and isinstance(state.get("config"), dict):
            check_same_settings(state["config"], config, "resume", folder.last)
            check_same_files(state["config"], config, folder.last)


def check_same_files(
    stored: dict[str, Any], config: TrainConfig | BaseLearnerConfig, path: Path
) -> None:
    """Check that a network began with the files of a configuration, by their names.

    Their folders may differ: files move.

    Args:
        stored: the settings of what was made.
        config: what is asked for.
        path: where the stored ones are from.

    Raises:
        ValueError: another name.
    """
    for name in ("weights", "base_weights", "official"):
        former = stored["model"].get(name, getattr(ModelConfig, name))
        wanted = getattr(config.model, name)
        if _name(former) != _name(wanted):
            raise ValueError(
                f"model.{name}: expected {_name(wanted)}, {path} is of {_name(former)}; give "
                "another --out"
            )


def _name(file: str | None) -> str | None:
    return None if file is None else Path(file).name


def make(folder: BaseFolder, config: TrainConfig | BaseLearnerConfig) -> None:
    """Train, or go on, unless it is finished; see `train` and `train_base`."""
    if folder.state != "finished":
        resume = folder.state == "in progress"
        if isinstance(config, TrainConfig):
            train(config, resume=resume, overwrite=not resume)
        else:
            train_base(config, resume=resume, overwrite=not resume)


def failed(error: Exception) -> str:
    """Return what a table says of a run that failed, where one process makes it.

    Raises:
        Exception: the error, if there are other processes, still in the middle of the run.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise error
    return f"failed: {' '.join(str(error).split()) or type(error).__name__}"


def is_first_process() -> bool:
    """Tell whether this is the process that writes the table."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def origin(result: dict[str, Any]) -> Iterator[str]:
    """Yield the last lines of a table: the machine and the command; outside of git no commit."""
    source = result["source"]
    if source:
        machine, commit = source["machine"], source["commit"]
        device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        of_commit = f", commit {commit}" if commit else ""
        yield ""
        yield f"{device}, torch {source['versions']['torch']}{of_commit}."
    yield ""
    yield f"    {result['command']}"


@contextmanager
def conclude_when_stopped(conclude: Callable[[], Any], file: Path) -> Iterator[None]:
    """Make runs within; at ctrl-C or SIGTERM call `conclude`, which writes `file`.

    A training ends its step first; a test, which keeps nothing, is left at once.

    Raises:
        Stopped: says where what is finished is.
    """

    def stop(number: int, frame: Any) -> None:
        raise Stopped("stopped", 128 + number)

    try:
        former = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone gets signals
        former = None
    try:
        yield
    except KeyboardInterrupt as error:
        conclude()
        raise Stopped(
            f"{str(error).partition(';')[0] or 'stopped'}; what is finished is in {file}, the same "
            "command goes on",
            getattr(error, "status", INTERRUPTED),
        ) from error
    finally:
        if former is not None:
            signal.signal(signal.SIGTERM, former)
