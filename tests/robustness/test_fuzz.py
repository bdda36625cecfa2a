"""Damaged files: each is understood, or refused with an error that the command line prints.

SVF_LONG=1 reads twelve thousand, else a thousand; SVF_SEED repeats those of a failure.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.long import LONG


def test_readers_understand_or_refuse(root: Path) -> None:
    seed = os.environ.get("SVF_SEED", str(random.SystemRandom().randrange(10**6)))
    print(f"the inputs are those of SVF_SEED={seed}")
    count = "12000" if LONG else "1000"
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.fuzz", "--count", count, "--seed", seed],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, 1), f"a crash: {done.stderr[-2000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    failures = result.pop("failures")
    print(result)
    assert not failures, f"{len(failures)} failures, the first\n" + "\n".join(failures[:3])
    assert result["read"] > result["inputs"] / 20 and result["refused"] > result["inputs"] / 4
