"""`fss data prepare` and `fss data verify`: data sets from their published archives.

Each step makes one folder or file, completely or not at all, and is skipped if that exists: an
interrupted command goes on when started again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from fss.data import coco, pascal
from fss.data.prepare.annotations import Annotated, draw_coco, read_coco, read_sbd, require
from fss.data.prepare.archives import complete_folder, members, unpack
from fss.data.prepare.counts import Verification, verify
from fss.data.prepare.download import Archive, check, fetch
from fss.files import atomic_write

VOC = Archive(
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "6cd6e144f989b92b3379bac3b3de84fd",
)
SBD = Archive(
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz",
    "82b4d87ceb2ed10f6038a1cba92111cb",
)
COCO_IMAGES = {
    "train2014": Archive(
        "http://images.cocodataset.org/zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88"
    ),
    "val2014": Archive(
        "http://images.cocodataset.org/zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3"
    ),
}
COCO_JSON = Archive(
    "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
    "0a379cfc70b0e71301e0f377548639bd",
)


def prepare(
    name: Literal["pascal", "coco"], root: str, archives: str | None = None
) -> Verification:
    """Make Pascal-5i or COCO-20i from the published archives and verify it.

    Args:
        name: "pascal" (VOC 2012 and SBD, 3.4 GB) or "coco" (COCO 2014, 20 GB).
        root: folder that gets VOCdevkit2012/VOC2012 or MSCOCO2014.
        archives: folder of archives, which are not downloaded again; by default `downloads` in the
            root.

    Returns what `verify_data` does.

    Raises:
        ImportError: a package that the conversion needs is missing.
        ConnectionError: an archive cannot be downloaded; run again to go on.
        ValueError: an archive with another checksum, or with other content than expected.
    """
    folder = Path(root).expanduser()
    downloads = Path(archives).expanduser() if archives else folder / "downloads"
    if archives and not downloads.is_dir():
        raise FileNotFoundError(f"archives: expected a folder, {downloads} is none")
    get = partial(_get, downloads, archives is not None)
    if name == "pascal":
        _prepare_pascal(folder / "VOCdevkit2012/VOC2012", get)
    elif name == "coco":
        _prepare_coco(folder / "MSCOCO2014", get)
    else:
        raise ValueError(f"name: expected pascal or coco, got {name!r}")
    return verify_data(name, root)


def verify_data(
    name: Literal["pascal", "coco"],
    root: str,
    train_list: str | None = None,
    val_list: str | None = None,
) -> Verification:
    """Check a data set's files and class ids, and compare its counts with the published ones.

    Args:
        name: "pascal" or "coco".
        root: folder of the data set.
        train_list: file with `image mask` per line, together with `val_list`.
        val_list: as `train_list`, of the test images.

    Returns the lines to print and whether the numbers are the published ones.

    Raises:
        FileNotFoundError: a folder or files are missing.
        ValueError: unreadable files or wrong class ids.
    """
    if name not in ("pascal", "coco"):
        raise ValueError(f"name: expected pascal or coco, got {name!r}")
    if name == "pascal":
        return verify(pascal.PascalSource(root, train_list, val_list))
    return verify(coco.CocoSource(root, "fwb", train_list, val_list))


def _get(folder: Path, given: bool, archive: Archive) -> Path:
    """Get an archive, checked once: a given one now, a downloaded one when it was complete."""
    path = folder / archive.name
    if given and path.is_file():
        check(path, archive)
        return path
    return fetch(archive, folder)


def _prepare_pascal(folder: Path, get: Callable[[Archive], Path]) -> None:
    masks = folder / pascal.MASKS
    convert = not masks.is_dir()
    parts = [pascal.IMAGES]
    if convert:
        require("scipy.io", "scipy")
        parts.append("SegmentationClass")
    if not (folder / pascal.LISTS / "val.txt").is_file():
        parts.append("ImageSets")
    if any(not (folder / part).is_dir() for part in parts):
        archive = get(VOC)
        for part in parts:
            unpack(archive, f"VOCdevkit/VOC2012/{part}", folder / part)
    if convert:
        archive = get(SBD)
        with complete_folder(masks) as made:
            for member in members(archive, "benchmark_RELEASE/dataset/cls"):
                target = made / f"{member.path.stem}.png"
                if member.path.suffix == ".mat" and not target.is_file():
                    _write_mask(target, read_sbd(member.file.read(), member.path.name))
            # Where both have a mask VOC's is the finer one, and marks boundaries as ignored.
            sources = sorted((folder / "SegmentationClass").glob("*.png"))
            for path in tqdm(sources, "masks of VOC", unit="mask", delay=2):
                with Image.open(path) as file:
                    _write_mask(made / path.name, np.array(file))
    lists = folder / pascal.LISTS
    if not (lists / "val.txt").is_file():
        lists.mkdir(parents=True, exist_ok=True)
        train, val = pascal.build_lists(folder, {path.stem for path in masks.glob("*.png")})
        for name, images in (("train", train), ("val", val)):
            with atomic_write(lists / f"{name}.txt") as file:
                for image in images:
                    line = f"{pascal.IMAGES}/{image}.jpg {pascal.MASKS}/{image}.png\n"
                    file.write(line.encode())


def _prepare_coco(folder: Path, get: Callable[[Archive], Path]) -> None:
    missing = [split for split in coco.SPLITS if not (folder / coco.MASKS / split).is_dir()]
    if missing:
        require("pycocotools.mask", "pycocotools")
    for split in coco.SPLITS:
        if not (folder / split).is_dir():
            unpack(get(COCO_IMAGES[split]), split, folder / split)
    for split in missing:
        _convert_json(get(COCO_JSON), split, folder / coco.MASKS / split)


def _convert_json(archive: Path, split: str, folder: Path) -> None:
    """Draw the masks of all annotated images of a split."""
    wanted = f"instances_{split}.json"
    text = b""
    for member in members(archive, "annotations"):
        if member.path.name == wanted:
            text = member.file.read()
    if not text:
        raise ValueError(f"{archive} has no {wanted}: it is another archive")
    images = read_coco(text, f"{archive}, {wanted}")
    with complete_folder(folder) as made:
        targets = {made / f"{Path(image.file).stem}.png": image for image in images}
        jobs = [(path, image) for path, image in targets.items() if not path.is_file()]
        try:
            with ProcessPoolExecutor(initializer=_end_with_parent) as pool:
                done = pool.map(_draw, jobs, chunksize=16)
                for _ in tqdm(done, f"masks of {split}", len(jobs), unit="mask", delay=2):
                    pass
        except ValueError as error:
            raise ValueError(f"{archive}, {wanted}: {error}") from error


def _end_with_parent() -> None:
    """End this process when its parent is gone: kill -9 gives that no time to do so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _draw(job: tuple[Path, Annotated]) -> None:
    path, image = job
    _write_mask(path, draw_coco(image))


def _write_mask(path: Path, mask: np.ndarray) -> None:
    """Write class ids as an 8-bit PNG; a kill leaves the complete file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(mask.astype(np.uint8)).save(temporary, format="PNG")
    temporary.rename(path)
