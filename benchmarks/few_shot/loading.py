"""Episodes that a core loads, stage by stage, against what a step consumes: results/loading.json.

    python -m benchmarks.few_shot.loading --workers 2 && python -m benchmarks.render

Photos are rendered and encoded with the sides and the file size of Pascal's and COCO's. Stages are
CPU time of one thread, which other processes slow less than they slow the clock. A step is layers
2-4 alone, at the predicted time of `roofline`: a whole step takes longer, so the need is an upper
bound.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cv2
import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from tqdm import tqdm

from benchmarks.files import RESULTS, write_results
from benchmarks.gpu import tables
from benchmarks.gpu.roofline import CEILINGS, attainable, passes, seconds
from benchmarks.race.levels import Settings
from fss.data import (
    EpisodeDataset,
    FolderSource,
    ShapesSource,
    TrainTransform,
    collate_episodes,
    episodes,
    transforms,
)
from fss.data.loader import episode_loader

# NVIDIA's datasheet of the H100 SXM: the engines of an H200, and less memory bandwidth.
GPUS = {"H100": CEILINGS["H200"] | {"memory": 3.35e12}, "A100": CEILINGS["A100 80GB SXM"]}
STAGES = ("decode", "warp, crop", "normalise", "label", "stack")
WANTED = 3.0  # times what a step consumes


class Photos(NamedTuple):
    """Photos of a data set: usual sides in px and bytes of a file, size and scale of its training.

    Bytes: the published archives over their number of photos.
    """

    width: int
    height: int
    bytes: int
    size: int
    scale: tuple[float, float]


PHOTOS = {
    "Pascal": Photos(500, 375, 110_000, 473, (0.9, 1.1)),
    "COCO": Photos(640, 480, 160_000, 641, (0.8, 1.25)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--photos", type=int, default=120, help="how many of each kind are made")
    parser.add_argument("--images", type=int, default=48, help="loaded for each row")
    parser.add_argument("--passes", type=int, default=5, help="over them; the fastest counts")
    parser.add_argument("--batch", type=int, default=8, help="episodes of a step")
    parser.add_argument("--workers", type=int, default=0, help="processes of a timed loader, or 0")
    parser.add_argument("--cores", type=int, default=16, help="of the machine, for each GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for name, photos in PHOTOS.items():
            root = Path(folder) / name
            size = write_photos(root, photos, options.photos)
            for shots in options.shots:
                row = {"peer": f"{name}, {photos.size} px, {shots}-shot", "file_bytes": size}
                count = max(1, options.images // (1 + shots))
                data = dataset(root, photos, shots, count)
                row |= measure(data, options.batch, options.passes)
                if options.workers:
                    row["loader_episodes_per_second"] = throughput(data, options.workers)
                row["needed"] = needed(photos.size, shots, options.batch)
                print(json.dumps(row), flush=True)
                rows.append(row)
    settings = {
        "device": "cpu", "batch": options.batch, "cores": options.cores, "workers": options.workers
    }  # fmt: skip
    groups = [{"name": "loading", "rows": rows}]
    path = options.results / "loading.json"
    print(write_results(path, "loading", "Loading episodes", settings, groups))
    return 0


def write_photos(root: Path, photos: Photos, count: int) -> int:
    """Write photos and masks in the Pascal VOC layout; return a photo file's mean bytes."""
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    source = ShapesSource(photos.width, train=count, test=1, objects=(4, 6))
    names = {str(class_id): name for class_id, name in source.class_names.items()}
    (root / "classes.json").write_text(json.dumps({"classes": names}))
    noise = np.random.default_rng(0)
    sizes = []
    for index in tqdm(range(count), "making photos", delay=2):
        image, mask = (array[: photos.height] for array in source.load(index))
        grain = noise.normal(0, 8, image.shape)  # as a sensor has it: flat areas are too cheap
        image = np.clip(image + grain, 0, 255).astype(np.uint8)
        encoded = _encode(image, photos.bytes)
        (root / "JPEGImages" / f"{index}.jpg").write_bytes(encoded)
        Image.fromarray(np.ascontiguousarray(mask)).save(
            root / "SegmentationClass" / f"{index}.png"
        )
        sizes.append(len(encoded))
    return round(statistics.fmean(sizes))


def _encode(image: np.ndarray, size: int) -> bytes:
    """Encode a JPEG file of at most `size` bytes, in the best quality that fits."""
    low, high = 10, 98
    while low < high:
        quality = (low + high + 1) // 2
        _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        low, high = (quality, high) if len(encoded) <= size else (low, quality - 1)
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, low])
    return encoded.tobytes()


def dataset(
    root: Path, photos: Photos, shots: int, count: int, min_area: float = 2048
) -> EpisodeDataset:
    """Build training episodes of fold 0, transformed as for Pascal and COCO."""
    transform = TrainTransform(photos.size, photos.scale)
    source = FolderSource(root)
    return EpisodeDataset(source, 0, "train", shots, transform, count, min_area=min_area)


class Stages:
    """CPU seconds of this thread by stage; a stage within another is not counted for both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.thread_time()

    def timed(self, stage: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            self._switch()
            self._running.append(stage)
            try:
                return function(*arguments, **options)
            finally:
                self._switch()
                self._running.pop()

        return call

    def _switch(self) -> None:
        now = time.thread_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextlib.contextmanager
def timed_stages() -> Iterator[Stages]:
    """Time the functions that load an episode."""
    stages = Stages()
    timed = (
        ("decode", FolderSource, "load"),
        ("warp, crop", TrainTransform, "__call__"),
        ("normalise", transforms, "_normalize"),
        ("label", episodes, "_labels"),
        ("stack", EpisodeDataset, "_item"),  # what is left of it
    )
    with contextlib.ExitStack() as stack:
        for stage, owner, name in timed:
            wrapped = _unbound(stages.timed(stage, getattr(owner, name)))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield stages


def _unbound(call: Callable) -> Callable:
    """Wrap a callable in a plain function, which a class binds as a method."""
    return lambda *arguments, **options: call(*arguments, **options)


def measure(data: EpisodeDataset, batch: int, passes: int) -> dict[str, Any]:
    """Measure the CPU time of loading all episodes and collating batches, in this process.

    Of each stage the least of several passes: whatever else runs only ever adds to it.
    """
    data[0]  # what happens once
    images = len(data) * (1 + data.shots)
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(passes):
        with timed_stages() as stages:
            collate = stages.timed("stack", collate_episodes)
            for start in range(0, len(data), batch):
                collate([data[i] for i in range(start, min(start + batch, len(data)))])
        for stage in STAGES:
            taken[stage].append(stages.seconds[stage] / images)
    per_image = {stage: min(values) for stage, values in taken.items()}
    return {
        "seconds_per_image": per_image,
        "episodes_per_core_second": 1 / (sum(per_image.values()) * (1 + data.shots)),
        "images": images,
    }


def throughput(data: EpisodeDataset, workers: int) -> float:
    """Return episodes per second of the loader that training uses, by the clock."""
    fabric = Fabric(accelerator="cpu", devices=1)
    batches = iter(episode_loader(data, 1, workers, fabric))
    for _ in range(2 * workers):  # processes start
        next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
    return count / (time.perf_counter() - start)


def needed(size: int, shots: int, batch: int) -> dict[str, float]:
    """Predict the episodes per second that layers 2-4 consume on each GPU, with svf_fast."""
    settings = dataclasses.replace(
        Settings(), size=size, batch=batch * (1 + shots), dtype="bfloat16", channels_last=True
    )
    step = passes(settings, "svf_fast")
    return {gpu: batch / seconds(step, attainable(GPUS[gpu])) for gpu in GPUS}


def table(result: dict[str, Any]) -> str:
    """Format results/loading.json as a table."""
    cores, batch = result["settings"]["cores"], result["settings"]["batch"]
    lines = []
    for row in result["groups"][0]["rows"]:
        rate, stages = row["episodes_per_core_second"], row["seconds_per_image"]
        cells = [row["peer"], *(f"{1e3 * stages[stage]:.2f}" for stage in STAGES)]
        cells += [f"{1e3 * sum(stages.values()):.2f}", f"{rate:.1f}"]
        for need in row["needed"].values():
            times = cores * rate / need
            short = "**" if times < WANTED else ""
            cells.append(f"{need:.0f} ({short}{times:.1f}{short})")
        lines.append(cells)
    head = ["ms of CPU time an image", *STAGES, "together", "episodes/s and core"]
    head += [f"{gpu} consumes ({cores} cores give, ×)" for gpu in GPUS]
    note = (
        "Training episodes from JPEG photos of Pascal's and COCO's size; one process. Consumes: "
        f"episodes/s of layers 2-4 alone in a step of {batch} episodes of svf_fast, **predicted**, "
        "an upper bound of what the whole step consumes. Assumed: "
        f"{cores} cores for each GPU, as fast as this one. Bold: "
        f"less than {WANTED:.0f} times what is consumed."
    )
    return f"{tables.table(head, lines)}\n\n{note}"


if __name__ == "__main__":
    sys.exit(main())
