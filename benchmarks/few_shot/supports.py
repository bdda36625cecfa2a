"""Tuning on the supports alone: what each regime gives on real photos, paired by episode.

    python -m benchmarks.few_shot.supports --out runs/supports --root ../shared/data/pascal \
        --weights ../shared/weights/resnet50_imagenet.safetensors --min-area 1311 --minutes 60
    python -m benchmarks.few_shot.supports --out runs/supports --table benchmarks/results/supports

Matching, without any training, is tuned on K photos with a mask of one class and asked for the
class in other photos. Rates are chosen on training photos, each fold's by its base classes alone
and by the same number of trials for each regime; then every regime gets the same supports, queries
and views of the folds' novel classes. The first command does the next pending tuning until the
minutes are over; it may be killed at any time, and each tuning leaves one file. The protocol is in
benchmarks/LOG.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.few_shot import supports_table
from benchmarks.few_shot.rows import read_rows
from benchmarks.files import command
from fss.config import RegimeConfig
from fss.data import IGNORE, PascalSource
from fss.data.episodes import counting_classes
from fss.files import parse_json, read_text, write_json
from fss.segment.backbones import remembering
from fss.segment.segmenter import FewShotSegmenter
from fss.segment.tuning import SHARE, Measure
from fss.training.provenance import provenance


class Regime(NamedTuple):
    """What is tuned.

    what: see `FewShotSegmenter.tune`.
    rates: that are tried, as many for each regime.
    sees_queries: whether the queries are among what it tunes on, without their masks.
    """

    what: str | RegimeConfig
    rates: tuple[float, ...]
    sees_queries: bool = False


REGIMES = {
    "svf": Regime("svf", (0.007, 0.02, 0.06)),
    "svf, sees the queries": Regime("svf", (0.007, 0.02, 0.06), sees_queries=True),
    "svf_scale": Regime("svf_scale", (0.007, 0.02, 0.06)),
    "batch_norm": Regime("batch_norm", (0.001, 0.004, 0.016)),
    "bias": Regime("bias", (0.001, 0.004, 0.016)),
    "layer4": Regime("layer4", (1e-5, 3e-5, 1e-4)),
    "layers2-4": Regime(RegimeConfig("full", ("layer2", "layer3", "layer4")), (1e-5, 3e-5, 1e-4)),
}
"""By name; of layers 3 and 4 where the name does not say otherwise."""
STEPS = 20
CURVE_STEPS = 200
CURVES = ("svf", "batch_norm", "layers2-4")
CURVE_AT = (0, 5, 10, 20, 40, 60, 100, 150, 200)
SETS, QUERIES = 2, 10
FIRST = 1
"""Number of the first support set of the finals: set 0 was seen while the recipe was made."""
CLASSES_OF_A_FOLD = 5
SEARCHED = 1
"""Place in a fold of the class that rates are tried on, and that curves are of."""
KINDS = ["search", "final", "curve"]
SEED = 510


class Task(NamedTuple):
    """A tuning.

    kind: one of `KINDS`.
    class_id: of the object.
    number: of the support set of the class.
    shots: photos in it.
    regime: what trains.
    rate: None for the one that base classes chose.
    """

    kind: str
    class_id: int
    number: int
    shots: int
    regime: str
    rate: float | None

    @property
    def name(self) -> str:
        """Return the name of the file of its row."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return (
            f"{self.kind}-{self.shots}shot-class{self.class_id:02d}-{self.number}-"
            f"{self.regime.replace(', ', '-').replace(' ', '-')}{rate}"
        )


def tasks(classes: list[int], shots: list[int]) -> Iterator[Task]:
    """Yield all tunings, in the order of their worth; those of the same supports are together."""
    searched = [c for n, c in enumerate(classes) if n % CLASSES_OF_A_FOLD == SEARCHED]
    for k in shots:
        for class_id in searched:
            for name, regime in REGIMES.items():
                for rate in regime.rates:
                    yield Task("search", class_id, 0, k, name, rate)
    for k in shots:
        for number in range(FIRST, FIRST + SETS):
            for class_id in classes:
                for regime in REGIMES:
                    yield Task("final", class_id, number, k, regime, None)
    for k in shots:
        for class_id in searched:
            for regime in CURVES:
                yield Task("curve", class_id, 0, k, regime, None)


class Photos:
    """Supports and queries of a class, the same for every regime.

    Args:
        root: of Pascal-5i.
        min_area: see `DataConfig`.
    """

    def __init__(self, root: str, min_area: float) -> None:
        self.source = PascalSource(root)
        self.classes = sorted(self.source.class_names)
        self._listed: dict[str, dict[int, list[int]]] = {}
        for split in ("train", "test"):
            listed: dict[int, list[int]] = {c: [] for c in self.classes}
            for index in self.source.indices(split):  # type: ignore[arg-type]
                for c in counting_classes(self.source, index, self.classes, min_area):
                    listed[c].append(index)
            self._listed[split] = listed

    def fold(self, class_id: int) -> int:
        """Return the fold in which a class is novel."""
        return next(k for k, novel in enumerate(self.source.folds) if class_id in novel)

    def draw(self, task: Task) -> tuple[list[int], list[int]]:
        """Draw supports and queries of a task; those of five shots begin with the one of one."""
        images = self._listed["train" if task.kind == "search" else "test"][task.class_id]
        rng = np.random.default_rng([SEED, task.kind == "search", task.class_id, task.number])
        drawn = rng.choice(images, 5 + QUERIES, replace=False).tolist()
        return drawn[:5][: task.shots], drawn[5:]

    def load(self, index: int, class_id: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Load a photo, and its mask: 1 the class, 255 ignored, else 0."""
        picture, classes = self.source.load(index)
        mask = np.where(classes == class_id, 1, np.where(classes == IGNORE, IGNORE, 0))
        return picture, mask.astype(np.uint8)

    def others(self, class_id: int) -> Iterator[tuple[int, int, int]]:
        """Yield a class, a support and a query of it for five other classes, the same always."""
        rng = np.random.default_rng([SEED, 2, class_id])
        for other in rng.choice([c for c in self.classes if c != class_id], 5, False).tolist():
            support, query = rng.choice(self._listed["test"][other], 2, replace=False).tolist()
            yield other, support, query


def counts(mask: NDArray[np.bool_], truth: NDArray[np.uint8]) -> list[int]:
    """Count intersection and union of the object and of the background, without ignored pixels."""
    valid, found = truth != IGNORE, truth == 1
    mask, found = mask[valid], found[valid]
    both, either = int((mask & found).sum()), int((mask | found).sum())
    return [both, either, int((~mask & ~found).sum()), int((~mask | ~found).sum())]


class Example:
    """A support set, and what is asked by it.

    Args:
        task: whose supports and queries these are.

    Attributes:
        queries: pictures with their masks.
        untuned: counts of the queries before any tuning, see `counts`; computed once.
        others_untuned: those of other classes, see `ask_others`.
    """

    def __init__(self, task: Task, photos: Photos) -> None:
        self._photos, self._class_id = photos, task.class_id
        self._asks_others = task.kind == "final" and task.number == FIRST
        self._supports, self._queries = photos.draw(task)
        self._examples = [photos.load(index, task.class_id) for index in self._supports]
        self._tunable = [each for each in self._examples if (each[1] == 0).any()]
        self.queries = [photos.load(index, task.class_id) for index in self._queries]
        self.untuned: list[list[int]] = []
        self.others_untuned: list[list[int]] = []

    def give(self, segmenter: FewShotSegmenter) -> None:
        """Give the supports to the segmenter, untuned."""
        segmenter.adapter(None)
        if self._asks_others and not self.others_untuned:
            self.others_untuned = self.ask_others(segmenter)
        if not self.untuned:
            self.untuned = self.ask(segmenter)
        # a support without a pixel that is surely background segments, but cannot be tuned on
        segmenter.support(*map(list, zip(*self._tunable, strict=True)))

    def ask(self, segmenter: FewShotSegmenter) -> list[list[int]]:
        """Return the counts of each query, by all supports, by the network as it is now."""
        segmenter.support(*map(list, zip(*self._examples, strict=True)))
        found = segmenter([picture for picture, _ in self.queries])
        return [counts(f.mask, truth) for f, (_, truth) in zip(found, self.queries, strict=True)]

    def ask_others(self, segmenter: FewShotSegmenter) -> list[list[int]]:
        """Return the counts of a query of five other classes, each by a support of its own."""
        if not self._asks_others:
            return []
        result = []
        for other, support, query in self._photos.others(self._class_id):
            picture, mask = self._photos.load(support, other)
            segmenter.support(picture, mask)
            picture, truth = self._photos.load(query, other)
            result.append(counts(segmenter(picture).mask, truth))
        return result

    def about(self) -> dict[str, Any]:
        """Return the names of class and photos, for a row."""
        source = self._photos.source
        return {
            "fold": self._photos.fold(self._class_id),
            "class": source.class_names[self._class_id],
            "supports": [source.name(i) for i in self._supports],
            "query_names": [source.name(i) for i in self._queries],
        }


def run(
    task: Task, rate: float, segmenter: FewShotSegmenter, example: Example, size: int
) -> dict[str, Any]:
    """Tune once; return its row: what was measured, and the counts of each query at each time."""
    torch.manual_seed(0)
    example.give(segmenter)
    checks = [{"step": 0, "queries": example.untuned}]

    def look(measure: Measure) -> None:
        if measure.step in CURVE_AT[1:]:
            checks.append({"step": measure.step, "queries": example.ask(segmenter)})

    curve = task.kind == "curve"
    steps = CURVE_STEPS if curve else STEPS
    what, _, sees_queries = REGIMES[task.regime]
    tuning = segmenter.tune(
        steps,
        rate,
        what,
        size,
        progress=False,
        patience=steps,
        on_measure=look if curve else None,
        unlabeled=[picture for picture, _ in example.queries] if sees_queries else (),
    )
    if not curve and tuning.best_step:
        checks.append({"step": tuning.best_step, "queries": example.ask(segmenter)})
    return {
        **task._asdict(),
        "rate": rate,
        "share": SHARE,
        **example.about(),
        "best_step": tuning.best_step,
        "stopped": tuning.stopped,
        "history": [[each.step, each.iou, each.loss] for each in tuning.history],
        "checks": checks,
        "others_untuned": example.others_untuned,
        "others": example.ask_others(segmenter),
    }


def main() -> int:
    options = _arguments()
    out = Path(options.out)
    if options.go_on:
        unpack(Path(options.go_on), out)
    rows = read_rows(out)
    if options.table:
        path = out / "about.json"
        if not path.is_file():
            raise SystemExit(f"--out: expected rows of an earlier run in {out}, found none")
        about = parse_json(read_text(path), path)
        print(supports_table.write(rows, list(REGIMES), about, Path(options.table)))
        return 0
    if any(row.get("share", 1.0) != SHARE for row in rows.values()):
        raise SystemExit(f"--out: {out} has rows of another share than {SHARE}; give an empty one")
    photos = Photos(options.root, options.min_area)
    segmenter = FewShotSegmenter(weights=options.weights, device=options.device)
    deadline = time.monotonic() + 60 * options.minutes
    (out / "rows").mkdir(parents=True, exist_ok=True)
    about = {"size": options.size, "weights": Path(options.weights).name, "command": command()}
    write_json(out / "about.json", provenance(segmenter.device) | about)
    wanted = [t for t in tasks(photos.classes, options.shots) if t.kind in options.kinds]
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in wanted:
        if task.name not in rows:
            groups.setdefault(task[:4], []).append(task)
    shared = list(groups.values())[options.part :: options.parts]
    bar = tqdm(total=sum(map(len, shared)), desc="tunings")
    for task, example in _with_examples(shared, photos, segmenter):
        if time.monotonic() > deadline:
            break
        rate = task.rate
        if rate is None:
            fold = photos.fold(task.class_id)
            rate = supports_table.chosen_rate(read_rows(out), task.regime, task.shots, fold)
        row = run(task, rate, segmenter, example, options.size)
        write_json(out / "rows" / f"{task.name}.json", row)
        bar.update()
    left = sum(task.name not in read_rows(out) for task in wanted)
    print(f"done: {len(wanted) - left} of {len(wanted)} tunings")
    return 0 if left == 0 else 1


def _with_examples(
    groups: list[list[Task]], photos: Photos, segmenter: FewShotSegmenter
) -> Iterator[tuple[Task, Example]]:
    """Yield each task with its supports and queries.

    Those of the same supports have the layers up to layer 2 computed once, unless these train.
    """
    for group in groups:
        example = Example(group[0], photos)
        frozen = [task for task in group if not _trains_early(task)]
        segmenter.adapter(None)
        with remembering(segmenter.model.backbone):
            for task in frozen:
                yield task, example
            segmenter.adapter(None)
        for task in group:
            if _trains_early(task):
                yield task, example


def _trains_early(task: Task) -> bool:
    what = REGIMES[task.regime].what
    return isinstance(what, RegimeConfig) and "layer2" in what.layers


def unpack(path: Path, out: Path) -> None:
    """Write the rows of a table's JSON file that are not in a folder yet."""
    content = parse_json(read_text(path), path)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    for name, row in content["rows"].items():
        if not (out / "rows" / f"{name}.json").is_file():
            write_json(out / "rows" / f"{name}.json", row)
    if not (out / "about.json").is_file():
        write_json(out / "about.json", content["about"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the rows")
    parser.add_argument("--root", help="of Pascal-5i")
    parser.add_argument("--weights", help="of a backbone")
    parser.add_argument("--min-area", type=float, default=2048)
    parser.add_argument("--size", type=int, default=225, help="of the views that are tuned on")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 1], choices=[1, 5])
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, choices=KINDS, help="of tunings, all by default"
    )
    parser.add_argument("--minutes", type=float, default=60, help="no tuning begins after")
    parser.add_argument("--part", type=int, default=0, help="of the tunings that are pending")
    parser.add_argument("--parts", type=int, default=1, help="processes that share them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--go-on", metavar="FILE", help="JSON of an earlier --table, to add to")
    parser.add_argument("--table", help="write NAME.md, NAME.json and NAME.png of the rows")
    options = parser.parse_args()
    if not options.table and not (options.root and options.weights):
        parser.error("--root and --weights are needed to tune")
    return options


if __name__ == "__main__":
    sys.exit(main())
