"""Checks of settings against the types and the ranges that they have, and what to say."""

from __future__ import annotations

import functools
import math
import numbers
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal


def check_settings(config: Any, prefix: str = "") -> None:
    """Check that the fields of a dataclass have the types that it declares.

    Raises:
        ValueError: a value that is none of a fixed list.
        TypeError: a value of another type.
    """
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if not _is(value, hint):
            error = ValueError if _choices(hint) else TypeError
            raise error(misfit(prefix + name, hint, f"{value!r:.200}"))


def misfit(name: str, hint: Any, got: str) -> str:
    """Return the message of a setting whose value is not of its type `hint`."""
    expected = _in_words(hint)
    return f"{name}: expected {expected}{';' if ',' in expected else ','} got {got}"


hints = functools.cache(typing.get_type_hints)
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_WORDS |= {type(None): "null"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}


def _in_words(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if choices := _choices(hint):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if typing.get_origin(hint) is tuple:
        count = "a list of" if arguments[-1] is ... else str(len(arguments))
        return f"{count} {_PLURALS[arguments[0]]}"
    if arguments:
        return " or ".join(map(_in_words, arguments))
    return _WORDS.get(hint) or hint.__name__


def _choices(hint: Any) -> list[str]:
    """Return the texts of a Literal, [] for another type."""
    literal = typing.get_origin(hint) is Literal
    return [value for value in typing.get_args(hint) if literal and isinstance(value, str)]


def _is(value: object, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_is(item, arguments[0]) for item in value)
    if typing.get_origin(hint) is Literal:
        return value in arguments
    if arguments:
        return any(_is(value, argument) for argument in arguments)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_at_least(name: str, value: float, lowest: int) -> None:
    if not (value >= lowest and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number from {lowest} on, got {value}")


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a number above 0, got {value}")


def check_side(name: str, size: int) -> None:
    """Check the side of a network's square input."""
    if size < 9 or (size - 1) % 8:
        lower = max(9, (size - 1) // 8 * 8 + 1)
        raise ValueError(
            f"{name}: expected a multiple of 8 plus 1 pixels, so that maps at output stride 8 "
            f"align with the image; got {size}, the nearest are {lower} and {lower + 8}"
        )


def check_scale(name: str, scale: Sequence[float]) -> None:
    """Check the range of a random scale."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(
            f"{name}: expected two factors, smallest first, above 0; got {list(scale)}"
        )


def check_rotation(name: str, degrees: float) -> None:
    """Check the largest angle of a random rotation."""
    if not 0 <= degrees <= 180:
        raise ValueError(f"{name}: expected 0 to 180 degrees, got {degrees}")


_EPOCHS = re.compile(r"(\d+(?:\.\d+)?|\.\d+) epochs?")


def check_steps(name: str, every: int | str) -> None:
    """Check a number of steps, or of epochs as a text: "2 epochs", "0.5 epochs"."""
    if isinstance(every, int):
        check_at_least(name, every, 0)
        return
    number = _EPOCHS.fullmatch(every)
    if number is None or float(number[1]) <= 0:
        raise ValueError(
            f'{name}: expected a number of steps, or of epochs like "2 epochs"; got {every!r}'
        )


def count_steps(every: int | str, images: int, batch_size: int) -> int:
    """Return how many steps `every` is, see `check_steps`; at least 1 where it is in epochs.

    Args:
        every: steps, or a text like "2 epochs".
        images: photos of an epoch.
        batch_size: photos of a step; an incomplete last batch is left out, as published.
    """
    if isinstance(every, int):
        return every
    return max(1, round(float(every.split()[0]) * (images // batch_size)))
