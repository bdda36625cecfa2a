"""Time and memory of training steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """Counts the bytes that autograd keeps from a forward pass for its backward pass.

    Each storage counts once, however many tensors share it; parameters and buffers are ignored.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {
            tensor.untyped_storage().data_ptr()
            for tensor in [*model.parameters(), *model.buffers()]
        }
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._storages.values())

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what forward passes within the block save, without changing what they compute."""
    counter = SavedBytes(model)
    with saved_tensors_hooks(counter.count, lambda tensor: tensor):
        yield counter


class StepTimer:
    """Measures steps from `start` to `stop`, in seconds: on a GPU by events, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._running: list[tuple[Any, Any]] = []
        self._started: Any = None
        self._seconds: list[float] = []

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        if self._cuda:
            self._running.append((self._started, self._now()))
        else:
            self._seconds.append(self._now() - self._started)

    def take(self) -> list[float]:
        """Return the seconds of the steps since the last call; waits for the GPU."""
        if self._running:
            torch.cuda.synchronize()
            self._seconds = [start.elapsed_time(stop) / 1000 for start, stop in self._running]
        seconds, self._seconds, self._running = self._seconds, [], []
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def begin_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where this process has trained before.

    On a CPU only Linux can; elsewhere the peak is that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak of bytes held by tensors on a GPU, else by this process (resident set).

    Since `begin_peak`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
