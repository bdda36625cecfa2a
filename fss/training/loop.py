"""How a run stops, is saved and goes on: what `fss train` and `fss train-base` have in common."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric

from fss.runs.checkpoint import (
    check_same,
    check_types,
    explain_misfit,
    flat_settings,
    random_state,
    restore_random_state,
)

T = TypeVar("T")

INTERRUPTED = 128 + signal.SIGINT


class Stopped(KeyboardInterrupt):
    """A run that ctrl-C or SIGTERM ended.

    Attributes:
        status: exit status of the command, 128 and the number of the signal: 130 or 143.
    """

    def __init__(self, message: str, status: int = INTERRUPTED) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def postponed_stop() -> Iterator[list[int]]:
    """Yields a list that ctrl-C and SIGTERM fill with exit statuses, so that no step is cut in two.

    The second signal stops at once.
    """
    statuses: list[int] = []

    def note(number: int, frame: Any) -> None:
        if statuses:
            raise Stopped("stopped at once; the last checkpoint is the one before", 128 + number)
        statuses.append(128 + number)

    former = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, note)
    except ValueError:  # not the main thread, which alone gets signals
        yield statuses
        return
    try:
        yield statuses
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def gather(fabric: Fabric, value: T) -> list[T]:
    """The values of all processes."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def agreed(statuses: list[int], fabric: Fabric, due: bool) -> int:
    """The exit status with which all processes stop now, 0 to go on: see `postponed_stop`.

    Several processes ask each other when it is `due`, in the same step for all.
    """
    status = max(statuses, default=0)
    if fabric.world_size == 1:
        return status
    return max(gather(fabric, status)) if due else 0


def training_state(fabric: Fabric, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """What a checkpoint needs beside the weights for the run to go on bit for bit."""
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "random": gather(fabric, random_state()),
    }


def restore_training(state: dict[str, Any], fabric: Fabric, optimizer: Any, scheduler: Any) -> None:
    """The inverse of `training_state`."""
    optimizer.load_state_dict(state["optimizer"])
    # as its parameter lies: torch updates all at once only what lies alike
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    check_types(state["scheduler"], dict.fromkeys(scheduler.state_dict(), object))
    scheduler.load_state_dict(state["scheduler"])
    fabric.strategy.precision.load_state_dict(state["precision"])
    restore_random_state(state["random"][fabric.global_rank])


def check_resumable(
    state: dict[str, Any], config: dict[str, Any], free: set[str], path: Path, fabric: Fabric
) -> None:
    """Raises ValueError unless a run of `config` would go on as that of the checkpoint would have.

    Args:
        state: content of the checkpoint.
        config: of the run, as nested plain values.
        free: settings by dotted name that may differ, since they do not change what is trained.
        path: of the checkpoint.
        fabric: launched.
    """
    check_same(flat_settings(state["config"], free), flat_settings(config, free), path)
    with explain_misfit(path):
        check_types(state, {"random": list})
    if len(state["random"]) != fabric.world_size:
        raise ValueError(
            f"devices: the checkpoint was written by {len(state['random'])} processes, these are "
            f"{fabric.world_size}; resume with as many"
        )


def saved_on_failure(batches: Iterable[T], save: Callable[[], None]) -> Iterator[T]:
    """The batches; what the loader fails with finds the steps before saved."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception:
            save()
            raise
        yield batch
