from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fss.files import atomic_write
from fss.runs.checkpoint import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("the disk is full")


def test_round_trip(path, tiny):
    config = tiny()
    state = {"step": 7, "best": None, "model": {"w": torch.arange(3.0)}, "random": [random_state()]}
    save_checkpoint(path, config, state)
    loaded = load_checkpoint(path, config)
    assert loaded["step"] == 7 and loaded["best"] is None
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert loaded["config"] == config.to_dict()


def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(path, tiny):
    save_checkpoint(path, tiny(), {"step": 1, "model": {}})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="the disk is full"):
        save_checkpoint(
            path, tiny(), {"step": 2, "model": {"a": torch.ones(9), "b": Unpicklable()}}
        )
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_atomic_write_of_a_new_file_leaves_nothing_behind_on_an_interrupt(tmp_path):
    def write_half():
        with atomic_write(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 10, 200, -20])
def test_a_truncated_file(path, tiny, kept):
    save_checkpoint(path, tiny(), {"step": 1, "model": {"w": torch.ones(100)}})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"checkpoint: .*last.pt cannot be read, it is truncated"):
        load_checkpoint(path)


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: expected a file at .*last.pt, found"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"format": 99}])
def test_a_file_of_another_program(path, content):
    torch.save(content, path)
    with pytest.raises(ValueError, match="checkpoint: expected a checkpoint of fss, format 1, at"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ({"model": {"width": 8}}, "model.width: expected 8, the checkpoint has 4"),
        ({"data": {"fold": 2}}, "data.fold: expected 2, the checkpoint has 0"),
        ({"regime": {"name": "full"}}, "regime.name: expected 'full', the checkpoint has 'svf'"),
        (
            {"regime": {"layers": ["layer4"]}},
            r"regime.layers: expected \['layer4'\], the checkpoint has \['layer2', 'layer3'",
        ),
    ],
)
def test_a_checkpoint_of_another_run_says_what_differs(path, tiny, override, difference):
    save_checkpoint(path, tiny(), {"step": 1, "model": {}})
    with pytest.raises(ValueError, match=f"last.pt belongs to another run: {difference}"):
        load_checkpoint(path, tiny(**override))


def test_what_computes_the_same_may_differ(path, tiny):
    save_checkpoint(path, tiny(), {"step": 1, "model": {}})
    load_checkpoint(path, tiny(regime={"strategy": "fold"}, data={"shots": 5}))


def test_random_states_come_back(path, tiny):
    save_checkpoint(path, tiny(), {"model": {}, "random": random_state()})

    def draw() -> list:
        legacy = np.random.rand(3)  # noqa: NPY002
        return [*torch.rand(3).tolist(), *legacy, random.random(), random.gauss(0, 1)]

    drawn = draw()
    restore_random_state(load_checkpoint(path)["random"])
    assert draw() == drawn
