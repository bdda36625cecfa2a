"""What tuning on supports costs: seconds of a class, memory of a step, bytes of what is kept.

    python -m benchmarks.few_shot.supports_cost --root ../shared/data/pascal \
        --weights ../shared/weights/resnet50_imagenet.safetensors --min-area 1311

Matching is tuned in 20 steps, no stop before, on views of the default size. Nothing else should
run beside. Writes results/supports-cost.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.few_shot.supports import REGIMES, Example, Photos, Task
from benchmarks.files import RESULTS, command
from benchmarks.gpu import tables
from benchmarks.race.peers import official
from fss.config import RegimeConfig
from fss.files import write_json
from fss.segment.segmenter import FewShotSegmenter
from fss.segment.tuning import LAYERS, Measure, Tuning
from fss.training.measure import SavedBytes, saved_bytes
from fss.training.provenance import provenance
from svf_fast.budget import format_bytes

STEPS, REPEATS = 20, 3
CLASS = 2
ROWS = ("svf", "the paper's layers", "batch_norm", "layer4", "layers2-4")
"""Regimes; the second is S as the paper computes it."""


def cost(name: str, shots: int, photos: Photos, weights: str) -> dict[str, Any]:
    """Tune in one regime on one class; return what it took."""
    segmenter = FewShotSegmenter(weights=weights, device="cpu")
    if name not in REGIMES:
        official(segmenter.model.backbone, LAYERS).requires_grad_(False)
    example = Example(Task("cost", CLASS, 0, shots, name, None), photos)
    example.give(segmenter)
    what = what_of(name)
    first, saved, trained = _first(segmenter, what)
    done = [
        segmenter.tune(STEPS, what=what, progress=False, patience=STEPS) for _ in range(REPEATS)
    ]
    seconds = [tuning.seconds for tuning in done]
    return {
        "name": name,
        "shots": shots,
        "first_seconds": first.seconds,  # of one step: what is decomposed, is so here
        "seconds": seconds,
        "saved_bytes": saved,
        "trained": trained,
        "kept_bytes": _kept(done[-1], trained),
    }


def what_of(name: str) -> str | RegimeConfig:
    """Return what a row tunes."""
    return REGIMES[name if name in REGIMES else "svf"].what


def _first(segmenter: FewShotSegmenter, what: str | RegimeConfig) -> tuple[Tuning, int, int]:
    """Tune one step; return it, the bytes that its forward pass saves, and how much trains."""
    saved = trained = 0
    with contextlib.ExitStack() as stack:

        def look(measure: Measure) -> None:
            nonlocal saved, trained
            if measure.step:
                saved = counter[0].total
                stack.close()
                return
            model = segmenter.model  # by now the copy that is tuned, whose own does not count
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            counter.append(stack.enter_context(saved_bytes(model)))

        counter: list[SavedBytes] = []
        tuning = segmenter.tune(1, what=what, progress=False, on_measure=look)
    return tuning, saved, trained


def _kept(tuning: Tuning, trained: int) -> int:
    """Return the bytes of a tuned class: of the adapter's file, or of what trained, float32."""
    if tuning.adapter is None:
        return 4 * trained
    with tempfile.TemporaryDirectory() as folder:
        tuning.adapter.save(Path(folder) / "adapter.safetensors")
        return (Path(folder) / "adapter.safetensors").stat().st_size


def table(rows: list[dict[str, Any]]) -> str:
    """Return the costs as Markdown, a line a regime."""
    head = ["tuned", "trains"]
    for shots in (1, 5):
        head += [f"s a class, {shots}-shot", f"saved MiB, {shots}-shot"]
    lines = []
    for name in ROWS:
        found = {row["shots"]: row for row in rows if row["name"] == name}
        cells = [name, f"{found[1]['trained']:,}".replace(",", " ")]
        for shots in (1, 5):
            seconds = found[shots]["seconds"]
            spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
            cells.append(f"{statistics.median(seconds):.1f} ({spread})")
            cells.append(f"{found[shots]['saved_bytes'] / 2**20:.0f}")
        lines.append([*cells, format_bytes(found[1]["kept_bytes"])])
    return tables.table([*head, "kept"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="of Pascal-5i")
    parser.add_argument("--weights", required=True, help="of a backbone")
    parser.add_argument("--min-area", type=float, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS / "supports-cost.json")
    options = parser.parse_args()
    photos = Photos(options.root, options.min_area)
    every = [(name, shots) for name in ROWS for shots in (1, 5)]
    rows = [cost(*each, photos, options.weights) for each in tqdm(every, "costs")]
    about = provenance(torch.device("cpu"))
    about |= {"weights": Path(options.weights).name, "command": command()}
    write_json(options.out, {"about": about, "steps": STEPS, "rows": rows})
    text = table(rows)
    options.out.with_suffix(".md").write_text(f"{text}\n\n{_told(about)}\n")
    print(text)
    return 0


def _told(about: dict[str, Any]) -> str:
    """Return what the cells are, and how they were measured."""
    machine = about["machine"]
    return (
        f"Tuning matching, ResNet-50, {STEPS} steps without a stop, views of the default size. "
        "Seconds: median of three (least and most), with what a measure takes, without decomposing "
        "once. Saved: what autograd keeps from the forward pass of a step, parameters left out. "
        "Kept: of a tuned class.\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {about['versions']['torch']}, "
        f"commit {about['commit']}, `{about['command']}`."
    )


if __name__ == "__main__":
    sys.exit(main())
