"""Kernels compile for GPUs that are not here, in processes that interpret nothing."""

import os
import subprocess
import sys

import pytest
import torch

from svf_fast.triton import check, cosine_max, cosine_max_backward, tuning
from svf_fast.triton.check import Case


def _python(*arguments):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_registers_spills_and_shared_memory_per_architecture():
    script = (
        "import torch\n"
        "from svf_fast.triton import check, cosine_max\n"
        "problem = cosine_max.Problem(1, 64, 48, 48, torch.bfloat16)\n"
        "tile = dict(QUERIES=64, SUPPORTS=64, CHANNELS=32, num_stages=2, num_warps=4, SPLITS=1)\n"
        "for arch in check.ARCHITECTURES:\n"
        "    for x in check.usages(problem, tile, arch):\n"
        "        print(arch, x.kernel, x.registers, x.spilled, x.shared,\n"
        "              'wgmma' in x.ptx, 'mma.sync' in x.ptx)\n"
    )
    done = _python("-c", script)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    found = {row[0]: row[2:] for row in rows if row[1] == "cosine_max_compare_kernel"}
    assert found.keys() == {"80", "90"}
    for arch, (registers, spilled, shared, wgmma, mma) in found.items():
        assert 32 <= int(registers) <= 255 and spilled == "0"
        assert 2 * 64 * 32 * 2 <= int(shared) <= tuning.shared_memory(int(arch))
        assert (wgmma, mma) == (("True", "False") if arch == "90" else ("False", "True"))


@pytest.mark.parametrize("rows, warps, status", [(8, 4, 0), (16, 1, 1)])
def test_the_table_of_a_kernel_and_its_spills(rows, warps, status):
    script = (
        "import builtins, contextlib, sys, torch\n"
        "from svf_fast.triton import check, cosine_max_backward as module\n"
        f"config = dict(ROWS={rows}, CHANNELS=512, STAGES=1, num_warps={warps})\n"
        "class Problem(module.Problem):\n"
        "    def candidates(self, arch):\n"
        "        return [config]\n"
        "problems = [Problem(1, 64, 48, 48, torch.bfloat16)]\n"
        "check.tunables = lambda: {'cosine_max_backward': lambda: problems}\n"
        "check.processes = lambda count: contextlib.nullcontext(builtins)\n"
        "sys.exit(check.main([]))\n"
    )
    done = _python("-c", script)
    assert done.returncode == status, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "support_gradient_kernel" in line]
    assert {row.split(" | ")[1] for row in rows} == {"sm_80", "sm_90"}
    assert all(("too much" in row) == bool(status) for row in rows)
    assert f"{2 * status} that spill" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_an_interpreter_compiles_nothing(capsys):
    assert check.main([]) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_a_compilation_stands_for_all_that_triton_does_not_distinguish():
    name = "cosine_max_backward"
    large, small, *_ = (Case(name, problem, False) for problem in cosine_max_backward.problems())
    config = {"ROWS": 8}
    # 6561 is odd, 3600 is not
    assert len(check.compilations([(large, 90, config), (small, 90, config)])) == 2
    assert len(check.compilations([(large, 90, config), (large, 80, config)])) == 2
    (one,) = check.compilations([(large, 90, config), (large, 90, dict(config))])
    assert one == (large.problem, False, 90, config)
    problems = [large.problem._replace(batch=b, channels=c) for b, c in ((3, 2048), (5, 512))]
    cases = [Case(name, problem, False) for problem in problems]
    (one,) = check.compilations([(case, 90, config) for case in cases])
    assert one.problem.channels == 512  # the smaller


def test_every_kernel_is_known():
    assert {"cosine_max", "cosine_max_backward"} <= check.tunables().keys()
    assert check.select_kernels(check.tunables(), ["cosine_max"]) == cosine_max.TUNABLES
