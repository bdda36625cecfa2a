"""Unpacking of archives into folders that are either complete or not there."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
_DAMAGED += (UnicodeDecodeError, IndexError)


class MemberFile:
    """Reads a file of an archive."""

    def __init__(self, file: BinaryIO, archive: Path) -> None:
        self._file, self._archive = file, archive

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, by default all.

        Raises:
            ValueError: a damaged archive.
        """
        try:
            return self._file.read(size)
        except _DAMAGED as error:
            raise _damaged(self._archive, error) from error


class Member(NamedTuple):
    """A file of an archive: its path below the folder asked for, its bytes, and a reader."""

    path: PurePosixPath
    size: int
    file: MemberFile


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when the block ends without an error.

    What an earlier run left in it is still there, so that it need not be made again.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(folder)


def unpack(archive: Path, inside: str, folder: Path) -> None:
    """Unpack the folder `inside` of an archive as `folder`, unless it is there.

    Raises:
        ValueError: a damaged archive, or one without the folder.
    """
    if folder.is_dir():
        return
    with complete_folder(folder) as partial:
        for member in members(archive, inside):
            path = partial / member.path
            if path.is_file() and path.stat().st_size == member.size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                while chunk := member.file.read(1 << 20):
                    file.write(chunk)


def members(archive: Path, inside: str) -> Iterator[Member]:
    """Yield the files below the folder `inside` of a .zip or .tar archive, in its order.

    Raises:
        ValueError: a damaged archive, one without the folder, or a path that leads out of it.
    """
    found = 0
    files = _zip(archive) if archive.suffix == ".zip" else _tar(archive)
    bar = tqdm(files, f"unpacking {archive.name}", unit="file", delay=2)
    try:
        for name, size, open_file in bar:
            path = PurePosixPath(name)
            if not path.is_relative_to(inside):
                continue
            path = path.relative_to(inside)
            if ".." in path.parts:
                raise ValueError(f"{archive}: {name} leads out of the archive")
            found += 1
            with open_file() as file:
                yield Member(path, size, MemberFile(file, archive))
    except _DAMAGED as error:
        raise _damaged(archive, error) from error
    if not found:
        raise ValueError(f"{archive} has no folder {inside}: it is another archive")


def _damaged(archive: Path, error: Exception) -> ValueError:
    return ValueError(f"{archive} is damaged ({error}); download it again")


def _tar(archive: Path):
    with tarfile.open(archive, "r:*") as tar:
        for entry in tar:
            if entry.isfile():
                yield entry.name, entry.size, lambda entry=entry: tar.extractfile(entry)


def _zip(archive: Path):
    with zipfile.ZipFile(archive) as content:
        for entry in content.infolist():
            if not entry.is_dir():
                yield entry.filename, entry.file_size, lambda entry=entry: content.open(entry)
