"""`fss train` on a GPU: its kernels, and a captured step against the same step run eagerly."""

from __future__ import annotations

import copy
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import svf_fast
from fss.captured import WARM_UP, CudaGraph
from fss.config import TrainConfig
from fss.data import build_episodes
from fss.data.loader import episode_loader
from fss.evaluation.evaluate import evaluate
from fss.processes import build_fabric
from fss.runs.log import read_log
from fss.training.run import train
from fss.training.trainer import Trainer

STEPS = 10
TINY = {
    "data": {"source": "shapes", "size": 65, "min_area": 0.01, "workers": 1},
    "model": {"backbone": "resnet50", "width": 16, "weights": "none", "channels": 32},
    "optimizer": {"lr": 0.01, "schedule": "constant", "backbone_lr": 0.01},
    "steps": STEPS,
    "batch_size": 4,
    "validation_every": 0,
    "validation_episodes": 4,
    "test_episodes": 4,
    "test_seeds": [1],
    "pictures": 0,
    "log_every": 1,
    "tf32": "none",
    "accelerator": "cuda",
}
# Of a loss about 0.7, and of the way that weights went. Between two eager runs cuDNN's choice of
# algorithms and sums in another order make a difference, too.
LOSS = {"32-true": 2e-3, "bf16-mixed": 3e-2, "16-mixed": 1e-2}
WAY = {"32-true": 0.05, "bf16-mixed": 0.5, "16-mixed": 0.3}


@pytest.fixture
def configured(tmp_path) -> Callable[..., TrainConfig]:
    """Makes a tiny configuration; overrides of a part are dicts."""

    def make(out: str, **overrides: Any) -> TrainConfig:
        values = copy.deepcopy(TINY) | {"out": str(tmp_path / out)}
        for name, value in overrides.items():
            values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
        return TrainConfig.from_dict(values)

    return make


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often graphs were captured and replayed."""
    counted: Counter[str] = Counter()
    for name in ("capture", "replay"):
        original = getattr(CudaGraph, name)

        def call(self, *arguments, name=name, original=original):
            counted[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(CudaGraph, name, call)
    return counted


def trained(config: TrainConfig, name: str = "last.pt") -> tuple[list[float], dict[str, Any]]:
    state = torch.load(Path(config.out) / name, weights_only=True)
    return read_log(Path(config.out) / "train.csv")["loss"], state


def assert_same_training(eager: TrainConfig, other: TrainConfig) -> None:
    """The same losses up to rounding, and weights that went the same way."""
    (losses, state), (other_losses, other_state) = trained(eager), trained(other)
    assert len(losses) == len(other_losses) == STEPS
    assert other_losses == pytest.approx(losses, abs=LOSS[eager.precision])
    assert other_state["skipped"] == state["skipped"]
    # the philox offset: as many random numbers were drawn
    assert torch.equal(state["random"][0]["cuda"], other_state["random"][0]["cuda"])
    begun = Trainer(eager, build_fabric(eager)).network.state_dict()
    moved = 0
    for name, first in begun.items():
        way = state["model"][name].double() - first.cpu().double()
        other_way = other_state["model"][name].double() - first.cpu().double()
        assert bool(way.any()) == bool(other_way.any()), name
        if way.any() and way.numel() > 1:
            moved += 1
            error = (other_way - way).norm() / way.norm()
            assert error <= WAY[eager.precision], f"{name}: {error:.2e}"
    assert moved > 10


RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "float16": {"precision": "16-mixed"},
    "float16 in parts": {"precision": "16-mixed", "accumulate": 2},
    "parts": {"accumulate": 2},
    "validation between": {"validation_every": 2, "feature_cache": 0.0},
    "freeze": {"regime": {"name": "freeze"}},
    "full": {"regime": {"name": "full"}},
    "statistics of the batch": {
        "regime": {"batch_norm": "both", "batch_norm_statistics": "batch"},
    },
    "pfenet": {"model": {"name": "pfenet", "bins": [1, 0.5]}},
    "bam": {"model": {"name": "bam", "base_weights": "none"}, "data": {"shots": 2}},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_captured_run_is_the_eager_run(run, configured, calls, capfd):
    eager, replayed = (configured(graph, graph=graph, **RUNS[run]) for graph in ("off", "auto"))
    train(eager)
    assert not calls
    train(replayed)
    assert calls["replay"] > 0, capfd.readouterr().err
    assert "graph:" not in capfd.readouterr().err
    assert_same_training(eager, replayed)


def test_another_key_captures_anew(configured, calls, monkeypatch):
    eager, replayed = (configured(graph, graph=graph) for graph in ("off", "auto"))
    train(eager)
    follow, called = svf_fast.follow, Counter()

    def other(model):
        called["follow"] += 1
        return follow(model), called["follow"] > WARM_UP + 2

    monkeypatch.setattr(svf_fast, "follow", other)
    train(replayed)
    assert calls["capture"] >= 2 and calls["replay"] >= 3
    assert_same_training(eager, replayed)


def test_a_run_that_was_stopped_goes_on(configured, calls, monkeypatch):
    whole, halves = configured("whole", graph="off"), configured("halves")
    train(whole)
    step = Trainer._train_step

    def interrupted(self, parts):
        step(self, parts)
        if self.step == STEPS // 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", interrupted)
        train(halves)
    train(halves, resume=True)
    assert calls["capture"] >= 2
    assert_same_training(whole, halves)


def test_a_step_that_waits_for_the_gpu_runs_eagerly_and_says_so(
    configured, calls, monkeypatch, capfd
):
    """After a capture that failed stream, generator and allocator serve as before."""
    original = Trainer._loss

    def waiting(self, batch):
        loss = original(self, batch)
        assert loss.item() > 0
        return loss

    monkeypatch.setattr(Trainer, "_loss", waiting)
    eager, other = (configured(graph, graph=graph) for graph in ("off", "auto"))
    train(eager)
    train(other)
    assert calls == {"capture": 1}
    assert capfd.readouterr().err.count("graph: steps run eagerly, capturing one failed") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert_same_training(eager, other)


def test_a_captured_test_is_the_eager_test(configured, calls):
    config = configured("run", precision="bf16-mixed")
    trainer = Trainer(config, build_fabric(config))
    episodes = build_episodes(config.data, "test", 22, 0, trainer.source)
    eager, recorded = (
        evaluate(trainer.model, episodes, list(trainer.classes), trainer.fabric, 4, graph=graph)
        for graph in ("off", "auto")
    )
    assert calls == {"capture": 1, "replay": 2}
    assert recorded.miou == pytest.approx(eager.miou, abs=1e-3)
    assert recorded.episodes == eager.episodes


class Calls(TorchDispatchMode):
    """Counts the calls of ops in this thread: of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_takes_the_fused_kernels(configured):
    config = configured("run", precision="bf16-mixed")
    trainer = Trainer(config, build_fabric(config))
    loader = episode_loader(trainer.dataset, config.batch_size, 0, trainer.fabric)
    batch = next(iter(loader))
    trainer.model.train()
    with Calls() as calls:
        trainer._loss(batch)
    # conv1 and conv3 of 4 + 6 bottlenecks, and of layer 4 of queries and of masked supports
    assert calls.counted["svf_fast::pointwise"] >= 2 * (4 + 6 + 2 * 3), calls.counted


def test_a_checkpoint_of_a_gpu_is_one_of_a_cpu(configured):
    config = configured("run", steps=1)
    train(config)
    for name, value in trained(config)[1]["model"].items():
        assert value.device.type == "cpu" and value.is_contiguous(), name
