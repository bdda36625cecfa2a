"""Two gloo processes under torchrun against one: curve, metrics, episodes, restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fss.config import TrainConfig
from fss.runs.log import read_log
from fss.training.run import train

ROOT = Path(__file__).parents[3]
# Without dropout and ignored pixels the averaged gradients are those of the whole batch.
SETTINGS = {
    "model": {"dropout": 0.0},
    "data": {"rotate": 0.0, "scale": (1.0, 1.0), "workers": 1},
    "steps": 6,
    "batch_size": 4,
    "validation_every": 2,
    "validation_episodes": 7,
    "test_episodes": 9,
    "test_seeds": [1],
}


def torchrun(config: TrainConfig, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    folder = Path(config.out)
    folder.mkdir()
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(Path(__file__).with_name("torchrun_script.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(path), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def episodes(folder: Path) -> list[tuple[int, int, int]]:
    """Number, step and life of the training episodes of both processes."""
    lines = [(folder / f"episodes-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    return sorted(tuple(map(int, line.split())) for rank in lines for line in rank)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One process; two; two of which one is killed in the fourth step, so from step 2 on again."""
    from_ = tmp_path_factory.mktemp("runs")
    values = yaml.safe_load(TINY_YAML)
    for name, value in SETTINGS.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    configs = {
        name: TrainConfig.from_dict({**values, "out": str(from_ / name)})
        for name in ("one", "two", "killed")
    }
    two = torchrun(configs["two"])
    killed = torchrun(configs["killed"], "4", restarts=1)
    train(configs["one"])
    wait(two)
    wait(killed)
    return from_


TINY_YAML = """
data: {source: shapes, size: 33, min_area: 0.01, workers: 0}
model: {backbone: resnet18, width: 4, weights: none, channels: 8}
regime: {name: svf}
optimizer: {lr: 0.01}
pictures: 0
log_every: 1
accelerator: cpu
"""


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_the_loss_curve_is_that_of_one_process(runs):
    one, two = (read_log(runs / name / "train.csv") for name in ("one", "two"))
    assert one["step"] == two["step"] == [1, 2, 3, 4, 5, 6]
    assert one["lr"] == two["lr"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    a, b = (torch.load(runs / n / "last.pt", weights_only=True)["model"] for n in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def test_every_episode_is_trained_on_once(runs):
    found = episodes(runs / "two")
    assert [number for number, _, _ in found] == list(range(24))
    assert [step for _, step, _ in found] == [1 + number // 4 for number in range(24)]
    first = (runs / "two" / "episodes-0.txt").read_text().split()[0::3]
    assert first == [str(number) for number in range(0, 24, 2)]


def test_a_killed_process_restarts_from_the_last_checkpoint(runs):
    """The fourth step of the other process may have begun, it is never written down as done."""
    whole, killed = runs / "two", runs / "killed"
    found = episodes(killed)
    before = [number for number, _, life in found if life == 0]
    after = [number for number, _, life in found if life == 1]
    assert set(before) == set(range(12))
    assert after == list(range(8, 24))
    for name in ("train.csv", "validation.csv"):
        a, b = read_log(whole / name), read_log(killed / name)
        for column in a.keys() & {"step", "loss", "lr", "miou", "fb_iou", "train_miou"}:
            assert a[column] == b[column]
    assert result(whole)["test"] == result(killed)["test"]
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (whole, killed))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_metrics_are_summed_exactly_over_processes(runs):
    """The weights of two processes, scored by one."""
    from fss.evaluation.score import evaluate_run

    again = evaluate_run(str(runs / "two"), accelerator="cpu", workers=0)
    assert result(runs / "two")["test"]["miou"] == again["miou"]
    assert result(runs / "two")["test"]["fb_iou"] == again["fb_iou"]
    assert result(runs / "two")["test"]["episodes"] == again["episodes"]
    assert sum(again["episodes"].values()) == 9
