"""Segmentation of files and folders of pictures: the command `fss predict`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fss.data.images import ENDINGS, OTHER_ENDINGS
from fss.files import atomic_write, check_writable
from fss.segment.pictures import MaskLike, read_picture
from fss.segment.segmenter import Device, FewShotSegmenter, Segmentation
from fss.segment.tuning import Tuning, TuningSettings
from fss.segment.views import SCENES

KINDS = ("mask", "probability", "overlay")
"""What is written of each query."""


def predict_files(
    queries: Sequence[str],
    supports: Sequence[tuple[str, str]],
    out: str,
    run: str | None = None,
    backbone: str | None = None,
    weights: str | None = None,
    size: int | None = None,
    checkpoint: Literal["best", "last"] = "best",
    adapter: str | None = None,
    mask_value: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 8,
    overwrite: bool = False,
    device: Device = "auto",
    tune: int | None = None,
    tune_what: str = "svf",
    tune_lr: float | None = None,
    save_adapter: str | None = None,
) -> str:
    """Segment pictures and write three PNG files of each, of its size, into a folder.

    NAME.mask.png is 255 where the object is, else 0; NAME.probability.png is 255 times the
    probability; NAME.overlay.png is the picture with the mask. NAME is the picture's path in the
    folder that was asked for, without its ending; where two would be the same, the ending is kept,
    or the path goes on from the folder that all queries share. Results are upright, as viewers show
    the picture, whatever its EXIF orientation says.

    Args:
        queries: files, and folders, of which all pictures are taken, also those deeper down.
        supports: a picture and its mask: a file, a box "x0,y0,x1,y1" or a polygon
            "x,y x,y x,y …", pixels from the top left; may be repeated.
        out: folder of the results.
        run: folder of `fss train`, or a checkpoint in it; without one, features of a pretrained
            backbone are matched, by default of the small embedded one.
        backbone: without a run: its name; by default what the weights tell.
        weights: without a run: file of a pretrained backbone.
        size: without a run: longer side of the network's input, pixels.
        checkpoint: of the run, "best" or "last".
        adapter: file of singular values of the backbone, as runs leave it.
        mask_value: which value of the masks is the object, where they have several: a class id or
            gray as in 15, or a color (red,green,blue) as in 128,0,0.
        threshold: probability above which a pixel belongs to the object.
        batch_size: pictures at a time.
        overwrite: replace earlier results.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        tune: first tune the backbone on the supports, in at most so many steps (20 are usual); the
            values that are best on views that are not trained on are kept. Some of the queries
            serve as backgrounds. It starts from the adapter, if one is given. Ctrl-C ends the
            tuning, not the command, which segments with the best so far.
        tune_what: what is tuned: svf (singular values), svf_scale, batch_norm, bias, scale_output,
            scale_input, rotated_scale, adapter, full or layer4.
        tune_lr: learning rate; by default one for each of these.
        save_adapter: write what was tuned to this file, for --adapter (svf and svf_scale).

    Returns two lines: what was done, and in which conventions the masks were read; after tuning a
    third: the IoU on held-out views before and after.

    Raises:
        FileNotFoundError: no such query, support or run.
        FileExistsError: a result is there already.
        ValueError: pictures that cannot be read, or an adapter that cannot be written, named;
            results of the others are written.
    """
    paths = find_pictures(queries, Path(out))
    names = _names(queries, paths)
    results = {path: Path(out) / name for path, name in zip(paths, names, strict=True)}
    if not overwrite:
        _refuse_to_overwrite(list(results.values()))
    if not supports:
        raise ValueError("support: expected at least one picture with its mask, got none")
    with _named_as_here():
        _check_tuning(tune, tune_what, tune_lr, save_adapter, overwrite)
    check_writable(_files(next(iter(results.values())))[0], "out")
    if run is None:
        segmenter = FewShotSegmenter(backbone, weights, None, size, adapter, threshold, device)
    else:
        if (backbone, weights, size) != (None, None, None):
            raise ValueError("backbone, weights, size: a run brings its own, omit them")
        segmenter = FewShotSegmenter.load(run, checkpoint, adapter, threshold, device)
    images, masks = zip(*supports, strict=True)
    segmenter.support(list(images), [parse_mask(mask) for mask in masks], mask_value)
    told, failed = "", ""
    if tune is not None:
        unlabeled = _some_readable(paths)
        try:
            with _named_as_here():
                tuning = segmenter.tune(tune, tune_lr, tune_what, unlabeled=unlabeled)
        except KeyboardInterrupt:
            told = "\nnot tuned: stopped by ctrl-C before the first step"
        else:
            told, failed = _saved(tuning, save_adapter)
    errors = _predict(segmenter, results, batch_size)
    if errors:
        left = f"are left out, results of the others are in {out}"
        if len(errors) == len(paths):
            left = "nothing is segmented"
        count = f"{len(errors)} of {len(paths)} pictures"
        failed += f"\n{count} cannot be read and {left}:\n  "
        failed += "\n  ".join(errors)
    if failed:
        raise ValueError(f"{failed}{told}".strip())
    count = f"{len(paths)} pictures" if len(paths) > 1 else "1 picture"
    read = "; ".join(dict.fromkeys(segmenter.conventions))
    return (
        f"{count} segmented: {out} has of each .mask.png, .probability.png and .overlay.png\n"
        f"support masks read as: {read}{told}"
    )


def _saved(tuning: Tuning, file: str | None) -> tuple[str, str]:
    """Write what was tuned to a file, if there is one; return what to tell, and what failed."""
    told = f"\n{tuning}"
    if file is None or tuning.adapter is None:
        return told, ""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        tuning.adapter.save(file)
    except OSError as error:  # the pictures are segmented nevertheless
        return told, f"save_adapter: {file} cannot be written, {error}"
    return f"{told}; saved to {file}", ""


def _check_tuning(
    steps: int | None, what: str, lr: float | None, save_adapter: str | None, overwrite: bool
) -> None:
    """Check what there is to check before anything is loaded."""
    if steps is None:
        given = {"tune_what": what != "svf", "tune_lr": lr is not None}
        given["save_adapter"] = save_adapter is not None
        if names := [name for name, is_given in given.items() if is_given]:
            raise ValueError(
                f"{', '.join(names)}: expected with --tune STEPS, which is missing: nothing is "
                "tuned without it"
            )
        return
    settings = TuningSettings(steps, lr, what)
    if save_adapter is not None and not settings.leaves_adapter:
        raise ValueError(
            f"save_adapter: expected svf or svf_scale to be tuned, got tune_what {what}: an "
            "adapter holds singular values alone"
        )
    if save_adapter is not None:
        check_writable(Path(save_adapter), "save_adapter")
    if save_adapter is not None and Path(save_adapter).exists() and not overwrite:
        raise FileExistsError(
            f"save_adapter: {save_adapter} is there already; give another file, or --overwrite to "
            "replace it and earlier results"
        )


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Call the arguments of `FewShotSegmenter.tune` in errors as they are called here."""
    names = {"steps": "tune", "lr": "tune_lr", "what": "tune_what"}
    try:
        yield
    except (ValueError, TypeError) as error:
        name, _, said = str(error).partition(":")
        if name not in names:
            raise
        said = said.replace(", or a RegimeConfig", "")
        raise type(error)(f"{names[name]}:{said}") from error


def _some_readable(paths: Sequence[Path]) -> list[NDArray[np.uint8]]:
    """Read as many pictures as tuning uses, drawn from all; those that cannot be read are left."""
    found: list[NDArray[np.uint8]] = []
    for number in np.random.default_rng(0).permutation(len(paths)):
        try:
            found.append(read_picture(paths[number]))
        except (ValueError, OSError):
            continue  # it is named when its turn comes
        if len(found) == SCENES:
            break
    return found


def find_pictures(queries: Sequence[str], out: Path) -> list[Path]:
    """List the pictures that files and folders stand for, each once, without those in `out`.

    Pictures of formats that cannot be read here are among them: reading names them.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without a picture.
    """
    found: dict[Path, Path] = {}
    for query in queries:
        path = Path(query).expanduser()
        files = [path]
        if path.is_dir():
            files = [each for each in sorted(path.rglob("*")) if _is_picture(each, path, out)]
            if not files:
                raise FileNotFoundError(
                    f"query: expected pictures ({', '.join(ENDINGS)}) in {path}, found none"
                )
        elif not path.is_file():
            raise FileNotFoundError(f"query: expected a file or a folder at {path}, found none")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise ValueError("query: expected files or folders of pictures, got none")
    return list(found.values())


def parse_mask(text: str) -> MaskLike:
    """Parse a mask from the command line: an existing file, "x0,y0,x1,y1", or "x,y x,y x,y …".

    Raises:
        ValueError: numbers that are neither a box nor a polygon.
    """
    if Path(text).expanduser().is_file() or not re.fullmatch(r"[-+\d.eE, ]+", text):
        return text
    try:
        points = [tuple(float(number) for number in part.split(",")) for part in text.split()]
    except ValueError:
        points = []
    if len(points) == 1 and len(points[0]) == 4:
        return points[0]
    if len(points) >= 3 and all(len(point) == 2 for point in points):
        return points  # type: ignore[return-value]
    raise ValueError(
        'support: expected a mask file, a box "x0,y0,x1,y1" or a polygon "x,y x,y x,y …" of at '
        f"least three points, got {text!r}"
    )


def _is_picture(path: Path, folder: Path, out: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    result = out.resolve() in path.resolve().parents and out.resolve() != folder.resolve()
    written = path.name.endswith(tuple(f".{kind}.png" for kind in KINDS))
    picture = path.suffix.lower() in (*ENDINGS, *OTHER_ENDINGS) and path.is_file()
    return picture and not hidden and not result and not written


def _names(queries: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Name the results of each picture, no two the same."""
    folders = [Path(query).expanduser() for query in queries if Path(query).expanduser().is_dir()]

    def inside(path: Path) -> Path:
        own = next((folder for folder in folders if folder in path.parents), path.parent)
        return path.relative_to(own)

    common = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    short, shared = [inside(p) for p in paths], [p.resolve().relative_to(common) for p in paths]
    choices: list[list[Path]] = [
        [path.with_suffix("") for path in short],
        short,
        [path.with_suffix("") for path in shared],
    ]
    # upper and lower case are the same file on some systems
    unique = (c for c in choices if len({str(path).lower() for path in c}) == len(paths))
    return [str(path) for path in next(unique, shared)]


def _files(result: Path) -> list[Path]:
    return [result.with_name(f"{result.name}.{kind}.png") for kind in KINDS]


def _refuse_to_overwrite(results: Sequence[Path]) -> None:
    there = [file for result in results for file in _files(result) if file.exists()]
    if there:
        raise FileExistsError(
            f"out: {there[0]} is there already ({len(there)} results are); give another folder, or "
            "--overwrite to replace them"
        )


def _predict(segmenter: FewShotSegmenter, results: dict[Path, Path], batch_size: int) -> list[str]:
    """Write the results of each picture; return the errors of those that cannot be read."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    errors: list[str] = []
    waiting: list[tuple[Path, NDArray[np.uint8]]] = []

    def segment() -> None:
        found = segmenter([pixels for _, pixels in waiting], batch_size)
        for (result, _), segmentation in zip(waiting, found, strict=True):
            _write(segmentation, result)
        waiting.clear()

    for path, result in tqdm(results.items(), "predict", unit="picture", delay=2):
        try:
            waiting.append((result, read_picture(path)))
        except (ValueError, OSError) as error:
            errors.append(str(error))
        if len(waiting) == batch_size:
            segment()
    if waiting:
        segment()
    return errors


def _write(segmentation: Segmentation, result: Path) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    mask = segmentation.mask.astype(np.uint8) * np.uint8(255)
    probability = np.rint(segmentation.probability * 255).astype(np.uint8)
    images = (Image.fromarray(mask), Image.fromarray(probability), segmentation.overlay())
    for path, image in zip(_files(result), images, strict=True):
        with atomic_write(path) as file:
            image.save(file, format="PNG")
