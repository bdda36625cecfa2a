"""FSS-1000: a thousand classes of ten images, each with one object class.

Li et al., "FSS-1000: A 1000-Class Dataset for Few-Shot Segmentation", CVPR 2020.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fss.data.file_source import ListedSource
from fss.data.images import check_sizes, read_picture
from fss.data.lists import Pair, check_files
from fss.data.masks import open_object
from fss.data.source import IGNORE, Mask
from fss.files import read_text


class Fss1000Source(ListedSource):
    """Folders of classes: FSS-1000, or any data set of one object class per image.

        FSS-1000/, or the folder itself
            CLASS/*.jpg     the images
            CLASS/*.png     their masks, not black where the class is: see `open_object`

    Class ids go from 1 on in the order of the names of all folders, without 255, so masks are
    uint16. There is one fold, whose novel classes are those of `test_list`; images of base classes
    are training images and images of novel classes test images. Classes of neither list, FSS-1000's
    own validation classes say, are left out.

    Args:
        root: the folder.
        train_list, test_list: files with a class name per line (HSNet's `trn.txt`, `test.txt`).

    Raises:
        FileNotFoundError: the folder, a list or a mask is missing, or a class of a list.
        ValueError: a class in both lists or none in one, an unreadable file, or a mask of
            another size than its image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train_list: str | os.PathLike[str],
        test_list: str | os.PathLike[str],
    ) -> None:
        folder = Path(root).expanduser()
        self.root = folder / "FSS-1000" if (folder / "FSS-1000").is_dir() else folder
        if not self.root.is_dir():
            raise FileNotFoundError(f"data folder {self.root} does not exist")
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        ids = [c for c in range(1, len(names) + 2) if c != IGNORE]
        known = dict(zip(names, ids, strict=False))
        train, test = (
            _read_names(Path(path), known, self.root) for path in (train_list, test_list)
        )
        both = sorted(set(train) & set(test))
        if both:
            raise ValueError(
                f"{test_list}: {len(both)} classes, {both[0]!r} first, are in {train_list} too"
            )
        self.class_names = {known[name]: name for name in sorted({*train, *test})}
        self.folds = (tuple(sorted(known[name] for name in test)),)
        self._ids: list[int] = []
        splits: list[list[Pair]] = []
        for classes in (train, test):
            pairs: list[Pair] = []
            for name in classes:
                images = sorted((self.root / name).glob("*.jpg"))
                pairs += [Pair(path, path.with_suffix(".png")) for path in images]
                self._ids += [known[name]] * len(images)
            check_files(pairs, str(self.root))
            splits.append(pairs)
        self._take_splits(*splits)

    def name(self, index: int) -> str:
        return f"{self._images[index].parent.name}/{self._images[index].stem}"

    def class_areas(self, index: int) -> dict[int, int]:
        area = self._records[index].areas.get(1)
        return {self._ids[index]: area} if area else {}

    def load(self, index: int) -> tuple[NDArray[np.uint8], Mask]:
        image = read_picture(self._images[index])
        mask = np.array(self._open_mask(self._masks[index]), dtype=np.uint16)
        check_sizes(self._images[index], image.shape[:2], self._masks[index], mask.shape)
        return image, mask * np.uint16(self._ids[index])

    def _open_mask(self, path: Path) -> Image.Image:
        return open_object(path)


def _read_names(path: Path, known: dict[str, int], root: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"list {path} does not exist; expected a class name per line")
    names = sorted({line.strip() for line in read_text(path).splitlines() if line.strip()})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise FileNotFoundError(
            f"{path}: {len(unknown)} of {len(names)} classes have no folder in {root}, the first "
            f"is {unknown[0]!r}; the data set is incomplete"
        )
    if not names:
        raise ValueError(f"{path}: expected a class name per line, the file is empty")
    return names
