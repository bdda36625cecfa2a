"""The tests of the CPU ops on a build with address and undefined-behaviour sanitizers: `make asan`.

torch's buffers on the CPU are as long as asked for, so a read behind one is seen. The process runs
once per instruction set, which is chosen when the library is loaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu import emulated_cuda
from tests.robustness import sanitized_cpu

pytestmark = pytest.mark.skipif(
    emulated_cuda.compiler() is None, reason="no C++ compiler here ($CXX or g++)"
)

OPS = ("channel_dot", "affine_act", "gram", "cosine_max", "product")
# Other processes would load the ordinary library; what torch compiles takes minutes.
UNFIT = "not capability and not instruction_sets and not compile and not opcheck and not lower"
UNFIT += " and not cuda"
# Of each kernel its shapes, layouts and alignments; what is behind the checks; odd values.
CHOSEN = f"({UNFIT}) and (any_shape or any_alignment or any_number or safe or equal_cosines"
CHOSEN += " or different_layouts or (definition and bfloat16 and sliced))"
NATIVE = f"({UNFIT}) and (any or layouts or safe or special or nan or strided or equal_cosines or"
NATIVE += " threads or every_16_bit or gradient_matches or (definition and bfloat16 and sliced))"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if not emulated_cuda.can_sanitize(tmp_path_factory.mktemp("compiler")):
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
    return sanitized_cpu.build_library()


def run(root: Path, library: Path, capability: str, *arguments: str) -> tuple[int, str]:
    """Runs pytest on the library; its exit status and what it says."""
    environment = {
        **os.environ,
        **emulated_cuda.sanitizer_environment(),
        sanitized_cpu.LIBRARY: str(library),
        "PYTHONPATH": str(root),
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [
        "-p",
        "tests.robustness.sanitized_cpu",
        "--capture=sys",
        *arguments,
    ]  # fd 2 is the sanitizers'
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, f"{done.stdout[-6000:]}\n{done.stderr[:6000]}"  # its first lines tell


def test_cpu_kernels_stay_within_their_buffers(root: Path, library: Path) -> None:
    files = [str(root / f"tests/svf_fast/ops/test_{op}.py") for op in OPS]
    chosen = {"default": CHOSEN, "avx2": CHOSEN, "avx512": NATIVE}
    with ThreadPoolExecutor(2) as pool:  # two cores
        done = pool.map(lambda c: run(root, library, c, *files, "-k", chosen[c]), chosen)
    for status, output in done:
        assert status == 0, output
        found = re.search(r"(\d+) passed", output)
        assert found and int(found[1]) > 100, output


def test_the_sanitizer_sees_a_read_behind_the_end(root: Path, library: Path, tmp_path) -> None:
    """Of a tensor that is said to be longer than its buffer: the test above can fail."""
    test = tmp_path / "test_overrun.py"
    test.write_text(
        "import numpy, torch, svf_fast\n"
        "from svf_fast.ops.channel_dot import channel_dot\n"
        "def test():\n"
        "    numbers = numpy.ones(4000, numpy.float32)\n"
        "    longer = numpy.lib.stride_tricks.as_strided(numbers, (1, 4, 1001), (0, 4004, 4))\n"
        "    channel_dot(*[torch.from_numpy(longer)] * 2)\n"
    )
    status, output = run(root, library, "default", str(test), "--rootdir", str(tmp_path))
    assert status != 0 and "heap-buffer-overflow" in output, output
