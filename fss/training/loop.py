"""The loop of a training: when it logs, validates and saves, how it stops, is saved and resumed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm

from fss.data import build_source
from fss.data.loader import episode_loader, explain_killed_worker
from fss.processes import build_fabric, fixed_shapes, float32_products, is_restart, lay_out
from fss.runs.checkpoint import (
    check_same_settings,
    check_types,
    explain_misfit,
    random_state,
    restore_random_state,
)
from fss.runs.folder import BaseFolder
from fss.training.optimizer import hold_masters

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
Trained = TypeVar("Trained", bound="Loop")

INTERRUPTED = 128 + signal.SIGINT


class Loop:
    """A training in steps, as `fss train` and `fss train-base` have it in common.

    Process r of n takes items r, r + n, ... of the data. A trainer makes the network (`_set_up`)
    and the data, and defines

    - `_train_step(parts)`: train on the batches of a step, increment `step`;
    - `_log_steps(first, since)`: log the steps after step `first`, begun at time `since`; return
      what the progress bar shows;
    - `_validate()`: validate, update `best`, save it if it is better;
    - `_state()`: return what every checkpoint holds, `_progress()`: and what last.pt holds besides;
    - `_write(path, state)`: write a checkpoint, in the first process;
    - `read(path, config)`: read last.pt; raise ValueError if it is of another command.

    Attributes:
        FOLDER: class of `folder`.
        config, fabric, folder, source: of the run; its processes, files and photos.
        dataset: steps · batch_size items, in the order of training.
        validation_every: steps between two validations.
        part: items of a process in a forward pass.
        network, model: to train, as built and as Fabric wraps it.
        step: steps done.
        best: step and scores of the best validation so far.
        title: of the progress bar.
        continuation: says how to go on after a stop.
    """

    FOLDER: ClassVar[type[BaseFolder]]
    validation_every: int

    def __init__(self, config: Any, fabric: Fabric) -> None:
        self.config, self.fabric, self.folder = config, fabric, self.FOLDER(config.out)
        self.source = build_source(config.data)
        folds = len(self.source.folds)
        if config.data.fold >= folds:
            raise ValueError(
                f"data.fold: expected 0 to {folds - 1}, the folds of {config.data.source}; "
                f"got {config.data.fold}"
            )
        self.part = config.batch_size // fabric.world_size // config.accumulate
        self.step = 0
        self.best: dict[str, Any] | None = None
        fabric.seed_everything(config.seed, verbose=False)

    def _set_up(self, network: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Place a network on the device; its random weights follow `__init__`, which seeds them."""
        hold_masters(optimizer)
        self.network, self.scheduler = lay_out(network, self.fabric.device), scheduler
        self.model, self.optimizer = self.fabric.setup(self.network, optimizer)
        self.fabric.seed_everything(self.config.seed + self.fabric.global_rank, verbose=False)

    @property
    def has_converged(self) -> bool:
        """Whether the run has ended before its last step."""
        return False

    def fit(self) -> None:
        """Train from the current step to the last.

        Raises:
            Stopped: after ctrl-C or SIGTERM, once the step is finished and saved.
        """
        config, fabric = self.config, self.fabric
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=self.title,
            unit="step",
            disable=not fabric.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self.model.train()
        window = self.step, time.perf_counter()
        with (
            fixed_shapes(),
            postponed_stop() as statuses,
            bar,
            explain_killed_worker(self.folder.last_good),
        ):
            batches = self._batches()
            while self.step < config.steps and not self.has_converged:
                self._train_step([next(batches) for _ in range(config.accumulate)])
                bar.update()
                ends = self.step == config.steps
                if ends or self._due(config.log_every):
                    bar.set_postfix(self._log_steps(*window), refresh=False)
                    window = self.step, time.perf_counter()
                if ends or self._due(self.validation_every):
                    self._validate()
                    self._save(self.folder.last)
                    window = self.step, time.perf_counter()
                elif self._due(config.save_every):
                    self._save(self.folder.last)
                if status := agree_on_stop(statuses, fabric, self._due(config.log_every)):
                    self._save(self.folder.last)
                    raise Stopped(
                        f"stopped after step {self.step} of {config.steps}, saved; "
                        f"{self.continuation}",
                        status,
                    )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the content of last.pt, see `start`; subclasses load their part of it."""
        check_types(state, {"step": int, "best": dict | None})
        if not 0 <= state["step"] <= self.config.steps:
            raise IndexError(f"step: expected 0 to {self.config.steps}, got {state['step']}")
        self.step, self.best = state["step"], state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        # as its parameter lies: torch updates all at once only what lies alike
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        check_types(state["scheduler"], dict.fromkeys(self.scheduler.state_dict(), object))
        self.scheduler.load_state_dict(state["scheduler"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        restore_random_state(state["random"][self.fabric.global_rank])

    def _save(self, path: Path) -> None:
        """Write a checkpoint; all processes take part. From `folder.last` a run goes on."""
        state = {"step": self.step, "best": self.best, **self._state()}
        if path == self.folder.last:
            state |= {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "random": gather(self.fabric, random_state()),
                **self._progress(),
            }
        if self.fabric.is_global_zero:
            self._write(path, state)
        self.fabric.barrier()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield this process's batches from the current step on; save when loading fails."""
        config, fabric = self.config, self.fabric
        first, end = self.step * config.batch_size, config.steps * config.batch_size
        numbers = range(first + fabric.global_rank, end, fabric.world_size)
        try:
            share = Subset(self.dataset, numbers)
            yield from episode_loader(share, self.part, config.data.workers, fabric)
        except Exception:
            if self.step and fabric.world_size == 1:  # others would have to take part
                self._save(self.folder.last)
            raise

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


@contextmanager
def start(kind: type[Trained], config: Any, resume: bool, overwrite: bool) -> Iterator[Trained]:
    """Yield a trainer ready to `fit`: at its first step, or as the run was left.

    When torchrun restarts its processes, they resume by themselves, or begin anew if there is no
    checkpoint yet.

    Args:
        kind: of trainer.
        config: of the run.
        resume: go on from last.pt.
        overwrite: replace an earlier run in the same folder.

    Raises:
        ValueError: a folder that already has a run, or a checkpoint of another run.
        FileNotFoundError: nothing to resume.
        OSError: a folder that cannot be written, also while the trainer is in use.
    """
    folder = kind.FOLDER(config.out)
    if is_restart():
        resume = folder.last.is_file()
        overwrite = not resume
    folder.check(resume, overwrite)
    state = kind.read(folder.last, config) if resume else None
    fabric = build_fabric(config)
    if state is not None:
        _check_resumable(state, config, folder.last, fabric)
    with float32_products(config.tf32):
        trainer = kind(config, fabric)
        with folder.explain_unwritable():
            if fabric.is_global_zero:
                folder.remove_leftovers()
            if state is not None:
                with explain_misfit(folder.last):
                    trainer.restore(state)
            elif fabric.is_global_zero:
                folder.clear()
            yield trainer


def _check_resumable(state: dict[str, Any], config: Any, path: Path, fabric: Fabric) -> None:
    """Raise ValueError unless a run would go on as that of the checkpoint would have."""
    with explain_misfit(path):
        check_types(state, {"random": list, "config": dict})
    check_same_settings(state["config"], config, "resume", path)
    if len(state["random"]) != fabric.world_size:
        raise ValueError(
            f"devices: the checkpoint was written by {len(state['random'])} processes, these are "
            f"{fabric.world_size}; resume with as many"
        )


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
    """Yield a list that ctrl-C and SIGTERM fill with exit statuses, so that no step is cut in two.

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
    """Collect the values of all processes."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def agree_on_stop(statuses: list[int], fabric: Fabric, due: bool) -> int:
    """Return the exit status with which all processes stop now, 0 to go on; see `postponed_stop`.

    Several processes ask each other when it is `due`, in the same step for all.
    """
    status = max(statuses, default=0)
    if fabric.world_size == 1:
        return status
    return max(gather(fabric, status)) if due else 0
