"""Everything a GPU can show, in under ten minutes: builds, tests, tunes, races, renders.

    make gpu                                # or python benchmarks/gpu.py
    python benchmarks/gpu.py --phases build,tests --out runs/gpu
    python benchmarks/gpu.py --dry-run      # no GPU needed: the same steps, tiny, on the CPU

Uses the Python and the torch it is run with and installs nothing. Each phase is a process of its
own with a time limit and a log; when one fails or runs out of time the next goes on. What a phase
leaves of its time is added to the next one's limit. Results are JSON in the folder of results,
tables and pictures beside them, logs in its folder ``logs``, the table of tuned configurations in
``cache``: SVF_FAST_CACHE names it to later runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from processes import ROOT, Ended, run

TOTAL = 580  # seconds, of the ten minutes
TUNE_SECONDS = 60  # at most: what others leave is for the races
NEEDED = (
    "torch", "triton", "numpy", "safetensors", "tqdm", "matplotlib", "pytest", "pytest_benchmark",
    "hypothesis", "pybind11", "ninja", "setuptools",
)  # fmt: skip
MINIMUM = {"torch": (2, 10), "setuptools": (77,)}
PROBE = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": found and
    torch.cuda.get_device_name(), "capability": found and torch.cuda.get_device_capability()}))
"""


class Options(NamedTuple):
    """out, weights: as the commands get them, relative to the repository where that is shorter."""

    out: Path
    dry: bool
    weights: str

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


class Phase(NamedTuple):
    """seconds: its share of the whole time. command: what it runs, given those it may take."""

    name: str
    seconds: int
    command: Callable[[Options, int], list[str]]


def script(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, f"benchmarks/{name}", *map(str, arguments)]


def build(options: Options, _: int) -> list[str]:
    if options.dry:
        return [sys.executable, "-c", "import svf_fast; print(svf_fast.build_info())"]
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def facts(options: Options, _: int) -> list[str]:
    return script("facts.py", "--device", options.device, "--results", options.out)


def tests(options: Options, seconds: int) -> list[str]:
    command = script("gpu_tests.py", "--seconds", str(seconds - 3), "--out", options.out)
    if options.dry:  # the kernels' tests run on the CPU with all others
        files = (ROOT / "tests/gpu").glob("test_gpu_*.py")
        names = sorted(path.relative_to(ROOT) for path in files)
        command += ["--files", *map(str, names)]
    return command


def tune(options: Options, seconds: int) -> list[str]:
    command = [sys.executable, "-m", "svf_fast.triton.tune"]
    if options.dry:
        return [*command, "--help"]
    return [*command, "--budget-seconds", str(max(min(seconds - 10, TUNE_SECONDS), 1))]


def race(level: str, *arguments: str) -> Callable[[Options, int], list[str]]:
    """A level of the race, as `make bench-…` runs it."""

    def command(options: Options, _: int) -> list[str]:
        words = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
        words += ["-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet"]
        words += [f"benchmarks/bench_{level}.py", "--race-dtype", "bfloat16"]
        words += ["--race-device", options.device, "--race-results", str(options.out)]
        if level != "prior":
            words += ["--race-channels-last", "--race-weights", options.weights]
            words += ["--race-stride-on", _stride_on(options)]
        words += arguments
        if options.dry:  # what comes later counts
            words += ["--race-size", "33", "--race-width", "8", "--race-rounds", "1"]
            words += ["--race-batch", "1", "--race-weights", "none", "--race-no-peak"]
            words += ["--race-peers", "official;svf_fast"]
        return words

    return command


def elementwise(options: Options, _: int) -> list[str]:
    return script("elementwise.py", "--device", options.device, "--results", options.out)


def roofline(options: Options, _: int) -> list[str]:
    return script("roofline.py", "--results", options.out, "--stride-on", _stride_on(options))


def replay(options: Options, _: int) -> list[str]:
    command = script("replay.py", "--device", options.device, "--results", options.out)
    command += ["--weights", options.weights, "--stride-on", _stride_on(options)]
    if options.dry:
        tiny = ["--size", "33", "--width", "8", "--batches", "1", "--rounds", "1"]
        command += [*tiny, "--weights", "none"]
    return command


def render(options: Options, _: int) -> list[str]:
    return script("render.py", "--results", options.out)


def _stride_on(options: Options) -> str:
    """Where the ImageNet weights at hand have it; the usual place for drawn ones."""
    return "conv2" if options.weights == "none" else "conv1"


LARGE = ("--race-size", "641", "--race-batch", "6")  # as many images as a 5-shot episode
EPISODE = ("--race-size", "641", "--race-batch", "1", "--race-shots", "5")


def compiled(name: str) -> Callable[[Options, int], list[str]]:
    """One peer with torch.compile, which takes a minute and more to compile, beside ours."""
    names = f"official;svf_fast;torch.compile of {name}"
    return race("backbone", *LARGE, "--race-suffix", f"compiled_{name}", "--race-peers", names)


PHASES = (
    Phase("build", 100, build),
    Phase("facts", 25, facts),
    Phase("tests", 110, tests),
    Phase("tune", 45, tune),
    Phase("race", 75, race("backbone", *LARGE, "--race-no-compile")),
    Phase("step", 65, race("step", *EPISODE, "--race-no-compile")),
    Phase("prior", 25, race("prior")),
    Phase("elementwise", 20, elementwise),
    Phase("roofline", 10, roofline),
    Phase("replay", 30, replay),
    Phase("compiled-official", 40, compiled("official")),
    Phase("compiled-recomposed", 30, compiled("recomposed")),
    Phase("render", 15, render),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [phase.name for phase in PHASES]
    parser.add_argument("--phases", default=",".join(names), help="some of them, with commas")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all phases together")
    parser.add_argument("--weights", help="of the ResNet-50, a file; none: drawn ones")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args(arguments)
    chosen = given.phases.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--phases: expected some of {','.join(names)}, got {','.join(unknown)}")
    if given.dry_run and given.out is None:
        parser.error("--out: needed with --dry-run, which measures nothing worth keeping")
    started = time.monotonic()
    out = _short(given.out or ROOT / "benchmarks/results")
    found = probe()
    print(describe(found), flush=True)
    if lacking := missing(found, given.dry_run):
        print("make gpu: missing here:", *lacking, sep="\n  ")
        return 2
    weights = Path(given.weights) if given.weights not in (None, "none") else None
    weights = _weights() if given.weights is None else weights
    options = Options(out, given.dry_run, "none" if weights is None else str(_short(weights)))
    left = given.seconds - (time.monotonic() - started)
    rows = run_all([p for p in PHASES if p.name in chosen], options, left, found)
    print(summary(rows, out))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def run_all(
    phases: list[Phase], options: Options, total: float, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """One phase after another, each in its share of the time and what is left of those before."""
    share = min(1.0, total / sum(phase.seconds for phase in phases))
    end = time.monotonic() + total
    # where the search leaves its table, and where the kernels look for it
    environment = {"SVF_FAST_CACHE": str((ROOT / options.out / "cache").resolve())}
    if found["capability"] and not options.dry:
        environment["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, found["capability"]))
        environment["SVF_FAST_CUDA"] = "1"
    rows: list[dict[str, Any]] = []
    for index, phase in enumerate(phases):
        later = share * sum(other.seconds for other in phases[index + 1 :])
        limit = max(1, int(end - later - time.monotonic()))
        log = ROOT / options.out / "logs" / f"{phase.name}.log"
        log.unlink(missing_ok=True)
        print(f"{phase.name}: at most {limit} s …", end=" ", flush=True)
        ended = run(phase.command(options, limit), log, limit, **environment)
        print(f"{ended.word}, {ended.seconds:.0f} s", flush=True)
        rows.append(row(phase, ended, limit, log))
        summary_file = ROOT / options.out / "gpu.json"
        summary_file.write_text(json.dumps({"machine": found, "phases": rows}, indent=1) + "\n")
    return rows


def row(phase: Phase, ended: Ended, limit: int, log: Path) -> dict[str, Any]:
    lines = log.read_text(errors="replace").splitlines()
    last = [text for line in lines if (text := line.strip(" ="))]
    return {
        "phase": phase.name,
        "status": ended.word,
        "seconds": round(ended.seconds, 1),
        "limit": limit,
        "last_line": last[-1][:200] if last else "",
    }


def summary(rows: list[dict[str, Any]], out: Path) -> str:
    """The end of what is printed: figures, then a line a phase."""
    width = max(len(row["phase"]) for row in rows)
    lines = []
    figures = ROOT / out / "figures.md"
    if figures.is_file():
        lines += [figures.read_text()]
    for row in rows:
        status = f"{row['status']}, {row['seconds']:.0f} of {row['limit']} s"
        lines.append(f"{row['phase']:{width}}  {status:28}  {row['last_line'][:100]}")
    return "\n".join([*lines, f"results, tables, logs: {out}"])


def probe() -> dict[str, Any]:
    """torch and the GPU as another process sees them: this one keeps off the GPU."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return {"torch": None, "cuda": None, "gpu": None, "capability": None, "error": last}
    return json.loads(done.stdout.splitlines()[-1])


def describe(found: dict[str, Any]) -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    gpu = found["gpu"] or "no GPU"
    return f"Python {python} ({sys.executable}), torch {found['torch']}, {gpu}"


def missing(found: dict[str, Any], dry: bool) -> list[str]:
    """What `make gpu` needs and does not find, each with what to do."""
    lacking = []
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            lacking.append(f"{name}: {sys.executable} -m pip install {name.replace('_', '-')}")
    for name, least in MINIMUM.items():
        try:
            have = version(name).split("+")[0].split(".")
        except PackageNotFoundError:
            continue
        if tuple(int(part) for part in have[: len(least)] if part.isdigit()) < least:
            needed = ".".join(map(str, least))
            lacking.append(f"{name} >= {needed}: here is {'.'.join(have)}")
    if "error" in found:
        lacking.append(f"a torch that can be imported: {found['error']}")
    if dry or "error" in found:
        return lacking
    if found["cuda"] is None:
        lacking.append(
            f"a CUDA build of torch: {sys.executable} has {found['torch']}; name another Python, "
            "make gpu PYTHON=…"
        )
    elif not found["gpu"]:
        lacking.append("a GPU: torch.cuda.is_available() is False; without one: --dry-run")
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        lacking.append("a C++ compiler: install g++ >= 11, or name one with CXX=…")
    return lacking


def _weights() -> Path | None:
    """ImageNet weights beside the repository or in $SVF_SHARED, where there are some."""
    folder = Path(os.environ.get("SVF_SHARED", ROOT.parent / "shared"))
    path = folder / "weights/resnet50_imagenet.safetensors"
    return path if path.is_file() else None


def _short(path: Path) -> Path:
    """As seen from the repository, for what is in it or beside it: results keep the commands."""
    beside = path.resolve().is_relative_to(ROOT.parent)
    return Path(os.path.relpath(path, ROOT)) if beside else path.resolve()


if __name__ == "__main__":
    sys.exit(main())
