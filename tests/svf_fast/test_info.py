"""Build facts, and what is said where a compiled library is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import svf_fast
from svf_fast import _library
from svf_fast.ops.channel_dot import channel_dot


def test_build_info_names_the_facts() -> None:
    facts = svf_fast.build_info()
    assert facts["torch"] == torch.__version__
    assert facts["compiler"].split()[0] in ("gcc", "clang")
    assert facts["instruction_set"] in ("avx512", "avx2", "sse2", "neon", "baseline")
    decision, _, reason = str(facts["cuda_decision"]).partition(", ")
    assert decision == ("yes" if facts["cuda_built"] else "no")
    assert reason
    if torch.version.cuda is None:
        assert facts["cuda_ops"] == f"no, torch {torch.__version__} is not a CUDA build"


def test_module_prints_one_fact_a_line_in_columns() -> None:
    command = [sys.executable, "-W", "error", "-m", "svf_fast.info"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    facts = svf_fast.build_info()
    assert [line.split()[0] for line in lines] == list(facts)
    column = max(map(len, facts)) + 2
    assert all(line[:column].rstrip() == name for line, name in zip(lines, facts, strict=True))


def test_missing_cpu_library_is_named_with_its_remedy() -> None:
    script = "import sys; sys.modules['svf_fast._C'] = None; import svf_fast"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: the compiled library svf_fast._C cannot be imported")
    assert "pip install ." in message
    assert torch.__version__ in message


class CudaTensor:
    """The device is all that is looked at; a CUDA tensor cannot be made everywhere."""

    device = torch.device("cuda", 0)


def test_missing_cuda_library_is_named_with_its_reason(monkeypatch) -> None:
    monkeypatch.setattr(_library, "cuda_missing", "svf_fast was built without them (no, reasons)")
    with pytest.raises(RuntimeError, match=r"cuda:0.*no, reasons.*SVF_FAST_CUDA=1"):
        _library.check_device("channel_dot", CudaTensor())


def test_device_without_kernels_is_refused() -> None:
    class Other:
        device = torch.device("mps")

    with pytest.raises(
        ValueError, match="channel_dot: expected CPU or CUDA tensors, got device mps"
    ):
        _library.check_device("channel_dot", Other())


def test_meta_tensors_have_shapes() -> None:
    a = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta")
    assert channel_dot(a, a).shape == (3,)
    assert channel_dot(a, a).dtype == torch.float32
