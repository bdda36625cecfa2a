"""The captured step on the CPU: a stand-in for the graph runs at each replay what was captured."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import svf_fast
from fss import captured as module
from fss.captured import WARM_UP, CapturedStep, captured
from fss.data import build_episodes
from fss.evaluation.evaluate import episode_classes, evaluate
from fss.models import build_model
from fss.runs.log import read_log
from fss.training.run import train
from fss.training.trainer import Trainer
from tests.long import LONG


class Replayed:
    """A graph that writes what its function gives into the tensors of its capture, as a GPU's does.

    A capture computes nothing: its tensors are NaN until the first replay. Whose gradients there
    are is known from the runs before it.
    """

    def __init__(self, network: nn.Module, trains: bool = True) -> None:
        self.parameters = list(network.parameters()) if trains else []
        self.calls: list[str] = []

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.calls.append("run")
        result = function()
        self.trained = [p for p in self.parameters if p.grad is not None]
        self.like = result
        return result

    def capture(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.calls.append("capture")
        assert all(p.grad is None for p in self.parameters)
        self.function = function
        for parameter in self.trained:
            parameter.grad = torch.full_like(parameter, torch.nan)
        self.gradients = [parameter.grad for parameter in self.trained]
        self.result = torch.full_like(self.like, torch.nan)
        return self.result

    def replay(self) -> None:
        self.calls.append("replay")
        present = [parameter.grad for parameter in self.trained]
        for parameter in self.parameters:
            parameter.grad = None
        self.result.copy_(self.function())
        for parameter, gradient, before in zip(self.trained, self.gradients, present, strict=True):
            gradient.copy_(parameter.grad)
            parameter.grad = before

    def discard(self) -> None:
        self.calls.append("discard")
        self.function = None


@contextmanager
def nothing_to_compose(model: nn.Module):
    yield


@pytest.fixture
def graphs(monkeypatch) -> list[Replayed]:
    """The graphs of runs, which are recorded on the CPU as on a GPU."""
    made: list[Replayed] = []
    step = CapturedStep.__init__

    def init(self, body, network, inputs, graph, tell, trains=True):
        made.append(Replayed(network, trains))
        step(self, body, network, inputs, made[-1], tell, trains)

    monkeypatch.setattr(CapturedStep, "__init__", init)
    monkeypatch.setattr(module, "CudaGraph", lambda device: None)
    monkeypatch.setattr(module, "records_graphs", lambda device: True)
    monkeypatch.setattr(svf_fast, "follow", lambda model: (), raising=False)
    monkeypatch.setattr(svf_fast, "composed", nothing_to_compose, raising=False)
    return made


def last(config) -> dict:
    return torch.load(Path(config.out) / "last.pt", weights_only=True)


@pytest.fixture
def assert_same_run(same) -> Callable[..., None]:
    """The same bits: weights, optimizer, generators, logs, scores."""

    def compare(one, other) -> None:
        a, b = last(one), last(other)
        for name in a.keys() - {"config", "seconds"}:
            assert same(a[name], b[name]), name
        training = ("step", "loss", "lr", "skipped_steps")
        for log, columns in (("train.csv", training), ("validation.csv", None)):
            tables = [read_log(Path(config.out) / log) for config in (one, other)]
            for column in columns or tables[0]:
                assert tables[0][column] == tables[1][column], column
        results = (Path(config.out) / "result.json" for config in (one, other))
        tests = [json.loads(path.read_text())["test"] for path in results]
        assert tests[0] == tests[1]

    return compare


RUNS = {
    "svf": {"validation_every": 3},
    "accumulate": {"accumulate": 2},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-mixed": {"precision": "bf16-mixed", "optimizer": {"name": "adamw"}},
    "freeze": {"regime": {"name": "freeze"}},
    "full": {"regime": {"name": "full"}},
    "statistics of the batch": {
        "regime": {"batch_norm": "both", "batch_norm_statistics": "batch"},
        "validation_every": 3,
    },
    "adapter": {"regime": {"name": "adapter"}},
    "pfenet": {"model": {"name": "pfenet", "bins": [0.5]}},
    "bam": {"model": {"name": "bam", "base_weights": "none"}, "data": {"shots": 2}},
    "cyctr": {"model": {"name": "cyctr"}},
    "hdmnet": {"model": {"name": "hdmnet", "base_weights": "none"}, "data": {"shots": 2}},
    "deterministic": {"deterministic": True},
}
if LONG:
    RUNS["asgnet"] = {"model": {"name": "asgnet", "bins": [0.5]}}
    RUNS |= {name: {"model": {"name": name}} for name in ("canet", "pmm", "hsnet", "dcama")}
    RUNS["dcama"]["model"]["channels"] = 64


@pytest.mark.parametrize("run", RUNS)
def test_a_captured_run_is_the_eager_run(tiny, tmp_path, graphs, assert_same_run, run):
    settings = {"steps": 8, "log_every": 2, "optimizer": {"schedule": "constant"}} | RUNS[run]
    eager = tiny(out=str(tmp_path / "eager"), graph="off", **settings)
    replayed = tiny(out=str(tmp_path / "replayed"), **settings)
    train(eager)
    assert not graphs
    train(replayed)
    assert graphs[0].calls == ["discard", *["run"] * WARM_UP, "capture", *["replay"] * 5]
    assert_same_run(eager, replayed)


def test_a_captured_run_resumes(tiny, tmp_path, graphs, assert_same_run, monkeypatch):
    """Stopped after its second replay, and captured anew: the run in one go, eagerly."""
    settings = {"steps": 10, "optimizer": {"schedule": "constant"}, "validation_every": 5}
    whole = tiny(out=str(tmp_path / "whole"), graph="off", **settings)
    halves = tiny(out=str(tmp_path / "halves"), **settings)
    train(whole)
    step = Trainer._train_step

    def interrupted(self, parts):
        step(self, parts)
        if self.step == WARM_UP + 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 10"):
        train(halves)
    monkeypatch.setattr(Trainer, "_train_step", step)
    train(halves, resume=True)
    assert [graph.calls.count("replay") for graph in graphs] == [2, 2]
    assert_same_run(whole, halves)


def test_a_step_that_overflows_is_left_out_and_the_graph_reads_the_next_scale(
    tiny, tmp_path, graphs, assert_same_run, monkeypatch
):
    original = Trainer._step_optimizer

    def overflow(self) -> None:
        if self.step == WARM_UP + 1:
            next(p for p in self.network.parameters() if p.grad is not None).grad.fill_(torch.inf)
        original(self)

    monkeypatch.setattr(Trainer, "_step_optimizer", overflow)
    settings = {"steps": 8, "precision": "16-mixed", "accumulate": 2}
    runs = [tiny(out=str(tmp_path / graph), graph=graph, **settings) for graph in ("off", "auto")]
    for config in runs:
        train(config)
        assert last(config)["skipped"] == 1 and last(config)["precision"]["scale"] == 2**15
    assert_same_run(*runs)


class Net(nn.Module):
    """With a weight that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.unused = nn.Parameter(torch.ones(2))


def parts(*values: float) -> list[dict[str, object]]:
    return [{"x": torch.tensor([value, value]), "name": "photo"} for value in values]


class Step:
    """A step of a `Net`, its graph and what it tells."""

    def __init__(self, monkeypatch) -> None:
        self.network, self.told = Net(), []
        self.key: object = 0
        self.composed = 0
        self.graph = Replayed(self.network)
        self.step = CapturedStep(self.body, self.network, "x", self.graph, self.told.append)
        monkeypatch.setattr(svf_fast, "follow", lambda model: self.key, raising=False)
        monkeypatch.setattr(svf_fast, "composed", self.compose, raising=False)

    @contextmanager
    def compose(self, model):
        self.composed += 1
        yield

    def body(self, parts) -> torch.Tensor:
        losses = [(self.network.weight * part["x"]).square().sum() for part in parts]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).detach()

    def check(self, *values: float) -> None:
        """A step whose loss and gradients are those of the formula."""
        for parameter in self.network.parameters():
            parameter.grad = None
        losses = self.step(parts(*values))
        weight = self.network.weight.detach()
        expected = torch.tensor([float((weight * value).square().sum()) for value in values])
        torch.testing.assert_close(losses, expected)
        gradient = 2 * weight * sum(value**2 for value in values)
        torch.testing.assert_close(self.network.weight.grad, gradient)
        assert self.network.unused.grad is None
        with torch.no_grad():
            self.network.weight.sub_(0.1)
        self.losses = losses


@pytest.fixture
def step(monkeypatch) -> Step:
    return Step(monkeypatch)


def test_losses_of_a_replay_outlive_the_next(step):
    for value in range(WARM_UP + 1):
        step.check(1.0 + value)
    kept = step.losses
    before = kept.clone()
    step.check(9.0)
    assert step.graph.calls[-2:] == ["replay", "replay"]
    assert torch.equal(kept, before)


def test_an_outdated_graph_is_captured_anew_once_its_key_stays(step):
    for _ in range(WARM_UP + 2):
        step.check(1.0, 2.0)
    assert step.graph.calls[-1] == "replay" and step.composed == 2
    for key in (1, 2):  # changes in every step: no graph would be used
        step.key = key
        step.check(1.0, 2.0)
        assert step.graph.calls[-2:] == ["discard", "run"]
    for _ in range(WARM_UP - 1):
        step.check(1.0, 2.0)
        assert step.graph.calls[-1] == "run"
    step.check(1.0, 2.0)
    assert step.graph.calls[-2:] == ["capture", "replay"]
    assert not step.told


def test_steps_of_another_shape_run_eagerly(step):
    for _ in range(WARM_UP + 1):
        step.check(1.0, 2.0)
    calls = len(step.graph.calls)
    step.check(3.0)
    step.check(4.0)
    assert len(step.graph.calls) == calls
    step.check(5.0, 6.0)
    assert step.graph.calls[calls:] == ["replay"]
    assert step.told == ["graph: steps of another shape than the first run eagerly"]


def test_a_capture_that_fails_is_told_once_and_steps_go_on(step, monkeypatch):
    def fails(function):
        step.network.weight.grad = torch.full((2,), torch.nan)  # of a part that was captured
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with …")

    monkeypatch.setattr(step.graph, "capture", fails)
    for _ in range(WARM_UP + 3):
        step.check(1.0, 2.0)
    assert step.told == [
        "graph: steps run eagerly, capturing one failed (operation not permitted when stream is "
        "capturing)"
    ]
    assert step.graph.calls == ["discard", *["run"] * WARM_UP, "discard"]


@pytest.mark.parametrize(
    ("graph", "device", "processes", "told"),
    [
        ("off", "cuda", 1, []),
        ("auto", "cpu", 1, []),
        (
            "auto",
            "cuda",
            2,
            ["graph: steps run eagerly, several processes exchange gradients within a step"],
        ),
    ],
)
def test_what_is_not_captured(graph, device, processes, told):
    def body(parts):
        return torch.zeros(1)

    lines: list[str] = []
    fabric = SimpleNamespace(device=torch.device(device), world_size=processes)
    assert captured(body, Net(), ["x"], fabric, graph, lines.append) is body
    assert lines == told


@pytest.mark.parametrize("parameters", ["untrained", "trained"])
def test_a_captured_test_is_the_eager_test(tiny, graphs, parameters):
    """Whole batches are replayed, the last one is not whole; gradients stay as they were."""
    config = tiny()
    episodes = build_episodes(config.data, "test", 17, 0)
    classes = list(episode_classes(episodes.source, config.data.fold))
    fabric = Fabric(accelerator="cpu", devices=1)
    network = build_model(config.model, {}, config.data.shots)
    for parameter in network.classifier[-1].parameters():
        parameter.data = parameter.data.flip(0)  # untrained it sees no object
    gradients = {}
    for parameter in network.parameters() if parameters == "trained" else ():
        parameter.grad = gradients[parameter] = torch.ones_like(parameter)
    model = fabric.setup(network)
    eager = evaluate(model, episodes, classes, fabric, 3)
    kept = evaluate(model, episodes, classes, fabric, 3, feature_cache=1.0, graph="auto")
    assert not graphs
    recorded = evaluate(model, episodes, classes, fabric, 3, graph="auto")
    assert graphs[0].calls == ["discard", *["run"] * WARM_UP, "capture", *["replay"] * 2]
    assert eager == kept == recorded and eager.miou > 0
    for parameter in network.parameters():
        assert parameter.grad is gradients.get(parameter)


def test_images_are_copied_into_the_networks_memory_format(monkeypatch):
    images, masks = torch.randn(2, 3, 3, 9, 9), torch.zeros(2, 3, 9, 9, dtype=torch.uint8)
    assert module._buffer(images).is_contiguous()
    monkeypatch.setattr(module, "takes_channels_last", lambda device: True)
    buffer = module._buffer(images)
    assert buffer.shape == images.shape
    assert buffer.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert module._buffer(images[:, 0]).is_contiguous(memory_format=torch.channels_last)
    assert module._buffer(masks).is_contiguous()
