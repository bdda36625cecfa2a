"""A phase's processes end at their limit and with their parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import processes

# a process with a child, both of which write their ids and would run for a minute
FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""
# the one that runs it, as make gpu and benchmarks/gpu/tests.py do
PARENT = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from benchmarks.gpu import processes
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
command = [sys.executable, "-c", sys.argv[3], sys.argv[2] + "/ids"]
processes.run(command, Path(sys.argv[2]) / "log", 60)
"""
ROOT = str(processes.ROOT)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def eventually(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def ids(path: Path) -> list[int]:
    assert eventually(lambda: path.is_file() and len(path.read_text().split()) == 2)
    return [int(word) for word in path.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("nested", [False, True], ids=["a phase", "a phase's own runs"])
def test_no_process_outlives_a_killed_parent(tmp_path, number, nested):
    command = [sys.executable, "-c", PARENT, ROOT, str(tmp_path), FAMILY]
    if nested:  # the killed one runs one that runs the family
        code = "import subprocess, sys; sys.path.insert(0, sys.argv[1])\n"
        code += "from benchmarks.gpu import processes\n"
        code += "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        code += "from pathlib import Path\n"
        code += "processes.run(sys.argv[3:], Path(sys.argv[2]), 60)"
        command = [sys.executable, "-c", code, ROOT, str(tmp_path / "outer"), *command]
    parent = subprocess.Popen(command)
    family = ids(tmp_path / "ids")
    assert all(is_running(process) for process in family)
    parent.send_signal(number)
    parent.wait(20)
    assert eventually(lambda: not any(is_running(process) for process in family))


def test_children_of_a_stopped_process_are_stopped_too(tmp_path):
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "ids")]
    ended = processes.run(command, tmp_path / "log", 2)
    assert ended.status is None and ended.word == "out of time" and ended.seconds < 10
    family = ids(tmp_path / "ids")
    assert eventually(lambda: not any(is_running(process) for process in family), 5)


def test_one_that_saves_is_given_time(tmp_path):
    code = "import signal, sys, time\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)))\n"
    code += "print('on', flush=True); time.sleep(60)"
    ended = processes.run([sys.executable, "-c", code], tmp_path / "log", 1.5, grace=20)
    assert ended.status is None and ended.seconds < 15
    assert (tmp_path / "log").read_text().splitlines()[-1] == "saved"


def test_the_status_is_that_of_the_command(tmp_path):
    ended = processes.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 20)
    assert ended.status == 3 and ended.word == "failed (3)"
    kill = "import os; os.kill(os.getpid(), 9)"
    assert processes.run([sys.executable, "-c", kill], tmp_path / "log", 20).status == 137


def test_a_guard_whose_parent_is_gone_runs_nothing(tmp_path):
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    guard = [sys.executable, processes.__file__, str(os.getpid() + 1), sys.executable, "-c", code]
    done = subprocess.run(guard, start_new_session=True)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "ran").exists()
