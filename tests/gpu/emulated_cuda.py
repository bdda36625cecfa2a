"""Compiles csrc/cuda for the CPU (see cuda_runtime.h here) and loads it in the place of `_C`.

As a pytest plugin, `-p tests.gpu.emulated_cuda`, it loads the library that
$SVF_FAST_EMULATED_CUDA names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = "SVF_FAST_EMULATED_CUDA"
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-w", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
]
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def can_sanitize(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [compiler(), *SANITIZE, source, "-o", folder / "empty"]
    built = subprocess.run(command, capture_output=True)
    return built.returncode == 0 and subprocess.run([folder / "empty"]).returncode == 0


def sanitizer_environment() -> dict[str, str]:
    """For a Python that loads the sanitized library: its runtime must come first."""
    found = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    preload = " ".join(done.stdout.strip() for done in found)
    return {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build_library(sanitize: bool = False) -> Path:
    """The ops of csrc/cuda, registered for CPU tensors; built once per state of the sources."""
    flags = FLAGS + (SANITIZE if sanitize else [])
    units = {source.stem: _unit(source) for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    link = ["-shared", f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"]
    link += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    return build("library.so", {**units, "emulation": [HERE / "emulation.cpp"]}, flags, link, HERE)


def build_faulty() -> Path:
    """The program of faulty.cpp, sanitized."""
    units = {"faulty": [HERE / "faulty.cpp"], "emulation": [HERE / "emulation.cpp"]}
    return build("faulty", units, FLAGS + SANITIZE, [], HERE)


def _unit(source: Path) -> list[str | Path]:
    return [HERE / "source.cpp", f'-DSOURCE="{source}"']


def build(
    name: str, units: dict[str, list], flags: list[str], link: list[str], sources: Path
) -> Path:
    """Compiles the units, each an object from its arguments, and links them to `name`.

    Once per state of the compiler, its flags, csrc and the folder `sources`, whose headers are
    found and whose name the folder of the result below build/ has.
    """
    flags = [*flags, f"-I{sources}", *(f"-I{path}" for path in cpp_extension.include_paths())]
    facts = hashlib.sha256(f"{compiler()} {torch.__version__} {flags} {link}".encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *sources.glob("*.h"), *sources.glob("*.cpp")]):
        if path.is_file():
            facts.update(path.read_bytes())
    folder = ROOT / "build" / sources.name / facts.hexdigest()[:16]
    if (folder / name).exists():
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    own = f"{os.getpid()}-{name}"  # two test runs may build at once
    objects = {unit: folder / f"{own}-{unit}.o" for unit in units}
    running = [
        subprocess.Popen([compiler(), "-c", *sources, *flags, "-o", objects[unit]])
        for unit, sources in units.items()
    ]
    failed = [process.args for process in running if process.wait()]
    if failed:
        raise RuntimeError(f"csrc does not compile: {failed[0]}")
    shared = [flag for flag in flags if flag.startswith("-fsanitize")]
    linking = [compiler(), *objects.values(), *shared, *link, "-o", folder / own]
    subprocess.run(linking, check=True)
    for unit in objects.values():
        unit.unlink()
    return (folder / own).rename(folder / name)


def pytest_configure() -> None:
    import svf_fast  # noqa: F401 (its kernels first: the last registered are called)

    torch.ops.load_library(os.environ[LIBRARY])
