"""Options of the race, and its results: a file for each level, and the table at the end."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from levels import LEVELS, Settings
from race import Contest, defaults, earlier_groups, variant, write_results
from render import markdown

import svf_fast

FOLDER = Path(__file__).with_name("results")
GIVEN = ("size", "batch", "shots", "dtype", "device", "backbone", "weights", "stride_on", "width")
ROUNDS = {"layer": 11, "block": 11, "backbone": 9, "step": 7, "prior": 5}
GPU_ROUNDS = 31  # milliseconds each


def pytest_addoption(parser) -> None:
    group = parser.getgroup("race")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
    for name in GIVEN:
        option = f"--race-{name.replace('_', '-')}"
        group.addoption(option, type=kinds[name], help=f"`{name}` of levels.Settings")
    group.addoption("--race-channels-last", action="store_true", help="channels_last memory format")
    group.addoption("--race-peers", help="names of peers, separated by semicolons (default: all)")
    group.addoption("--race-rounds", type=int, help="timed steps of each peer")
    group.addoption("--race-no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--race-no-peak", action="store_true", help="measure no peaks")
    group.addoption("--race-suffix", help="what the names of the results end with")
    group.addoption("--race-seconds", type=float, help="after them fewer rounds and no peaks")
    group.addoption("--race-svd-cache", type=Path, help="folder of decompositions, kept")
    group.addoption(
        "--race-resume", action="store_true", help="keep what an earlier run has measured"
    )
    group.addoption("--race-results", type=Path, default=FOLDER, help="folder of the results")


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["svf_fast"] = {key: str(value) for key, value in svf_fast.build_info().items()}


class Clock:
    """A clock that only `advance` moves: it gives pytest-benchmark the rounds timed in turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


CLOCK = Clock()


class Race:
    """Runs a group of a level when its first peer is asked for; keeps the rows of all."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results: dict[str, dict[str, dict]] = {}
        seconds = config.getoption("race_seconds")
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.written: list[Path] = []

    def settings(self, level: str) -> Settings:
        given = {name: self._config.getoption(f"race_{name}") for name in GIVEN}
        given = {name: value for name, value in given.items() if value is not None}
        layout = self._config.getoption("race_channels_last")
        return dataclasses.replace(defaults(LEVELS[level]), **given, channels_last=layout)

    def peers(self, level: str) -> list[str]:
        known = LEVELS[level].peers
        asked = self._config.getoption("race_peers")
        names = [name.strip() for name in asked.split(";")] if asked else list(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise pytest.UsageError(
                f"--race-peers: expected some of {'; '.join(known)}, got {'; '.join(unknown)}"
            )
        if self._config.getoption("race_no_compile"):
            names = [name for name in names if not known[name].compiled]
        return names

    def row(self, level: str, group: str, name: str) -> dict:
        names = self.peers(level)
        if name not in names:
            pytest.skip("left out by --race-peers or --race-no-compile")
        groups = self._results.setdefault(level, {})
        if group not in groups:
            settings = self.settings(level)
            rounds = ROUNDS[level] if settings.device == "cpu" else GPU_ROUNDS
            rounds = self._config.getoption("race_rounds") or rounds
            cache, earlier = self._config.getoption("race_svd_cache"), self._earlier(level, group)
            contest = Contest(LEVELS[level], group, settings, names, cache, earlier)

            def save(result: dict) -> None:
                groups[group] = result
                self._write(level)

            contest.run(rounds, self.peaks, save, self._deadline)
        return next(row for row in groups[group]["rows"] if row["peer"] == name)

    @property
    def peaks(self) -> bool:
        return not self._config.getoption("race_no_peak")

    def _path(self, level: str) -> Path:
        suffix = self._config.getoption("race_suffix")
        words = [variant(LEVELS[level], self.settings(level)), *([suffix] if suffix else [])]
        return self._config.getoption("race_results") / f"{'-'.join(words)}.json"

    def _earlier(self, level: str, group: str) -> list[dict]:
        """The rows of a run with the same settings, if they are to be kept."""
        if not self._config.getoption("race_resume"):
            return []
        groups = earlier_groups(self._path(level), self.settings(level))
        return [row for other in groups if other["name"] == group for row in other["rows"]]

    def _write(self, name: str) -> None:
        """Writes what there is of a level."""
        command = "pytest " + shlex.join(self._config.invocation_params.args)
        level, groups = LEVELS[name], list(self._results[name].values())
        suffix = self._config.getoption("race_suffix")
        path = self._path(name)
        write_results(path, name, level.title, self.settings(name), groups, command, suffix)
        if path not in self.written:
            self.written.append(path)


@pytest.fixture(scope="session")
def race(request) -> Iterator[Race]:
    race = Race(request.config)
    yield race
    request.config.stash[WRITTEN] = race.written


WRITTEN: pytest.StashKey[list[Path]] = pytest.StashKey()


@pytest.fixture
def contestant(race, benchmark):
    """Reports one row of a race to pytest-benchmark; fails where the row is not exact."""

    def report(level: str, group: str, name: str) -> None:
        row = race.row(level, group, name)
        if "reason" in row:
            (pytest.skip if row.get("skipped") else pytest.fail)(row["reason"])
        error = row.get("error", float("nan"))
        of_blocks = f", of a block {row['block_error']:.1e}" if "block_error" in row else ""
        assert row["exact"], f"relative error {error:.1e}{of_blocks} against float64: no speed"
        if race.peaks and not row.keys() & {"peak_bytes", "peak_reason"}:
            pytest.fail("out of time before its peak was measured")
        benchmark.group = f"{level}: {group}"
        benchmark.extra_info |= {key: value for key, value in row.items() if key != "seconds"}
        seconds = iter(row["seconds"])
        benchmark.pedantic(CLOCK.advance, args=(seconds,), rounds=len(row["seconds"]))

    return report


def pytest_generate_tests(metafunc) -> None:
    """``level`` is a constant of the file; its groups and peers are the parameters."""
    level = LEVELS[metafunc.module.LEVEL]
    metafunc.parametrize("group", level.groups)
    metafunc.parametrize("peer", level.peers)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_terminal_summary(terminalreporter, config) -> None:
    for path in config.stash.get(WRITTEN, []):
        terminalreporter.write_line("")
        terminalreporter.write_line(markdown(path))
        terminalreporter.write_line(f"written: {path}")
