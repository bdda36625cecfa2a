"""A compressed archive of a folder of results, and other files, complete at any moment."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

EVERY = 20.0  # seconds between two writes
LEFT_OUT = ("cache/svd", "cache/fss", "cache/matplotlib", "site", "photos")  # can be made again
LARGE = {".pt", ".safetensors"}


def write_whole(path: Path, text: str) -> None:
    """Write a file that replaces `path` when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Archive:
    """Writes the folder to `path` every few seconds while the block runs, and at its end.

    Each write takes the place of the one before when it is complete. Checkpoints, decompositions
    and what begins with a dot stay out.

    Args:
        path: of the archive, .tgz; outside of `folder`.
        folder: what goes into it, under its own name.
        every: seconds.
    """

    def __init__(self, path: Path, folder: Path, every: float = EVERY) -> None:
        self._path, self._folder, self._every = path.resolve(), folder.resolve(), every
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Archive:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.write()

    def write(self) -> None:
        """Write the present results; a file that others are writing goes in as far as it came."""
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
                for path in self._files():
                    try:
                        content, status = path.read_bytes(), path.stat()
                    except FileNotFoundError:  # replaced or removed meanwhile
                        continue
                    name = path.relative_to(self._folder.parent).as_posix()
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(content), int(status.st_mtime)
                    tar.addfile(info, io.BytesIO(content))
            temporary.replace(self._path)

    def _keep(self) -> None:
        while not self._ended.wait(self._every):
            self.write()

    def _files(self) -> Iterator[Path]:
        skipped = [self._folder / name for name in LEFT_OUT]
        for folder, folders, names in os.walk(self._folder):
            here = Path(folder)
            folders[:] = sorted(name for name in folders if here / name not in skipped)
            for name in sorted(names):
                if not name.startswith(".") and Path(name).suffix not in LARGE:
                    yield here / name
