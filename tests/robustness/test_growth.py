"""Nothing grows: a process that trains, converts, merges or switches adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs the resident memory of Linux"
)
def test_nothing_grows(root) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/robustness/growth.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr
