"""Which files of a folder are photos, and how their names are compared."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from fss.data.images import ENDINGS

MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Of masks, in any case: formats that keep class ids as they are."""

MASK_WORDS = "masks?|matte|seg|segm|segmentation|labels?|labelids|labeltrainids|gt|groundtruth|anno"
"""What tools call masks, in names of files and folders, as a regular expression."""

MASK_FOLDER = re.compile(rf"(?:^|[ _.-])(?:{MASK_WORDS}|annotations?)$", re.IGNORECASE)
"""Names of folders of masks."""

_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_NAMED = 10


def list_files(folder: Path, endings: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """List the files of a folder with one of the endings, and what else is in it, by name.

    Files that a system makes for itself are in neither: hidden ones, Thumbs.db, desktop.ini.
    """
    taken: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES:
            continue
        fits = path.suffix.lower() in endings and not path.is_dir()
        (taken if fits else others).append(path)
    return taken, others


def warn_left_out(root: Path, taken: int, reasons: dict[str, Sequence[Path | str]]) -> None:
    """Warn of the files of a data set that are left out, by reason; of none, say nothing."""
    count = sum(map(len, reasons.values()))
    if not count:
        return
    parts = [f"{reason}: {name_some(files, root)}" for reason, files in reasons.items() if files]
    warnings.warn(
        f"{root}: {taken} photos are taken, {count} files are left out. {'. '.join(parts)}",
        stacklevel=2,
    )


def name_some(files: Sequence[Path | str], root: Path) -> str:
    """Name up to ten files, relative to a folder, and say how many there are."""
    names = [str(f.relative_to(root)) if isinstance(f, Path) else f for f in files[:_NAMED]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def same_name(name: str) -> str:
    """Return a name in the one of its Unicode forms that all comparisons use (NFC)."""
    return unicodedata.normalize("NFC", name)


def fold_name(name: str) -> str:
    """Return what the spellings of a name have in common: Unicode forms, upper and lower case."""
    return same_name(same_name(name).casefold())


class Names:
    """The names in a folder and those below it, each folder read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[tuple[str, ...], Path | None] = {}
        self._names: dict[Path, tuple[set[str], dict[str, list[str]], dict[str, list[str]]]] = {}

    def find(self, *parts: str) -> Path | None:
        """Find a path below the root: as it is written, or else the only one spelled alike."""
        folder = self._folder(parts[:-1])
        if folder is None:
            return None
        exact, alike, _ = self._read(folder)
        if parts[-1] in exact:
            return folder / parts[-1]
        found = alike.get(fold_name(parts[-1]), [])
        return folder / found[0] if len(found) == 1 else None

    def find_stem(self, *parts: str) -> Path | None:
        """Find a picture by its path without ending; of several, the first `ENDINGS`."""
        folder = self._folder(parts[:-1])
        if folder is None:
            return None
        found = self._read(folder)[2].get(fold_name(parts[-1]), [])
        order = sorted(found, key=lambda name: ENDINGS.index(Path(name).suffix.lower()))
        return folder / order[0] if order else None

    def _folder(self, parts: tuple[str, ...]) -> Path | None:
        if parts not in self._folders:
            path = self.root.joinpath(*parts)
            found = path if path.is_dir() else self.find(*parts) if parts else None
            self._folders[parts] = found if found is not None and found.is_dir() else None
        return self._folders[parts]

    def _read(self, folder: Path) -> tuple[set[str], dict[str, list[str]], dict[str, list[str]]]:
        if folder not in self._names:
            exact = {path.name for path in folder.iterdir()}
            alike: dict[str, list[str]] = {}
            stems: dict[str, list[str]] = {}
            for name in sorted(exact):
                alike.setdefault(fold_name(name), []).append(name)
                if Path(name).suffix.lower() in ENDINGS:
                    stems.setdefault(fold_name(Path(name).stem), []).append(name)
            self._names[folder] = exact, alike, stems
        return self._names[folder]
