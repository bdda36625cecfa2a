"""What reads files that users bring, each with valid ones and a test of what it makes of others.

A reader takes a path. It returns when the file means something and was understood so, asserts that,
and otherwise raises what the command line prints as one line.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import svf_fast
from fss.cli import build_parser
from fss.config import TrainConfig
from fss.data import FolderSource, pascal
from fss.data.coco import CLASSES, JSON_IDS
from fss.data.fss1000 import _read_names
from fss.data.images import read_picture
from fss.data.imports.outlines import draw, read_outlines
from fss.data.lists import read_list
from fss.data.masks import open_classes
from fss.data.prepare import datasets as prepare
from fss.data.prepare.annotations import read_sbd
from fss.data.prepare.archives import members
from fss.data.scan import inspect
from fss.models.backbone import build_backbone
from fss.models.official import load_official
from fss.models.pspnet import PSPNet
from fss.models.weights import load_backbone
from fss.runs.checkpoint import load_checkpoint, save_checkpoint
from fss.runs.log import read_log
from fss.settings import read_settings
from tests.robustness.mutations import Seed, header, pixels, png, tarred, text, zipped

YAML = """
data: {source: shapes, size: 33, min_area: 0.01, workers: 0, scale: [0.9, 1.1]}
model: {backbone: resnet18, width: 4, weights: none, channels: 8}
regime:
  name: svf
  layers: [layer3, layer4]
optimizer: {lr: 0.01, momentum: 0.9}
steps: 3
batch_size: 2
test_seeds: [1, 2]
feature_cache: 0.5
precision: 32-true
devices: 1
out: runs/x
"""


@dataclass(frozen=True)
class Reader:
    """`share` is how many inputs of a run of a hundred it gets, `suffix` the ending of the file."""

    name: str
    suffix: str
    share: int
    seeds: list[Seed]
    read: Callable[[Path], object]


def readers(folder: Path) -> list[Reader]:
    """All of them; `folder` gets the valid files around the one that is read."""
    found = [*_pictures(folder), *_lists(folder), *_settings(), *_weights(folder)]
    return [*found, *_checkpoints(folder), *_annotations(folder), *_own_pictures()]


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _photo(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def _mask(mode: str = "L") -> Image.Image:
    ids = np.zeros((20, 30), dtype=np.uint8)
    ids[4:12, 5:20], ids[0] = 2, 255
    image = Image.frombytes(mode, (30, 20), ids.tobytes())
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    return image


def _photos() -> list[Seed]:
    turned = Image.Exif()
    turned[0x112] = 6
    jpegs = [_encoded(_photo(), "JPEG"), _encoded(_photo("L"), "JPEG", progressive=True)]
    jpegs.append(_encoded(_photo(), "JPEG", exif=turned.tobytes()))
    pngs = [_encoded(_photo(), "PNG"), _encoded(_photo("RGBA"), "PNG", exif=turned.tobytes())]
    others = [_encoded(_photo("P"), "GIF"), _encoded(_photo(), "WEBP"), _encoded(_photo(), "BMP")]
    others.append(_encoded(_photo(), "TIFF"))
    return [*map(Seed, jpegs), *map(png, pngs), pixels(pngs[0]), *map(Seed, others)]


def _masks() -> list[Seed]:
    files = [_encoded(_mask(), "PNG"), _encoded(_mask("P"), "PNG")]
    return [*map(Seed, files), *map(png, files), *map(pixels, files), Seed(_photos()[0].payload)]


def _pictures(folder: Path) -> list[Reader]:
    _photo().save(folder / "whole.jpg")
    _mask().save(folder / "whole.png")

    def photo(path: Path) -> None:
        found = read_picture(path)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        with Image.open(path) as file:
            assert sorted(found.shape[:2]) == sorted(file.size)

    def mask(path: Path) -> None:
        found = np.array(open_classes(path))
        assert found.dtype == np.uint8 and found.ndim == 2
        with Image.open(path) as file:
            assert found.shape == (file.height, file.width)

    def record(path: Path, image: bool) -> None:
        pair = (path, folder / "whole.png") if image else (folder / "whole.jpg", path)
        found = inspect(*pair, open_classes)
        assert found.size in ((20, 30), (30, 20)) and sum(found.areas.values()) <= 600
        if not image:
            ids, areas = np.unique(np.array(open_classes(path)), return_counts=True)
            counted = {int(c): int(a) for c, a in zip(ids, areas, strict=True) if 0 < c < 255}
            assert found.areas == counted

    return [
        Reader("photo", ".jpg", 12, _photos(), photo),
        Reader("mask", ".png", 10, _masks(), mask),
        Reader("scanned photo", ".jpg", 3, _photos(), partial(record, image=True)),
        Reader("scanned mask", ".png", 3, _masks(), partial(record, image=False)),
    ]


def _lists(folder: Path) -> list[Reader]:
    root = folder / "data"
    stems = [f"p{i}" for i in range(8)]
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for stem in stems:
        _photo().save(root / f"JPEGImages/{stem}.jpg")
        _mask().save(root / f"SegmentationClass/{stem}.png")
    names = {"1": "cat", "2": "dog", "3": "hen", "4": "cow"}
    classes = {"classes": names, "folds": [[1, 2], [3], [4]]}

    def write(path: str, content: bytes) -> None:
        (root / path).write_bytes(content)

    def pairs(path: Path) -> None:
        found = read_list(path, root, "JPEGImages", "SegmentationClass")
        assert all(path.exists() for pair in found.pairs for path in pair)
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(found.pairs) == len({pair.image for pair in found.pairs}) == len(lines)

    def source() -> FolderSource:
        found = FolderSource(root)
        assert found.class_names and all(0 < c < 255 for c in found.class_names)
        assert all(set(fold) <= set(found.class_names) and fold for fold in found.folds)
        assert set(found.indices("train")) | set(found.indices("test")) == set(range(len(found)))
        return found

    def class_list(path: Path) -> None:
        write("classes.json", path.read_bytes())
        found = source()
        stored = json.loads(path.read_text())["classes"]
        stored = stored.values() if isinstance(stored, dict) else stored
        assert sorted(found.class_names.values()) == sorted(map(str, stored))

    def stems_of(path: Path) -> None:
        write("classes.json", json.dumps(classes).encode())
        write("ImageSets/Segmentation/train.txt", path.read_bytes())
        write("ImageSets/Segmentation/val.txt", b"p7\n")
        try:
            assert {source().name(i) for i in source().indices("train")} <= set(stems)
        finally:
            for name in ("train", "val"):
                (root / f"ImageSets/Segmentation/{name}.txt").unlink()

    def folders(path: Path) -> None:
        known = {"abacus": 1, "ab wheel": 2, "übung": 3}
        assert set(_read_names(path, known, root)) <= set(known)

    def voc(path: Path) -> None:
        for part in ("Main/train", "Segmentation/train", "Segmentation/val"):
            write(f"ImageSets/{part}.txt", b"p1\np2\n" if "train" in part else path.read_bytes())
        try:
            train, val = pascal.build_lists(root, {"p1", "p2"})
            assert set(train) <= {"p1", "p2"} and all(isinstance(name, str) for name in val)
        finally:
            for name in ("train", "val"):
                (root / f"ImageSets/Segmentation/{name}.txt").unlink()

    def pickled(path: Path) -> None:
        found = read_list(path, root, "JPEGImages", "SegmentationClass")
        assert {pair for pair, _ in found.classes} == set(found.pairs)
        assert all(path.exists() for pair in found.pairs for path in pair)
        assert all(type(class_id) is int and class_id > 0 for _, class_id in found.classes)

    def outlines(path: Path) -> None:
        found = read_outlines(root / "JPEGImages", path)
        labels = {name: k for k, name in enumerate(found.classes, start=1)}
        assert found.photos and all(photo.path.stem in stems for photo in found.photos)
        for photo in found.photos:
            mask = draw(photo, labels, (20, 30))
            assert mask.shape == (photo.size or (20, 30)) and mask.max() <= len(labels)

    named = {0: ["JPEGImages/p1.jpg", "p2"], 3: ["p1.jpg"], 4: []}
    pickles = [Seed(pickle.dumps(named, protocol)) for protocol in (2, 3, 5)]
    square = [2.0, 3.0, 9.5, 3.0, 9.5, 8.0, 2.0, 8.0]
    coco = {
        "images": [{"id": 7, "file_name": "p1.jpg", "height": 20, "width": 30}],
        "categories": [{"id": 0, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 4, "segmentation": [square]},
            {"image_id": 7, "category_id": 0, "segmentation": {"size": [20, 30], "counts": [600]}},
        ],
    }
    polygon = {"label": "cat", "points": [[1, 1], [9, 1], [5, 8.5]], "shape_type": "polygon"}
    circle = {"label": "dog", "points": [[12, 10], [15, 10]], "shape_type": "circle"}
    labelme = {"imagePath": "p2.jpg", "imageHeight": 20, "imageWidth": 30}
    labelme |= {"shapes": [polygon, circle]}

    whole = "".join(f"JPEGImages/{s}.jpg SegmentationClass/{s}.png\n" for s in stems)
    moved = "".join(f"/x/y/JPEGImages/{s}.jpg\tSegmentationClass/{s}.png\n" for s in stems)
    return [
        Reader("list", ".txt", 8, [text(whole), text(moved), text("\n".join(stems))], pairs),
        Reader("list of HSNet", ".pkl", 3, pickles, pickled),
        Reader("annotations to import", ".json", 4, [text(coco), text(labelme)], outlines),
        Reader("class list", ".json", 4, [text(classes), text({"classes": ["a"] * 4})], class_list),
        Reader("list of VOC", ".txt", 3, [text("\n".join(stems))], stems_of),
        Reader("list of FSS-1000", ".txt", 2, [text("abacus\nab wheel\nübung\n")], folders),
        Reader("list of Pascal-5i", ".txt", 2, [text("p1\np7 1\n")], voc),
    ]


def _settings() -> list[Reader]:
    parser = build_parser()
    seeds = [text(YAML), text(json.dumps(yaml.safe_load(YAML), indent=1))]

    def command_line(path: Path) -> None:
        settings = parser.instantiate(parser.parse_args(["train", "--config", str(path)]))
        options = vars(settings["train"])
        for name in ("resume", "overwrite", "debug", "config"):
            options.pop(name)
        again(TrainConfig(**options))

    def again(config: TrainConfig) -> None:
        values = config.to_dict()
        assert TrainConfig.from_dict(copy.deepcopy(values)).to_dict() == values
        numbers = (config.optimizer.lr, config.foreground_weight, config.data.min_area)
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert json.loads(json.dumps(values, allow_nan=False)) == values

    def mapping(path: Path) -> None:
        assert isinstance(read_settings(path), dict)

    log = "step,loss,lr,backbone_lr\n1,0.7,0.1,\n2,0.6,0.1,nan\n"

    def table(path: Path) -> None:
        found = read_log(path)
        assert all(isinstance(value, float) for column in found.values() for value in column)

    return [
        Reader("configuration", ".yaml", 4, seeds, command_line),
        Reader("settings of a table", ".yaml", 3, seeds, mapping),
        Reader("log", ".csv", 2, [text(log)], table),
    ]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Linear(5, 7))


def _torch_file(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _torch_seeds(content: object) -> list[Seed]:
    data = _torch_file(content)
    old = io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False)
    return [Seed(data), zipped(data, "data.pkl"), zipped(data, "data.pkl"), Seed(old.getvalue())]


def _weights(folder: Path) -> list[Reader]:
    backbone = build_backbone("resnet18", width=4)
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    save_file(state, folder / "backbone.safetensors", {"stride": "conv2"})
    weights = (folder / "backbone.safetensors").read_bytes()
    torch.manual_seed(0)
    pspnet = PSPNet(build_backbone("resnet18", width=4), 3)
    whole = {f"module.{key}": value for key, value in _as_official(pspnet).items()}

    def all_or_nothing(load: Callable[[nn.Module], object], module: nn.Module) -> None:
        """A file that does not fit leaves the module as it was; one that does, sets all of it."""
        kept = {key: value.clone() for key, value in module.state_dict().items()}
        try:
            load(module)
        except BaseException:
            now = module.state_dict()
            assert all(torch.equal(kept[key], now[key]) for key in kept), "changed by an error"
            raise
        finally:
            module.load_state_dict(kept)
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        assert shapes == {key: value.shape for key, value in kept.items()}

    def adapter(core: str, weight: int) -> Reader:
        model = svf_fast.convert(_network(), None, progress=False, core=core)
        svf_fast.save_adapter(model, folder / "adapter.safetensors")
        data = (folder / "adapter.safetensors").read_bytes()
        before = copy.deepcopy(model.state_dict())
        trained = ("S", "off_diagonal", "core_A", "core_B")

        def adapt(path: Path) -> None:
            all_or_nothing(lambda m: svf_fast.load_adapter(m, path), model)
            frozen = {k: v for k, v in model.state_dict().items() if not k.endswith(trained)}
            assert all(torch.equal(before[key], value) for key, value in frozen.items())

        name = "adapter" if core == "diag" else f"adapter with {core}"
        return Reader(name, ".safetensors", weight, [Seed(data), header(data)], adapt)

    return [
        adapter("diag", 6),
        adapter("band:1", 2),
        adapter("lowrank:2", 2),
        Reader(
            "backbone",
            ".safetensors",
            5,
            [Seed(weights), header(weights), header(weights)],
            lambda path: all_or_nothing(lambda m: load_backbone(m, str(path)), backbone),
        ),
        Reader(
            "backbone of torch",
            ".pth",
            6,
            _torch_seeds({"state_dict": dict(state)}),
            lambda path: all_or_nothing(lambda m: load_backbone(m, str(path)), backbone),
        ),
        Reader(
            "official",
            ".pth",
            4,
            _torch_seeds(whole),
            lambda path: all_or_nothing(lambda m: load_official(m, str(path)), pspnet),
        ),
    ]


def _as_official(model: nn.Module) -> dict[str, torch.Tensor]:
    from fss.models.official import official_keys

    names = official_keys(model)
    return {names[key]: value for key, value in model.state_dict().items()}


def _checkpoints(folder: Path) -> list[Reader]:
    config = TrainConfig.from_dict(yaml.safe_load(YAML))
    model = {"a.weight": torch.rand(3, 4), "a.S": torch.rand(3)}
    path = folder / "whole.pt"
    save_checkpoint(path, config, {"step": 3, "best": None, "model": model})
    data = path.read_bytes()
    seeds = [Seed(data), *[zipped(data, "data.pkl")] * 3]

    def checkpoint(path: Path) -> None:
        content = load_checkpoint(path, config)
        assert content["format"] == 1 and isinstance(content["config"], dict)
        assert isinstance(content["model"], dict)

    return [Reader("checkpoint", ".pt", 8, seeds, checkpoint), *_runs(folder)]


def _runs(folder: Path) -> list[Reader]:
    """A whole run's checkpoint, as `fss predict` loads it; where there is such a command."""
    if importlib.util.find_spec("fss.segment.segmenter") is None:
        return []
    from fss.models import build_model
    from fss.models.regimes import apply_regime
    from fss.segment.segmenter import FewShotSegmenter

    config = TrainConfig.from_dict(yaml.safe_load(YAML))
    network = build_model(config.model, {1: "a", 2: "b"}, 1)
    apply_regime(network, config.regime)
    path = folder / "run.pt"
    save_checkpoint(path, config, {"step": 3, "best": None, "model": network.state_dict()})
    data = path.read_bytes()
    seeds = [Seed(data), *[zipped(data, "data.pkl")] * 3]
    return [Reader("run", ".pt", 1, seeds, lambda path: FewShotSegmenter.load(path))]


def _annotations(folder: Path) -> list[Reader]:
    import zipfile

    prepare.ProcessPoolExecutor = ThreadPoolExecutor  # a process per file would take minutes
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    crowd = {"size": [40, 60], "counts": [0, 40, 40 * 59]}
    coco_mask = importlib.import_module("pycocotools.mask")
    packed = coco_mask.frPyObjects(crowd, 40, 60)["counts"].decode()
    packed = {"size": [40, 60], "counts": packed}
    content = {
        "categories": [{"id": i, "name": n} for i, n in zip(JSON_IDS, CLASSES, strict=True)],
        "images": [
            {"id": i, "file_name": f"p{i}.jpg", "height": 40, "width": 60} for i in range(3)
        ],
        "annotations": [
            {"image_id": 0, "category_id": 90, "segmentation": square, "iscrowd": 0},
            {"image_id": 1, "category_id": 1, "segmentation": crowd, "iscrowd": 1},
            {"image_id": 2, "category_id": 3, "segmentation": packed, "iscrowd": 1},
        ],
    }
    # what is behind the categories: mutations of these would all end at the comparison of names
    categories = json.dumps(content.pop("categories"))
    rest = json.dumps(content, indent=1).encode()

    def archive(payload: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as made:
            name = "annotations/instances_train2014.json"
            made.writestr(name, b'{"categories": ' + categories.encode() + b", " + payload[1:])
        return stream.getvalue()

    def annotations(path: Path) -> None:
        target = folder / "masks"
        try:
            prepare._convert_json(path, "train2014", target)
            for mask in target.glob("*.png"):
                ids = np.array(Image.open(mask))
                assert ids.dtype == np.uint8 and ids.max(initial=0) <= 80
        finally:
            for place in (target, folder / ".masks.partial"):
                for file in place.rglob("*") if place.is_dir() else ():
                    file.unlink()
                if place.is_dir():
                    place.rmdir()

    def unpacked(path: Path) -> None:
        for member in members(path, "annotations"):
            assert ".." not in member.path.parts and not member.path.is_absolute()
            while member.file.read(1 << 20):
                pass

    stored = archive(rest)
    found = [
        Reader("annotations", ".zip", 7, [Seed(rest, archive, text=True)], annotations),
        Reader("zip", ".zip", 3, [Seed(stored)], unpacked),
        Reader("tar", ".tgz", 3, [Seed(tarred("annotations/x", b"").pack(b"abc" * 99))], unpacked),
        Reader("tar inside", ".tgz", 1, [tarred("annotations/x", b"abc" * 99)], unpacked),
    ]
    if importlib.util.find_spec("scipy") is None:
        return found
    import scipy.io

    record = np.empty((1, 1), dtype=[("Boundaries", object), ("Segmentation", object)])
    record[0, 0] = (0, np.full((40, 50), 3, np.uint8))
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"GTcls": record})

    def matlab(path: Path) -> None:
        mask = read_sbd(path.read_bytes(), path.name)
        assert mask.ndim == 2 and mask.dtype == np.uint8

    return [*found, Reader("mask of SBD", ".mat", 4, [Seed(stream.getvalue())], matlab)]


def _own_pictures() -> list[Reader]:
    """A user's own pictures and masks, where there is `fss predict`."""
    if importlib.util.find_spec("fss.segment.pictures") is None:
        return []
    from fss.segment.pictures import read_mask, read_picture

    def picture(path: Path) -> None:
        found = read_picture(path)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3

    def mask(path: Path) -> None:
        found = read_mask(path, (20, 30))
        assert found.dtype == np.bool_ and found.shape == (20, 30) and found.any()

    return [
        Reader("own picture", ".png", 5, _photos(), picture),
        Reader("own mask", ".png", 5, [*_masks(), *_photos()], mask),
    ]
