"""What breaks in the middle of a run: full disk, killed loader, unreadable photo, SIGTERM."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch

import fss.runs.checkpoint
import fss.training.loop
from fss.cli import main
from fss.data import EpisodeDataset
from fss.data.loader import episode_loader
from fss.processes import build_fabric
from fss.runs.checkpoint import load_checkpoint, save_checkpoint
from fss.runs.log import RunLog, read_log
from fss.training.loop import Stopped
from fss.training.run import train
from fss.training.trainer import Trainer

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")


def fill_disk(path: Path) -> None:
    """The next write of `path` by this process goes to a disk without space."""
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")


@full
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, tiny, size):
    path = tmp_path / "last.pt"
    fill_disk(path)
    message = r"checkpoint: .*last.pt cannot be written \(No space left on device\), {}; make room"
    with pytest.raises(OSError, match=message.format("none was written before")):
        save_checkpoint(path, tiny(), {"step": 1, "model": {"w": torch.ones(size)}})
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(path, tiny(), {"step": 1, "model": {}})
    fill_disk(path)
    with pytest.raises(OSError, match=message.format("the one written before is whole")):
        save_checkpoint(path, tiny(), {"step": 2, "model": {"w": torch.ones(size)}})
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@full
def test_a_run_goes_on_after_a_full_disk(tiny, tmp_path):
    config = tiny(save_every=1, steps=3)
    whole = tiny(save_every=1, steps=3, out=str(tmp_path / "whole"))
    train(whole)
    original, full_once = Trainer._save, []

    def save(self, path: Path) -> None:
        if self.step == 2 and not full_once:
            full_once.append(path)
            fill_disk(path)
        original(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", save)
        with pytest.raises(OSError, match="cannot be written"):
            train(config)
    assert load_checkpoint(Path(config.out) / "last.pt")["step"] == 1
    train(config, resume=True)
    a, b = (load_checkpoint(Path(c.out) / "last.pt")["model"] for c in (config, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_loader_says_so_and_the_run_goes_on(tiny, monkeypatch):
    original = EpisodeDataset.__getitem__

    def killed(self, index: int):
        if self.split == "train" and index == 9 and not resumed:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    resumed: list[bool] = []
    monkeypatch.setattr(EpisodeDataset, "__getitem__", killed)
    config = tiny(data={"workers": 1}, steps=6, save_every=1)
    message = (
        "data.workers: a process that loads episodes (is killed by signal: Killed|exited .*); if "
        "memory ran out, take fewer data.workers. .*last.pt is from before; --resume goes on"
    )
    with pytest.raises(ChildProcessError, match=message):
        train(config)
    assert 1 <= load_checkpoint(Path(config.out) / "last.pt")["step"] <= 4
    resumed.append(True)
    assert train(config, resume=True)["steps"] == 6


def test_a_loader_that_is_killed_while_a_checkpoint_is_written(tiny, monkeypatch):
    """Its signal breaks into torch's writer, which then fails with an error of its own."""
    original = fss.runs.checkpoint.atomic_write

    @contextmanager
    def interrupted(path):
        with original(path) as file:
            if path.name == "last.pt" and path.exists():
                error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
                results = chain([DEFAULT] * 12, [error], repeat(DEFAULT))
                file = Mock(wraps=file, write=Mock(wraps=file.write, side_effect=results))
            yield file

    monkeypatch.setattr(fss.runs.checkpoint, "atomic_write", interrupted)
    config = tiny(steps=6, save_every=1)
    with pytest.raises(ChildProcessError, match="data.workers: .* is killed by signal: Killed; if"):
        train(config)
    assert load_checkpoint(Path(config.out) / "last.pt")["step"] == 1


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_loader_that_is_killed_while_it_sends_a_batch(tiny, monkeypatch, interrupted):
    """The connection breaks first; the signal may come while the run then saves its step."""
    original = fss.runs.checkpoint.atomic_write

    def broken(*args):
        yield from islice(episode_loader(*args), 2)
        if interrupted:
            error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
            monkeypatch.setattr(fss.runs.checkpoint, "atomic_write", Mock(side_effect=error))
        here, there = multiprocessing.Pipe()
        there.close()
        here.recv()

    monkeypatch.setattr(fss.training.loop, "episode_loader", broken)
    config = tiny(data={"workers": 1}, steps=6, save_every=1)
    how = "is killed by signal: Killed" if interrupted else "ended while it sent them"
    with pytest.raises(ChildProcessError, match=f"data.workers: .* {how}; .*--resume goes on"):
        train(config)
    monkeypatch.setattr(fss.runs.checkpoint, "atomic_write", original)
    assert load_checkpoint(Path(config.out) / "last.pt")["step"] == 2


@pytest.mark.parametrize("kind", ["full", "killed"])
def test_what_ends_a_run_is_told_from_what_ends_its_last_save(tmp_path, tiny, kind):
    error = {
        "full": RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"),
        "killed": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    }[kind]
    expected = (OSError, "disk full?") if kind == "full" else (RuntimeError, "is killed by signal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", Mock(side_effect=error))
        with pytest.raises(expected[0], match=expected[1]):
            try:
                raise ConnectionResetError(104, "Connection reset by peer")
            except OSError:
                save_checkpoint(tmp_path / "last.pt", tiny(), {"step": 1, "model": {}})


def test_a_loader_that_is_killed_while_a_run_is_scored(tiny, monkeypatch, capsys):
    config = tiny(steps=1, data={"workers": 1})
    train(config)

    def killed(self, index: int):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(EpisodeDataset, "__getitem__", killed)
    assert main(["eval", config.out, "--episodes", "2"]) == 2
    assert "data.workers: a process that loads episodes" in capsys.readouterr().err


def test_a_file_that_ends_too_early_is_no_killed_loader(tiny, monkeypatch):
    def short(self, index: int):
        raise EOFError("No data left in file")

    monkeypatch.setattr(EpisodeDataset, "__getitem__", short)
    with pytest.raises(EOFError, match="No data left in file"):
        train(tiny(data={"workers": 1}))


def test_an_unreadable_photo_ends_the_run_with_every_step_saved(tiny, monkeypatch):
    original = EpisodeDataset.__getitem__

    def unreadable(self, index: int):
        if self.split == "train" and index == 5:
            raise ValueError("episode 5 (train, seed 321): photo.jpg cannot be decoded")
        return original(self, index)

    monkeypatch.setattr(EpisodeDataset, "__getitem__", unreadable)
    config = tiny(steps=6, save_every=0)
    with pytest.raises(ValueError, match=re.escape("photo.jpg cannot be decoded")):
        train(config)
    assert load_checkpoint(Path(config.out) / "last.pt")["step"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_the_step_also_when_the_loaders_get_it(tiny, monkeypatch, workers):
    """As batch systems send it: to all processes of the job."""
    original = Trainer._loss

    def loss(self, batch):
        if self.step == 1:
            monkeypatch.setattr(Trainer, "_loss", original)
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    config = tiny(data={"workers": workers}, steps=4, save_every=0)
    with pytest.raises(Stopped, match="stopped after step 2 of 4, saved") as stop:
        train(config)
    assert stop.value.status == 143
    assert load_checkpoint(Path(config.out) / "last.pt")["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_stops_at_once(tiny, monkeypatch):
    def loss(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("goes on")

    monkeypatch.setattr(Trainer, "_loss", loss)
    with pytest.raises(Stopped, match="stopped at once") as stop:
        train(tiny())
    assert stop.value.status == 143


def test_a_folder_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out: .*/run cannot be written \(Not a directory\); make"):
        train(tiny(out=str(tmp_path / "file" / "run")))

    def no_space(self, row):
        if row["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLog, "train", no_space)
    config = tiny(save_every=1)
    with pytest.raises(OSError, match=r"out: .* \(No space left .*last.pt is from before; --"):
        train(config)
    assert load_checkpoint(Path(config.out) / "last.pt")["step"] == 1


def test_unreadable_photos_are_named_and_counted(tiny, monkeypatch, capsys):
    config = tiny(data={"skip_unreadable": True}, steps=4)
    episodes = Trainer(config, build_fabric(config)).dataset
    broken = episodes.draw(3).query
    original = type(episodes.source).load

    def load(self, index: int):
        if index == broken:
            raise ValueError("photo.jpg cannot be decoded")
        return original(self, index)

    monkeypatch.setattr(type(episodes.source), "load", load)
    with pytest.warns(UserWarning, match="another episode takes its place"):
        result = train(config)
    ((error, times),) = result["unreadable"].items()
    assert error == "photo.jpg cannot be decoded" and times >= 1
    counted = read_log(Path(config.out) / "train.csv")["unreadable"]
    assert counted[0] <= counted[1] and counted[1:] == [times] * 3
    assert load_checkpoint(Path(config.out) / "last.pt")["unreadable"] == result["unreadable"]
    line = f"{times} training episodes gave way to others because of 1 unreadable photos: photo.jpg"
    assert line in capsys.readouterr().err
