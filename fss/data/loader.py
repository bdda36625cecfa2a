"""Batches of episodes, and the failures of the processes that load them."""

from __future__ import annotations

import multiprocessing.connection
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from fss.data import collate_episodes
from fss.files import causes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_KILLED = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: \w+|exited unexpectedly)")


def episode_loader(dataset: Dataset, batch_size: int, workers: int, fabric: Fabric) -> DataLoader:
    """Load batches of episodes in order, onto the device of this process.

    The dataset decides which episodes this process gets: no sampler is added.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate_episodes,
        worker_init_fn=_outlive_first_signal,
        pin_memory=fabric.device.type == "cuda",
        # Its own generator: the loader would draw from the global one, which resuming restores.
        generator=torch.Generator(),
    )
    return fabric.setup_dataloaders(loader, use_distributed_sampler=False)


def _outlive_first_signal(worker: int) -> None:
    """Let a loading process go on when all processes of a run are told to stop.

    The training process still needs its episodes to finish and save a step; a second SIGTERM, or
    the end of the training process, ends the loading one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    )


@contextmanager
def explain_killed_worker(outcome: Callable[[], str]) -> Iterator[None]:
    """Explain that a loading process was killed, and what became of the run.

    torch notices this by a signal, not only while this process loads: whatever it interrupts, for
    example the writing of a checkpoint, may fail with an error of its own. A batch on its way may
    break off before the signal comes.

    Raises:
        ChildProcessError: instead of torch's RuntimeError, or of the connection's error.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        found = (_KILLED.search(str(cause)) for cause in causes(error))
        killed = next(filter(None, found), None)
        if killed is None and not _broke_off(error):
            raise
        raise ChildProcessError(
            "data.workers: a process that loads episodes "
            f"{killed[1] if killed else 'ended while it sent them'}; if memory ran out, take "
            f"fewer data.workers. {outcome()}"
        ) from error


def _broke_off(error: BaseException) -> bool:
    """Tell whether the connection to another process raised it, and not the reading of a file."""
    frames = traceback.walk_tb(error.__traceback__)
    return not isinstance(error, RuntimeError) and any(
        frame.f_globals.get("__name__") == multiprocessing.connection.__name__
        for frame, _ in frames
    )
