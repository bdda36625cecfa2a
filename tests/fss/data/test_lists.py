"""Lists of files as other programs, other systems and other projects write them."""

from __future__ import annotations

import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fss.config import DataConfig
from fss.data import CocoSource, FolderSource, Fss1000Source, PascalSource, build_episodes
from fss.data.lists import Listing, read_list
from fss.files import parse_json, read_text, read_yaml

STEMS = ("2007_a", "2007_b", "2008_c", "2008_d", "übung 1", "IMG 20 01")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fill(images: Path, masks: Path, names=STEMS, ids=None) -> None:
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (80, 60), (40 * i, 9, 9)).save(images / f"{name}.jpg")
        mask = np.zeros((60, 80), np.uint8)
        mask[:50] = ids[i] if ids else i + 1
        Image.fromarray(mask).save(masks / f"{name}.png")


@pytest.fixture
def voc(tmp_path) -> Path:
    fill(tmp_path / "VOC2012/JPEGImages", tmp_path / "VOC2012/SegmentationClassAug")
    return tmp_path / "VOC2012"


def lines(form: str, names=STEMS, end="\n") -> str:
    return end.join(form.format(name) for name in names)


def read(voc: Path, content: bytes | str) -> Listing:
    path = voc / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_list(path, voc, "JPEGImages", "SegmentationClassAug")


WHOLE = "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png"


@pytest.mark.parametrize(
    "content",
    [
        lines(WHOLE),
        lines(WHOLE, end="\r\n"),
        lines(WHOLE, end="\r"),
        lines(WHOLE + "  \t "),
        "\n\n" + lines(WHOLE, end="\n\n"),
        "\ufeff" + lines(WHOLE),
        "\ufeff" + lines("{}", end="\r\n"),
        lines("{}.jpg"),
        lines("JPEGImages/{}.jpg"),
        lines(WHOLE.replace("/", "\\")),
        "\ufeff" + lines("D:\\data\\VOC\\" + WHOLE.replace("/", "\\"), end="\r\n"),
        lines("/srv/x/JPEGImages/{0}.jpg\t/srv/x/SegmentationClassAug/{0}.png"),
        unicodedata.normalize("NFD", lines(WHOLE)),
        unicodedata.normalize("NFD", lines("{}")),
        lines(WHOLE.replace(".jpg", ".JPG").replace("JPEGI", "jpegi")),
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_forms_of_a_list(voc, content):
    found = read(voc, content)
    assert [pair.image.stem for pair in found.pairs] == list(STEMS)
    assert all(pair.mask.stem == pair.image.stem and pair.mask.is_file() for pair in found.pairs)
    assert found.classes == []


def test_names_of_macos_on_disk(tmp_path):
    """A file system that keeps the decomposed form, and a list in the composed one."""
    names = [unicodedata.normalize("NFD", name) for name in ("été", "übung", "한글")]
    fill(tmp_path / "JPEGImages", tmp_path / "SegmentationClassAug", names)
    found = read(tmp_path, lines(WHOLE, [unicodedata.normalize("NFC", name) for name in names]))
    assert [pair.image.stem for pair in found.pairs] == names


@pytest.mark.parametrize("ending", ["JPG", "jpeg", "JPEG", "png", "webp", "bmp", "tif"])
def test_names_alone_find_photos_of_any_ending(voc, ending):
    (voc / "JPEGImages/2007_b.jpg").unlink()
    Image.new("RGB", (80, 60)).save(voc / f"JPEGImages/2007_b.{ending}")
    found = read(voc, lines("{}"))
    assert found.pairs[1].image.name == f"2007_b.{ending}"


def test_one_missing_file_is_not_all(voc):
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing.*JPEGImages/none\.jpg"):
        read(voc, lines(WHOLE, ("none", "2007_a", "2007_b")))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing.*JPEGImages/none\.jpg"):
        read(voc, "2007_a\nnone\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("reader", [read_text, read_yaml])
def test_utf_16_is_named(tmp_path, encoding, reader):
    (tmp_path / "list.txt").write_text("2007_a\n2007_b\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"list\.txt: expected .*UTF-8, got UTF-16.*save it as"):
        reader(tmp_path / "list.txt")


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes("übung".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8, got the byte 0xfc at 0"):
        read_text(tmp_path / "list.txt")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_elsewhere(tmp_path, mark):
    (tmp_path / "a").write_text(mark + '{"steps": 3}', encoding="utf-8")
    assert parse_json(read_text(tmp_path / "a"), "a") == read_yaml(tmp_path / "a") == {"steps": 3}


# Lists of HSNet


def test_classes_of_hsnet(voc):
    text = "2007_a__01\n2007_b__02\n2007_a__05\nübung 1__20\n"
    found = read(voc, text)
    assert [pair.image.stem for pair in found.pairs] == ["2007_a", "2007_b", "übung 1"]
    assert [(pair.image.stem, c) for pair, c in found.classes] == [
        ("2007_a", 1),
        ("2007_b", 2),
        ("2007_a", 5),
        ("übung 1", 20),
    ]
    with pytest.raises(ValueError, match="line 2: 2007_a is listed twice"):
        read(voc, "2007_a__01\n2007_a__01\n")
    with pytest.raises(ValueError, match=r"a class on every line .* got 1 lines without and 1"):
        read(voc, "2007_a__01\n2007_b\n")


def test_a_name_that_looks_like_a_class(voc):
    """A photo of the whole name is meant as such."""
    fill(voc / "JPEGImages", voc / "SegmentationClassAug", ["IMG__01", "IMG__02"])
    found = read(voc, "IMG__01\nIMG__02\n")
    assert [pair.image.stem for pair in found.pairs] == ["IMG__01", "IMG__02"] and not found.classes


def test_pascal_with_lists_of_hsnet(voc, tmp_path):
    """One file, or the folder of the files of all folds."""
    (tmp_path / "trn").mkdir()
    (tmp_path / "trn/fold0.txt").write_text("2007_a__01\n2007_b__02\n")
    (tmp_path / "trn/fold1.txt").write_text("2008_c__03\n")
    (tmp_path / "val.txt").write_text("2008_d__04\n")
    source = PascalSource(tmp_path, tmp_path / "trn", tmp_path / "val.txt")
    assert [source.name(i) for i in source.indices("train")] == ["2007_a", "2007_b", "2008_c"]
    assert source.listed_classes("train") == [(0, 1), (1, 2), (2, 3)]
    assert source.listed_classes("test") == [(3, 4)]
    one = PascalSource(tmp_path, tmp_path / "trn/fold0.txt", tmp_path / "val.txt")
    assert one.listed_classes("train") == [(0, 1), (1, 2)] and len(one) == 3


def test_episodes_ask_for_the_pairs_of_hsnet(voc, tmp_path):
    """In the order of the list, with the class that it names: protocol hsnet."""
    listed = [("2007_a", 1), ("2008_c", 1), ("2007_b", 2), ("2007_a", 2), ("2008_c", 2)]
    for name in ("2007_a", "2007_b", "2008_c"):
        mask = np.zeros((60, 80), np.uint8)
        mask[:20], mask[30:50] = 1, 2
        Image.fromarray(mask).save(voc / f"SegmentationClassAug/{name}.png")
    (tmp_path / "val.txt").write_text("".join(f"{name}__{c:02d}\n" for name, c in listed))
    (tmp_path / "trn.txt").write_text("2008_d__04\n")
    config = DataConfig(
        "pascal",
        str(tmp_path),
        str(tmp_path / "trn.txt"),
        str(tmp_path / "val.txt"),
        size=33,
        protocol="hsnet",
        shuffle_test=False,
        drop_small_classes=True,
    )
    with pytest.warns(UserWarning, match="left out: bird 0"):
        data = build_episodes(config, "test", 5, 0)
    drawn = [data.draw(i) for i in range(5)]
    assert [(data.source.name(e.query), e.class_id) for e in drawn] == listed


def test_classes_that_the_masks_do_not_show(voc, tmp_path):
    (tmp_path / "val.txt").write_text("2008_d__04\n")
    (tmp_path / "trn.txt").write_text("2007_a__01\n2007_b__02\n2007_b__09\n")
    with pytest.warns(UserWarning, match=r"1 of the 3 classes .* train list.* 9 in .*2007_b\.png"):
        source = PascalSource(tmp_path, tmp_path / "trn.txt", tmp_path / "val.txt")
    assert source.listed_classes("train") == [(0, 1), (1, 2)]
    (tmp_path / "trn.txt").write_text("2007_a__00\n2007_b__01\n2008_c__02\n")  # counted from 0
    with pytest.raises(ValueError, match=r"3 of the 3 classes in the train list are not in"):
        PascalSource(tmp_path, tmp_path / "trn.txt", tmp_path / "val.txt")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_coco_with_lists_of_hsnet(tmp_path, protocol):
    for split, names in (("train2014", ["a", "b"]), ("val2014", ["c"])):
        fill(tmp_path / split, tmp_path / "annotations" / split, names)
    trn = {0: ["train2014/a.jpg"], 1: ["train2014/b.jpg"], 2: []}
    val = {0: ["val2014/c.jpg"], 7: []}
    (tmp_path / "trn.pkl").write_bytes(pickle.dumps(trn, protocol))
    (tmp_path / "val.pkl").write_bytes(pickle.dumps(val, protocol))
    source = CocoSource(tmp_path, "fwb", tmp_path / "trn.pkl", tmp_path / "val.pkl")
    assert [source.name(i) for i in source.indices("train")] == ["a", "b"]
    assert source.listed_classes("train") == [(0, 1), (1, 2)]
    assert source.listed_classes("test") == [(2, 1)]
    image, mask = source.load(1)
    assert abs(int(image[0, 0, 0]) - 40) < 4 and mask.max() == 2


class Stranger:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "content",
    [
        lambda trace: pickle.dumps({0: ["a"], 1: Stranger(trace)}),
        lambda trace: pickle.dumps(Stranger(trace), protocol=2),
        lambda trace: b"\x80\x02cos\nmkdir\n(V" + str(trace).encode() + b"\ntR.",
        lambda trace: b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x01x\x85R.",
        lambda trace: pickle.dumps({0: [np.str_("a")]}),
        lambda trace: pickle.dumps({0: ["a"]})[:-9],
        lambda trace: b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of gigabytes
        lambda trace: b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",  # so many bytes
        lambda trace: pickle.dumps({}),
        lambda trace: pickle.dumps(["a", "b"]),
        lambda trace: pickle.dumps({"cat": ["a"]}),
        lambda trace: pickle.dumps({0: "a"}),
        lambda trace: pickle.dumps({0: [["a"]]}),
        lambda trace: pickle.dumps(dict.fromkeys(range(5000), ["a"] * 5000)),
    ],
)
def test_no_pickle_is_executed(tmp_path, content):
    trace = tmp_path / "trace"
    (tmp_path / "list.pkl").write_bytes(content(trace))
    with pytest.raises(ValueError, match=r"list\.pkl: expected a pickle of image names by class"):
        read_list(tmp_path / "list.pkl", tmp_path, "train2014", "annotations/train2014")
    assert not trace.exists()


# Other text files of a data set


@pytest.mark.parametrize("change", [str, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")])
def test_lists_of_a_folder(tmp_path, change):
    names = ["p0", "ü1", "p 2", "p3"]
    root = tmp_path / "photos"
    fill(root / "JPEGImages", root / "SegmentationClass", names)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "classes.json").write_bytes(
        change('{"classes": ["a", "b", "c", "d"]}\n').encode("utf-8")
    )
    train = ["p0 ", unicodedata.normalize("NFD", "ü1"), "JPEGImages\\p 2.jpg", ""]
    for name, text in (("train", "\n".join(train)), ("val", "p3\n")):
        (root / f"ImageSets/Segmentation/{name}.txt").write_bytes(change(text).encode("utf-8"))
    source = FolderSource(root)
    assert {source.name(i) for i in source.indices("train")} == set(names[:3])


@pytest.mark.parametrize("change", [str, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")])
def test_lists_of_classes(tmp_path, change):
    for name in ("cat", unicodedata.normalize("NFD", "mésange"), "dog"):
        fill(tmp_path / name, tmp_path / name, ["1", "2"], ids=[255, 255])
    (tmp_path / "trn.txt").write_bytes(change("cat\nmésange\n").encode("utf-8"))
    (tmp_path / "test.txt").write_bytes(change("dog\\\n").encode("utf-8"))
    source = Fss1000Source(tmp_path, tmp_path / "trn.txt", tmp_path / "test.txt")
    assert len(source) == 6 and len(source.indices("train")) == 4


@pytest.mark.parametrize("change", [str, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")])
def test_lists_of_voc(voc, change):
    for part, text in (("Main/train", "2007_a\n2007_b\n"), ("Segmentation/train", "2008_c  1\n")):
        (voc / f"ImageSets/{part}.txt").parent.mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/{part}.txt").write_bytes(change(text).encode("utf-8"))
    (voc / "ImageSets/Segmentation/val.txt").write_bytes(change("2008_d\n").encode("utf-8"))
    source = PascalSource(voc)
    assert [source.name(i) for i in source.indices("train")] == ["2007_a", "2007_b", "2008_c"]


def nested(depth: int, kind: type) -> object:
    value: object = kind(["a"])
    for _ in range(depth):
        value = kind([value, value])
    return value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({0: nested(60, list)}), r"got 0: \[\["),
        (pickle.dumps({0: nested(60, tuple)}), "it has a tuple twice"),
        (pickle.dumps({0: nested(60, tuple)}, 0), "it has a tuple twice"),
        (pickle.dumps([nested(60, list)]), "got a list without any"),
        (b"\x80\x04}(U\x01a" + b"\x85" + b"2\x86" * 60 + b"]su.", "the instruction DUP"),
    ],
)
def test_values_nested_without_end(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "a.pkl", tmp_path, "images", "masks")


def test_a_key_of_nested_tuples(tmp_path):
    """Whose hash alone would take time without end."""
    steps = b"".join(b"h%c\x86q%c" % (k, k + 1) for k in range(1, 60))
    content = b"\x80\x02}U\x01a\x85q\x01" + steps + b"]s."
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="it has a tuple twice"):
        read_list(tmp_path / "a.pkl", tmp_path, "images", "masks")
