"""Child processes with a time limit, their output in a file; none outlives its parent.

Between the two stands a guard, this file as a script: it runs the command in a process group of
its own and kills the whole group when the parent dies, by any signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1  # of Linux


class Ended(NamedTuple):
    """How a process ended: its exit status (None: stopped at the limit) and its seconds."""

    status: int | None
    seconds: float

    @property
    def word(self) -> str:
        if self.status is None:
            return "out of time"
        return "ok" if self.status == 0 else f"failed ({self.status})"


def run(
    command: list[str], log: Path, limit: float, grace: float = 0.0, **environment: str
) -> Ended:
    """Run a command in the repository; at the limit it and all its children are killed.

    Args:
        command: what to run.
        log: file that gets the command and whatever it and its children print.
        limit: seconds.
        grace: seconds between SIGTERM at the limit, for those that save then, and the end.
        environment: variables beside those of this process. The repository comes first among the
            folders that Python imports from.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    env["COLUMNS"] = "240"  # pytest cuts what is wider
    started = time.monotonic()
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
            cwd=ROOT,
            env=env | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {limit:.0f} s\n")
            file.flush()
            if grace:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        finally:  # children too, of one that ended or was interrupted as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status, time.monotonic() - started)


def guard(parent: int, command: list[str]) -> int:
    """Run a command in the group of this process, which ends when process `parent` does.

    Returns the exit status, 128 and the number of the signal that ended the command.
    """

    def end(*_: object) -> None:
        os.killpg(0, signal.SIGKILL)

    # SIGTERM to the group is meant for the command; its own handling is as by default
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGHUP, end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGHUP))
    if os.getppid() != parent:  # it died before
        end()
    status = subprocess.run(command).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
