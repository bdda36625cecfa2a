"""Files written completely or not at all; text, JSON and YAML read with errors for users."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_VALUES = 100_000  # of a YAML file: aliases make many of few bytes, or one that holds itself


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that replaces `path` when the block ends without an error.

    Until then an earlier file stays as it was; after an error nothing of the new one is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: Path, name: str) -> None:
    """Check that a file can be written, before the work whose result it is for.

    Args:
        path: of the file; an earlier one stays as it is, and no folder is made.
        name: of the argument, for the error.

    Raises:
        ValueError: it cannot.
    """
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, {path} is a folder")
    trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"{name}: {path} cannot be written ({error.strerror}); give another place"
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def causes(
    error: BaseException | None, outer: BaseException | None = None
) -> Iterator[BaseException]:
    """Yield the error, its cause or context, the cause of that, and so on, up to `outer`.

    What was being handled when the work began that then failed is no cause of its failure.
    """
    while error is not None and error is not outer:
        yield error
        error = error.__cause__ or error.__context__


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: bytes that are not UTF-8, or text in UTF-16.
    """
    content = path.read_bytes()
    if content.startswith(_UTF_16) or b"\0" in content:
        raise ValueError(
            f"{path}: expected text in UTF-8, got UTF-16 or no text at all; save it as UTF-8"
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8, got the byte {error.object[error.start]:#x} at "
            f"{error.start}; is it the right file?"
        ) from error


def parse_json(text: str | bytes, name: object) -> Any:
    """Parse JSON text; errors call its file `name`.

    Raises:
        ValueError: not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got something else ({error})") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file into plain types.

    Raises:
        ValueError: not YAML, or aliases that stand for more than 100 000 values.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from error
    except ValueError as error:  # of a date or a number
        raise ValueError(f"{path}: expected YAML ({error})") from error
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > _VALUES:
            raise ValueError(f"{path}: expected at most {_VALUES} values, aliases give more")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
    return content
