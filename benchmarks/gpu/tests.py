"""Runs the tests that need a GPU, each file in a process of its own: tests-PART.json.

    python -m benchmarks.gpu.tests --part first --seconds 60 --out runs/gpu

First the files of `tests/gpu`, small ones first; the rest are those whose cases run on a GPU if
there is one, kernels first. An illegal access in one file cannot affect another. Files that have
not ended in time are stopped, and counted as far as they came. Results are written after each file;
those of files that ended in an earlier call are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import ROOT, run
from fss.files import write_json

WORDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
SWITCH = "cuda.is_available()"  # in a file that runs elsewhere too
NOTHING = 5  # exit status of pytest without a test
OUT_OF_TIME = "out of time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--at-once", type=int, default=min(6, max(1, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--part", choices=["first", "rest"], required=True)
    parser.add_argument("--files", nargs="*", type=Path, help="instead of all of the part")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    chosen = options.files and [path.resolve() for path in options.files]
    names = [str(path.relative_to(ROOT)) for path in chosen or files(options.part)]
    path = options.out / f"tests-{options.part}.json"
    found = _earlier(path)
    with ThreadPoolExecutor(options.at_once) as pool:
        waiting = [
            pool.submit(tested, ROOT / name, options.out / "logs", deadline)
            for name in names
            if name not in found
        ]
        for future in as_completed(waiting):
            row = future.result()
            found[row["file"]] = row
            write_json(path, summary(list(found.values())))
    rows = [found[name] for name in names]
    total = summary(rows)
    for row in rows:
        counts = ", ".join(f"{row[word]} {word}" for word in WORDS.values() if row[word])
        print(f"{row['file']}: {row['status']}, {row['seconds']:.0f} s: {counts or 'no tests'}")
        for failure in row["failures"][:8]:
            print(f"    {failure}")
    print(", ".join(f"{total[word]} {word}" for word in WORDS.values()), end="")
    unfinished = total["unfinished_files"]
    print(f"; {unfinished} files out of time" if unfinished else "")
    return 1 if total["failed"] or total["errors"] or unfinished else 0


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the counts over all files, and list the files."""
    total = {word: sum(row[word] for row in rows) for word in WORDS.values()}
    unfinished = sum(row["status"] == OUT_OF_TIME for row in rows)
    return {**total, "unfinished_files": unfinished, "files": rows}


def _earlier(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of files that had ended in an earlier call."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())["files"]
    return {row["file"]: row for row in rows if row["status"] != OUT_OF_TIME}


def files(part: str) -> list[Path]:
    """List the files of `tests/gpu`, smallest first; or those of kernels, then other ops."""
    if part == "first":
        of_gpu = (ROOT / "tests/gpu").glob("test_*.py")
        listed = [path for path in of_gpu if "emulated" not in path.name]
        return sorted(listed, key=lambda path: path.stat().st_size)
    of_ops = [
        path
        for path in sorted((ROOT / "tests/svf_fast").rglob("test_*.py"))
        if SWITCH in path.read_text()
    ]
    of_ops.sort(key=lambda path: path.parent.name != "triton")
    return of_ops


def tested(path: Path, logs: Path, deadline: float) -> dict[str, Any]:
    """Run one file and count its outcomes."""
    log = logs / f"{path.parent.name}-{path.stem}.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command.append(str(path.relative_to(ROOT)))
    if path.parent.name not in ("gpu", "triton"):
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
    """Count outcomes in the output of ``pytest -v``, and collect its lines about failures."""
    found = re.findall(r"^\S+::.*? (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    counts: dict[str, Any] = {name: found.count(word) for word, name in WORDS.items()}
    if re.search(r"^E  ", text, re.M) and not found:  # the file itself cannot be imported
        counts["errors"] = 1
    counts["failures"] = [line[:240] for line in re.findall(r"^(?:FAILED|ERROR) .+", text, re.M)]
    return counts


if __name__ == "__main__":
    sys.exit(main())
