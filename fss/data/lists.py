"""Where a data set's images and masks are: its folder, and the lists of its files."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fss.data.discovery import Names
from fss.files import read_text

_NAME_AND_CLASS = re.compile(r"(.+?)__(\d+)$")

# What a pickle of lists and names is made of: no instruction that imports or calls anything.
_PLAIN_OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_PLAIN_OPCODES |= {"GET", "BINGET", "LONG_BINGET", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
_PLAIN_OPCODES |= {"EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1"}
_PLAIN_OPCODES |= {"TUPLE2", "TUPLE3", "INT", "BININT", "BININT1", "BININT2", "LONG1"}
_PLAIN_OPCODES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"}
_PLAIN_OPCODES |= {"SHORT_BINUNICODE", "BINUNICODE8", "POP", "POP_MARK"}


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


class Listing(NamedTuple):
    """What a list names: pairs, each once, and the pair and class of each line that has a class."""

    pairs: list[Pair]
    classes: list[tuple[Pair, int]]


class _Line(NamedTuple):
    """An entry of a list: where it stands, its words, and a class if the list has classes."""

    place: str
    words: list[str]
    class_id: int | None


def find_folder(root: Path, places: Sequence[str], images: str, needed: Sequence[str]) -> Path:
    """Find the first of `places` below `root` (or `root` itself) that has the folder `images`.

    Raises:
        FileNotFoundError: no place has it, or the place lacks another of the `needed` folders.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist")
    folders = [root / place for place in (".", *places)]
    found = [folder for folder in folders if (folder / images).is_dir()]
    if not found:
        raise FileNotFoundError(
            f"{root}: expected {images}/ in it or in its folder {' or '.join(places)}; found in "
            f"it: {', '.join(sorted(path.name for path in root.iterdir())[:8]) or 'nothing'}"
        )
    missing = [name for name in needed if not (found[0] / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"the data set in {found[0]} is incomplete: {images}/ exists, "
            f"{', '.join(f'{name}/' for name in missing)} does not; `fss data prepare` makes it, "
            "or copy what is missing"
        )
    return found[0]


def read_lines(path: Path, what: str) -> dict[int, str]:
    """Read the lines of a text file that are not blank, by their number from 1.

    Raises:
        FileNotFoundError: no such file; `what` says what a line holds.
        ValueError: no line, or no text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list {path} does not exist; expected {what} per line")
    lines = enumerate(read_text(path).splitlines(), start=1)
    found = {number: line.strip() for number, line in lines if line.strip()}
    if not found:
        raise ValueError(f"{path}: expected {what} per line, the file is empty")
    return found


def read_list(path: Path, folder: Path, images: str, masks: str) -> Listing:
    """Read a list file, or all .txt and .pkl files of a folder of lists, as one.

    A line has `image mask`, one name, or `NAME__CLASS` (HSNet), which may name an image once per
    class. A pickle (HSNet's of COCO) has {class from 0: [images]}; it is read without executing
    what else a pickle may hold.

    Paths are relative to the data folder, with / or \\. Lists made elsewhere may begin with the
    path of another folder: as many leading parts are ignored as make the first image exist here. A
    name alone means the image of that name in `images`, with any ending if it has none, and
    `masks/NAME.png`. Names may differ from those of the files in their Unicode form and in case.

    Raises:
        FileNotFoundError: the list, or files that it names, are missing (counted).
        ValueError: a line of another form, no line, or an image listed twice.
    """
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in (".txt", ".pkl"))
        if not files:
            raise FileNotFoundError(f"{path}: expected lists in it, .txt or .pkl; found none")
    else:
        files = [path]
    finder = _Finder(folder, images, masks)
    pairs: dict[Path, Path] = {}
    classes: dict[tuple[Pair, int], None] = {}
    plain = 0
    for file in files:
        listed: set[tuple[Path, int | None]] = set()
        for line in _read_pickle(file) if _is_pickle(file) else finder.split(file):
            pair = finder.pair(line.words)
            if (pair.image, line.class_id) in listed:
                raise ValueError(f"{line.place}: {line.words[0]} is listed twice")
            listed.add((pair.image, line.class_id))
            pairs[pair.image] = pair.mask
            if line.class_id is None:
                plain += 1
            else:
                classes[pair, line.class_id] = None
    if plain and classes:
        raise ValueError(
            f"{path}: expected a class on every line (NAME__CLASS) or on none, got {plain} lines "
            f"without and {len(classes)} with one"
        )
    result = [Pair(*pair) for pair in pairs.items()]
    check_files(result, str(path))
    return Listing(result, list(classes))


def check_files(pairs: Sequence[Pair], origin: str) -> None:
    """Raise FileNotFoundError if images or masks are missing, with their number."""
    folders = {path.parent for pair in pairs for path in pair}
    present = {
        folder: {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        for folder in folders
    }
    for column in ("image", "mask"):
        paths = [getattr(pair, column) for pair in pairs]
        missing = [path for path in paths if path.name not in present[path.parent]]
        if missing:
            raise FileNotFoundError(
                f"{origin}: {len(missing)} of {len(pairs)} {column}s are missing, the first is "
                f"{missing[0]}; the data set is incomplete: copy them, or list only existing files"
            )


class _Finder:
    """Finds the image and the mask of a line of a list."""

    def __init__(self, folder: Path, images: str, masks: str) -> None:
        self.folder, self.images, self.masks = folder, images, masks
        self._names = Names(folder)
        self._pairs: dict[tuple[str, ...], Pair] = {}
        self._surplus: dict[int, int] = {}  # leading parts of each column that are not here

    def split(self, path: Path) -> Iterator[_Line]:
        """Yield the lines of a text file, each split into its words: names may have blanks."""
        for number, text in read_lines(path, "`image mask`").items():
            place = f"{path}, line {number}"
            words = [word.strip() for word in text.split("\t")]
            if len(words) == 1 and len(text.split()) > 1:
                words = text.split()
                if len(words) > 2 or not self._locate(0, words[0]):
                    words = self._split_blanks(text) or words
            if len(words) > 2:
                raise ValueError(f"{place}: expected `image mask`, got {text!r}")
            named = _NAME_AND_CLASS.match(words[0]) if len(words) == 1 else None
            if named and self._image(words[0]) is None:
                yield _Line(place, [named[1]], int(named[2]))
            else:
                yield _Line(place, words, None)

    def pair(self, words: list[str]) -> Pair:
        """Return the files of a line; those that are missing with the path where they should be."""
        key = tuple(words)  # HSNet's lists have a photo many times
        if key not in self._pairs:
            self._pairs[key] = self._new_pair(words)
        return self._pairs[key]

    def _new_pair(self, words: list[str]) -> Pair:
        if len(words) == 2:
            return Pair(*(self._find(column, word) for column, word in enumerate(words)))
        image = self._image(words[0])
        if image is None:
            parts = _parts(words[0])
            missing = parts if len(parts) > 1 else (self.images, f"{words[0]}.jpg")
            image = self.folder.joinpath(*missing)
        masks = self.masks
        if image.parent != self.folder / self.images:
            masks = f"{Path(self.masks).parent}/{image.parent.name}"
        mask = self._names.find(*Path(masks).parts, f"{image.stem}.png")
        return Pair(image, mask or self.folder / masks / f"{image.stem}.png")

    def _split_blanks(self, text: str) -> list[str] | None:
        """Split a line of names with blanks where that gives an image, None if nothing does."""
        named = _NAME_AND_CLASS.match(text)
        if self._image(text) is not None or (named and self._image(named[1]) is not None):
            return [text]
        for blank in re.finditer(r"\s+", text):
            if self._locate(0, text[: blank.start()]):
                return [text[: blank.start()], text[blank.end() :]]
        return None

    def _image(self, word: str) -> Path | None:
        """Find an image by its name alone, with or without folder and ending."""
        parts = _parts(word)
        starts = [parts[k:] for k in range(len(parts))]
        if len(parts) == 1:
            starts = [(*Path(self.images).parts, *parts)]
        for start in starts:
            found = self._names.find(*start) or self._names.find_stem(*start)
            if found is not None and found.is_file():
                return found
        return None

    def _find(self, column: int, word: str) -> Path:
        """Return the path of a column's file, also if it is missing."""
        parts = _parts(word)
        start = min(self._surplus.get(column, 0), len(parts) - 1)
        return self._locate(column, word) or self.folder.joinpath(*parts[start:])

    def _locate(self, column: int, word: str) -> Path | None:
        """Find the file of a column without the leading parts that do not exist here."""
        parts = _parts(word)
        if column in self._surplus:
            return self._names.find(*parts[min(self._surplus[column], len(parts) - 1) :])
        for k in range(len(parts)):
            found = self._names.find(*parts[k:])
            if found is not None and found.is_file():
                self._surplus[column] = k
                return found
        return None


def _parts(word: str) -> tuple[str, ...]:
    return PurePosixPath(word.replace("\\", "/")).parts


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or path.suffix == ".pkl"


def _read_pickle(path: Path) -> Iterator[_Line]:
    """Yield the images of a pickle {class from 0: [images]}, with their class from 1.

    Raises:
        ValueError: other content; nothing in the file is imported or called.
    """
    expected = "expected a pickle of image names by class from 0, as HSNet's of COCO"
    try:
        content = _load_plain(path.read_bytes())
    except Exception as error:  # of damaged pickles the reader raises whatever it meets
        raise ValueError(f"{path}: {expected}; {error}; write the names as text") from error
    if not isinstance(content, dict) or not any(content.values()):
        raise ValueError(f"{path}: {expected}, got a {type(content).__name__} without any")
    for class_id, names in content.items():
        fits = type(class_id) is int and class_id >= 0 and isinstance(names, (list, tuple))
        if not fits or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{path}: {expected}, got {_shortened(class_id, names)}")
    if sum(map(len, content.values())) > path.stat().st_size:  # one list, many times
        raise ValueError(f"{path}: {expected}, got more names than the file is long")
    for class_id, names in content.items():
        for name in names:
            yield _Line(f"{path}, class {class_id}", [name], class_id + 1)


def _shortened(class_id: object, names: object) -> str:
    """Return an entry as text: of values nested in each other, a whole one may be endless."""
    return f"{reprlib.repr(class_id):.40}: {reprlib.repr(names):.80}"


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers and text."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}, which is not read")


def _load_plain(content: bytes) -> Any:
    """Load a pickle of containers, numbers and text, after a look at its instructions.

    Raises:
        ValueError: an instruction that could do more, or one that takes more memory than the file
            is long.
    """
    known: set[int] = set()
    tuples: set[int] = set()
    last = ""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _PLAIN_OPCODES:
            raise ValueError(f"it has the instruction {opcode.name} {argument or ''}".rstrip())
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"it has the instruction {opcode.name} {argument}")
        if "GET" in opcode.name and int(argument) in tuples:
            # of tuples of one another, the hash takes time without end
            raise ValueError("it has a tuple twice")
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            key = len(known) if argument is None else int(argument)
            known.add(key)
            (tuples.add if "TUPLE" in last else tuples.discard)(key)
        else:
            last = opcode.name
    return _PlainUnpickler(io.BytesIO(content)).load()
