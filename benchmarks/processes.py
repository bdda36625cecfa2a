"""Child processes with a time limit, their output in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """How a process ended: its exit status (None: stopped at the limit) and its seconds."""

    status: int | None
    seconds: float

    @property
    def word(self) -> str:
        if self.status is None:
            return "out of time"
        return "ok" if self.status == 0 else f"failed ({self.status})"


def run(command: list[str], log: Path, limit: float, **environment: str) -> Ended:
    """Runs a command in the repository; at the limit it and all its children are killed.

    The log gets the command and whatever it and its children print. The repository comes first
    among the folders that Python imports from.
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
            command,
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
        finally:  # children too, of one that ended or was interrupted as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status, time.monotonic() - started)
