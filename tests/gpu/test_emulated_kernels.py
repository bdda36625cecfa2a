"""The CUDA kernels where there is no GPU: their own tests on csrc/cuda compiled for the CPU.

`emulation.cpp` says what of CUDA is modelled. A sanitized second run stands in for
compute-sanitizer: torch's CPU buffers are as long as asked for, so a read behind one is seen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import emulated_cuda

pytestmark = pytest.mark.skipif(
    emulated_cuda.compiler() is None, reason="no C++ compiler here ($CXX or g++)"
)

# Layouts that are copied before a kernel sees them, and half of the dtypes, are left to `any_shape`
# and `any_alignment`; the kernels are templates of the dtype.
CHOSEN = (
    "any or special or every or more or guard or"
    " (definition or scale_matches or in_place or backward)"
    " and not (sliced or expanded or torch.float64 or torch.float16 or dtype0 or dtype3)"
)
SANITIZED = "any_alignment or any_number or guard or (scale_matches and contiguous and dtype2)"
UNFIT = "not sets and not threads"  # of CPUs


def run_tests(root: Path, library: Path, chosen: str, environment: dict[str, str]) -> int:
    """Runs the chosen tests of the ops on the library; how many passed."""
    files = [
        root / f"tests/svf_fast/ops/test_{op}.py" for op in ("affine_act", "channel_dot", "guard")
    ]
    options = ["-q", "-x", "-p", "tests.gpu.emulated_cuda", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *files, "-k", f"({chosen}) and {UNFIT}"]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **environment,
        emulated_cuda.LIBRARY: str(library),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout
    return int(found[1])


def test_kernels_pass_their_tests(root: Path) -> None:
    assert run_tests(root, emulated_cuda.build_library(), CHOSEN, {}) > 250


def test_kernels_stay_within_their_buffers(root: Path, tmp_path: Path) -> None:
    if not emulated_cuda.can_sanitize(tmp_path):
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
    library = emulated_cuda.build_library(sanitize=True)
    environment = emulated_cuda.sanitizer_environment()
    assert run_tests(root, library, SANITIZED, environment) > 50


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("none", r"right\nright"),
        ("missing barrier, right", "wrong"),
        ("missing barrier, left", "wrong"),
        ("divergent barrier", "divergent barrier: .* 40 wait in __syncthreads.* 24 have ended"),
        ("part of a warp", "divergent barrier: .* 8 for lanes of their warp"),
        ("read behind the end", "heap-buffer-overflow"),
        ("misaligned vector", "misaligned address"),
        ("no blocks", "invalid launch"),
    ],
)
def test_emulation_sees_faults(fault: str, seen: str, tmp_path: Path) -> None:
    if not emulated_cuda.can_sanitize(tmp_path):
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
    command = [emulated_cuda.build_faulty(), fault]
    done = subprocess.run(command, capture_output=True, text=True)
    assert re.search(seen, done.stdout + done.stderr), done.stdout + done.stderr
