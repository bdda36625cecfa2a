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
    command = [sys.executable, "-W", "error", "-m", "svf_fast"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    facts = svf_fast.build_info()
    assert [line.split()[0] for line in lines] == list(facts)
    column = max(map(len, facts)) + 2
    assert all(line[:column].rstrip() == name for line, name in zip(lines, facts, strict=True))


def test_what_is_slow_to_import_waits_for_its_use() -> None:
    """Dynamo takes as long as all of torch."""
    script = "import sys, svf_fast; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


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


def test_without_the_cuda_library_triton_serves(monkeypatch) -> None:
    monkeypatch.setattr(_library, "cuda_missing", "svf_fast was built without them (no, reasons)")
    monkeypatch.setattr(_library, "triton_missing", lambda: "")
    _library.check_device("channel_dot", CudaTensor())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expected = "Triton, svf_fast was built without them (no, reasons)"
    assert svf_fast.build_info()["cuda_ops"] == expected


def test_without_triton_too_both_are_named_with_their_reasons(monkeypatch) -> None:
    monkeypatch.setattr(_library, "cuda_missing", "svf_fast was built without them (no, reasons)")
    monkeypatch.setitem(sys.modules, "triton", None)
    _library.triton_missing.cache_clear()
    try:
        with pytest.raises(RuntimeError) as caught:
            _library.check_device("channel_dot", CudaTensor())
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert svf_fast.build_info()["cuda_ops"].startswith("no, svf_fast was built without")
    finally:
        _library.triton_missing.cache_clear()
    for words in ("cuda:0", "no, reasons", "pip install triton", "SVF_FAST_CUDA=1"):
        assert words in str(caught.value)


@pytest.mark.parametrize("op", ["affine_act", "affine_act_", "affine_act_backward", "channel_dot"])
def test_every_op_of_the_cuda_library_has_a_kernel_without_it(op) -> None:
    """What torch finds for a GPU: the compiled kernel, or else its Triton twin."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"svf_fast::{op}", "CUDA")


def test_a_kernel_that_is_there_is_not_replaced() -> None:
    with torch.library._scoped_library("svf_fast", "FRAGMENT") as library:
        library.define("only_here(Tensor x) -> Tensor")
        library.impl("only_here", lambda x: x, "CUDA")
        before = torch._C._dispatch_dump("svf_fast::only_here")
        _library.register_gpu("only_here", lambda x: x + 1)
        assert torch._C._dispatch_dump("svf_fast::only_here") == before


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
