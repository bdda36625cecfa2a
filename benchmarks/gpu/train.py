"""Times `fss train` as users run it, regime by regime, eager and captured: train.json.

    python -m benchmarks.gpu.train --photos ../shared/data/pascal --weights resnet50.safetensors

ResNet-50 in bfloat16, the baseline model, 1-shot and 5-shot: seconds of a step and images per
second of the last steps, the peak of the GPU's memory, bytes that autograd keeps. Each row is the
command itself, one after another in this process, written when it has ended; earlier rows
are kept. After an error that may have damaged the process the rest runs in a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.files import RESULTS, write_results
from fss.data import ShapesSource
from fss.files import write_json
from fss.runs.folder import RunFolder

CASES = ("473x1", "641x5", "641x1", "473x5")  # px and shots, most wanted first
BATCH = {473: 8}  # episodes of a step, as in the recipe; at other sizes:
OTHER_BATCH = 4
REGIMES = {
    "svf": ("--regime.name=svf",),
    "paper's layers": ("--regime.name=svf", "--regime.strategy=reference"),
    "full": ("--regime.name=full",),
    "freeze": ("--regime.name=freeze",),
}
GRAPHS = {"eager": "off", "captured": "auto"}
STEPS, LOGGED = 24, 8  # of which the last so many are reported: all is warm by then
RENDERED, RENDERED_SIDE = 120, 257  # photos of the embedded data, where there are no others


class Row(NamedTuple):
    """What is run."""

    size: int
    shots: int
    regime: str
    mode: str  # of GRAPHS


def main() -> int:
    options = _arguments()
    path = options.results / "train.json"
    settings = {"device": options.device, "dtype": "bfloat16", "backbone": options.backbone}
    sizes = {case.partition("x")[0]: None for case in options.cases}
    batch = {size: _batch(options, int(size)) for size in sizes}
    settings |= {"weights": options.weights, "photos": options.photos, "batch": batch}
    done = _earlier(path, settings)
    deadline = time.monotonic() + options.seconds
    runs = options.results / "runs" / "train"
    # those that a crash had ended come last
    for row in sorted(_rows(options), key=lambda row: row in done):
        if row in done and "unfinished" not in done[row]:
            continue
        if time.monotonic() > deadline:
            print("out of time")
            return 1
        done[row] = {"unfinished": True}
        _write(path, settings, done)
        fatal = False
        try:
            done[row] = _measured(row, options, runs)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:200]
            done[row] = {"reason": f"{type(error).__name__}: {reason}"}
            fatal = options.device != "cpu" and not isinstance(error, torch.OutOfMemoryError)
        _write(path, settings, done)
        shutil.rmtree(runs, ignore_errors=True)
        print(row, done[row], flush=True)
        if fatal:
            left = max(1.0, deadline - time.monotonic())
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--seconds", str(left)])
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    print(path)
    return 1 if any("reason" in found for found in done.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--photos", default="none", help="Pascal-5i; none: embedded ones")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--stride-on", default="conv2")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="px x shots")
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--batch", type=int, help="episodes; by default 8 at 473 px, else 4")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--seconds", type=float, default=600, help="no run begins after them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _rows(options: argparse.Namespace) -> list[Row]:
    cases = [tuple(map(int, case.split("x"))) for case in options.cases]
    return [
        Row(size, shots, regime, mode)
        for size, shots in cases
        for mode in GRAPHS
        for regime in options.regimes
    ]


def _batch(options: argparse.Namespace, size: int) -> int:
    """Return the episodes of a step."""
    return options.batch or BATCH.get(size, OTHER_BATCH)


def _measured(row: Row, options: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """Run `fss train` in this process and read what it wrote.

    Raises:
        RuntimeError: it ended with an error of the user's.
    """
    from fss.cli import main as fss  # needs more packages than the tables

    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    command = _command(row, options, runs)
    print(f"\n$ fss {shlex.join(command)}", flush=True)
    told = _Told()
    with contextlib.redirect_stderr(told):
        status = fss(command)
    if status:
        raise RuntimeError(f"fss train ended with {status}: {told.lines[-1]}")
    folder = RunFolder(runs)
    result, (log, _) = folder.result(), folder.logs()
    return {
        "command": f"fss {shlex.join(command)}",
        "step_seconds": log["step_seconds"][-1],
        "images_per_second": log["images_per_second"][-1],
        "peak_bytes": result["peak_memory_bytes"],
        "saved_bytes": result["saved_bytes_per_step"],
        "loss": log["loss"][-1],
        # where a step was not captured the command says why
        "told": [line.strip()[:200] for line in told.lines if line.startswith("graph: ")],
    }


def _command(row: Row, options: argparse.Namespace, runs: Path) -> list[str]:
    logged = min(LOGGED, options.steps)
    return [
        "train",
        *photo_settings(options.photos, options.results),
        f"--data.size={row.size}",
        f"--data.shots={row.shots}",
        f"--data.workers={options.workers}",
        f"--model.backbone={options.backbone}",
        f"--model.width={options.width}",
        f"--model.weights={options.weights}",
        f"--model.stride_on={options.stride_on}",
        *REGIMES[row.regime],
        f"--graph={GRAPHS[row.mode]}",
        f"--batch_size={_batch(options, row.size)}",
        f"--steps={options.steps}",
        f"--log_every={logged}",
        "--validation_every=0",
        "--validation_episodes=1",
        "--save_every=0",
        "--test_episodes=1",
        "--test_seeds=[1]",
        "--feature_cache=0",
        "--pictures=0",
        "--precision=bf16-mixed",
        f"--accelerator={'cpu' if options.device == 'cpu' else 'cuda'}",
        f"--out={runs}",
        "--overwrite",
    ]


def photo_settings(photos: str, results: Path) -> list[str]:
    """Return the settings of `fss train` for Pascal-5i, packed or at 400 px, or rendered photos.

    Args:
        photos: the folder of Pascal-5i, or "none".
        results: folder in which rendered photos are kept.
    """
    if photos != "none":
        packed = Path(photos) / "pascal.yaml"
        area = ["--data.source=pascal", "--data.min_area=1311"]  # of photos of 400 px
        config = [f"--config={packed}"] if packed.is_file() else area
        return [*config, f"--data.root={photos}", "--data.drop_small_classes=true"]
    return ["--data.source=folder", f"--data.root={_rendered(results)}", "--data.min_area=0.02"]


def _rendered(results: Path) -> Path:
    """Write embedded photos as files in the layout of Pascal VOC, to load them as others."""
    folder = results / "photos"
    if (folder / "classes.json").is_file():
        return folder
    source = ShapesSource(size=RENDERED_SIDE, train=RENDERED, test=1)
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(RENDERED):
        image, mask = source.load(index)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{source.name(index)}.jpg")
        Image.fromarray(mask).save(folder / "SegmentationClass" / f"{source.name(index)}.png")
    classes = {"classes": source.class_names, "folds": source.folds}
    write_json(folder / "classes.json", classes)  # the last: without it all is made again
    return folder


class _Told(io.StringIO):
    """Standard error, which is also kept."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        return [line for line in self.getvalue().splitlines() if line.strip()] or [""]


def _earlier(path: Path, settings: dict[str, Any]) -> dict[Row, dict[str, Any]]:
    """Return what an earlier call with these settings measured."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        return {}
    rows = [row for group in found["groups"] for row in group["rows"]]
    return {Row(*(row.pop(name) for name in Row._fields)): row for row in rows}


def _write(path: Path, settings: dict[str, Any], done: dict[Row, dict[str, Any]]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, found in done.items():
        rows = groups.setdefault(f"{row.size} px, {row.shots}-shot", [])
        rows.append({**row._asdict(), **found})
    listed = [{"name": name, "rows": rows} for name, rows in groups.items()]
    title = "`fss train`, the baseline model"
    write_results(path, "train", title, settings, listed)


if __name__ == "__main__":
    sys.exit(main())
