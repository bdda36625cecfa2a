"""Downloads that go on where they were cut."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_CHUNK = 1 << 20
_TRIES = 5
_WAIT = 2.0  # seconds before the second try, doubled before each further one
_TIMEOUT = 60.0


class Archive(NamedTuple):
    """A file to download: where it is, and the MD5 checksum of what it must be."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, folder: Path) -> Path:
    """Return the path of an archive in `folder`, downloaded unless it exists.

    It grows as `NAME.part` and gets its name once its checksum is right. A connection that breaks
    is taken up again where it broke, and so is a part left by an earlier run.

    Raises:
        ConnectionError: the server does not answer or keeps breaking off; run again to go on.
        ValueError: what was downloaded has another checksum; it is removed.
    """
    path = folder / archive.name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    wait = _WAIT
    for attempt in range(1, _TRIES + 1):
        before = part.stat().st_size if part.is_file() else 0
        try:
            _continue(archive, part, before)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _TRIES:
                raise ConnectionError(
                    f"{archive.url}: the server answers {error.code} {error.reason}; download "
                    f"{archive.name} elsewhere and give its folder as --archives"
                ) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and not isinstance(
                error, (urllib.error.URLError, ConnectionError, TimeoutError)
            ):
                raise  # the disk, not the network
            if attempt == _TRIES:
                raise ConnectionError(
                    f"{archive.url}: {error}; {_TRIES} tries, {_size(part)} bytes are kept in "
                    f"{part}: run again to go on, or download {archive.name} elsewhere and give "
                    "its folder as --archives"
                ) from error
        time.sleep(wait)
        wait *= 2
    try:
        check(part, archive)
    except ValueError:
        part.unlink()
        raise
    return part.rename(path)


def check(path: Path, archive: Archive) -> None:
    """Raise ValueError if a file does not have the checksum of its archive."""
    digest = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        tqdm(
            desc=f"checking {archive.name}",
            total=_size(path),
            unit="B",
            unit_scale=True,
            delay=2,
        ) as bar,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != archive.md5:
        raise ValueError(
            f"{path}: expected the MD5 checksum {archive.md5}, got {digest.hexdigest()} "
            f"({_size(path)} bytes): the file is damaged or another one; download it again"
        )


def _continue(archive: Archive, part: Path, start: int) -> None:
    """Append what is missing of an archive from byte `start` on."""
    request = urllib.request.Request(archive.url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return  # nothing is missing; the checksum tells whether there is too much
        raise
    with response:
        resumed = response.status == 206
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                desc=archive.name, total=total, initial=start, unit="B", unit_scale=True, delay=1
            ) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) < total:
        raise http.client.IncompleteRead(b"", total - _size(part))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
