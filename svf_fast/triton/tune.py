"""Time the configurations of the kernels on this GPU and keep the fastest.

``python -m svf_fast.triton.tune`` writes a table to the user's cache folder, where the kernels find
it (``tuning.py``). Results are the same without it. The same command continues an interrupted
search; after a finished one it has nothing to do.

1. Other processes compile the candidates, for at most a third of the budget.
2. The rule's configuration of each problem is timed: the slowest are searched first.
3. Each candidate's result is compared with that of the rule's configuration, then timed briefly;
   the fastest few are timed again, and the best is kept.

A time is the median over launches that find nothing of theirs in the L2 cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.errors import TritonError
from triton.testing import do_bench

from svf_fast.triton import check, tuning
from svf_fast.triton.check import Case
from svf_fast.triton.tuning import OPTIONS, Config

BUDGET = 300.0  # seconds
RACE_POSITIONS = (6561, 39366)
_BRIEF, _LONG = 10.0, 60.0  # milliseconds of a timing
_FINALISTS = 3
_DIFFERENT_BITS = 1e-3  # of masks and indices, where rounding decides

Launch = Callable[[], Any]
Timer = Callable[[Launch, float], float]  # a launch, milliseconds to spend -> microseconds


class Found(NamedTuple):
    """The outcome for a problem: the best configuration, and how it compares with the rule's."""

    config: Config
    microseconds: float
    by_rule: float
    timed: int
    differing: int  # candidates whose result was another
    failed: int  # candidates that do not compile or fit


def search(
    cases: Sequence[Case],
    arch: int,
    device: torch.device,
    table: dict[str, Any],
    budget: float,
    timer: Timer,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Case, Found]]:
    """Add the fastest configuration of each case to a table, the longest-running case first.

    Each case may take an equal part of the seconds that are left; cases not reached within the
    budget are not added, and those in the table already are not timed again.
    """
    end = clock() + budget
    costs = []
    for case in select_missing(cases, table):
        if clock() > end:
            break
        with check.allow_tf32(case.tf32):
            launcher = case.problem.launcher(device)
            costs.append((timer(_launch(launcher, case.candidates(arch)[0]), _BRIEF), case))
    costs.sort(key=lambda pair: pair[0], reverse=True)
    for place, (_, case) in enumerate(costs):
        now = clock()
        if now > end:
            return
        found = find_best(
            case, arch, device, now + (end - now) / (len(costs) - place), timer, clock
        )
        table["kernels"].setdefault(case.kernel, {})[case.key] = found.config
        table["microseconds"].setdefault(case.kernel, {})[case.key] = round(found.microseconds, 2)
        yield case, found


def find_best(
    case: Case,
    arch: int,
    device: torch.device,
    end: float,
    timer: Timer,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Find the fastest configuration of a case that has the result of the rule's.

    After the time ``end`` no further candidate is tried.
    """
    rule, *others = case.candidates(arch)
    random.Random(0).shuffle(others)  # a part of them is a fair sample
    differing = failed = 0
    with check.allow_tf32(case.tf32):
        launcher = case.problem.launcher(device)
        launch = functools.partial(_launch, launcher)
        expected = collect_tensors(launch(rule)())
        brief = [(timer(launch(rule), _BRIEF), 0, rule)]
        for number, config in enumerate(others, 1):
            if clock() > end:
                break
            try:
                result = collect_tensors(launch(config)())
            except TritonError:  # too much shared memory, or an assembler that gives up
                failed += 1
                continue
            if agree(result, expected):
                brief.append((timer(launch(config), _BRIEF), number, config))
            else:
                differing += 1
        finalists = sorted(brief)[:_FINALISTS]
        if all(config is not rule for *_, config in finalists):
            finalists.append(brief[0])
        timed = [(timer(launch(config), _LONG), number, config) for _, number, config in finalists]
    by_rule = next(microseconds for microseconds, _, config in timed if config is rule)
    microseconds, _, config = min(timed)
    return Found(config, microseconds, by_rule, len(brief), differing, failed)


def _launch(launcher: Callable[[Config], Any], config: Config) -> Launch:
    return lambda: launcher({**config, **OPTIONS})


def select_missing(cases: Sequence[Case], table: dict[str, Any]) -> list[Case]:
    """Select the cases that a table does not have."""
    kernels = table["kernels"]
    return [case for case in cases if case.key not in kernels.get(case.kernel, {})]


def collect_tensors(result: Any) -> list[Tensor]:
    """Collect the tensors of a launch's result: one, or in tuples and lists among other things."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in collect_tensors(part)]
    return []


def agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Tell whether results are equal up to rounding, which other block sizes change.

    Floating point: ``|actual - expected| <= max(eps, 1e-5) |expected|`` in the L2 norm. Of other
    results, which follow from a comparison, one in a thousand may differ.
    """
    return len(actual) == len(expected) and all(map(_near, actual, expected))


def _near(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if actual.dtype == torch.uint8:  # a mask: eight of them a byte
        shifts = torch.arange(8, dtype=torch.uint8, device=actual.device)
        actual, expected = (x[:, None] >> shifts & 1 for x in (actual, expected))
    if not actual.is_floating_point():
        return (actual != expected).sum().item() <= _DIFFERENT_BITS * actual.numel()
    tolerance = max(torch.finfo(actual.dtype).eps, 1e-5)
    a, b = actual.double(), expected.double()
    return ((a - b).norm() <= tolerance * b.norm()).item()


def open_table(path: Path, gpu: str) -> dict[str, Any]:
    """Return the table at a path, to be continued, or an empty one.

    Raises:
        ValueError: the file is not such a table.
    """
    tuning.read_table(path)
    head = {
        "origin": "timed on this GPU by python -m svf_fast.triton.tune",
        "gpu": gpu,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    table = json.loads(path.read_text()) if path.exists() else {}
    return {"kernels": {}, "microseconds": {}} | table | head


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace the file atomically: a reader finds the old table or the new one."""
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        part.write_text(text)
        part.replace(path)


def is_of_a_race(case: Case) -> bool:
    """Tell whether the races' bottlenecks at 641 px, one image or six, need the case."""
    problem: Any = case.problem
    if getattr(problem, "positions", 0) not in RACE_POSITIONS:
        return False
    if case.kernel == "pointwise":
        return not problem.extras.dot  # of layers that run as `chain`
    return case.kernel != "gram" or problem.width_a <= 512


def compile_ahead(cases: Sequence[Case], arch: int, seconds: float) -> None:
    """Fill Triton's cache on disk with the candidates of the cases, as far as time allows."""
    rules = [(case, arch, case.candidates(arch)[0]) for case in cases]
    others = [(case, arch, config) for case in cases for config in case.candidates(arch)[1:]]
    random.Random(0).shuffle(others)  # a part of them is a fair sample
    pool = check.processes()
    try:
        # one that fails shows when it is timed
        wait(
            [pool.submit(check.compile_one, x) for x in check.compilations(rules + others)], seconds
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _timer(launch: Launch, milliseconds: float) -> float:
    return 1000 * do_bench(launch, warmup=milliseconds / 4, rep=milliseconds, return_mode="median")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m svf_fast.triton.tune", description=__doc__)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="all of them if not given")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the user's cache if not given")
    parser.add_argument(
        "--like",
        choices=("race",),
        help="only what the races' bottlenecks ask for: 6561 and 39366 positions",
    )
    options = parser.parse_args(arguments)
    cases = check.cases(check.select_kernels(check.tunables(), options.kernels))
    if options.like == "race":
        cases = list(filter(is_of_a_race, cases))
    if knobs.runtime.interpret or not torch.cuda.is_available():
        why = "TRITON_INTERPRET is set" if knobs.runtime.interpret else "torch finds no GPU here"
        print(f"{why}: there is nothing to time, the kernels use their rules.", file=sys.stderr)
        return 1
    return _tune(cases, options.out, options.budget_seconds)


def _tune(cases: Sequence[Case], out: Path | None, budget: float) -> int:
    start = time.monotonic()
    arch, gpu, _ = tuning.gpu()
    path = out or tuning.cache_path(gpu)
    table = open_table(path, gpu)
    todo = [case for case in select_missing(cases, table) if len(case.candidates(arch)) > 1]
    compile_ahead(todo, arch, budget / 3)
    print("| kernel | problem | rule, µs | best, µs | timed | differ | fail | configuration |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    done = differing = failed = 0
    left = budget - (time.monotonic() - start)
    device = torch.device("cuda", torch.cuda.current_device())
    for case, found in search(todo, arch, device, table, left, _timer):
        write(path, table)
        done, differing, failed = done + 1, differing + found.differing, failed + found.failed
        times = f"{found.by_rule:.1f} | {found.microseconds:.1f}"
        counts = f"{found.timed} | {found.differing} | {found.failed}"
        config = check.format_config(found.config)
        print(f"| {case.kernel} | {case.key} | {times} | {counts} | {config} |", flush=True)
    tuning.forget()
    print(
        f"{path}: {done} of {len(todo)} problems in {time.monotonic() - start:.0f} s; "
        f"{differing} candidates gave another result, {failed} did not compile or fit"
    )
    if done < len(todo):
        print("The budget is spent; the same command goes on with the rest.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
