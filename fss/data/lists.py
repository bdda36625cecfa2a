"""Where a data set's images and masks are: its folder, and the lists of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fss.files import read_text


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


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


def read_list(path: Path, folder: Path, images: str, masks: str) -> list[Pair]:
    """Read the pairs of a list file, with `image mask` or one name per line.

    Paths are relative to the data folder. Lists made elsewhere may begin with the path of another
    folder: as many leading parts are ignored as make the first line's image exist here. A name
    without its ending means `images/NAME.jpg` and `masks/NAME.png`.

    Raises:
        FileNotFoundError: the list, or files that it names, are missing (counted).
        ValueError: a line of another form, no line, or an image listed twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list {path} does not exist")
    pairs: dict[Path, Path] = {}
    surplus: dict[int, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) == 1:
            words = [f"{images}/{words[0]}.jpg", f"{masks}/{words[0]}.png"]
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: expected `image mask`, got {line.strip()!r}")
        files = []
        for column, word in enumerate(words):
            parts = Path(word).parts
            if column not in surplus:
                surplus[column] = _surplus(parts, folder)
            files.append(folder.joinpath(*parts[min(surplus[column], len(parts) - 1) :]))
        if files[0] in pairs:
            raise ValueError(f"{path}, line {number}: {words[0]} is listed twice")
        pairs[files[0]] = files[1]
    if not pairs:
        raise ValueError(f"{path}: expected `image mask` per line, the file is empty")
    result = [Pair(*pair) for pair in pairs.items()]
    check_files(result, str(path))
    return result


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


def _surplus(parts: tuple[str, ...], folder: Path) -> int:
    """Count the leading parts of a path to remove so that it exists in the folder."""
    present = (k for k in range(len(parts)) if folder.joinpath(*parts[k:]).is_file())
    return next(present, 0)
