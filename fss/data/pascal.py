"""Pascal-5i: Pascal VOC 2012 with the masks of SBD, in four folds of five classes.

Shaban et al., "One-Shot Learning for Semantic Segmentation", BMVC 2017; lists as PFENet and BAM.
"""

from __future__ import annotations

import os
from pathlib import Path

from fss.data.file_source import ListedSource
from fss.data.lists import Listing, Pair, check_files, find_folder, read_lines, read_list
from fss.data.prepare.counts import Counts

IMAGES = "JPEGImages"
MASKS = "SegmentationClassAug"
LISTS = "ImageSets/SegmentationClassAug"

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


class PascalSource(ListedSource):
    """Pascal-5i, where PFENet, BAM or HSNet keep it.

        VOCdevkit2012/VOC2012/ or VOC2012/, or the folder itself
            JPEGImages/*.jpg
            SegmentationClassAug/*.png      classes 1 to 20, 0 background, 255 ignored

    The lists are those given, else `ImageSets/SegmentationClassAug/{train,val}.txt`, which
    `fss data prepare` writes, else made from the lists of VOC: see `build_lists`. The test images
    are VOC's validation images. Fold k's novel classes are 5k + 1 to 5k + 5.

    Args:
        root: the folder.
        train_list, val_list: files with `image mask` per line, or HSNet's lists, or folders of
            such files; both or none.
        skip_unreadable: leave out images that cannot be used, and warn; by default an error.

    Raises:
        FileNotFoundError: no such folder, or files are missing.
        ValueError: a bad list, an unreadable file, a mask that has not the size of its image, or
            class ids above 20.
    """

    published: Counts | None = Counts(
        files=(5953, 1449),
        train=(4760, 4588, 4097, 5108),
        train_excluding_novel=(4208, 3726, 2752, 4510),
        test=(364, 445, 592, 336),
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        train_list: str | os.PathLike[str] | None = None,
        val_list: str | os.PathLike[str] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.skip_unreadable = skip_unreadable
        places = ("VOCdevkit2012/VOC2012", "VOCdevkit/VOC2012", "VOC2012")
        self.root = find_folder(Path(root).expanduser(), places, IMAGES, (MASKS,))
        self.class_names = dict(enumerate(CLASSES, start=1))
        self.folds = tuple(tuple(range(5 * k + 1, 5 * k + 6)) for k in range(4))
        self._take_splits(*self._lists(train_list, val_list))
        self._check_class_ids("a mask of Pascal VOC has the ids 1 to 20")

    def _lists(
        self,
        train_list: str | os.PathLike[str] | None,
        val_list: str | os.PathLike[str] | None,
    ) -> tuple[Listing, Listing]:
        paths = [self.root / LISTS / f"{name}.txt" for name in ("train", "val")]
        if train_list or val_list:
            if not (train_list and val_list):
                raise ValueError("train_list, val_list: expected both or none, got one")
            paths = [Path(train_list), Path(val_list)]
        elif not any(path.is_file() for path in paths):
            masks = {path.stem for path in (self.root / MASKS).glob("*.png")}
            names = build_lists(self.root, masks)
            pairs = [
                [
                    Pair(self.root / IMAGES / f"{name}.jpg", self.root / MASKS / f"{name}.png")
                    for name in split
                ]
                for split in names
            ]
            for split in pairs:
                check_files(split, f"the lists of VOC in {self.root}")
            return Listing(pairs[0], []), Listing(pairs[1], [])
        train, val = (read_list(path, self.root, IMAGES, MASKS) for path in paths)
        return train, val


def build_lists(folder: Path, masks: set[str]) -> tuple[list[str], list[str]]:
    """List the training and validation images, from VOC's lists and the names with a mask.

    Training: the images of VOC's detection training set (`ImageSets/Main/train.txt`) with a mask
    (SBD's `train_noval`, 5623 images, is SBD's share of that set), then the rest of VOC's
    segmentation training set. With the masks of SBD these are PFENet's 5953 images.

    Raises:
        FileNotFoundError: a list of VOC is missing.
    """
    names = []
    for part in ("Main/train.txt", "Segmentation/train.txt", "Segmentation/val.txt"):
        path = folder / "ImageSets" / part
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so the training images cannot be listed; copy VOC's "
                "ImageSets/, or give data.train_list and data.val_list"
            )
        names.append([line.split()[0] for line in read_lines(path, "an image name").values()])
    detection, train, val = names
    held_out = set(val)
    merged = [name for name in sorted(detection) if name in masks and name not in held_out]
    known = set(merged)
    return merged + [name for name in train if name not in known], val
