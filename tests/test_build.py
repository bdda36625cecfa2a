"""What setup.py decides about CUDA, and what it says; nothing is compiled here."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

cpu_torch = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch is a CUDA build: nothing is impossible"
)


def setup(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    if not (root / "setup.py").exists():
        pytest.skip("the sources are not here")
    command = [sys.executable, "setup.py", "-q", *arguments]
    environment = {**os.environ, "CUDA_HOME": "", "CUDA_PATH": "", **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)


def toolkit(folder: Path, release: str = "99.1") -> Path:
    """What looks like a CUDA toolkit, with an nvcc that knows its version and where it is."""
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    (folder / "lib64/libcudart.so").touch()
    executable(
        folder / "bin/nvcc",
        'case "$1" in\n'
        f'  --version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;\n'
        f'  --dryrun) echo "#\\$ _HERE_={folder}/bin" >&2 ;;\n'
        '  *) echo "fake nvcc cannot compile" >&2; exit 1 ;;\n'
        "esac\n",
    )
    return folder


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@cpu_torch
def test_cuda_wanted_where_impossible_stops_with_the_reason(root: Path) -> None:
    done = setup(root, "build_ext", SVF_FAST_CUDA="1")
    assert done.returncode != 0
    assert "SVF_FAST_CUDA=1, but the CUDA ops cannot be built" in done.stderr
    assert f"torch {torch.__version__} is not a CUDA build" in done.stderr


def test_unknown_wish_is_refused(root: Path) -> None:
    done = setup(root, "build_ext", SVF_FAST_CUDA="perhaps")
    assert done.returncode != 0
    assert "SVF_FAST_CUDA: expected 0, 1 or auto, got 'perhaps'" in done.stderr


def test_toolkit_is_found_in_cuda_home(root: Path, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    done = setup(root, "cuda_check", CUDA_HOME=str(home))
    assert done.stdout.startswith(f"CUDA 99.1 in {home}, torch {torch.__version__}")
    assert done.returncode != 0
    assert "does not compile" in done.stderr
    assert "fake nvcc cannot compile" in done.stderr


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"])
def test_toolkit_is_recognised_by_its_content(root: Path, tmp_path: Path, missing: str) -> None:
    home = toolkit(tmp_path / "half")
    (home / missing).unlink()
    other = toolkit(tmp_path / "whole", "98.0")
    done = setup(root, "cuda_check", CUDA_HOME=str(home), CUDA_PATH=str(other))
    assert done.stdout.startswith(f"CUDA 98.0 in {other}")


@pytest.mark.parametrize("kind", ["wrapper script", "link"])
def test_nvcc_on_path_leads_to_its_toolkit(root: Path, tmp_path: Path, kind: str) -> None:
    home = toolkit(tmp_path / "cuda")
    nvcc = tmp_path / "bin/nvcc"
    if kind == "link":
        nvcc.parent.mkdir()
        nvcc.symlink_to(home / "bin/nvcc")
    else:
        executable(nvcc, f'exec {home}/bin/nvcc "$@"\n')
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    done = setup(root, "cuda_check", PATH=path)
    assert done.stdout.startswith(f"CUDA 99.1 in {home}")


@pytest.mark.skipif(
    shutil.which("nvcc") is not None or bool(list(Path("/usr/local").glob("cuda*"))),
    reason="a CUDA toolkit is installed here",
)
def test_cuda_check_without_a_toolkit_says_so(root: Path) -> None:
    done = setup(root, "cuda_check")
    assert done.returncode != 0
    assert "no CUDA toolkit was found" in done.stderr
