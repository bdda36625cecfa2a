"""Commands of `fss` in processes of their own, without the seconds that each takes to import torch.

A server, started by `Commands`: it imports fss and computes nothing, so that it can fork. Each line
of its input is a command in JSON; it answers with the process's id, then with the exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """Runs commands, one at a time, each in a process group of its own.

    Args:
        output: file that gets what they print.
        environment: variables beside those of this process.
    """

    def __init__(self, output: Path, **environment: str) -> None:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with output.open("w") as file:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=variables,
                text=True,
            )
        self.output = output
        self._answer()

    def start(
        self,
        *arguments: str,
        archives: dict[str, tuple[str, str]] | None = None,
        largest_file: int | None = None,
    ) -> int:
        """Starts `fss` with arguments; its process's id.

        `archives` replaces those of datasets.py, `largest_file` (bytes) limits what is written
        as a full disk does.
        """
        assert self._server.stdin is not None
        order = {"arguments": arguments, "archives": archives or {}, "largest_file": largest_file}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit status of the command, minus the signal if that ended it."""
        return self._answer()

    def run(self, *arguments: str, **options) -> tuple[int, float]:
        """Exit status and seconds of a whole command."""
        begin = time.monotonic()
        self.start(*arguments, **options)
        return self.wait(), time.monotonic() - begin

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def _answer(self) -> int:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended: {self.output.read_text()[-3000:]}")
        return int(line)


def kill(process: int) -> None:
    """Kills a command and the processes it started, unless they have ended; none can react."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _serve() -> None:
    import torch._dynamo  # noqa: F401 (seconds that the first optimizer would take)

    from fss.cli import build_parser, main
    from fss.data.prepare import datasets as prepare
    from fss.data.prepare.download import Archive

    build_parser()  # imports every command, once for all forks

    answers = os.fdopen(os.dup(1), "w")
    print(os.getpid(), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            answers.close()
            os.setpgid(0, 0)
            os.dup2(2, 1)
            os.close(0)
            if order["largest_file"]:
                limit = order["largest_file"]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for name, archive in order["archives"].items():
                _replace(prepare, name, Archive(*archive))
            status = 70
            try:
                status = main(order["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        with contextlib.suppress(OSError):
            os.setpgid(process, process)  # whoever comes first
        print(process, file=answers, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _replace(prepare, name: str, archive) -> None:
    name, _, split = name.partition(".")
    if split:
        getattr(prepare, name)[split] = archive
    else:
        setattr(prepare, name, archive)


if __name__ == "__main__":
    _serve()
