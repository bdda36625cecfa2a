"""Folders as people have them, imported and read back: the same photos, classes and pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fss.cli import main
from fss.data import EpisodeDataset, EvalTransform, FolderSource
from fss.data.imports.folder import import_folder
from fss.data.masks import voc_colors

NAMES = ("cat", "dog", "hen")
SIZES = ((40, 60), (48, 48), (64, 36), (50, 70), (40, 60), (48, 64))
VOC = voc_colors()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def truth(i: int, ids: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    """Photo i has a block of class i % 3, those from 3 on a second class below."""
    height, width = SIZES[i]
    mask = np.zeros((height, width), np.uint16)
    mask[4:20, 4:30] = ids[i % len(ids)]
    if i >= 3:
        mask[24:36, 4:30] = ids[(i + 1) % len(ids)]
    return mask


def write_photo(path: Path, i: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = SIZES[i]
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def in_colors(mask: np.ndarray, colors: tuple[int, ...]) -> np.ndarray:
    codes = np.array((0, *colors))[mask]
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 2).astype(np.uint8)


def palette(mask: np.ndarray, colors: tuple[int, ...]) -> Image.Image:
    picture = Image.fromarray(mask.astype(np.uint8)).convert("L")
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette([c >> shift & 255 for c in colors for shift in (16, 8, 0)])
    return picture


RGB = (0xFF0000, 0x00FF00, 0xFFFFFF)
Kind = Callable[[Path, Path], None]


def pictures(
    photo: str, mask: str, convert: Callable[[np.ndarray, int], Any] = lambda m, i: m.astype("u1")
) -> Kind:
    """Write photos and masks under names with {i} (number), {c} (class) and {s} (split)."""

    def write(images: Path, masks: Path) -> None:
        for i in range(len(SIZES)):
            words = {"i": i, "c": NAMES[i % 3], "s": "val" if i in (1, 2, 3) else "train"}
            write_photo(images / photo.format(**words), i)
            path = masks / mask.format(**words)
            path.parent.mkdir(parents=True, exist_ok=True)
            found = convert(truth(i), i)
            (found if isinstance(found, Image.Image) else Image.fromarray(found)).save(path)

    return write


def scaled(mask: np.ndarray, i: int) -> np.ndarray:
    return mask.astype(np.uint8).repeat(2 + i % 2, 0).repeat(2 + i % 2, 1)


def alpha(mask: np.ndarray, i: int) -> np.ndarray:
    return np.dstack([in_colors(mask, (0xFF0000, 0x00FF00, 0x0000FF)), (mask > 0) * np.uint8(255)])


# Each with the class ids that its three classes get.
FOLDERS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "ids": (pictures("{i}.jpg", "{i}.png"), (1, 2, 3)),
    "photos of other endings": (pictures("{i}.webp", "{i}.png"), (1, 2, 3)),
    "masks of other endings": (pictures("{i}.JPG", "{i}.bmp"), (1, 2, 3)),
    "tif": (pictures("{i}.tif", "{i}.TIF"), (1, 2, 3)),
    "nested": (pictures("{c}/day 1/{i}.jpg", "{c}/day 1/{i}.png"), (1, 2, 3)),
    "nested masks": (pictures("{i}.jpg", "x/{c}/{i}.png"), (1, 2, 3)),
    "suffix": (pictures("im{i}.jpg", "im{i}_mask.png"), (1, 2, 3)),
    "prefix": (pictures("image_{i}.jpg", "mask_{i}.png"), (1, 2, 3)),
    "double ending": (pictures("{i}.jpg", "{i}.jpg.png"), (1, 2, 3)),
    "cityscapes": (pictures("{i}_leftImg8bit.png", "{i}_gtFine_labelIds.png"), (1, 2, 3)),
    "umlauts": (pictures("schön{i}.jpg", "scho\u0308n{i}.png"), (1, 2, 3)),
    "split": (pictures("{s}/{i}.jpg", "{s}/{i}.png"), (1, 2, 3)),
    "16 bits": (pictures("{i}.jpg", "{i}.png", lambda m, i: m), (1, 2, 3)),
    "32 bits": (pictures("{i}.jpg", "{i}.tif", lambda m, i: m.astype(np.int32)), (1, 2, 3)),
    "floating": (pictures("{i}.jpg", "{i}.tif", lambda m, i: m.astype(np.float32)), (1, 2, 3)),
    "ids of many": (pictures("{i}.jpg", "{i}.png", lambda m, i: m * np.uint16(1000)), (1, 2, 3)),
    "other ids": (
        pictures("{i}.jpg", "{i}.png", lambda m, i: (m * 40).astype("u1")),
        (40, 80, 120),
    ),
    "other sizes": (pictures("{i}.jpg", "{i}.png", scaled), (1, 2, 3)),
    "RGB": (pictures("{i}.jpg", "{i}.png", lambda m, i: in_colors(m, RGB)), (2, 1, 3)),
    "RGBA": (pictures("{i}.jpg", "{i}.png", alpha), (3, 2, 1)),
    "VOC colors": (
        pictures("{i}.jpg", "{i}.png", lambda m, i: in_colors(m, tuple(VOC[[8, 12, 255]]))),
        (8, 12, 255),
    ),
    "palette": (
        pictures("{i}.jpg", "{i}.png", lambda m, i: palette(m, (0, *RGB))),
        (1, 2, 3),
    ),
    "palettes made anew": (
        pictures("{i}.jpg", "{i}.png", lambda m, i: Image.fromarray(in_colors(m, RGB)).quantize(8)),
        (2, 1, 3),
    ),
}


def check(out: Path, ids: tuple[int, ...]) -> FolderSource:
    source = FolderSource(out)
    assert len(source) == len(SIZES)
    for index in range(len(source)):
        image, mask = source.load(index)
        name = source.name(index).replace("day 1", "").replace("8bit", "")
        i = int(next(c for c in name if c.isdecimal()))
        assert image.shape[:2] == SIZES[i]
        assert np.array_equal(mask, truth(i, ids)), source.name(index)
    assert set(source.class_names) == set(ids) - {255}
    return source


@pytest.mark.parametrize("kind", FOLDERS)
def test_pictures(tmp_path, kind):
    write, ids = FOLDERS[kind]
    write(tmp_path / "images", tmp_path / "masks")
    out = tmp_path / "sets/out"
    if kind == "VOC colors":  # a border alone is no class: photo 2 shows nothing
        lines = import_folder(str(tmp_path / "images"), str(tmp_path / "masks"), str(out)).lines
        assert lines[0].endswith("5 of 6 photos, 2 classes") and "border ignored" in lines[1]
        assert FolderSource(out).class_names == {8: "cat", 12: "dog"}
        return
    lines = import_folder(str(tmp_path / "images"), str(tmp_path / "masks"), str(out)).lines
    assert lines[0] == f"{out}: 6 of 6 photos, 3 classes"
    assert not any("left out" in line for line in lines)
    source = check(out, ids)
    train = [source.name(i) for i in source.indices("train")]
    assert train == (["0", "4", "5"] if kind == "split" else [source.name(i) for i in range(6)])
    if kind != "split":  # whose lists are too short for episodes
        data = EpisodeDataset(source, 0, "train", 1, EvalTransform(33), 4, min_area=1)
        assert all((data[i]["query_mask"] == 1).any() for i in range(4))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_one_folder_for_both(tmp_path):
    pictures("{i}.jpg", "{i}.png")(tmp_path / "all", tmp_path / "all")
    import_folder(str(tmp_path / "all"), str(tmp_path / "all"), str(tmp_path / "out"))
    check(tmp_path / "out", (1, 2, 3))
    pictures("a/{i}.png", "a/{i}_mask.png")(tmp_path / "both", tmp_path / "both")
    import_folder(str(tmp_path / "both"), str(tmp_path / "both"), str(tmp_path / "two"))
    check(tmp_path / "two", (1, 2, 3))


def test_a_folder_per_split_with_both(tmp_path):
    pictures("{s}/images/{i}.jpg", "{s}/masks/{i}.png")(tmp_path / "all", tmp_path / "all")
    import_folder(str(tmp_path / "all"), str(tmp_path / "all"), str(tmp_path / "out"))
    source = check(tmp_path / "out", (1, 2, 3))
    assert len(source.indices("train")) == len(source.indices("test")) == 3


def in_class_folders(mask: np.ndarray, i: int) -> np.ndarray:
    return (mask == i % 3 + 1) * np.uint8(255)


@pytest.mark.parametrize(
    ("photo", "mask"),
    [
        ("{i}.jpg", "{c}/{i}.png"),
        ("{c}/{i}.jpg", "{c}/{i}.png"),
        ("{s}/{c}/{i}.jpg", "{c}/{i}.png"),
    ],
)
@pytest.mark.parametrize("value", [1, 128, 255])
def test_a_folder_per_class(tmp_path, photo, mask, value):
    """Masks of one object, the class in the name of the folder."""
    convert = lambda m, i: (m == i % 3 + 1) * np.uint8(value)  # noqa: E731
    pictures(photo, mask, convert)(tmp_path / "images", tmp_path / "masks")
    out = tmp_path / "out"
    lines = import_folder(str(tmp_path / "images"), str(tmp_path / "masks"), str(out)).lines
    assert "name of its folder" in lines[1]
    source = FolderSource(out)
    assert source.class_names == {1: "cat", 2: "dog", 3: "hen"} and len(source) == 6
    shown = {source.name(i)[-1]: source.class_areas(i) for i in range(6)}
    assert shown == {str(i): {i % 3 + 1: 16 * 26} for i in range(6)}


def test_several_classes_of_a_photo_in_folders(tmp_path):
    for i in range(len(SIZES)):
        write_photo(tmp_path / f"images/{i}.jpg", i)
        for k, name in enumerate(NAMES, start=1):
            write_mask(tmp_path / f"masks/{name}/{i}.png", (truth(i) == k) * np.uint8(255))
    import_folder(str(tmp_path / "images"), str(tmp_path / "masks"), str(tmp_path / "out"))
    check(tmp_path / "out", (1, 2, 3))


def test_a_fss1000_layout(tmp_path):
    pictures("{c}/{i}.jpg", "{c}/{i}.png", in_class_folders)(tmp_path / "all", tmp_path / "all")
    import_folder(str(tmp_path / "all"), str(tmp_path / "all"), str(tmp_path / "out"))
    assert FolderSource(tmp_path / "out").class_names == {1: "cat", 2: "dog", 3: "hen"}


def soft(mask: np.ndarray, i: int) -> np.ndarray:
    edges = Image.fromarray((mask > 0) * np.uint8(255))
    return np.array(edges.resize(np.array(edges.size) * 4, 0).reduce(4).resize(edges.size, 2))


@pytest.mark.parametrize(
    "convert",
    [
        lambda m, i: (m > 0) * np.uint8(255),
        lambda m, i: (m > 0) * np.uint8(1),
        lambda m, i: m > 0,
        lambda m, i: (m > 0) * np.uint16(65535),
        lambda m, i: in_colors((m > 0) * 1, (0xFFFFFF,)),
        lambda m, i: np.dstack([in_colors((m > 0) * 1, (0xFF,)), (m > 0) * np.uint8(255)]),
        soft,
    ],
    ids=["255", "1", "bool", "16 bits", "white", "alpha", "soft"],
)
@pytest.mark.parametrize("name", ["tumor", None])
def test_one_class(tmp_path, convert, name):
    pictures("{i}.jpg", "{i}.png", convert)(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    lines = import_folder(*paths, classes=[name] if name else []).lines
    source = FolderSource(tmp_path / "out")
    assert len(source) == 6 and source.folds == ((1,),)
    assert any("one class: training needs base classes" in line for line in lines)
    assert not any("fss train" in line for line in lines)
    if name:
        assert source.class_names == {1: name}
    for i in range(6):
        assert np.array_equal(source.load(i)[1] == 1, truth(i) > 0)


def test_masks_saved_as_jpeg(tmp_path):
    pictures("{i}.png", "{i}.jpg", lambda m, i: (m > 0) * np.uint8(255))(
        tmp_path / "images", tmp_path / "masks"
    )
    import_folder(str(tmp_path / "images"), str(tmp_path / "masks"), str(tmp_path / "out"))
    source = FolderSource(tmp_path / "out")
    for i in range(6):
        assert np.mean((source.load(i)[1] == 1) != (truth(i) > 0)) < 0.02


# Annotations


def box(i: int, k: int) -> tuple[int, int, int, int] | None:
    ys, xs = np.nonzero(truth(i) == k)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def corners(i: int, k: int) -> list[float]:
    x0, y0, x1, y1 = map(float, box(i, k))
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def runs(i: int, k: int) -> dict[str, Any]:
    flat = (truth(i) == k).T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    points = [0, *edges.tolist(), len(flat)]
    counts = np.diff(points).tolist()
    return {"size": list(SIZES[i]), "counts": counts}


def coco(tmp_path: Path, shape: Callable[[int, int], Any], name: Callable[[int], str]) -> Path:
    content: dict[str, Any] = {"categories": [], "images": [], "annotations": []}
    content["categories"] = [{"id": 0, "name": "things"}]
    content["categories"] += [{"id": 3 * k, "name": n} for k, n in enumerate(NAMES, start=1)]
    for i, (height, width) in enumerate(SIZES):
        content["images"].append(
            {"id": 7 * i, "file_name": name(i), "height": height, "width": width}
        )
        for k in (1, 2, 3):
            if box(i, k):
                content["annotations"].append(
                    {"image_id": 7 * i, "category_id": 3 * k, "segmentation": shape(i, k)}
                )
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("shape", [lambda i, k: [corners(i, k)], runs], ids=["polygons", "runs"])
@pytest.mark.parametrize(
    "name", [lambda i: f"{i}.jpg", lambda i: f"a/{i}.jpg", lambda i: f"C:\\x\\a\\{i}.jpg"]
)
def test_coco(tmp_path, shape, name):
    for i in range(len(SIZES)):
        write_photo(tmp_path / f"images/a/{i}.jpg", i)
    write_photo(tmp_path / "images/none.jpg", 0)
    path = coco(tmp_path, shape, name)
    lines = import_folder(str(tmp_path / "images"), str(path), str(tmp_path / "out")).lines
    assert lines[0].endswith("6 of 7 photos, 3 classes")
    assert "left out: photos without an object: 1: none.jpg" in lines
    assert check(tmp_path / "out", (1, 2, 3)).class_names == {1: "cat", 2: "dog", 3: "hen"}


def test_coco_with_boxes_alone(tmp_path):
    for i in range(len(SIZES)):
        write_photo(tmp_path / f"images/{i}.jpg", i)
    path = coco(tmp_path, lambda i, k: [], lambda i: f"{i}.jpg")
    with pytest.raises(ValueError, match=r"6 photos with boxes without shape, 0\.jpg first"):
        import_folder(str(tmp_path / "images"), str(path), str(tmp_path / "out"))


@pytest.mark.parametrize("labels", ["labels", "all"])
def test_labelme(tmp_path, labels):
    for i, (height, width) in enumerate(SIZES):
        write_photo(tmp_path / f"all/{i}.jpg", i)
        shapes = []
        for k, name in enumerate(NAMES, start=1):
            if box(i, k):
                points = np.array(corners(i, k)).reshape(4, 2).tolist()
                kind = "polygon" if k < 3 else "rectangle"
                points = points if k < 3 else points[::2]
                shapes.append({"label": name, "points": points, "shape_type": kind})
        shapes.append({"label": "eye", "points": [[1, 1]], "shape_type": "point"})
        content = {"imagePath": f"..\\all\\{i}.jpg", "imageHeight": height, "imageWidth": width}
        (tmp_path / f"all/{i}.json").write_text(json.dumps(content | {"shapes": shapes}))
    (tmp_path / labels).mkdir(exist_ok=True)
    for path in (tmp_path / "all").glob("*.json"):
        path.rename(tmp_path / labels / path.name)
    paths = [str(tmp_path / part) for part in ("all", labels, "out")]
    lines = import_folder(*paths).lines
    assert any(
        "points or lines, background in the photos of these files: 6: 0.json" in line
        for line in lines
    )
    assert check(tmp_path / "out", (1, 2, 3)).class_names == {1: "cat", 2: "dog", 3: "hen"}


@pytest.mark.parametrize(
    ("photos", "labels", "given"),
    [
        ("images/train", "labels/train", ("images", "labels")),
        ("set/train/images", "set/train/labels", ("set", "set")),
        ("all", "all", ("all", "all")),
    ],
)
def test_yolo(tmp_path, photos, labels, given):
    for i, (height, width) in enumerate(SIZES):
        write_photo(tmp_path / f"{photos}/{i}.jpg", i)
        rows = []
        for k in (1, 2, 3):
            if box(i, k):
                shares = np.array(corners(i, k)).reshape(4, 2) / (width, height)
                rows.append(f"{k - 1} " + " ".join(f"{x:.9f}" for x in shares.ravel()))
        (tmp_path / labels).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{labels}/{i}.txt").write_text("\n".join(rows))
    (tmp_path / "data.yaml").write_text("names: [cat, dog, hen]\n")
    paths = [str(tmp_path / part) for part in (*given, "out")]
    import_folder(*paths)
    assert check(tmp_path / "out", (1, 2, 3)).class_names == {1: "cat", 2: "dog", 3: "hen"}


# Names of classes


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["a", "b", "c"], {1: "a", 2: "b", 3: "c"}),
        (["2=b", "1=a", "3=c"], {1: "a", 2: "b", 3: "c"}),
        (["2=b"], {1: "class 1", 2: "b", 3: "class 3"}),
    ],
)
def test_names_of_ids(tmp_path, classes, names):
    pictures("{i}.jpg", "{i}.png")(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, classes=classes)
    assert check(tmp_path / "out", (1, 2, 3)).class_names == names


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\n"),
        ("class_dict.csv", "name,r,g,b\nbackground,0,0,0\n"),
        (None, ""),
    ],
)
def test_names_of_colors(tmp_path, file, text):
    convert = lambda m, i: in_colors(m, RGB)  # noqa: E731
    pictures("{i}.jpg", "{i}.png", convert)(tmp_path / "images", tmp_path / "masks")
    colors = dict(zip(NAMES, ("255,0,0", "0,255,0", "255,255,255"), strict=True))
    classes = [f"{color}={name}" for name, color in colors.items()]
    if file == "labelmap.txt":
        text += "".join(f"{name}:{color}::\n" for name, color in colors.items())
    elif file:
        text += "".join(f"{name},{color}\n" for name, color in colors.items())
    if file:
        (tmp_path / file).write_text(text)
        classes = []
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, classes=classes)
    assert check(tmp_path / "out", (1, 2, 3)).class_names == {1: "cat", 2: "dog", 3: "hen"}


def test_colors_with_soft_edges(tmp_path):
    def blurred(mask: np.ndarray, i: int) -> np.ndarray:
        picture = Image.fromarray(in_colors(mask, RGB))
        return np.array(picture.resize(np.array(picture.size) * 3, 2).resize(picture.size, 2))

    pictures("{i}.jpg", "{i}.png", blurred)(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, classes=["#ff0000=cat", "#00ff00=dog", "white=hen"])
    source = FolderSource(tmp_path / "out")
    for i in range(6):
        assert np.mean(source.load(i)[1] != truth(i)) < 0.03


# What is left out, and what is refused


def test_what_is_left_out_is_named(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    pictures("{i}.jpg", "{i}.png")(images, masks)
    (masks / "0.png").unlink()
    write_mask(masks / "other.png", truth(0).astype(np.uint8))
    write_mask(masks / "1.png", np.zeros(SIZES[1], np.uint8))
    (images / "2.jpg").write_bytes((images / "2.jpg").read_bytes()[:300])
    (images / "x.cr2").write_bytes(b"raw")
    lines = import_folder(str(images), str(masks), str(tmp_path / "out")).lines
    assert lines[0].endswith("3 of 6 photos, 3 classes")
    for line in (
        "left out: masks that show nothing: 1: 1.jpg",
        "left out: photos that cannot be decoded: 1: 2.jpg",
        "left out: photos without a mask: 1: 0.jpg",
        "left out: masks without a photo: 1: other.png",
        "left out: other files: 1: x.cr2",
    ):
        assert line in lines
    assert len(FolderSource(tmp_path / "out")) == 3


@pytest.mark.parametrize("orientation", [6, 8, 5, 7])
def test_masks_of_turned_photos(tmp_path, orientation):
    """Of the photo as it is stored, or as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_photo(tmp_path / "images/0.jpg", 0, exif=exif)
    write_photo(tmp_path / "images/1.jpg", 1)
    stored = truth(0).astype(np.uint8)
    write_mask(tmp_path / "masks/0.png", stored)
    write_mask(tmp_path / "masks/1.png", truth(1).astype(np.uint8))
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    lines = import_folder(*paths).lines
    assert "masks turned like their photos: 1: 0.jpg" in lines
    picture = Image.fromarray(stored)
    picture.getexif()[0x0112] = orientation
    from PIL import ImageOps

    assert np.array_equal(FolderSource(paths[2]).load(0)[1], ImageOps.exif_transpose(picture))


def some(values: list[list[int]]) -> Kind:
    """Write masks with these values in blocks."""

    def write(images: Path, masks: Path) -> None:
        for i, row in enumerate(values):
            write_photo(images / f"{i}.jpg", i)
            mask = np.zeros(SIZES[i], np.uint8)
            for k, value in enumerate(row):
                mask[6 * k + 1 : 6 * k + 6, 3:30] = value
            write_mask(masks / f"{i}.png", mask)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (some([[1], [255], [1]]), r"values 1, 255, .*1\.png nothing but 255.*--values ids"),
        (some([[1, 2], [255], [1, 255]]), r"255 may be ignored or an object"),
        (some([[127], [255], [255]]), r"--values binary"),
        (some([[0], [0]]), "all masks are black"),
        (pictures("{i}.jpg", "m{i}x.png"), r"no photo of .*images has a mask.*0\.jpg.*m0x\.png"),
        (pictures("{i}.png", "{i}.jpg"), r"0\.jpg: expected masks without losses"),
        (pictures("a/{i}.jpg", "{i}.png"), None),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, write, message):
    write(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    if message is None:
        write_photo(tmp_path / "images/b/3.jpg", 3)
        message = r"3\.png: expected one photo of this name, found .*a/3\.jpg.*b/3\.jpg"
    with pytest.raises(ValueError, match=message):
        import_folder(*paths)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("values", "areas"), [("ids", [{1: 135}, {1: 135}]), ("binary", [{1: 135}] * 3)]
)
def test_the_option_decides(tmp_path, values, areas):
    some([[1], [255], [1]])(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, values=values)
    source = FolderSource(tmp_path / "out")
    assert [source.class_areas(i) for i in range(len(source))] == areas


def test_ignored_values(tmp_path):
    some([[1, 9], [2, 9], [1, 2]])(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, ignored=["9"])
    source = FolderSource(tmp_path / "out")
    assert set(source.class_names) == {1, 2} and 255 in source.load(0)[1]


@pytest.mark.parametrize("moment", ["photo", "mask", "classes"])
def test_an_error_leaves_nothing(tmp_path, monkeypatch, moment):
    pictures("{i}.jpg", "{i}.png")(tmp_path / "images", tmp_path / "masks")
    target = {"photo": "shutil.copyfile", "mask": "PIL.Image.Image.save"}
    target = target.get(moment, "fss.data.imports.folder.write_json")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(target, fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="disk full"):
        import_folder(*[str(tmp_path / part) for part in ("images", "masks", "out")])
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten(tmp_path, capsys):
    pictures("{i}.jpg", "{i}.png")(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    assert main(["data", "import", *paths, "--classes", *NAMES]) == 0
    text = capsys.readouterr().out
    assert "6 of 6 photos, 3 classes" in text and "cat: " in text and "--data.root" in text
    assert main(["data", "import", *paths]) == 2
    assert "out: expected a new folder" in capsys.readouterr().err
    assert main(["data", "import", *paths[:2], str(tmp_path / "images/out")]) == 2
    assert "outside of" in capsys.readouterr().err
    for wrong in ([str(tmp_path / "none"), *paths[1:]], [paths[0], "none", paths[2]]):
        assert main(["data", "import", *wrong]) == 2
    for option in (["--classes", "1=a", "b"], ["--classes", "q=a"], ["--values", "soft"]):
        assert main(["data", "import", *paths[:2], str(tmp_path / "new"), *option]) == 2
    assert not (tmp_path / "new").exists()
