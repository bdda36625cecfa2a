"""Fused against reference: a convolution, a residual block and the prior mask.

    make bench
    make bench ARGS="--dtype bfloat16 --device cuda -k layer3"

`svf_fast` beside `official`, the paper's three layers (for the prior mask, the dense matrix of
similarities), and beside `frozen bound`, the convolution or block that does not train at all.
Gradients are compared with float64 before anything is timed. S changes before each pass, as an
optimizer changes it.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from benchmarks.race.contest import Contest
from benchmarks.race.exactness import renew, step
from benchmarks.race.levels import LEVELS, Settings, autocast, defaults

NAMES = ("official", "frozen bound", "svf_fast")
CASES = [
    pytest.param(level, group, name, id=f"{level}: {group}-{name}")
    for level in ("layer", "block", "prior")
    for group in LEVELS[level].groups
    for name in NAMES
    if name in LEVELS[level].peers
]


@functools.lru_cache(maxsize=1)
def checked(level: str, group: str, settings: Settings) -> Contest:
    """Return the peers of a group, their gradients compared with float64."""
    names = [name for name in NAMES if name in LEVELS[level].peers]
    contest = Contest(LEVELS[level], group, settings, names)
    contest.check()
    return contest


@pytest.fixture
def settings(request, level: str) -> Settings:
    options = {name: request.config.getoption(name) for name in ("size", "dtype", "device")}
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(defaults(level), **given)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("level, group, name", CASES)
def test_speed(benchmark, settings, level: str, group: str, name: str, backward: bool) -> None:
    contest = checked(level, group, settings)
    row = contest.rows[name]
    assert row.get("exact"), f"no speed: {row}"
    network, inputs = contest.networks[name], LEVELS[level].inputs(settings, group)

    def run() -> None:
        renew(network, inputs)
        if backward:
            step(LEVELS[level], network, inputs, name, settings)
        else:
            with autocast(settings):
                LEVELS[level].forward(network, inputs, name)
        if settings.device != "cpu":
            torch.cuda.synchronize()

    benchmark.group = f"{level}: {group}, {'forward and backward' if backward else 'forward'}"
    benchmark.name = name
    benchmark.extra_info |= {"settings": dataclasses.asdict(settings), "error": row["error"]}
    benchmark(run)
