"""kill -9 at random moments of training and `fss data prepare`, SIGTERM, full and read-only disks.

What is left is whole, and a second start ends with the very same bits.

SVF_LONG=1 kills twenty times each, else a few; SVF_SEED repeats the moments that a failure printed.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fss.runs.checkpoint import load_checkpoint
from tests.long import LONG
from tests.robustness.forked_commands import Commands, kill

KILLS = 20 if LONG else 5
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("commands")
    found = Commands(folder / "output.txt", XDG_CACHE_HOME=str(folder / "cache"))
    yield found
    found.close()


@pytest.fixture
def moments() -> random.Random:
    seed = int(os.environ.get("SVF_SEED", random.SystemRandom().randrange(10**6)))
    print(f"the moments are those of SVF_SEED={seed}")  # shown where a test fails
    return random.Random(seed)


def photos(folder: Path, count: int) -> None:
    """A data set of four classes in the layout of VOC."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((40, 48), dtype=np.uint8)
        mask[5:30, 4 + i : 30] = 1 + i % 4
        pixels = rng.integers(0, 99, (40, 48, 3)) + 150 * (mask > 0)[..., None] * rng.random(3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"JPEGImages/{i}.png")
        Image.fromarray(mask).save(folder / f"SegmentationClass/{i}.png")
    names = {str(c): name for c, name in enumerate(("bag", "hat", "cap", "tie"), start=1)}
    (folder / "classes.json").write_text(json.dumps({"classes": names}))


def settings(tmp_path: Path, **values) -> str:
    """A file with the configuration of a run of a second or two."""
    photos(tmp_path / "photos", 16)
    values = {
        "data": {"source": "folder", "root": str(tmp_path / "photos"), "size": 33, "min_area": 9},
        "model": {"backbone": "resnet18", "width": 24, "weights": "shapes", "channels": 8},
        "optimizer": {"lr": 0.01},
        "steps": 8,
        "batch_size": 2,
        "save_every": 1,
        "log_every": 1,
        "validation_every": 3,
        "validation_episodes": 3,
        "test_episodes": 3,
        "test_seeds": [1, 2],
        "pictures": 0,
        "accelerator": "cpu",
    } | values
    values["data"]["workers"] = 0
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def same(a: object, b: object) -> bool:
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(folder: Path, name: str) -> dict:
    """What a run's checkpoint holds beside times, which differ, and the name of its folder."""
    content = load_checkpoint(folder / name)
    del content["config"]["out"]
    return {key: value for key, value in content.items() if key != "seconds"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    times = ("step_seconds", "images_per_second", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in times} for row in found]


def assert_same_run(killed: Path, whole: Path) -> None:
    for name in ("last.pt", "best.pt"):
        assert same(state(killed, name), state(whole, name)), name
    for name in ("train.csv", "validation.csv"):
        assert rows(killed / name) == rows(whole / name), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (killed, whole)]
    for name in ("test", "best_validation", "steps", "skipped_steps"):
        assert results[0][name] == results[1][name], name
    assert not list(killed.glob(".*.tmp"))


def wait_for_a_write(folder: Path, process: int) -> bool:
    """Waits until a checkpoint is being written; false when the process ended before."""
    while True:
        if any(folder.glob(".*.pt.*.tmp")):
            return True
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.0002)


def test_a_killed_training_goes_on_bit_for_bit(commands, moments, tmp_path):
    """Half of the kills come at any moment, the other half within the writing of a checkpoint."""
    config = settings(tmp_path)
    whole = tmp_path / "whole"
    status, seconds = commands.run("train", "--config", config, "--out", str(whole))
    assert status == 0, commands.output.read_text()
    kills = torn = finished = 0
    while kills < KILLS:
        folder = tmp_path / f"run{finished}"
        folder.mkdir(exist_ok=True)
        flag = "--resume" if (folder / "last.pt").exists() else "--overwrite"
        process = commands.start("train", "--config", config, "--out", str(folder), flag)
        if moments.random() < 0.5:
            for _ in range(moments.randrange(1, 8)):
                if not wait_for_a_write(folder, process):
                    break
                time.sleep(moments.uniform(0, 0.003))
        else:
            time.sleep(moments.uniform(0, 1.1 * seconds))
        kill(process)
        status = commands.wait()
        if status == 0:
            assert_same_run(folder, whole)
            finished += 1
            continue
        assert status == -signal.SIGKILL, commands.output.read_text()
        kills += 1
        torn += any(folder.glob(".*.pt.*.tmp"))
        for path in folder.glob("*.pt"):
            load_checkpoint(path)
    flag = "--resume" if (folder / "last.pt").exists() else "--overwrite"
    assert commands.run("train", "--config", config, "--out", str(folder), flag)[0] == 0
    assert_same_run(folder, whole)
    print(f"{kills} kills, {torn} of them in a write, {finished + 1} runs ended")
    assert not LONG or torn > 2


def test_sigterm_saves_and_says_how_to_go_on(commands, tmp_path):
    config = settings(tmp_path)
    run = ("train", "--config", config, "--out")
    assert commands.run(*run, str(tmp_path / "whole"))[0] == 0, commands.output.read_text()
    folder = tmp_path / "run"
    folder.mkdir()
    process = commands.start(*run, str(folder), "--overwrite")
    assert wait_for_a_write(folder, process)
    os.kill(process, signal.SIGTERM)
    assert commands.wait() == 128 + signal.SIGTERM
    (last,) = [line for line in commands.output.read_text().splitlines() if "continue with" in line]
    assert last.endswith(f"fss train --config {folder / 'config.yaml'} --resume")
    assert not (folder / "result.json").exists()
    assert commands.run("train", "--config", str(folder / "config.yaml"), "--resume")[0] == 0
    assert_same_run(folder, tmp_path / "whole")


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(commands, tmp_path):
    """Of the second checkpoint's first write; with more room the run goes on."""
    config = settings(tmp_path)
    run = ("train", "--config", config, "--out")
    assert commands.run(*run, str(tmp_path / "whole"))[0] == 0, commands.output.read_text()
    folder = tmp_path / "run"
    size = (tmp_path / "whole" / "last.pt").stat().st_size
    status, _ = commands.run(*run, str(folder), largest_file=size // 2)
    assert status == 2
    assert "cannot be written" in commands.output.read_text().splitlines()[-1]
    assert not list(folder.glob("*.pt")) and not list(folder.glob(".*.tmp"))
    assert commands.run(*run, str(folder), "--overwrite")[0] == 0
    assert_same_run(folder, tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 40 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk of its own")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_becomes_full_and_read_only(commands, small_disk, tmp_path):
    config = settings(tmp_path)
    folder = small_disk / "run"
    run = ("train", "--config", config, "--out", str(folder))
    full = small_disk / "full"
    full.write_bytes(bytes(2**20))
    with pytest.raises(OSError, match="No space"), full.open("ab") as file:
        while True:
            file.write(bytes(2**16))
            file.flush()
    assert commands.run(*run)[0] == 2, commands.output.read_text()
    assert f"{folder} cannot be written (No space" in commands.output.read_text().splitlines()[-1]
    full.unlink()
    assert commands.run(*run, "--overwrite")[0] == 0, commands.output.read_text()
    checkpoint = (folder / "last.pt").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert commands.run(*run, "--overwrite")[0] == 2
    assert f"{folder} cannot be written (Read-only" in commands.output.read_text().splitlines()[-1]
    assert (folder / "last.pt").read_bytes() == checkpoint


class Served(BaseHTTPRequestHandler):
    """Serves the files of a folder slowly, from the byte that is asked for."""

    def __init__(self, folder: Path, *args) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        content = (self.folder / self.path.strip("/")).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for first in range(start, len(content), len(content) // 16):
                self.wfile.write(content[first : first + len(content) // 16])
                time.sleep(0.03)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, tmp_path / "served"))
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pascal_archives(folder: Path, url: str, count: int) -> dict[str, tuple[str, str]]:
    """Archives of VOC and SBD with `count` photos, as `Commands.start` takes them."""
    matlab = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    names = [f"2008_{i:06d}" for i in range(count)]
    lists = {"Main/train": names[: count // 2], "Segmentation/train": names[: count // 3]}
    lists["Segmentation/val"] = names[count // 2 :]
    base = "VOCdevkit/VOC2012"
    voc = {f"{base}/ImageSets/{k}.txt": "\n".join(v).encode() for k, v in lists.items()}
    sbd = {}
    for i, name in enumerate(names):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        voc[f"{base}/JPEGImages/{name}.jpg"] = encoded(Image.fromarray(pixels), "JPEG")
        mask = np.full((40, 50), 1 + i % 20, dtype=np.uint8)
        mask[:5] = 0
        if i % 3 == 0 or i >= count // 2:
            voc[f"{base}/SegmentationClass/{name}.png"] = encoded(Image.fromarray(mask), "PNG")
        else:
            record = np.empty((1, 1), dtype=[("Boundaries", object), ("Segmentation", object)])
            record[0, 0] = (0, mask)
            buffer = io.BytesIO()
            matlab.savemat(buffer, {"GTcls": record})
            sbd[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = buffer.getvalue()
    found = {}
    for key, name, mode, files in (
        ("VOC", "voc.tar", "w", voc),
        ("SBD", "sbd.tgz", "w:gz", sbd),
    ):
        with tarfile.open(folder / name, mode) as tar:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        found[key] = (f"{url}/{name}", md5)
    return found


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_killed_preparation_goes_on_to_the_same_files(commands, moments, server, tmp_path):
    """Downloading, unpacking and converting: a file with its name is the whole file."""
    archives = pascal_archives(tmp_path / "served", server, 240)
    command = ("data", "prepare", "pascal")
    status, seconds = commands.run(*command, str(tmp_path / "whole"), archives=archives)
    assert status == 1, commands.output.read_text()  # the numbers are not the published ones
    whole = contents(tmp_path / "whole")
    kills = finished = 0
    left = set()
    while kills < KILLS:
        root = tmp_path / f"data{finished}"
        process = commands.start(*command, str(root), archives=archives)
        time.sleep(moments.uniform(0, seconds))
        kill(process)
        status = commands.wait()
        if status == 1:
            assert contents(root) == whole
            finished += 1
            continue
        assert status == -signal.SIGKILL, commands.output.read_text()
        kills += 1
        found = contents(root)
        named = {
            path: digest
            for path, digest in found.items()
            if "/." not in path and not path.endswith(".part")
        }
        left |= {path.rpartition("/")[0] for path in found.keys() - named.keys()}
        wrong = [path for path, digest in named.items() if whole[path] != digest]
        assert not wrong
        for folder in {path.rpartition("/")[0] for path in named} & {
            f"VOCdevkit2012/VOC2012/{name}"
            for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug")
        }:
            expected = {path for path in whole if path.startswith(f"{folder}/")}
            assert expected == {path for path in named if path.startswith(f"{folder}/")}
    assert commands.run(*command, str(root), archives=archives)[0] == 1
    assert contents(root) == whole
    print(f"{kills} kills, unfinished were {sorted(left)}; {finished + 1} preparations ended")
