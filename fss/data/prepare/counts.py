"""The published numbers of listed images, to verify a copy of a data set by."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from fss.data.episodes import counting_classes
from fss.data.source import Source


class Counts(NamedTuple):
    """Images of a published data set: in its lists (train, val), and listed in each fold."""

    files: tuple[int, int]
    test: tuple[int, ...]
    train_excluding_novel: tuple[int, ...]
    train: tuple[int, ...] | None = None


class Published(Source, Protocol):
    """A source whose numbers are published; `published` is None where a variant's are not."""

    published: Counts | None


class Verification(NamedTuple):
    """Lines to print, and whether all compared numbers are the published ones."""

    lines: list[str]
    passed: bool


def verify(source: Published) -> Verification:
    """Compare the images that each fold lists with the published numbers.

    A fold lists an image when one of its classes covers at least 2·32·32 pixels; with the † filter
    a training image that shows a novel class of any area is left out. Numbers of folds are
    compared only where the lists themselves have the published length.
    """
    published = source.published
    files = (len(source.indices("train")), len(source.indices("test")))
    lines = [f"training images {files[0]}, test images {files[1]}"]
    if published is None:
        return Verification([*lines, "no numbers are published for this variant"], True)
    if files != published.files:
        lines.append(
            f"published: {published.files[0]} and {published.files[1]}; as the lists differ, the "
            "numbers of the folds are not compared"
        )
        return Verification(lines, False)
    lines.append("listed images     fold  expected     got")
    passed = True
    rows: list[tuple[str, tuple[int, ...] | None, Literal["train", "test"], bool]] = [
        ("train", published.train, "train", False),
        ("train, † filter", published.train_excluding_novel, "train", True),
        ("test", published.test, "test", False),
    ]
    for title, expected, split, exclude_novel in rows:
        for fold, number in enumerate(expected or ()):
            got = _listed(source, fold, split, exclude_novel)
            passed &= got == number
            wrong = "" if got == number else f"  WRONG by {got - number:+d}"
            lines.append(f"{title:16}  {fold:4d}  {number:8d}  {got:6d}{wrong}")
    if not passed:
        lines.append(
            "the masks are not the published ones: a wrong class-id map moves the numbers of every "
            "fold by hundreds, other masks of the same classes by a few"
        )
    return Verification(lines, passed)


def _listed(source: Source, fold: int, split: Literal["train", "test"], exclude_novel: bool) -> int:
    novel = source.folds[fold]
    classes = novel if split == "test" else [c for c in source.class_names if c not in novel]
    return sum(
        bool(counting_classes(source, index, classes, 2 * 32 * 32))
        for index in source.indices(split)
        if not (exclude_novel and set(novel).intersection(source.class_areas(index)))
    )
