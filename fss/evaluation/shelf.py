"""Room for values that are used again, when it is known when."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class _Kept(NamedTuple, Generic[Value]):
    value: Value
    nbytes: int


class Shelf(Generic[Value]):
    """Keeps values for a known sequence of turns, up to a number of bytes.

    Where room is lacking, that value goes first which would take most of it: its bytes times the
    turns until it is used again (Belady's rule for values of unlike size). Nothing stays that is
    not used again.

    Args:
        capacity: bytes.
        turns: the keys that each turn uses.

    Attributes:
        nbytes: of all that is kept.
    """

    def __init__(self, capacity: int, turns: Sequence[Sequence[Hashable]]) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._turns = turns
        self._turn = 0
        self._uses: dict[Hashable, deque[int]] = {}
        for turn, keys in enumerate(turns):
            for key in dict.fromkeys(keys):
                self._uses.setdefault(key, deque()).append(turn)
        self._kept: dict[Hashable, _Kept[Value]] = {}

    def get(self, key: Hashable) -> Value | None:
        """The value of a key, None if it is not kept."""
        kept = self._kept.get(key)
        return None if kept is None else kept.value

    def advance(self, turns: int) -> None:
        """Ends that many turns, and drops what only they used."""
        ended = self._turns[self._turn : self._turn + turns]
        self._turn += turns
        for keys in ended:
            for key in keys:
                if key in self._kept and self._next_use(key) is None:
                    self._drop(key)

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Keeps a value of so many bytes, if it is used again and its place is worth it."""
        if self._next_use(key) is None:
            return
        if key in self._kept:
            self._drop(key)
        self._kept[key] = _Kept(value, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.capacity:
            self._drop(max(self._kept, key=self._rent))

    def _rent(self, key: Hashable) -> int:
        return self._kept[key].nbytes * (1 + self._uses[key][0] - self._turn)

    def _next_use(self, key: Hashable) -> int | None:
        uses = self._uses.get(key, deque())
        while uses and uses[0] < self._turn:
            uses.popleft()
        return uses[0] if uses else None

    def _drop(self, key: Hashable) -> None:
        self.nbytes -= self._kept.pop(key).nbytes
