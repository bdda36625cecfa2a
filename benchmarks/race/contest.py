"""The peers of a level against each other: exactness, then bytes, then time in turns, then peaks.

A round runs every peer once, and every second round in the opposite order, so that whatever else
the machine does meets all alike. S changes before each step, as an optimizer changes it: what
follows from S alone, such as a composed weight, is made anew within the time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.race.exactness import Judge, renew, step
from benchmarks.race.levels import Inputs, Level, Settings, autocast
from benchmarks.race.peak import measure_peaks
from benchmarks.race.peers import compiler_missing
from fss.training.measure import StepTimer, saved_bytes

SEEDS = range(5)  # a ReLU at rounding may flip in one of them, for either side
FEWEST_ROUNDS = 3  # that a median is taken of when time is short


class Contest:
    """The peers of one group of a level, ready to run.

    Args:
        level, group, settings, names: what is raced, by which peers.
        cache: folder of decompositions; by default of this contest alone.
        rows: of an earlier run with these settings that did not end: what they have is kept.
    """

    def __init__(
        self,
        level: Level,
        group: str,
        settings: Settings,
        names: list[str],
        cache: Path | None = None,
        rows: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.level, self.group, self.settings = level, group, settings
        earlier = {row["peer"]: row for row in rows}
        self.rows = {name: dict(earlier.get(name, {"peer": name})) for name in names}
        self.networks: dict[str, nn.Module] = {}
        self._cuda = torch.device(settings.device).type == "cuda"
        self._temporary = None if cache else tempfile.TemporaryDirectory()
        self._cache = cache or Path(self._temporary.name)
        # converted on the CPU, which is faster at it
        self._plain = level.network(dataclasses.replace(settings, device="cpu"), group)
        for name in names:
            if "reason" in self.rows[name]:
                continue
            reason = compiler_missing() if level.peers[name].compiled else ""
            if reason:
                self.rows[name] |= {"reason": reason, "skipped": True}
                continue
            with self._reported(name):
                self.networks[name] = self._converted(name)

    def _converted(self, name: str) -> nn.Module:
        network = self.level.convert(copy.deepcopy(self._plain), name, self._cache)
        return network.to(self.settings.device)

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Catch the error of a peer: its row gets the reason, and the others go on."""
        try:
            yield
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:200]
            self.rows[name]["reason"] = f"{type(error).__name__}: {reason}"
            if isinstance(error, torch.OutOfMemoryError):  # of the machine, not of the peer
                self.rows[name]["skipped"] = True
            self.networks.pop(name, None)
        if name not in self.networks and self._cuda:
            torch.cuda.empty_cache()

    def run(
        self,
        rounds: int,
        peaks: bool,
        save: Callable[[dict[str, Any]], None] = lambda group: None,
        deadline: float = math.inf,
    ) -> dict[str, Any]:
        """Check, count, time and measure peaks; return the rows.

        Args:
            rounds: timed steps of each peer; fewer, but `FEWEST_ROUNDS`, after the deadline.
            peaks: whether they are measured; not after the deadline.
            save: gets the rows after each stage.
            deadline: of `time.monotonic`.
        """
        result = {"name": self.group, "rows": list(self.rows.values())}
        if not all("exact" in self.rows[name] for name in self.networks):
            self.check()
            save(result)
        inputs = self.level.inputs(self.settings, self.group)
        # cuDNN tries its algorithms at the first step of each shape: for all peers alike
        with _switches(torch.backends.cudnn, benchmark=self._cuda):
            if not all("seconds" in self.rows[name] for name in self._exact()):
                for name in self._exact():
                    with self._reported(name):
                        self.rows[name]["saved_bytes"] = self._saved(name, inputs)
                for name, seconds in self._time(inputs, rounds, deadline).items():
                    self.rows[name]["seconds"] = seconds
                save(result)
            for name in self._exact() if peaks and self._cuda else ():
                if time.monotonic() < deadline:
                    with self._reported(name):
                        self.rows[name]["peak_bytes"] = self._peak(name, inputs)
        exact = self._exact() if peaks and time.monotonic() < deadline else []
        for name in exact if self._cuda else ():
            if not self.level.peers[name].compiled:  # the compiler holds on to those
                self.rows[name]["resident_bytes"] = self._resident(name)
        self.networks.clear()  # their memory is for those that are measured now
        for name in exact if not self._cuda else ():
            found = measure_peaks(self.level, name, self.settings)
            self.rows[name] |= found.get(self.group, found)
        save(result)
        return result

    def check(self) -> None:
        """Compare gradients with those of the official chain in float64.

        At a small size; a 16-bit row has to pass in float32 too: through many layers 16 bits alone
        prove little. On a GPU, where kernels split large sizes otherwise than small ones, at the
        raced size as well, and compiled rows only there: each size is compiled anew.
        """
        own, small = self.settings.dtype, {"size": self.level.check_size, "batch": 1}
        dtypes = (own,) if own in ("float32", "float64") else ("float32", own)
        judged = [(dataclasses.replace(self.settings, **small, dtype=d), SEEDS) for d in dtypes]
        judge = Judge(self.level, self.group, self._converted("official"))
        with _switches(torch.backends.cudnn.conv, fp32_precision="ieee"):
            for settings, seeds in judged:
                skipped = {name for name in self.networks if self._compiled_on_gpu(name)}
                self._judge(judge, settings, seeds, skipped)
            if self._cuda:
                try:
                    self._judge(judge, self.settings, SEEDS[:1], set())
                except torch.OutOfMemoryError:  # float64 needs the most: then small ones stand
                    torch.cuda.empty_cache()

    def _compiled_on_gpu(self, name: str) -> bool:
        return self._cuda and self.level.peers[name].compiled

    def _judge(
        self, judge: Judge, settings: Settings, seeds: Sequence[int], skipped: set[str]
    ) -> None:
        """Set the verdicts and errors of the rows that have not failed yet."""
        names = [name for name in self.networks if self.rows[name].get("exact", True)]
        names = [name for name in names if name not in skipped]
        networks = {name: self.networks[name] for name in names}
        passed = judge.judge(networks, settings, seeds, self._reported, self.rows)
        for name in names:
            self.rows[name]["exact"] = name in passed

    def _exact(self) -> list[str]:
        return [name for name in self.networks if self.rows[name].get("exact")]

    def _saved(self, name: str, inputs: Inputs) -> int:
        network = self.networks[name]
        renew(network, inputs)
        owner = self.level.owner(network, inputs)
        with saved_bytes(owner) as saved, autocast(self.settings):
            y = self.level.forward(network, inputs, name)  # alive until it is counted
        del y
        return saved.total

    def _time(
        self, inputs: Inputs, rounds: int, deadline: float, warmup: int = 2
    ) -> dict[str, list[float]]:
        """Time each step: on a GPU between two events, starting with an empty queue."""
        seconds: dict[str, list[float]] = {name: [] for name in self._exact()}
        timer = StepTimer(torch.device(self.settings.device))
        gc.disable()
        try:
            for number in range(-warmup, rounds):
                if number >= FEWEST_ROUNDS and time.monotonic() > deadline:
                    break
                gc.collect()
                names = self._exact()
                for name in names if number % 2 else reversed(names):
                    with self._reported(name):
                        network = self.networks[name]
                        renew(network, inputs)
                        if self._cuda:
                            torch.cuda.synchronize()
                        timer.start()
                        step(self.level, network, inputs, name, self.settings)
                        timer.stop()
                        taken = timer.take()
                        if number >= 0:
                            seconds[name] += taken
                        renew(network, inputs)
        finally:
            gc.enable()
        return {name: seconds[name] for name in self._exact()}

    def _peak(self, name: str, inputs: Inputs) -> int:
        """Return the peak bytes of tensors on the GPU during a step, above those before it."""
        network = self.networks[name]
        for _ in range(2):  # in the first cuDNN may try algorithms that need more
            renew(network, inputs)
            gc.collect()
            before = torch.cuda.memory_allocated(self.settings.device)
            torch.cuda.reset_peak_memory_stats(self.settings.device)
            step(self.level, network, inputs, name, self.settings)
        peak = torch.cuda.max_memory_allocated(self.settings.device)
        renew(network, inputs)
        return peak - before

    def _resident(self, name: str) -> int:
        """Return the bytes freed with the network: parameters, buffers and what else it keeps."""
        gc.collect()
        before = torch.cuda.memory_allocated(self.settings.device)
        del self.networks[name]
        gc.collect()
        return before - torch.cuda.memory_allocated(self.settings.device)


@contextlib.contextmanager
def _switches(backend: Any, **values: bool | str) -> Iterator[None]:
    """Set switches of a torch backend within the context."""
    before = {name: getattr(backend, name) for name in values}
    try:
        for name, value in values.items():
            setattr(backend, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(backend, name, value)
