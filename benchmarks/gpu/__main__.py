"""Everything a GPU can show, in 13 minutes: builds, tests, races, profiles, trains, renders.

    make gpu                                # or python -m benchmarks.gpu
    python -m benchmarks.gpu --seconds 570 --archive gpu.tgz; python -m benchmarks.gpu --seconds 200
    python -m benchmarks.gpu --dry-run --out runs/dry   # no GPU needed: the same, tiny, on the CPU

Uses the Python and the torch it is run with, no network, and installs nothing; wheels in a folder
``wheels`` are unpacked for its processes alone. Weights and photos are looked for in $SVF_SHARED,
in ``shared`` beside the checkout and in it.

The phases run in the order of their worth, as many as the time allows. Each is a process of its
own with a time limit and a log; when one fails or runs out of time the next goes on. Called again
with the same folder it runs what is missing. Results are JSON in the folder, tables and pictures
beside them, logs in its folder ``logs``, the table of tuned configurations in ``cache``:
SVF_FAST_CACHE names it to later runs. The archive has all of it except what can be made again, and
is complete at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.archive import Archive, write_whole
from benchmarks.gpu.phases import IMAGENET, PASCAL, PHASES, Options, Phase
from benchmarks.gpu.processes import ROOT, Ended, run

TOTAL = 780  # seconds
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
OK, SUMMARY = "ok", "gpu.json"

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=description)
    names = [phase.name for phase in PHASES]
    parser.add_argument("--phases", default=",".join(names), help="some of them, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all phases together")
    parser.add_argument("--archive", type=Path, help="file for all results, .tgz")
    parser.add_argument("--weights", help="file of the ResNet-50; none: random ones")
    parser.add_argument("--photos", help="folder of Pascal-5i; none: embedded photos")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of packages")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args(arguments)
    chosen = given.phases.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--phases: expected some of {','.join(names)}, got {','.join(unknown)}")
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = _short(given.out)
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    unpack(given.wheels, ROOT / out / "site")
    found = probe()
    print(describe(found), flush=True)
    if lacking := missing(found, given.dry_run):
        print("make gpu: missing here:", *lacking, sep="\n  ")
        return 2
    earlier = earlier_rows(ROOT / out / SUMMARY, found, parser.error)
    weights = _shared(given.weights, IMAGENET, given.dry_run)
    photos = _shared(given.photos, PASCAL, given.dry_run)
    print(f"weights: {weights}, photos: {photos}", flush=True)
    if not (ROOT / ".git").exists() and "SVF_COMMIT" not in os.environ:
        print("no .git here: set SVF_COMMIT, and the results say which commit they are of")
    options = Options(out, given.dry_run, weights, photos)
    left = given.seconds - (time.monotonic() - started)
    phases = [phase for phase in PHASES if phase.name in chosen]
    with contextlib.ExitStack() as stack:
        archive = given.archive and stack.enter_context(Archive(given.archive, ROOT / out))
        rows = run_all(phases, options, left, found, earlier, archive)
    print(summary(rows, out))
    return 0 if all(row["status"] == OK for row in rows) else 1


def run_all(
    phases: Sequence[Phase],
    options: Options,
    total: float,
    found: dict[str, Any],
    earlier: Sequence[Row] = (),
    archive: Archive | None = None,
) -> list[Row]:
    """Run the phases while there is time; those that are ok in `earlier` are not repeated.

    Returns the rows of these phases. `gpu.json` has all others too.
    """
    end = time.monotonic() + total
    folder = ROOT / options.out
    # where the search leaves its table, and where the kernels look for it; areas of masks
    environment = {"SVF_FAST_CACHE": str((folder / "cache").resolve())}
    environment["XDG_CACHE_HOME"] = environment["SVF_FAST_CACHE"]
    if (site := folder / "site").is_dir():
        paths = [str(site.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    if found["capability"] and not options.dry:
        environment["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, found["capability"]))
        environment["SVF_FAST_CUDA"] = "1"
    rows = {row["phase"]: row for row in earlier}
    for index, phase in enumerate(phases):
        if rows.get(phase.name, {}).get("status") == OK and not phase.repeats:
            print(f"{phase.name}: done before", flush=True)
            continue
        kept = sum(later.seconds for later in phases[index + 1 :] if later.repeats)
        limit = int(min(phase.seconds, end - kept - time.monotonic()))
        log = folder / "logs" / f"{phase.name}.log"
        if lacking := [name for name in phase.needs if not _is_here(name, folder / "site")]:
            status = f"not run: {', '.join(lacking)} not installed, nor in wheels"
            rows[phase.name] = {"phase": phase.name, "status": status}
        elif limit < min(phase.least, phase.seconds):
            rows.setdefault(phase.name, {"phase": phase.name, "status": "no time left"})
        else:
            log.unlink(missing_ok=True)
            print(f"{phase.name}: at most {limit} s …", end=" ", flush=True)
            ended = run(phase.command(options, limit), log, limit, **environment)
            rows[phase.name] = row(phase, ended, limit, log)
        _keep(folder / SUMMARY, found, list(rows.values()))
        if archive:
            archive.write()
        # what is said to be done is in the archive
        print(f"{phase.name}: {_outcome(rows[phase.name])}", flush=True)
    return [rows[phase.name] for phase in phases]


def row(phase: Phase, ended: Ended, limit: int, log: Path) -> Row:
    lines = log.read_text(errors="replace").splitlines()
    last = [text for line in lines if (text := line.strip(" ="))]
    return {
        "phase": phase.name,
        "status": ended.word,
        "seconds": round(ended.seconds, 1),
        "limit": limit,
        "last_line": last[-1][:200] if last else "",
    }


def summary(rows: list[Row], out: Path) -> str:
    """Format the end of the output: the figures, then a line per phase."""
    width = max(len(row["phase"]) for row in rows)
    lines = []
    figures = ROOT / out / "figures.md"
    if figures.is_file():
        lines += [figures.read_text()]
    for row in rows:
        lines.append(
            f"{row['phase']:{width}}  {_outcome(row):28}  {row.get('last_line', '')[:100]}"
        )
    return "\n".join([*lines, f"results, tables, logs: {out}"])


def earlier_rows(path: Path, found: dict[str, Any], error: Callable[[str], Any]) -> list[Row]:
    """Return the rows of an earlier call in the same folder; another GPU's are an error."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    if content["machine"]["gpu"] != found["gpu"]:
        there, here = (machine["gpu"] or "no GPU" for machine in (content["machine"], found))
        error(f"--out: expected results of {here}, {path} has those of {there}; name another --out")
    return content["phases"]


def probe() -> dict[str, Any]:
    """Describe torch and the GPU from another process, so that this one does not use the GPU."""
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
    """List what `make gpu` needs and does not find, each with what to do."""
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


def unpack(wheels: Path, site: Path) -> None:
    """Make the pure-Python packages in a folder of wheels importable from `site`."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)


def _is_here(name: str, site: Path) -> bool:
    """Return whether a module is installed or was unpacked."""
    places = (site / name, site / f"{name}.py")
    return any(place.exists() for place in places) or importlib.util.find_spec(name) is not None


def _outcome(row: Row) -> str:
    if "limit" not in row:
        return row["status"]
    return f"{row['status']}, {row['seconds']:.0f} of {row['limit']} s"


def _keep(path: Path, found: dict[str, Any], rows: list[Row]) -> None:
    """Write the summary of all calls in the order of the phases."""
    order = [phase.name for phase in PHASES]
    rows.sort(key=lambda row: order.index(row["phase"]) if row["phase"] in order else len(order))
    write_whole(path, json.dumps({"machine": found, "phases": rows}, indent=1) + "\n")


def _shared(given: str | None, name: str, dry: bool) -> str:
    """Find a file or folder of real data: as given, else the first place that has it, or "none"."""
    if given is not None:
        return given if given == "none" else str(_short(Path(given)))
    if dry:
        return "none"
    places = [ROOT.parent / "shared", ROOT / "shared"]
    if folder := os.environ.get("SVF_SHARED"):
        places.insert(0, Path(folder))
    found = [place / name for place in places if (place / name).exists()]
    return str(_short(found[0])) if found else "none"


def _short(path: Path) -> Path:
    """Make paths in or beside the repository relative to it, as results record the commands."""
    beside = path.resolve().is_relative_to(ROOT.parent)
    return Path(os.path.relpath(path, ROOT)) if beside else path.resolve()


if __name__ == "__main__":
    sys.exit(main())
