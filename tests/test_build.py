"""What setup.py decides about CUDA, and what it says; what belongs to a build, and what does not.

Nothing is compiled here but a library of a few lines.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import fss
import svf_fast
from svf_fast import _C

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


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A copy of the sources without compiled libraries."""
    if not (root / "csrc").is_dir():
        pytest.skip("the sources are not here")
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "svf_fast", "fss"):
        shutil.copytree(root / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder)
    return folder


# Other installations of svf_fast in this environment, editable ones too, are as if they were not.
ALONE = """
import pathlib, sys
sys.meta_path[:] = [x for x in sys.meta_path if "__editable__" not in getattr(x, "__module__", "")]
here = pathlib.Path(__file__).parent
others = [x for x in sys.path if any(pathlib.Path(x).glob("svf_fast/_C.*"))]
sys.path[:] = [x for x in sys.path if x not in others or pathlib.Path(x) == here]
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the folder `site` beside it on the path."""
    site = folder.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def library_of(folder: Path) -> Path:
    """The compiled library that is used here, in a package's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(str(_C.__file__), folder / f"_C{SUFFIX}"))


@pytest.mark.parametrize("change", ["another line", "another file", "one file less"])
def test_a_library_of_other_sources_is_refused_with_the_remedy(checkout: Path, change: str) -> None:
    library_of(checkout / "svf_fast")
    source = checkout / "csrc/library.cpp"
    if change == "another line":
        source.write_text(source.read_text() + "// newer\n")
    elif change == "another file":
        (checkout / "csrc/cpu/newer.cpp").touch()
    else:
        source.unlink()
    done = python(checkout, "-c", "import svf_fast")
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: the compiled library")
    assert "older or newer sources" in message
    assert message.endswith(f"run `pip install -e .` in {checkout}")


def test_a_library_without_a_number_of_its_sources_is_an_older_one(checkout: Path) -> None:
    script = (
        "import sys, types; library = types.ModuleType('svf_fast._C'); "
        f"library.__file__ = {str(checkout / 'svf_fast/_C.so')!r}; "
        "library.build_facts = lambda: {'cuda_built': False}; "
        "sys.modules['svf_fast._C'] = library; import svf_fast"
    )
    done = python(checkout, "-c", script)
    assert "was built from older or newer sources" in done.stderr.splitlines()[-1]


def test_line_endings_are_not_other_sources(checkout: Path) -> None:
    digest = checkout / "csrc/digest.py"
    before = runpy.run_path(str(digest))["digest"]()
    assert before == svf_fast.build_info()["sources"]
    for path in (checkout / "csrc").rglob("*.h"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert runpy.run_path(str(digest))["digest"]() == before


COMMANDS = [
    ("-m", "svf_fast"),
    ("-c", "import svf_fast; print(svf_fast.__version__)"),
    ("-m", "fss.cli", "adapter", "--help"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_sources_without_a_library_use_that_of_the_installation(
    checkout: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    library_of(tmp_path / "site/svf_fast")
    done = python(checkout, *command)
    assert done.returncode == 0, done.stderr


def test_an_installed_library_of_other_sources_is_not_used(checkout: Path, tmp_path: Path) -> None:
    library = library_of(tmp_path / "site/svf_fast")
    (checkout / "csrc/maps.h").write_text("")
    done = python(checkout, "-m", "svf_fast")
    message = done.stderr.splitlines()[-1]
    assert f"the compiled library {library} was built from older or newer sources" in message
    assert f"`pip install -e .` in {checkout}, or leave that folder" in message


def test_sources_without_any_library_say_what_to_do(checkout: Path) -> None:
    message = python(checkout, "-c", "import svf_fast").stderr.splitlines()[-1]
    assert message.startswith("ImportError: the compiled library svf_fast._C cannot be imported")
    assert "`pip install .`" in message


def test_nothing_of_an_earlier_build_is_packaged(checkout: Path, tmp_path: Path) -> None:
    built = tmp_path / "lib"
    for name in (f"svf_fast/_C_cuda{SUFFIX}", "svf_fast/nn/older.py", "fss/older.py", "other.py"):
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).touch()
    done = setup(checkout, "build_py", "--build-lib", str(built))
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    sources = {
        path.relative_to(checkout)
        for name in ("svf_fast", "fss")
        for path in (checkout / name).rglob("*")
        if path.is_file() and "egg-info" not in str(path)
    }
    assert found == {*sources, Path("other.py")}  # which is not ours


SMALL_LIBRARY = """
#include <pybind11/pybind11.h>
#include <build_facts.h>
PYBIND11_MODULE(_C, module) {
  module.def("sources", [] { return SVF_FAST_SOURCES; });
  module.def("decision", [] { return SVF_FAST_CUDA_DECISION; });
}
"""


def test_a_build_in_place_removes_the_cuda_library_of_an_earlier_one(checkout: Path) -> None:
    shutil.rmtree(checkout / "csrc/cpu")
    (checkout / "csrc/library.cpp").unlink()
    (checkout / "csrc/module.cpp").write_text(SMALL_LIBRARY)
    stale, other = (
        checkout / "svf_fast" / f"_C_cuda{suffix}" for suffix in (SUFFIX, ".cpython-39-x.so")
    )
    stale.touch()
    other.touch()  # of another Python that uses these sources
    done = setup(checkout, "build_ext", "--inplace", SVF_FAST_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not stale.exists() and other.exists()
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(checkout / 'svf_fast')!r}); import torch, _C; "
    )
    script += "print(_C.sources() == runpy.run_path('csrc/digest.py')['digest'](), _C.decision())"
    assert python(checkout, "-c", script).stdout == "True no, SVF_FAST_CUDA=0\n"


def test_versions_agree(root: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert svf_fast.__version__ == fss.__version__ == project["project"]["version"]
    assert svf_fast.build_info()["svf_fast"] == svf_fast.__version__


def test_uv_builds_in_the_environment_that_has_torch(root: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["tool"]["uv"]["no-build-isolation-package"] == [project["project"]["name"]]
    assert project["tool"]["uv"]["default-groups"] == ["build"]  # `uv sync` installs it before
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]


NO_TORCH = "import sys; sys.modules['torch'] = None; "
HOOK = (
    "import json, setuptools.build_meta as b; print(json.dumps(b.get_requires_for_build_wheel()))"
)


def hook(folder: Path, script: str, *options: str, **variables: str) -> tuple[list[str], str]:
    """What a build asks for beside pyproject's list, and what it says."""
    variables = {"UV": "", "VIRTUAL_ENV": "", **variables}
    given = {name: value for name, value in variables.items() if value}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    command = [sys.executable, *options, "-c", script + HOOK]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**environment, **given}
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else ["[]"]
    return json.loads(lines[-1]), done.stderr


def test_an_isolated_build_asks_for_torch_where_none_is(checkout: Path) -> None:
    assert hook(checkout, "")[0] == []
    assert hook(checkout, NO_TORCH)[0] == ["torch>=2.10"]
    requires, message = hook(checkout, NO_TORCH, UV="uv")
    assert not requires
    assert "torch cannot be imported" in message
    assert message.rstrip().endswith("then the same command again with --no-build-isolation")


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python is in no environment")
def test_an_isolated_build_finds_torch_in_the_activated_environment(
    checkout: Path, tmp_path: Path
) -> None:
    import setuptools

    packages = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / "build" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "build" / name).symlink_to(packages / name)
    alone = f"import sys; sys.path.append({str(tmp_path / 'build')!r}); "  # -S: no site-packages
    assert hook(checkout, alone, "-S")[0] == ["torch>=2.10"]
    assert hook(checkout, alone, "-S", VIRTUAL_ENV=sys.prefix)[0] == []


def test_a_build_without_isolation_says_what_it_lacks(checkout: Path) -> None:
    script = "import sys, runpy; sys.modules['pybind11'] = None; "
    script += "sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py')"
    done = python(checkout, "-c", script)
    assert done.stderr.splitlines()[-1].startswith(
        "svf_fast: a build without isolation needs pybind11 in this environment: pip install"
    )
