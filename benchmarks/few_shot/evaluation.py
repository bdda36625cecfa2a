"""What an evaluation costs one query at a time, in batches and with kept features.

    python -m benchmarks.few_shot.evaluation --root ../shared/data/clothing \
        --weights ../shared/weights/resnet50_imagenet.safetensors --stride-on conv1

A few episodes are timed, the same ones in each way, with equal scores. How often photos return is
counted over a whole evaluation, by sampling its episodes only. Both give the time of the whole
evaluation: each episode costs as much as one whose photos are all kept, plus the share that is left
to compute. On a CPU process time is measured, as other users disturb the clock; on a GPU the clock.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.files import RESULTS
from benchmarks.gpu import tables
from fss.config import DataConfig, ModelConfig
from fss.data import EpisodeDataset, build_episodes, build_source, collate_episodes
from fss.evaluation.evaluate import episode_classes, evaluate_all
from fss.evaluation.feature_cache import Names, Shelf, uses
from fss.evaluation.metrics import Score
from fss.files import write_json
from fss.models import MODELS, build_model, load_backbone
from fss.models.pooling import resize
from fss.training.provenance import provenance

# Both round differently by the size of a batch, so a pixel on the edge may turn.
TOLERANCE = 1e-3
REPEATS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="folder")
    parser.add_argument("--root")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--size", type=int, default=225)
    parser.add_argument("--min-area", type=float, default=0.01)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[510, 365, 382, 322, 988])
    parser.add_argument("--episodes", type=int, default=1000, help="per seed, counted")
    parser.add_argument("--timed", type=int, default=4, help="episodes of the first seed; 0: none")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--gib", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--model", default="baseline")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--stride-on", default="conv2")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS / "evaluation.json")
    options = parser.parse_args()

    fabric = Fabric(accelerator=options.accelerator, devices=1)
    rows = [measure(options, shots, fabric) for shots in options.shots]
    settings = {name: value for name, value in vars(options).items() if name != "results"}
    write_json(options.results, {"settings": settings, **provenance(fabric.device), "rows": rows})
    print(table(rows))
    return 0


def measure(options: argparse.Namespace, shots: int, fabric: Fabric) -> dict[str, Any]:
    """Return the row of one number of shots."""
    data = DataConfig(
        source=options.source,
        root=options.root,
        fold=options.fold,
        shots=shots,
        size=options.size,
        min_area=options.min_area,
        workers=0,
    )
    source = build_source(data)
    network = network_of(options, shots, episode_classes(source, options.fold, novel=False))
    row: dict[str, Any] = {"shots": shots}
    if options.timed:
        episodes = build_episodes(data, "test", options.timed, options.seeds[0], source)
        row |= timed(network, episodes, options, fabric)
    whole = [build_episodes(data, "test", options.episodes, s, source) for s in options.seeds]
    share = deep_share(network)
    row["left"] = {str(gib): left(network, whole, options.batch, gib, share) for gib in options.gib}
    if options.timed:
        known, each = row["known"], row["batched"]
        row["predicted"] = {
            gib: row["one_by_one"] / (known + part * (each - known))
            for gib, part in row["left"].items()
        }
    return row


def network_of(options: argparse.Namespace, shots: int, base: dict[int, str]) -> nn.Module:
    """Build the model with a random head."""
    torch.manual_seed(0)
    config = ModelConfig(
        name=options.model,
        backbone=options.backbone,
        width=options.width,
        stride_on=options.stride_on,
        weights="none",
        base_weights="none" if MODELS[options.model].needs_base_learner else None,
    )
    network = build_model(config, base, shots)
    load_backbone(network.backbone, options.weights)
    return network.eval().requires_grad_(False)


def timed(
    network: nn.Module, episodes: EpisodeDataset, options: argparse.Namespace, fabric: Fabric
) -> dict[str, Any]:
    """Time an episode in each way; "known": one whose photos are all kept."""
    balance(network, episodes)
    model = fabric.setup(network)
    classes = list(episode_classes(episodes.source, options.fold))

    def run(sets: int, batch: int, gib: float) -> tuple[float, list[Score]]:
        clock = time.process_time if fabric.device.type == "cpu" else time.perf_counter
        begin = clock()
        scores = evaluate_all(model, [episodes] * sets, classes, fabric, batch, 0, "photo", gib)
        return clock() - begin, scores

    one, expected = run(1, 1, 0)
    batched, in_batches = run(1, options.batch, 0)
    kept, once = run(1, options.batch, 1e3)
    many, again = run(1 + REPEATS, options.batch, 1e3)
    difference = max(abs(s.miou - expected[0].miou) for s in (*in_batches, *once, *again))
    if difference > TOLERANCE:
        raise SystemExit(f"the scores differ by {difference}")
    seconds = {
        "one_by_one": one,
        "batched": batched,
        "kept": kept,
        "known": (many - kept) / REPEATS,
    }
    per_episode = {name: value / len(episodes) for name, value in seconds.items()}
    return {**per_episode, "miou": expected[0].miou, "largest_difference": difference}


@torch.no_grad()
def balance(network: nn.Module, episodes: EpisodeDataset) -> None:
    """Move the classifier's bias so that half of an episode is foreground: scores can differ."""
    batch = collate_episodes([episodes[0]])
    outputs: list[torch.Tensor] = []
    hook = network.classifier.register_forward_hook(lambda _, __, out: outputs.append(out))
    network(*(batch[name] for name in network.inputs))
    hook.remove()
    network.classifier[-1].bias[1] -= (outputs[0][:, 1] - outputs[0][:, 0]).median()


@torch.no_grad()
def deep_share(network: nn.Module) -> float:
    """Return layer 4's share of the backbone's multiplications."""
    image = torch.zeros(1, 3, 65, 65)
    with FlopCounterMode(display=False) as shallow:
        _, middle = network.backbone.features(image)
    with FlopCounterMode(display=False) as deep:
        network.backbone.layer4(middle)
    return deep.get_total_flops() / (deep.get_total_flops() + shallow.get_total_flops())


def left(
    network: nn.Module, sets: Sequence[EpisodeDataset], batch: int, gib: float, share: float
) -> float:
    """Return the share of the backbone's work that an evaluation with kept features still does."""
    photos, layer4 = work(network, sets, batch, gib)
    images = sum(map(len, sets)) * (1 + sets[0].shots)
    return (photos * (1 - share) + layer4 * share) / images


def work(
    network: nn.Module, sets: Sequence[EpisodeDataset], batch: int, gib: float
) -> tuple[int, int]:
    """Count the photos that go through layers 1 to 3, and through layer 4, in one process."""
    name = sets[0].source.name
    sampled = [episodes.draw(index) for episodes in sets for index in range(len(episodes))]
    sampled.sort(key=lambda e: (e.class_id, name(e.query)))
    episodes = [Names(name(e.query), tuple(map(name, e.supports)), e.class_id) for e in sampled]
    number = {name(i): i for e in sampled for i in (e.query, *e.supports)}
    sizes = entry_sizes(network, sets[0])
    shelf: Shelf[bool] = Shelf(int(gib * 2**30), uses(episodes))
    photos = layer4 = 0
    for first in range(0, len(episodes), batch):
        group = episodes[first : first + batch]
        queries = dict.fromkeys(("query", e.query) for e in group)
        supports = dict.fromkeys(("support", s, e.class_id) for e in group for s in e.supports)
        deep = [key for key in (*queries, *supports) if not shelf.get(key)]
        seen = dict.fromkeys([*(e.query for e in group), *(k[1] for k in deep)])
        shallow = [("photo", each) for each in seen if not shelf.get(("photo", each))]
        photos += len(shallow)
        layer4 += len(deep)
        shelf.advance(len(group))
        for kind, photo, *rest in (*shallow, *deep):
            shelf.put((kind, photo, *rest), True, sizes(kind, number[photo], *rest))
    return photos, layer4


@functools.cache
def entry_sizes(network: nn.Module, episodes: EpisodeDataset) -> Callable[..., int]:
    """Return a function: bytes kept of a photo, a query or a support, in float32."""
    image = torch.zeros(1, 3, episodes.transform.size, episodes.transform.size)
    with torch.no_grad():
        low, middle = network.backbone.features(image)
        high = network.backbone.layer4(middle)
        summaries = network.summarize(low, middle, torch.ones_like(low[:, :1]))
    summary = sum(each.nbytes for each in summaries)

    @functools.cache
    def positions(index: int, class_id: int) -> int:
        mask = episodes.transform(*episodes.source.load(index), None, class_id).mask
        mask = resize((mask == class_id)[None, None].float(), middle.shape[2:])
        return int(mask.count_nonzero()) + 1

    def size(kind: str, index: int, class_id: int = 0) -> int:
        if kind == "photo":
            return low.nbytes + middle.nbytes
        if kind == "query":
            return high.nbytes
        return summary + 4 * positions(index, class_id) * (1 + high.shape[1])

    return size


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return times in ms per episode, and what a whole evaluation leaves and gains."""
    gibs = list(rows[0]["left"])
    head = ["shots", "one by one", "batched", "all kept"]
    head += [f"{gib} GiB" for gib in gibs]
    lines = []
    for row in rows:
        cells = [str(row["shots"])]
        for key in ("one_by_one", "batched", "known"):
            cells.append(f"{1e3 * row[key]:.0f} ms" if key in row else "–")
        for gib in gibs:
            gain = f", {row['predicted'][gib]:.1f} times" if "predicted" in row else ""
            cells.append(f"{100 * row['left'][gib]:.0f} %{gain}")
        lines.append(cells)
    return tables.table(head, lines)


if __name__ == "__main__":
    sys.exit(main())
