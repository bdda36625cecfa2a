"""Damaged and hostile variants of valid files, from a seed."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator


@dataclass(frozen=True)
class Seed:
    """A valid file: what of it is mutated, and how the rest, checksums say, is put around it."""

    payload: bytes
    pack: Callable[[bytes], bytes] = bytes
    text: bool = False


def variant(rng: Rng, seeds: list[Seed]) -> bytes:
    """A file with one to four mutations of one of the seeds; now and then the valid file itself."""
    seed = seeds[rng.integers(len(seeds))]
    other = seeds[rng.integers(len(seeds))].payload
    payload = seed.payload
    ways = _TEXT + _BYTES[:4] if seed.text else _BYTES
    for _ in range(rng.integers(0, 5) if rng.random() < 0.9 else rng.integers(5, 30)):
        payload = ways[rng.integers(len(ways))](rng, payload, other)
    return seed.pack(payload)


def _at(rng: Rng, data: bytes) -> int:
    """A place, half of the time in the first 64 bytes, where headers are."""
    end = min(len(data), 64) if rng.random() < 0.5 else len(data)
    return int(rng.integers(end + 1))


def _flip(rng: Rng, data: bytes, other: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        place = _at(rng, data)
        if place < len(found):
            found[place] ^= 1 << int(rng.integers(8))
    return bytes(found)


def _truncate(rng: Rng, data: bytes, other: bytes) -> bytes:
    return data[: _at(rng, data)]


def _delete(rng: Rng, data: bytes, other: bytes) -> bytes:
    start = _at(rng, data)
    return data[:start] + data[start + int(rng.integers(1, 40)) :]


def _splice(rng: Rng, data: bytes, other: bytes) -> bytes:
    """A piece of another file, in the place of as many bytes or between them."""
    start, first = _at(rng, data), _at(rng, other)
    piece = other[first : first + int(rng.integers(1, 200))]
    end = start + (len(piece) if rng.random() < 0.5 else 0)
    return data[:start] + piece + data[end:]


def _noise(rng: Rng, data: bytes, other: bytes) -> bytes:
    start = _at(rng, data)
    return data[:start] + rng.bytes(int(rng.integers(1, 64))) + data[start:]


def _repeat(rng: Rng, data: bytes, other: bytes) -> bytes:
    start = _at(rng, data)
    end = start + int(rng.integers(1, 300))
    return data[:end] + data[start:end] * int(rng.integers(1, 20)) + data[end:]


_EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def _giant(rng: Rng, data: bytes, other: bytes) -> bytes:
    """An extreme integer, as a header has its sizes."""
    code = "BHIQ"[rng.integers(4)]
    order = "<>"[rng.integers(2)]
    value = _EXTREMES[rng.integers(len(_EXTREMES))] % 2 ** (8 * struct.calcsize(code))
    piece, start = struct.pack(order + code, value), _at(rng, data)
    return data[:start] + piece + data[start + len(piece) :]


_WORDS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"nan", b".inf", b"99999999999999999999",
    b"1000000000", b"2147483648", b"-0.5", b'""', b"''", b"[]", b"{}", b"[1, [2]]", b'{"a": 1}',
    b"~", b"!!python/object/apply:os.abort []", b"!!binary x", b"&a [*a]", b"*a", b"<<: *a",
    b"\x00", b"\xff\xfe", "\u2028ẞ".encode(), b"\t", b"\r\n", b"- ", b": ", b",", b'"', b"..",
    b"../" * 30 + b"etc/hosts", b"/", b"[" * 3000, b"{" * 3000, b'{"a":' * 2000, b"x" * 5000,
    b"1_000", b"0x1f", b"0o17", b"2001-01-01", b"%YAML 9.9\n---\n", b"---\n", b"...\n", b"#",
)  # fmt: skip


def _word(rng: Rng, data: bytes, other: bytes) -> bytes:
    """A word in the place of a value, or between two."""
    word = _WORDS[rng.integers(len(_WORDS))]
    values = [match.span() for match in re.finditer(rb'"[^"\n]*"|[\w.+-]+', data)]
    if not values or rng.random() < 0.2:
        start = end = _at(rng, data)
    else:
        start, end = values[rng.integers(len(values))]
    return data[:start] + word + data[end:]


def _line(rng: Rng, data: bytes, other: bytes) -> bytes:
    """A line left out, doubled, moved, indented, or one of another file."""
    lines = data.split(b"\n")
    i, j = (int(rng.integers(len(lines))) for _ in range(2))
    way = rng.integers(5)
    if way == 0:
        del lines[i]
    elif way == 1:
        lines.insert(j, lines[i])
    elif way == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif way == 3:
        lines[i] = b"  " + lines[i]
    else:
        found = other.split(b"\n")
        lines[i] = found[rng.integers(len(found))]
    return b"\n".join(lines)


def _swap_values(rng: Rng, data: bytes, other: bytes) -> bytes:
    """A value in the place of another one."""
    values = [match.span() for match in re.finditer(rb'"[^"\n]*"|[\w.+-]+', data)]
    if len(values) < 2:
        return data
    (a, b), (c, d) = (values[rng.integers(len(values))] for _ in range(2))
    return data[:a] + data[c:d] + data[b:]


_BYTES = [_flip, _truncate, _delete, _splice, _noise, _repeat, _giant, _giant]
_TEXT = [_word, _word, _line, _swap_values]


def png(data: bytes) -> Seed:
    """A PNG whose chunks get right checksums: mutations reach what decodes them."""
    return Seed(data, _with_checksums)


def _with_checksums(data: bytes) -> bytes:
    found, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        checksum = struct.pack(">I", zlib.crc32(body))
        found += data[place : place + 4] + body + checksum
        place += 12 + length
    return found + data[place:]


def pixels(data: bytes) -> Seed:
    """A PNG with one chunk of pixels, of which the filtered rows are mutated."""
    start = data.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", data[start : start + 4])

    def pack(rows: bytes) -> bytes:
        body = b"IDAT" + zlib.compress(rows)
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        return data[:start] + chunk + data[start + 12 + length :]

    return Seed(zlib.decompress(data[start + 8 : start + 8 + length]), pack)


def header(data: bytes) -> Seed:
    """A safetensors file of which the header is mutated; its length is that of the result."""
    (length,) = struct.unpack("<Q", data[:8])

    def pack(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return Seed(data[8 : 8 + length], pack, text=True)


def zipped(data: bytes, member: str, text: bool = False) -> Seed:
    """A .zip (or what torch.save writes) of which one member is mutated, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as content:
        parts = {entry.filename: content.read(entry) for entry in content.infolist()}
    (name,) = (name for name in parts if name.endswith(member))

    def pack(payload: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as content:
            for other, part in parts.items():
                content.writestr(other, payload if other == name else part)
        return stream.getvalue()

    return Seed(parts[name], pack, text)


def tarred(name: str, payload: bytes, mode: str = "w:gz") -> Seed:
    """A .tar of one file, which is mutated."""

    def pack(data: bytes) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=mode) as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        return stream.getvalue()

    return Seed(payload, pack)


def text(content: str | dict) -> Seed:
    """Lines, YAML, or JSON of a dict."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1)
    return Seed(content.encode(), text=True)
