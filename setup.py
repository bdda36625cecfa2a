"""Builds `svf_fast._C` (CPU ops, build facts) and, where possible, `svf_fast._C_cuda` (CUDA ops).

`python setup.py cuda_check` compiles every CUDA source without a GPU and without a CUDA torch.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# An isolated build is against the torch of the surrounding environment: with pip that of this
# Python, with `python -m build` the one that is activated.
sys.path.append(sysconfig.get_path("platlib"))
if activated := os.environ.get("VIRTUAL_ENV"):
    root = {"base": activated, "platbase": activated}
    sys.path.append(sysconfig.get_path("platlib", "posix_prefix", root))

TORCH_MINIMUM = (2, 10)
# Only symbols that torch keeps stable from this version on: one binary serves later versions too.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COMMON_FLAGS = ["-O3", "-std=c++20", STABLE_ABI]
COMPILE_FLAGS = [*COMMON_FLAGS, "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
NVCC_FLAGS = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
LINK_FLAGS = ["-Wl,--version-script=csrc/exports.map"]
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"
CHECKED_ARCHITECTURES = ("80", "90")


def import_torch():
    """The torch of this environment, or None and the reason why there is none to build against."""
    try:
        import torch
    except ImportError as error:
        return None, f"torch cannot be imported ({error})"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MINIMUM:
        return None, f"torch {torch.__version__} is too old"
    return torch, ""


torch, no_torch_reason = import_torch()
if torch:
    from torch.utils import cpp_extension


class Toolkit(NamedTuple):
    root: Path
    version: str


def is_toolkit(root: Path) -> bool:
    libraries = [*root.glob("lib64/libcudart.so*"), *root.glob("lib/libcudart.so*")]
    parts = (root / "bin/nvcc", root / "include/cuda_runtime.h")
    return bool(libraries) and all(part.is_file() for part in parts)


def nvcc_output(nvcc: Path | str, *arguments: str) -> str:
    command = [str(nvcc), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def toolkit_candidates() -> list[Path]:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        roots.append(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))))
        # nvcc may be a wrapper script: the real one names its folder
        with tempfile.TemporaryDirectory() as empty:
            dry_run = nvcc_output(nvcc, "--dryrun", "-c", f"{empty}/none.cu")
        named = re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE)
        roots.append(os.path.dirname(named[1]) if named else None)
    installed = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return [Path(root) for root in roots if root] + [Path("/usr/local/cuda"), *installed]


def find_toolkits() -> list[Toolkit]:
    """CUDA toolkits, recognised by their content, the preferred one first."""
    found: dict[Path, Toolkit] = {}
    for candidate in toolkit_candidates():
        root = candidate.resolve()
        if root not in found and is_toolkit(root):
            release = re.search(r"release (\d+\.\d+)", nvcc_output(root / "bin/nvcc", "--version"))
            if release:
                found[root] = Toolkit(root, release[1])
    return list(found.values())


class Decision(NamedTuple):
    toolkit: Toolkit | None
    text: str


def decide_cuda() -> Decision:
    """Tell whether the CUDA ops are built, and why; `SVF_FAST_CUDA=1` turns a no into an error."""
    wish = os.environ.get("SVF_FAST_CUDA", "auto").strip().lower() or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"SVF_FAST_CUDA: expected 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return Decision(None, "no, SVF_FAST_CUDA=0")
    toolkit, reason = choose_toolkit()
    if toolkit:
        return Decision(toolkit, f"yes, {reason}")
    if wish == "1":
        raise SystemExit(f"SVF_FAST_CUDA=1, but the CUDA ops cannot be built: {reason}")
    return Decision(None, f"no, {reason}")


def choose_toolkit() -> tuple[Toolkit | None, str]:
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not a CUDA build"
    built_with = f"torch {torch.__version__} was built with CUDA {torch.version.cuda}"
    toolkits = find_toolkits()
    if not toolkits:
        return None, (
            f"{built_with} but no toolkit was found (bin/nvcc, include/cuda_runtime.h and "
            "lib64/libcudart.so under CUDA_HOME, CUDA_PATH, the nvcc on PATH or /usr/local/cuda*)"
        )
    major = torch.version.cuda.split(".")[0]
    for toolkit in toolkits:
        if toolkit.version.split(".")[0] == major:
            return toolkit, f"{built_with}, toolkit {toolkit.version} in {toolkit.root}"
    versions = ", ".join(f"{toolkit.version} in {toolkit.root}" for toolkit in toolkits)
    return None, f"{built_with} but the toolkit is of another major version ({versions})"


def write_build_facts(path: Path, decision: Decision) -> None:
    facts = {
        "SVF_FAST_TORCH": torch.__version__,
        "SVF_FAST_CUDA_DECISION": decision.text,
        "SVF_FAST_CUDA_ARCH_LIST": os.environ["TORCH_CUDA_ARCH_LIST"] if decision.toolkit else "",
        "SVF_FAST_SOURCES": runpy.run_path("csrc/digest.py")["digest"](),
    }
    lines = ["#pragma once"]
    for name, value in facts.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'#define {name} "{escaped}"')
    lines.append(f"#define SVF_FAST_CUDA_BUILT {int(decision.toolkit is not None)}")
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def extensions(toolkit: Toolkit | None) -> list[Extension]:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "svf_fast: a build without isolation needs pybind11 in this environment: pip install "
            "'setuptools>=77' ninja 'pybind11>=2.13'"
        ) from None
    cpu = Extension(
        "svf_fast._C",
        sources=[*sources("csrc/*.cpp"), *sources("csrc/cpu/*.cpp")],
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": COMPILE_FLAGS},
        extra_link_args=LINK_FLAGS,
        language="c++",
    )
    if toolkit is None:
        return [cpu]
    cuda = Extension(
        "svf_fast._C_cuda",
        sources=sources("csrc/cuda/*.cu"),
        include_dirs=[*cpp_extension.include_paths(), str(toolkit.root / "include")],
        library_dirs=[
            *cpp_extension.library_paths(),
            *(str(toolkit.root / folder) for folder in ("lib64", "lib")),
        ],
        libraries=["torch_cpu", "torch_cuda", "cudart"],
        extra_compile_args={"cxx": COMPILE_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=LINK_FLAGS,
        language="c++",
    )
    return [cpu, cuda]


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path().glob(pattern))


class BuildPackages(build_py):
    """Copies the packages; what an earlier build left beside them would be installed with them."""

    def run(self) -> None:
        if not self.editable_mode:
            for name in {package.partition(".")[0] for package in self.packages}:
                shutil.rmtree(Path(self.build_lib) / name, ignore_errors=True)
        super().run()


class Build(cpp_extension.BuildExtension if torch else build_ext):
    """torch's BuildExtension for the extensions that this environment can build."""

    decision = Decision(None, no_torch_reason)

    def finalize_options(self) -> None:
        if torch:
            self.decision = decide_cuda()
            self.distribution.ext_modules = extensions(self.decision.toolkit)
        super().finalize_options()

    def run(self) -> None:
        if not torch:
            minimum = ".".join(map(str, TORCH_MINIMUM))
            raise SystemExit(
                f"svf_fast is built against torch >= {minimum}, but {no_torch_reason}. Install "
                "torch first, or let pip build in isolation (no --no-build-isolation)."
            )
        print(f"svf_fast: CUDA ops: {self.decision.text}", flush=True)
        if self.decision.toolkit:
            cpp_extension.CUDA_HOME = str(self.decision.toolkit.root)
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCH_LIST)
        else:  # one of an earlier build
            Path(self.get_ext_fullpath("svf_fast._C_cuda")).unlink(missing_ok=True)
        facts = Path(self.build_temp).resolve() / "facts"
        write_build_facts(facts / "build_facts.h", self.decision)
        for extension in self.extensions:
            extension.include_dirs.insert(0, str(facts))
        super().run()


class CudaCheck(Command):
    """Compiles csrc/cuda/*.cu for sm_80 and sm_90; prints registers and spills of each kernel."""

    description = "compile the CUDA sources and report registers and spills, no GPU needed"
    user_options: ClassVar = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        toolkits = find_toolkits()
        if torch is None:
            raise SystemExit(f"cuda-check: torch's headers are needed, but {no_torch_reason}")
        if not toolkits:
            raise SystemExit("cuda-check: no CUDA toolkit was found; set CUDA_HOME to one")
        print(f"CUDA {toolkits[0].version} in {toolkits[0].root}, torch {torch.__version__}")
        rows = []
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            rows += self.kernels(source, toolkits[0])
        width = max((len(row[0]) for row in rows), default=6)
        print(f"{'kernel':{width}}  arch   registers  spilled bytes")
        for name, arch, registers, spilled in rows:
            print(f"{name:{width}}  {arch}  {registers:>9}  {spilled:>13}")
        if not rows or any(row[3] for row in rows):
            raise SystemExit("cuda-check: failed, " + ("registers spill" if rows else "no kernels"))

    def kernels(self, source: Path, toolkit: Toolkit) -> list[tuple[str, str, int, int]]:
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CHECKED_ARCHITECTURES]
        with tempfile.TemporaryDirectory() as folder:
            command = [toolkit.root / "bin/nvcc", "-c", source, "-o", f"{folder}/out.o"]
            command += [*NVCC_FLAGS, *targets, "-Xptxas=-v"]
            command += [f"-I{path}" for path in cpp_extension.include_paths()]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"cuda-check: {source} does not compile\n{done.stdout}{done.stderr}")
        entry = re.compile(
            r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            re.DOTALL,
        )
        found = entry.findall(done.stdout + done.stderr)
        names = self.demangle([row[0] for row in found], toolkit)
        return [
            (name, arch, int(registers), int(stores) + int(loads))
            for name, (_, arch, stores, loads, registers) in zip(names, found, strict=True)
        ]

    def demangle(self, names: list[str], toolkit: Toolkit) -> list[str]:
        tool = toolkit.root / "bin/cu++filt"
        command = str(tool) if tool.exists() else shutil.which("c++filt")
        if not command or not names:
            return names
        done = subprocess.run([command], input="\n".join(names), capture_output=True, text=True)
        plain = done.stdout.replace("(anonymous namespace)::", "").replace("svf_fast::", "")
        shown = [re.sub(r"^void ", "", name.split("(")[0]) for name in plain.splitlines()]
        return shown if len(shown) == len(names) else names


def torch_to_fetch() -> list[str]:
    """What an isolated build fetches where no torch is found: for pip, which then installs it."""
    if torch:
        return []
    minimum = f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"
    if "UV" in os.environ:
        raise SystemExit(
            f"svf_fast is built against the torch of its environment, but {no_torch_reason}: uv's "
            f"isolated builds do not see it. First uv pip install '{minimum}' 'setuptools>=77' "
            "ninja 'pybind11>=2.13', then the same command again with --no-build-isolation"
        )
    return [minimum]


setup(
    # the real list is made when building, once torch and CUDA are decided on
    ext_modules=[Extension("svf_fast._C", sources=[])],
    cmdclass={"build_py": BuildPackages, "build_ext": Build, "cuda_check": CudaCheck},
    setup_requires=torch_to_fetch(),
)
