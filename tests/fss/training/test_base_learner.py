from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch

import fss.training.base_learner
import fss.training.loop
from fss import processes
from fss.cli import main
from fss.config import DataConfig, ModelConfig
from fss.data import build_source
from fss.data.base_images import BaseImages
from fss.evaluation.evaluate import episode_classes
from fss.models import build_model
from fss.training.base_learner import (
    BaseLearnerConfig,
    BaseLearnerData,
    BaseTrainer,
    confusion,
    train_base,
)
from fss.training.loop import Stopped

DATA = {"source": "shapes", "size": 33, "min_area": 0.01, "workers": 0}
MODEL = {"backbone": "resnet18", "width": 4, "weights": "none"}


@pytest.fixture(scope="module")
def source():
    return build_source(DataConfig(**DATA))


@pytest.fixture
def tiny(tmp_path):
    def make(**overrides):
        values = {
            "steps": 4,
            "batch_size": 4,
            "validation_images": 6,
            "validation_every": 2,
            "log_every": 1,
            "accelerator": "cpu",
            "out": str(tmp_path / "base"),
        }
        data = DataConfig(**(DATA | overrides.pop("data", {})))
        model = ModelConfig(**(MODEL | overrides.pop("model", {})))
        return BaseLearnerConfig(data, model, **(values | overrides))

    return make


def test_confusion():
    target = torch.tensor([[0, 1, 2], [2, 255, 255]])
    prediction = torch.tensor([[0, 2, 2], [1, 0, 2]])
    assert confusion(prediction, target, 3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]


def test_learns_and_resumes_bit_for_bit(tiny, tmp_path, monkeypatch):
    whole = train_base(tiny(steps=6, lr=0.005))
    config = tiny(steps=6, lr=0.005, out=str(tmp_path / "cut"), save_every=1)
    save = BaseTrainer._save

    def killed(self, name):
        save(self, name)
        if self.step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(BaseTrainer, "_save", killed)
        train_base(config)
    result = train_base(config, resume=True)
    assert result["iou"] == whole["iou"] and result["step"] == whole["step"]
    one, other = (torch.load(tmp_path / d / "last.pt") for d in ("base", "cut"))
    assert one["history"] == other["history"]
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    losses = [row["loss"] for row in one["history"] if "loss" in row]
    assert losses[-1] < losses[0]
    logs = [(tmp_path / d / "log.csv").read_text() for d in ("base", "cut")]
    assert logs[0] == logs[1] and logs[0].startswith("step,loss,lr,miou")


def test_the_foreground_weight_is_of_every_base_class(tiny, monkeypatch):
    weights = []
    monkeypatch.setattr(
        fss.training.base_learner.functional,
        "cross_entropy",
        lambda prediction, mask, weight, ignore_index: weights.append(weight) or prediction.mean(),
    )
    train_base(tiny(steps=1, foreground_weight=4.0))
    assert weights[0].tolist() == [1.0] + [4.0] * 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step(tiny, tmp_path, monkeypatch, number):
    step = BaseTrainer._train_step

    def signalled(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(BaseTrainer, "_train_step", signalled)
    config = tiny(validation_every=0, save_every=99)
    with pytest.raises(Stopped, match="after step 2 of 4, saved; .*--resume goes on") as stop:
        train_base(config)
    assert stop.value.status == 128 + number
    assert torch.load(tmp_path / "base" / "last.pt")["step"] == 2
    assert train_base(config, resume=True)["step"] == 4


def test_restarted_processes_begin_or_resume_by_themselves(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(fss.training.loop, "is_restart", lambda: True)
    config = tiny(validation_every=0, save_every=2)
    step = BaseTrainer._train_step
    steps = []

    def killed_once(self, parts):
        steps.append(self.step)
        if steps == [0, 1, 2]:
            raise RuntimeError("killed")
        return step(self, parts)

    monkeypatch.setattr(BaseTrainer, "_train_step", killed_once)
    with pytest.raises(RuntimeError, match="killed"):
        train_base(config)
    assert train_base(config)["step"] == 4
    assert steps == [0, 1, 2, 2, 3]


def test_what_the_loader_fails_with_finds_the_steps_before_saved(tiny, tmp_path, monkeypatch):
    item = BaseImages.__getitem__

    def unreadable(self, index):
        if index == 9:
            raise ValueError("photo.jpg cannot be decoded")
        return item(self, index)

    monkeypatch.setattr(BaseImages, "__getitem__", unreadable)
    with pytest.raises(ValueError, match="photo.jpg cannot be decoded"):
        train_base(tiny(validation_every=0, save_every=99))
    assert torch.load(tmp_path / "base" / "last.pt")["step"] == 2


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out: .*/file/run cannot be written \(Not a directory\)"):
        train_base(tiny(out=str(tmp_path / "file" / "run")))


def test_bam_takes_the_result(tiny, source, tmp_path):
    train_base(tiny(steps=2))
    state = torch.load(tmp_path / "base" / "base.pt")["state_dict"]
    config = ModelConfig(**MODEL, name="bam", base_weights=str(tmp_path / "base"), channels=8)
    bam = build_model(config, episode_classes(source, 0, novel=False))
    own = bam.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="of another fold or data set: it learnt .*base classes"):
        build_model(config, episode_classes(source, 1, novel=False))
    with pytest.raises(ValueError, match="of another shape: backbone.conv1.weight"):
        build_model(dataclasses.replace(config, width=6), episode_classes(source, 0, novel=False))


def test_a_run_is_not_overwritten_nor_mixed_up(tiny):
    with pytest.raises(FileNotFoundError, match="--resume: expected a checkpoint"):
        train_base(tiny(), resume=True)
    train_base(tiny(steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        train_base(tiny(steps=1))
    with pytest.raises(ValueError, match="lr: expected 0.1, the checkpoint has 0.00025"):
        train_base(tiny(steps=1, lr=0.1), resume=True)
    train_base(tiny(steps=1, lr=0.1), overwrite=True)


def test_a_checkpoint_from_before_a_setting_has_its_default(tiny, tmp_path):
    path = tmp_path / "base" / "last.pt"
    whole = train_base(tiny())
    state = torch.load(path)
    del state["config"]["tf32"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="tf32: expected 'all', the checkpoint has 'convolutions'"):
        train_base(tiny(tf32="all"), resume=True)
    assert train_base(tiny(), resume=True) == whole


def test_a_run_with_one_learning_rate_cannot_go_on_with_two(tiny, tmp_path):
    """Those of before: all parameters are in one group of the optimizer."""
    path = tmp_path / "base" / "last.pt"
    train_base(tiny())
    state = torch.load(path)
    (first, second) = state["optimizer"]["param_groups"]
    first["params"] += second["params"]
    state["optimizer"]["param_groups"] = [first]
    torch.save(state, path)
    with pytest.raises(ValueError, match="one learning rate for all parameters.*--overwrite"):
        train_base(tiny(), resume=True)


def test_what_a_step_asks_of_torch(tiny, monkeypatch):
    """The network as on a GPU, cuDNN's search, and the run's float32 products."""
    monkeypatch.setattr(processes, "takes_channels_last", lambda device: True)
    step, seen = BaseTrainer._train_step, []

    def noted(self, batch):
        weight = self.network.base_learner.classifier[0].weight
        layout = weight.is_contiguous(memory_format=torch.channels_last)
        cudnn = torch.backends.cudnn
        seen.append((layout, cudnn.benchmark, cudnn.conv.fp32_precision))
        return step(self, batch)

    monkeypatch.setattr(BaseTrainer, "_train_step", noted)
    train_base(tiny(steps=1, tf32="none"))
    assert seen == [(True, True, "ieee")]
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 1}, "batch_size: expected a number from 2 on, got 1"),
        ({"steps": 0}, "steps: expected a number from 1 on, got 0"),
        ({"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        ({"foreground_weight": 0.0}, "foreground_weight: expected a number above 0, got 0.0"),
        ({"momentum": 1.0}, "momentum: .*got 1.0"),
        ({"tf32": "some"}, "tf32: expected one of none, convolutions, all; got 'some'"),
        ({"out": ""}, "out: expected a folder"),
    ],
)
def test_bad_settings(tiny, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_a_fold_that_is_not_there(tiny):
    with pytest.raises(ValueError, match="data.fold: expected 0 to 3"):
        train_base(tiny(data={"fold": 9}))


def test_a_loss_that_is_not_finite_stops(tiny):
    with pytest.raises(FloatingPointError, match="loss: expected a finite number"):
        train_base(tiny(steps=6, lr=1e30, log_every=6, validation_every=0))


def test_command(tmp_path, capsys):
    options = [f"--data.{name}={value}" for name, value in DATA.items()]
    options += [f"--model.{name}={value}" for name, value in MODEL.items()]
    options += ["--steps=1", "--batch_size=2", "--validation_images=2", "--accelerator=cpu"]
    out = tmp_path / "run"
    assert main(["train-base", *options, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "mIoU" in printed and "base classes on test photos, step 1" in printed
    assert json.loads((out / "result.json").read_text())["config"]["steps"] == 1
    assert main(["train-base", *options, f"--out={out}"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_side_that_maps_do_not_align_with_is_refused():
    with pytest.raises(ValueError, match="data.size: .*got 416, the nearest are 409 and 417"):
        BaseLearnerConfig(data=BaseLearnerData(source="shapes", size=416))
