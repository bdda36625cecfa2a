"""COCO-20i: the 80 object classes of COCO 2014, in four folds of twenty."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from fss.config import Folds
from fss.data.file_source import ListedSource
from fss.data.lists import Listing, Pair, check_files, find_folder, read_list
from fss.data.masks import open_classes
from fss.data.prepare.counts import Counts

MASKS = "annotations"
SPLITS = ("train2014", "val2014")

CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)

# Class ids of the json, 1 to 90 with gaps, in the order of the contiguous ids.
JSON_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
JSON_IDS = tuple(c for c in range(1, 91) if c not in JSON_GAPS)

# Images of which one class covers more than three times what any other does: a mask that shows
# another one most was made with another class-id map.
_LARGEST = {
    "COCO_train2014_000000000110": 1,
    "COCO_train2014_000000000073": 4,
    "COCO_train2014_000000000081": 5,
    "COCO_train2014_000000000471": 6,
    "COCO_train2014_000000000349": 7,
    "COCO_train2014_000000000400": 9,
    "COCO_train2014_000000000143": 15,
    "COCO_train2014_000000000042": 17,
    "COCO_train2014_000000000263": 21,
    "COCO_train2014_000000000502": 22,
    "COCO_train2014_000000000034": 23,
    "COCO_train2014_000000000072": 24,
    "COCO_train2014_000000000201": 32,
    "COCO_train2014_000000000332": 46,
    "COCO_train2014_000000000194": 54,
    "COCO_train2014_000000000438": 55,
    "COCO_train2014_000000000133": 60,
    "COCO_train2014_000000000387": 64,
    "COCO_train2014_000000000208": 72,
    "COCO_train2014_000000000078": 75,
    "COCO_train2014_000000000491": 78,
    "COCO_val2014_000000007386": 4,
    "COCO_val2014_000000001584": 6,
    "COCO_val2014_000000005992": 19,
    "COCO_val2014_000000000285": 22,
    "COCO_val2014_000000001818": 23,
    "COCO_val2014_000000007784": 34,
    "COCO_val2014_000000006012": 47,
    "COCO_val2014_000000007991": 52,
    "COCO_val2014_000000005503": 62,
    "COCO_val2014_000000000776": 78,
}


class CocoSource(ListedSource):
    """COCO-20i, where PFENet, BAM or HSNet keep it.

        MSCOCO2014/ or COCO2014/, or the folder itself
            train2014/*.jpg                 val2014/*.jpg
            annotations/train2014/*.png     annotations/val2014/*.png

    Masks have the contiguous class ids 1 to 80, 0 background, 255 ignored. Without lists, every
    mask's image is used: the images with an annotation, 82081 and 40137 of them. The test images
    are those of val2014.

    Args:
        root: the folder.
        folds: novel classes of fold k: "fwb" k + 1, k + 5, … (FWB, PFENet, BAM, HSNet), "panet"
            20k + 1 to 20k + 20.
        train_list, val_list: files with `image mask` per line, or HSNet's lists, or folders of
            such files; both or none.
        skip_unreadable: leave out images that cannot be used, and warn; by default an error.

    Raises:
        FileNotFoundError: no such folder, or files are missing.
        ValueError: a bad list, an unreadable file, a mask of another size than its image, or
            masks with other class ids.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        folds: Folds = "fwb",
        train_list: str | os.PathLike[str] | None = None,
        val_list: str | os.PathLike[str] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.skip_unreadable = skip_unreadable
        if folds not in ("fwb", "panet"):
            raise ValueError(f"folds: expected fwb or panet, got {folds!r}")
        needed = (SPLITS[1], *(f"{MASKS}/{split}" for split in SPLITS))
        places = ("MSCOCO2014", "COCO2014")
        self.root = find_folder(Path(root).expanduser(), places, SPLITS[0], needed)
        self.class_names = dict(enumerate(CLASSES, start=1))
        starts = (
            range(k + 1, 81, 4) if folds == "fwb" else range(20 * k + 1, 20 * k + 21)
            for k in range(4)
        )
        self.folds = tuple(tuple(start) for start in starts)
        self.published = _PUBLISHED if folds == "fwb" else None
        if bool(train_list) != bool(val_list):
            raise ValueError("train_list, val_list: expected both or none, got one")
        train, val = (
            read_list(Path(path), self.root, split, f"{MASKS}/{split}")
            if path
            else Listing(self._masked(split), [])
            for split, path in zip(SPLITS, (train_list, val_list), strict=True)
        )
        self._take_splits(train, val)
        self._check_class_ids(
            "the json's ids have gaps and run to 90: write its classes in order as 1 to 80"
        )
        self._check_class_map()

    def _open_mask(self, path: Path) -> Image.Image:
        return open_classes(path, ignored_alone=True)  # of a photo that shows only a crowd

    def _masked(self, split: str) -> list[Pair]:
        images, masks = self.root / split, self.root / MASKS / split
        names = sorted(path.name[:-4] for path in masks.iterdir() if path.name.endswith(".png"))
        if not names:
            raise FileNotFoundError(
                f"{masks} has no .png mask; `fss data prepare coco` makes them from the json"
            )
        pairs = [Pair(images / f"{name}.jpg", masks / f"{name}.png") for name in names]
        if not {f"{name}.jpg" for name in names} <= {path.name for path in images.iterdir()}:
            check_files(pairs, str(masks))
        return pairs

    def _check_class_map(self) -> None:
        known = wrong = 0
        example = ""
        for index in range(len(self)):
            expected = _LARGEST.get(self.name(index))
            areas = self.class_areas(index)
            if expected is None or not areas:
                continue
            known += 1
            largest = max(areas, key=areas.__getitem__)
            if largest != expected:
                wrong += 1
                example = example or (
                    f"{self._masks[index]} shows mostly {self.class_names[largest]} ({largest}), "
                    f"the image {self.class_names[expected]} ({expected})"
                )
        if wrong:
            raise ValueError(
                f"wrong class ids in {wrong} of {known} known masks: {example}. Classes are 1 to "
                "80 in the order of the json's ids; with another map a model trained elsewhere "
                "scores far too low (about 39 mIoU with BAM's weights). Make the masks again: `fss "
                "data prepare coco`"
            )


_PUBLISHED = Counts(
    files=(82081, 40137),
    train_excluding_novel=(21917, 41809, 43045, 44614),
    test=(26052, 15305, 13138, 12640),
)
