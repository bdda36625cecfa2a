from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fss.cli import main
from fss.data import CocoSource, PascalSource
from fss.data.coco import CLASSES, JSON_IDS
from fss.data.prepare import datasets as prepare
from fss.data.prepare.annotations import Annotated, draw_coco
from fss.data.prepare.archives import members
from fss.data.prepare.download import Archive

VOC_ONLY, BOTH, SBD_ONLY, VAL = "2007_000001", "2008_000001", "2008_000002", "2007_000009"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, mode: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as content:
        for name, data in files.items():
            content.writestr(name, data)


def publish(monkeypatch, name: str, path: Path, key: str | None = None) -> None:
    """Makes a synthetic archive the published one."""
    archive = Archive(f"http://127.0.0.1:9/{path.name}", hashlib.md5(path.read_bytes()).hexdigest())
    if key is None:
        monkeypatch.setattr(prepare, name, archive)
    else:
        monkeypatch.setitem(getattr(prepare, name), key, archive)


@pytest.fixture
def voc(tmp_path, monkeypatch) -> Path:
    io_ = pytest.importorskip("scipy.io")
    folder = tmp_path / "archives"
    folder.mkdir()
    base = "VOCdevkit/VOC2012"
    lists = {"Main/train": [BOTH, SBD_ONLY], "Segmentation/train": [VOC_ONLY, BOTH]}
    lists |= {"Segmentation/val": [VAL]}
    files = {
        f"{base}/ImageSets/{name}.txt": "\n".join(names).encode() for name, names in lists.items()
    }
    for i, name in enumerate((VOC_ONLY, BOTH, SBD_ONLY, VAL)):
        photo = Image.new("RGB", (50, 40), (60 * i, 0, 0))
        files[f"{base}/JPEGImages/{name}.jpg"] = encoded(photo, "JPEG")
        files[f"{base}/Annotations/{name}.xml"] = b"<x/>"
        if name != SBD_ONLY:
            mask = Image.frombytes("P", (50, 40), bytes([i + 1] * 1900 + [255] * 100))
            mask.putpalette(list(range(256)) * 3)
            files[f"{base}/SegmentationClass/{name}.png"] = encoded(mask, "PNG")
    write_tar(folder / "VOC.tar", "w", files)
    files = {"benchmark_RELEASE/dataset/train.txt": b"x"}
    for name, label in ((BOTH, 15), (SBD_ONLY, 16)):
        kind = np.dtype([("Boundaries", object), ("Segmentation", object)])
        record = np.empty((1, 1), dtype=kind)
        record[0, 0] = (0, np.full((40, 50), label, np.uint8))
        buffer = io.BytesIO()
        io_.savemat(buffer, {"GTcls": record})
        files[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = buffer.getvalue()
    write_tar(folder / "benchmark.tgz", "w:gz", files)
    publish(monkeypatch, "VOC", folder / "VOC.tar")
    publish(monkeypatch, "SBD", folder / "benchmark.tgz")
    return folder


def everything(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_pascal(voc, tmp_path):
    root = tmp_path / "data"
    lines, passed = prepare.prepare("pascal", str(root), str(voc))
    assert lines[0] == "training images 3, test images 1" and not passed
    made = everything(root)
    folder = root / "VOCdevkit2012/VOC2012"
    assert (folder / "ImageSets/SegmentationClassAug/train.txt").read_text().splitlines() == [
        f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png"
        for name in (BOTH, SBD_ONLY, VOC_ONLY)
    ]
    assert not (folder / "Annotations").exists()
    source = PascalSource(root)
    areas = {source.name(i): source.class_areas(i) for i in range(4)}
    assert areas == {BOTH: {2: 1900}, SBD_ONLY: {16: 2000}, VOC_ONLY: {1: 1900}, VAL: {4: 1900}}
    assert Image.open(folder / f"SegmentationClassAug/{BOTH}.png").mode == "L"
    prepare.prepare("pascal", str(root), str(tmp_path))  # no archive needed, nothing is made again
    assert everything(root) == made
    assert not [name for name in made if "partial" in name or "tmp" in name]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 9))
def test_a_kill_at_any_point_is_made_good(voc, tmp_path, monkeypatch, at):
    """Dies at the at-th rename or list: what has its name is whole, and a second run completes."""
    count = 0
    rename = Path.rename

    def deadly(self, target):
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        return rename(self, target)

    root = tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", deadly)
        with pytest.raises(Killed):
            prepare.prepare("pascal", str(root), str(voc))
    folder = root / "VOCdevkit2012/VOC2012"
    for name, number in (("JPEGImages", 4), ("SegmentationClass", 3), ("SegmentationClassAug", 4)):
        assert not (folder / name).is_dir() or len(list((folder / name).iterdir())) == number
    prepare.prepare("pascal", str(root), str(voc))
    assert len(PascalSource(root)) == 4
    assert not list(root.rglob("*.partial")) and not list(root.rglob("*.tmp"))


def test_damaged_and_wrong_archives(voc, tmp_path, monkeypatch):
    path = voc / "benchmark.tgz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"benchmark\.tgz: expected the MD5"):
        prepare.prepare("pascal", str(tmp_path / "data"), str(voc))
    publish(monkeypatch, "SBD", path)  # damaged, though the checksum is right
    with pytest.raises(ValueError, match=r"benchmark\.tgz is damaged"):
        prepare.prepare("pascal", str(tmp_path / "data"), str(voc))
    assert not (tmp_path / "data/VOCdevkit2012/VOC2012/SegmentationClassAug").exists()
    write_tar(path, "w:gz", {"other/file": b"x"})
    publish(monkeypatch, "SBD", path)
    with pytest.raises(ValueError, match="has no folder benchmark_RELEASE/dataset/cls"):
        prepare.prepare("pascal", str(tmp_path / "data"), str(voc))
    write_tar(path, "w:gz", {"a/../../x": b"x"})
    with pytest.raises(ValueError, match="leads out"):
        list(members(path, "a"))
    with pytest.raises(FileNotFoundError, match="archives: expected a folder"):
        prepare.prepare("pascal", str(tmp_path), str(tmp_path / "none"))
    with pytest.raises(ValueError, match="pascal or coco, got 'voc'"):
        prepare.prepare("voc", str(tmp_path))


def test_missing_package(voc, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"needs scipy.*svf-fast\[data\]"):
        prepare.prepare("pascal", str(tmp_path / "data"), str(voc))
    assert not (tmp_path / "data").exists()  # told before any work


@pytest.fixture
def coco(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("pycocotools.mask")
    folder = tmp_path / "archives"
    folder.mkdir()
    categories = [{"id": i, "name": name} for i, name in zip(JSON_IDS, CLASSES)]
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    inner = [[10, 10, 15, 10, 15, 15, 10, 15]]
    crowd = {"size": [40, 60], "counts": [0, 40, 40 * 59]}  # the first column
    jsons = {}
    for split in ("train2014", "val2014"):
        names = [f"COCO_{split}_{i:012d}" for i in range(900, 903)]
        photo = encoded(Image.new("RGB", (60, 40)), "JPEG")
        write_zip(folder / f"{split}.zip", {f"{split}/{name}.jpg": photo for name in names})
        publish(monkeypatch, "COCO_IMAGES", folder / f"{split}.zip", split)
        content = {
            "categories": categories[::-1],
            "images": [
                {"id": i, "file_name": f"{name}.jpg", "height": 40, "width": 60}
                for i, name in enumerate(names)
            ],
            "annotations": [
                {"image_id": 0, "category_id": 90, "segmentation": square, "iscrowd": 0},
                {"image_id": 0, "category_id": 13, "segmentation": inner, "iscrowd": 0},
                {"image_id": 1, "category_id": 1, "segmentation": crowd, "iscrowd": 1},
            ],
        }
        jsons[f"annotations/instances_{split}.json"] = json.dumps(content).encode()
    write_zip(folder / "annotations.zip", {"annotations/captions.json": b"{}"} | jsons)
    publish(monkeypatch, "COCO_JSON", folder / "annotations.zip")
    return folder


def test_coco(coco, tmp_path, capsys):
    root = tmp_path / "data"
    assert main(["data", "prepare", "coco", str(root), "--archives", str(coco)]) == 1
    assert "training images 2, test images 2" in capsys.readouterr().out
    source = CocoSource(root)
    assert source.name(0) == "COCO_train2014_000000000900"
    assert source.class_areas(0) == {80: 375, 12: 25}  # the later annotation covers the earlier
    assert source.class_areas(1) == {1: 40}
    made = everything(root)
    assert main(["data", "prepare", "coco", str(root), "--archives", str(coco)]) == 1
    assert main(["data", "verify", "coco", str(root)]) == 1
    assert everything(root) == made
    assert main(["data", "verify", "pascal", str(root)]) == 2
    assert "expected JPEGImages/" in capsys.readouterr().err


def test_coco_json_of_other_classes(coco, tmp_path, monkeypatch):
    content = {"categories": [{"id": 1, "name": "cat"}], "images": [], "annotations": []}
    text = json.dumps(content).encode()
    write_zip(coco / "annotations.zip", {"annotations/instances_train2014.json": text})
    publish(monkeypatch, "COCO_JSON", coco / "annotations.zip")
    with pytest.raises(ValueError, match="expected the 80 object classes .*got 1: cat"):
        prepare.prepare("coco", str(tmp_path / "data"), str(coco))
    write_zip(coco / "annotations.zip", {"annotations/captions.json": b"{}"})
    publish(monkeypatch, "COCO_JSON", coco / "annotations.zip")
    with pytest.raises(ValueError, match=r"has no instances_train2014\.json"):
        prepare.prepare("coco", str(tmp_path / "data"), str(coco))


def test_conversion_goes_on(coco, tmp_path, monkeypatch):
    """Masks made before the kill are kept, the others are added."""
    folder = tmp_path / "data/MSCOCO2014/annotations"
    begun = folder / ".train2014.partial/COCO_train2014_000000000900.png"
    begun.parent.mkdir(parents=True)
    Image.new("L", (60, 40), 7).save(begun)
    prepare.prepare("coco", str(tmp_path / "data"), str(coco))
    assert CocoSource(tmp_path / "data").class_areas(0) == {7: 2400}
    assert sorted(path.name for path in folder.iterdir()) == ["train2014", "val2014"]


def test_download_is_asked_for_what_is_not_given(coco, tmp_path, monkeypatch):
    asked = []

    def fetch(archive, folder):
        asked.append((archive.name, folder))
        raise ConnectionError("no network here")

    monkeypatch.setattr(prepare, "fetch", fetch)
    (coco / "val2014.zip").unlink()
    with pytest.raises(ConnectionError):
        prepare.prepare("coco", str(tmp_path / "data"), str(coco))
    assert asked == [("val2014.zip", coco)]
    with pytest.raises(ConnectionError):
        prepare.prepare("coco", str(tmp_path / "data"))
    assert asked[1] == ("val2014.zip", tmp_path / "data/downloads")  # train2014 is there


def test_published_archives():
    assert prepare.VOC.name == "VOCtrainval_11-May-2012.tar"
    assert prepare.SBD.name == "benchmark.tgz"
    archives = [prepare.VOC, prepare.SBD, prepare.COCO_JSON, *prepare.COCO_IMAGES.values()]
    assert all(len(archive.md5) == 32 for archive in archives)


def annotated(*shapes: object, size: tuple = (40, 60)) -> Annotated:
    return Annotated("p.jpg", size, [(1 + i, shape) for i, shape in enumerate(shapes)])


def test_run_lengths_in_both_forms_are_those_of_pycocotools():
    rle = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.3, 0.9, 1):
        mask = np.asfortranarray(rng.random((37, 53)) < density).astype(np.uint8)
        packed = rle.encode(mask)
        text = packed["counts"].decode()
        runs = np.diff(np.flatnonzero(np.diff(np.r_[1 - mask.T.flat[0], mask.T.ravel(), 2])))
        counts = [0] * int(mask.T.flat[0]) + runs.tolist()
        for form in (text, counts):
            shape = {"size": [37, 53], "counts": form}
            np.testing.assert_array_equal(draw_coco(annotated(shape, size=(37, 53))), mask)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": [40, 60], "counts": [0, 2401]}, "run lengths of another number of pixels"),
        ({"size": [40, 60], "counts": [2, -1, 2399]}, "run lengths that are no numbers"),
        ({"size": [40, 60], "counts": [2**40]}, "run lengths of another number of pixels"),
        ({"size": [60, 40], "counts": [2400]}, r"run lengths for \[60, 40\]"),
        ({"size": [40, 60], "counts": "P"}, "run lengths are truncated"),
        ({"size": [40, 60], "counts": "\x00"}, "cannot be decoded"),
        ({"size": [40, 60]}, "counts"),
        ([[1, 2, 3]], "a polygon of 3 numbers"),
        ([[1, 2, 3, 4, 5, 1e9]], "a polygon that reaches far outside"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon that reaches far outside"),
        (7, "object"),
    ],
)
def test_shapes_that_do_not_fit_their_image(shape, message):
    pytest.importorskip("pycocotools.mask")
    with pytest.raises(ValueError, match=rf"p\.jpg: expected polygons .*{message}"):
        draw_coco(annotated(shape))


def test_a_shape_that_does_not_fit_is_one_line(coco, tmp_path, monkeypatch, capsys):
    """Though another process draws it."""
    with zipfile.ZipFile(coco / "annotations.zip") as file:
        content = json.loads(file.read("annotations/instances_train2014.json"))
    content["annotations"][0]["segmentation"] = [[1, 2, 3]]
    text = json.dumps(content).encode()
    write_zip(coco / "annotations.zip", {"annotations/instances_train2014.json": text})
    publish(monkeypatch, "COCO_JSON", coco / "annotations.zip")
    assert main(["data", "prepare", "coco", str(tmp_path / "x"), "--archives", str(coco)]) == 2
    (line,) = [r for r in capsys.readouterr().err.splitlines() if r.startswith("fss: ")]
    assert "COCO_train2014_000000000900.jpg: expected polygons" in line


_POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from fss.data.prepare.datasets import _end_with_parent

def work(i):
    time.sleep(0.3)
    return os.getpid()

if __name__ == "__main__":
    with ProcessPoolExecutor(3, initializer=_end_with_parent) as pool:
        print(*set(pool.map(work, range(6))), flush=True)
        time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_processes_that_draw_masks_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(_POOL)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    children = [Path("/proc", number) for number in parent.stdout.readline().split()]
    assert len(children) >= 2 and all(alive(child) for child in children)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while any(alive(child) for child in children):
        assert time.monotonic() < end, "they outlive their parent"
        time.sleep(0.05)


def alive(process: Path) -> bool:
    """Whether a process runs; one that ended may wait in vain to be asked for its status."""
    try:
        return ") Z " not in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
