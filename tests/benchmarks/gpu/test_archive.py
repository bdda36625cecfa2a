"""The archive of results is whole at any moment and has no more than results."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import threading
import time

from benchmarks.gpu import archive, processes

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from benchmarks.gpu.archive import Archive
with Archive(Path(sys.argv[2]), Path(sys.argv[3]), every=0.0):
    print("on", flush=True)
    sys.stdin.read()
"""


def names(path) -> set[str]:
    with tarfile.open(path) as tar:
        return set(tar.getnames())


def test_results_go_in_and_what_can_be_made_again_stays_out(tmp_path):
    folder = tmp_path / "gpu"
    kept = ("facts.json", "logs/race.log", "cache/triton/H100.json", "one_image/race.md")
    others = ("cache/svd/a.safetensors", "runs/x/last.pt", ".gpu.json.tmp", "photos/a.jpg")
    for name in (*kept, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    with archive.Archive(tmp_path / "out.tgz", folder):
        pass
    assert names(tmp_path / "out.tgz") == {f"gpu/{name}" for name in kept}
    with tarfile.open(tmp_path / "out.tgz") as tar:
        assert tar.extractfile("gpu/facts.json").read() == b"facts.json"


def test_it_is_written_while_others_write(tmp_path):
    """Files that grow, shrink and vanish meanwhile leave a whole archive."""
    folder, ended = tmp_path / "gpu", threading.Event()
    folder.mkdir()

    def others() -> None:
        size = 0
        while not ended.is_set():
            size = (size + 50_000) % 900_000
            (folder / "a.log").write_bytes(b"x" * size)
            (folder / "b.json").write_text("{}")
            (folder / "b.json").unlink()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        with archive.Archive(tmp_path / "out.tgz", folder, every=0.01) as written:
            for _ in range(30):
                written.write()
                assert names(tmp_path / "out.tgz") <= {"gpu/a.log", "gpu/b.json"}
    finally:
        ended.set()
        thread.join()


def test_a_kill_leaves_the_one_before(tmp_path):
    folder, path = tmp_path / "gpu", tmp_path / "out.tgz"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.json").write_text("[1]" * 5000)
    command = [sys.executable, "-c", WRITER, str(processes.ROOT), path, folder]
    for moment in (0.05, 0.09, 0.14):
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "on\n"
            while not path.is_file():
                time.sleep(0.01)
            time.sleep(moment)
            process.kill()
        assert len(names(path)) == 40
