from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fss.processes import build_fabric
from fss.training.run import train
from fss.training.trainer import Trainer

ROOT = Path(__file__).parents[3]


def last(config) -> dict:
    return torch.load(Path(config.out) / "last.pt", weights_only=True)


@pytest.mark.parametrize("regime", ["freeze", "svf", "full"])
def test_a_run_trains_what_its_regime_says_and_reports(tiny, regime):
    config = tiny(regime={"name": regime}, pictures=2, optimizer={"schedule": "constant"})
    before = Trainer(config, build_fabric(config)).network.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    result = train(config)
    after = last(config)["model"]
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    kind = {name.rpartition(".")[2] for name in moved if name.startswith("backbone.")}
    assert kind == {"freeze": set(), "svf": {"S"}, "full": {"weight"}}[regime]
    assert any(not name.startswith("backbone.") for name in moved)

    folder = Path(config.out)
    assert json.loads((folder / "result.json").read_text()) == result
    assert {"best.pt", "last.pt", "config.yaml", "episodes.png", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert result["step_seconds_median"] > 0 and result["peak_memory_bytes"] > 0
    assert result["saved_bytes_per_step"] > 0
    assert (result["parameters"]["trained_backbone"] > 0) == (regime != "freeze")
    assert len(result["test"]["miou"]["values"]) == 2
    assert result["versions"]["torch"] == torch.__version__
    assert result["config"] == config.to_dict()
    assert not list(folder.glob("*.tmp"))


def test_a_fold_that_the_source_does_not_have(tiny):
    with pytest.raises(ValueError, match="data.fold: expected 0 to 3, .*got 9"):
        train(tiny(data={"fold": 9}))


def test_two_processes_compute_what_one_does(tiny, tmp_path):
    """Without dropout, weights and ignored pixels the averaged gradients are the batch's."""
    settings = {
        "model": {"dropout": 0.0},
        "data": {"rotate": 0.0, "scale": (1.0, 1.0)},
        "test_seeds": [1],
    }
    one = tiny(out=str(tmp_path / "one"), **settings)
    two = tiny(out=str(tmp_path / "two"), devices=2, **settings)
    train(one)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two.to_dict()))
    command = [sys.executable, "-m", "fss.cli", "train", "--config", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = last(one)["model"], last(two)["model"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    episodes = [json.loads((tmp_path / x / "result.json").read_text()) for x in ("one", "two")]
    assert episodes[0]["test"]["episodes"] == episodes[1]["test"]["episodes"]
