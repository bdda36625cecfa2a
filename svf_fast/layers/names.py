"""Names of modules as the user knows them: without the wrappers around a model or within it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import NamedTuple

from torch import nn

# torch.compile, activation checkpoints, FSDP, Fabric; their children have no other name
_INSIDE_WRAPPERS = {
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "_original_module",
}


def plain_names(model: nn.Module) -> dict[str, str]:
    """Map the name of each module to its name without wrappers.

    A child called ``module`` is a wrapped one if it has no siblings: of DataParallel,
    DistributedDataParallel, AveragedModel and the averages of timm.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: dict[str, str] = {}
    for name in modules:
        parent, _, own = name.rpartition(".")
        wrapped = own == "module" and len(modules[parent]._modules) == 1
        if wrapped or own in _INSIDE_WRAPPERS:
            plain[name] = plain[parent]
        else:
            plain[name] = f"{plain[parent]}.{own}".lstrip(".") if name else ""
    return plain


def within(layers: Sequence[str] | None) -> Callable[[str], bool]:
    """Return a test whether what has a name lies in one of `layers`: names, or with ``*``."""
    patterns = ["*"] if layers is None else list(layers)

    def lies_within(name: str) -> bool:
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)

    return lies_within


class Place(NamedTuple):
    """Where names of one model are in another: one prefix is removed, another added."""

    remove: str
    add: str

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.remove)


def places(names: Collection[str], there: Collection[str], exact: bool) -> Iterator[Place]:
    """Yield how `names` can be those of layers `there`, all of them if ``exact``.

    A model can be part of a larger one, here or there. Without a change first, then with one prefix
    changed, then with both.
    """
    parents = [name.split(".")[:-1] for name in names]
    columns = zip(*parents, strict=False)  # as far as the shortest name goes
    shared = [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, columns)]
    first = next(iter(names))
    found: set[Place] = set()
    for end in range(len(shared) + 1):
        remove = "".join(f"{part}." for part in shared[:end])
        rest = first.removeprefix(remove)
        ending = (name for name in there if f".{name}".endswith(f".{rest}"))
        found.update(Place(remove, name.removesuffix(rest)) for name in ending)
    expected = {*there}
    for place in sorted(found, key=lambda place: (bool(place.remove and place.add), place)):
        placed = {place(name) for name in names}
        if placed == expected if exact else placed <= expected:
            yield place
