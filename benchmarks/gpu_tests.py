"""Runs the tests that need a GPU, each file in a process of its own: tests.json.

    python benchmarks/gpu_tests.py --seconds 120 --out benchmarks/results

The files of `tests/gpu`, and those whose cases run on a GPU where there is one; kernels first. An
illegal access in one file cannot spoil another. Files that have not ended in time are stopped and
counted as far as they came.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from processes import ROOT, run

WORDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
SWITCH = "cuda.is_available()"  # in a file that runs elsewhere too
NOTHING = 5  # exit status of pytest without a test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--at-once", type=int, default=min(6, max(1, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--files", nargs="*", type=Path, help="instead of all")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    chosen = files() if options.files is None else [path.resolve() for path in options.files]
    with ThreadPoolExecutor(options.at_once) as pool:
        rows = list(pool.map(lambda path: tested(path, options.out / "logs", deadline), chosen))
    total = {word: sum(row[word] for row in rows) for word in WORDS.values()}
    unfinished = sum(row["status"] == "out of time" for row in rows)
    options.out.mkdir(parents=True, exist_ok=True)
    summary = {**total, "unfinished_files": unfinished, "files": rows}
    (options.out / "tests.json").write_text(json.dumps(summary, indent=1) + "\n")
    for row in rows:
        counts = ", ".join(f"{row[word]} {word}" for word in WORDS.values() if row[word])
        print(f"{row['file']}: {row['status']}, {row['seconds']:.0f} s: {counts or 'no tests'}")
        for failure in row["failures"][:8]:
            print(f"    {failure}")
    print(", ".join(f"{count} {word}" for word, count in total.items()), end="")
    print(f"; {unfinished} files out of time" if unfinished else "")
    return 1 if total["failed"] or total["errors"] or unfinished else 0


def files() -> list[Path]:
    """Kernels, then other ops, then whole networks."""
    of_ops = [
        path
        for path in sorted((ROOT / "tests/svf_fast").glob("test_*.py"))
        if SWITCH in path.read_text()
    ]
    of_ops.sort(key=lambda path: not path.name.startswith("test_triton"))
    of_gpu = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    return [*of_ops, *(path for path in of_gpu if "emulated" not in path.name)]


def tested(path: Path, logs: Path, deadline: float) -> dict[str, Any]:
    """Runs one file and counts."""
    log = logs / f"{path.parent.name}-{path.stem}.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command.append(str(path.relative_to(ROOT)))
    if path.parent.name != "gpu" and not path.name.startswith("test_triton"):
        command += ["-k", "cuda"]  # the CPU's cases run with all other tests
    ended = run(command, log, deadline - time.monotonic(), OMP_NUM_THREADS="2")
    text = log.read_text(errors="replace")
    row: dict[str, Any] = {"file": str(path.relative_to(ROOT)), "seconds": ended.seconds}
    row["status"] = "no tests" if ended.status == NOTHING else ended.word
    row |= counted(text)
    if ended.status not in (0, 1, NOTHING) and not row["failed"] and not row["errors"]:
        row["errors"] = 1  # a crash, or stopped: something is wrong that no test tells
        row["failures"].append(text.strip().rpartition("\n")[2][:200])
    return row


def counted(text: str) -> dict[str, Any]:
    """Outcomes in what ``pytest -v`` prints, and the lines of its summary that name failures."""
    found = re.findall(r"^\S+::.*? (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    counts: dict[str, Any] = {name: found.count(word) for word, name in WORDS.items()}
    if re.search(r"^E  ", text, re.M) and not found:  # the file itself cannot be imported
        counts["errors"] = 1
    counts["failures"] = [line[:240] for line in re.findall(r"^(?:FAILED|ERROR) .+", text, re.M)]
    return counts


if __name__ == "__main__":
    sys.exit(main())
