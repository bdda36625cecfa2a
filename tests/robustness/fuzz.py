"""Reads damaged files and counts what becomes of them; in a process of its own, which may crash.

    python -m tests.robustness.fuzz --count 1000 --seed 7           all readers
    python -m tests.robustness.fuzz --only photo --index 12 --seed 7 --keep bad.jpg   one again

The last line is JSON: inputs, those understood, those refused, and the failures.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from fss.cli import _USER_ERRORS, ArgumentError, _expected, _message
from tests.robustness.mutations import variant
from tests.robustness.readers import Reader, readers

SECONDS = 10.0  # of the processor, for one input
MEMORY = 1 << 30  # bytes that one input may need


class Hang(BaseException):
    """An input took too long."""


def stop(number: int, frame: object) -> None:
    raise Hang


def attempt(reader: Reader, path: Path) -> tuple[str, str]:
    """What became of an input: "read", "refused" or "failed", and how."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(30 * SECONDS, exit=True)  # where no Python code runs
    try:
        reader.read(path)
        return "read", ""
    except (ArgumentError, *_USER_ERRORS) as error:
        if _expected(error) and len(_message(error)) <= 4000:
            return "refused", type(error).__name__
        return "failed", traceback.format_exc(limit=-6)[-3000:]
    except BaseException:
        return "failed", traceback.format_exc(limit=-6)[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def limit_memory() -> None:
    """A MemoryError, not a machine that swaps, where an input asks for more than `MEMORY`."""
    with Path("/proc/self/status").open() as file:
        used = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--index", type=int)
    parser.add_argument("--keep")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        os.environ["COLUMNS"] = "200"
        work = Path(folder)
        chosen = [r for r in readers(work) if options.only in (None, r.name)]
        signal.signal(signal.SIGPROF, stop)
        limit_memory()
        total = sum(reader.share for reader in chosen)
        outcomes: dict[str, Counter[str]] = {}
        failures, slowest = [], (0.0, "")
        for reader in chosen:
            count = max(1, round(options.count * reader.share / total))
            indices = range(count) if options.index is None else [options.index]
            counted = outcomes.setdefault(reader.name, Counter())
            path = work / f"input{reader.suffix}"
            for index in indices:
                key = [options.seed, zlib.crc32(reader.name.encode()), index]
                path.write_bytes(variant(np.random.default_rng(key), reader.seeds))
                if options.keep:
                    Path(options.keep).write_bytes(path.read_bytes())
                where = f"--only '{reader.name}' --seed {options.seed} --index {index}"
                print(where, file=sys.stderr, flush=True)  # the last one is what crashed
                begin = time.monotonic()
                outcome, how = attempt(reader, path)
                slowest = max(slowest, (round(time.monotonic() - begin, 2), where))
                counted[outcome] += 1
                if outcome == "failed":
                    failures.append(f"{where}\n{how}")
    summed: Counter[str] = sum(outcomes.values(), Counter())
    print(
        json.dumps(
            {
                "inputs": summed.total(),
                "read": summed["read"],
                "refused": summed["refused"],
                "failures": failures,
                "slowest": slowest,
                "by_reader": {name: dict(counted) for name, counted in outcomes.items()},
            }
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
