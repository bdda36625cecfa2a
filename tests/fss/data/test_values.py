"""Values of masks that the user names: of the object, of the background, ignored."""

from __future__ import annotations

import numpy as np
import pytest

from fss.data import FolderSource
from fss.data.imports.folder import import_folder
from tests.fss.data.test_imports import (
    check,
    coco,
    in_colors,
    pictures,
    runs,
    soft,
    some,
    truth,
    write_photo,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def inverted(mask: np.ndarray, i: int) -> np.ndarray:
    return (mask == 0) * np.uint8(255)


def blurred(mask: np.ndarray, i: int) -> np.ndarray:
    return 255 - soft(mask, i)


@pytest.mark.parametrize(
    ("mask", "convert", "options"),
    [
        ("{i}.png", inverted, {"classes": ["0=thing"]}),
        ("{i}.png", inverted, {"classes": ["0=thing"], "values": "binary"}),
        ("{i}.png", lambda m, i: inverted(m, i) // 255, {"classes": ["0=thing"]}),
        ("{i}.png", lambda m, i: inverted(m, i) * np.uint16(257), {"classes": ["0=thing"]}),
        ("{i}.png", inverted, {"classes": ["black=thing"], "values": "binary"}),
        ("{i}.png", inverted, {"classes": ["thing"], "background": "255"}),
        ("{i}.png", inverted, {"classes": ["thing"], "background": "white"}),
        ("{i}.png", blurred, {"classes": ["0=thing"]}),
        ("{i}.jpg", inverted, {"classes": ["thing"], "background": "255"}),
        ("{i}.png", lambda m, i: 255 - inverted(m, i), {"classes": ["255=thing"]}),
    ],
)
def test_the_named_value_is_the_object(tmp_path, mask, convert, options):
    pictures("{i}.webp", mask, convert)(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, **options)
    source = FolderSource(tmp_path / "out")
    assert source.class_names == {1: "thing"} and len(source) == 6
    for i in range(6):
        wrong = np.mean(source.load(i)[1] != (truth(i) > 0))
        assert wrong < 0.02 if convert is blurred or mask.endswith("jpg") else wrong == 0


def test_ignored_values_of_one_object(tmp_path):
    some([[255, 100], [255, 100], [255, 100]])(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks")]
    for name, ignored, ids in (("a", "100", [0, 1, 255]), ("b", "0", None)):
        if ids is None:
            with pytest.raises(ValueError, match=r"one object, .*values 0, 100, 255; name that"):
                import_folder(*paths, str(tmp_path / name), values="binary", ignored=[ignored])
            import_folder(
                *paths, str(tmp_path / name), ["100=x"], values="binary", ignored=[ignored]
            )
            ids = [0, 1, 255]
        else:
            import_folder(*paths, str(tmp_path / name), values="binary", ignored=[ignored])
        assert np.unique(FolderSource(tmp_path / name).load(0)[1]).tolist() == ids


def test_a_background_that_is_not_0(tmp_path):
    """Of Oxford-IIIT Pet: 1 is the pet, 2 the background, 3 the border."""

    def trimap(mask: np.ndarray, i: int) -> np.ndarray:
        found = np.where(mask > 0, 1, 2).astype(np.uint8)
        found[0] = 3
        return found

    pictures("{i}.jpg", "{i}.png", trimap)(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks")]
    lines = import_folder(*paths, str(tmp_path / "plain")).lines
    assert "no mask has 0: --background" in lines[1]
    lines = import_folder(*paths, str(tmp_path / "pet"), ["pet"], None, ["3"], "2").lines
    assert "2 is background" in lines[1] and "no mask has" not in lines[1]
    source = FolderSource(tmp_path / "pet")
    assert source.class_names == {1: "pet"}
    for i in range(6):
        expected = truth(i) > 0
        assert np.array_equal(source.load(i)[1][1:], expected[1:])
        assert (source.load(i)[1][0] == 255).all()


def test_a_background_of_a_color(tmp_path):
    def on_white(mask: np.ndarray, i: int) -> np.ndarray:
        return np.where(mask[..., None] > 0, in_colors(mask, (0, 0xFF00, 0xFF)), 255).astype("u1")

    pictures("{i}.jpg", "{i}.png", on_white)(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    import_folder(*paths, background="white")
    check(tmp_path / "out", (1, 3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["128=thing"]}, "128 is no value of the masks; these have 0, 255"),
        ({"classes": ["128=thing"], "values": "binary"}, "128 is no value of the masks"),
        ({"classes": ["red=thing"], "values": "binary"}, "#ff0000 is no value of the masks"),
        ({"classes": ["0=a", "255=b"]}, "expected one name"),
        ({"ignored": ["red"]}, "--ignored: #ff0000 is no value"),
        ({"background": "7"}, "--background: 7 is no value of the masks; these have 0, 255"),
        ({"background": "0", "classes": ["0=a"]}, "named in --classes or --ignored too"),
        ({"background": "x"}, "--background: expected a class id, or a color"),
        ({"ignored": ["0", "255"], "values": "binary"}, "expected one object"),
    ],
)
def test_a_value_that_masks_do_not_have(tmp_path, options, message):
    pictures("{i}.jpg", "{i}.png", inverted)(tmp_path / "images", tmp_path / "masks")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    with pytest.raises(ValueError, match=message):
        import_folder(*paths, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["1=a", "2=b", "3=c"]}, "--classes: expected names alone, in the order of"),
        ({"ignored": ["3"]}, "--ignored: .* has shapes"),
        ({"values": "ids"}, "--values: .* has shapes"),
        ({"background": "2"}, "--background: .* has shapes"),
    ],
)
def test_options_that_annotations_do_not_have(tmp_path, options, message):
    write_photo(tmp_path / "images/0.jpg", 0)
    path = coco(tmp_path, runs, lambda i: f"{i}.jpg")
    with pytest.raises(ValueError, match=message):
        import_folder(str(tmp_path / "images"), str(path), str(tmp_path / "out"), **options)


def test_shapes_that_are_lost(tmp_path):
    """Of COCO: box-only objects of photos that are in, and photos with nothing else."""
    for i in range(6):
        write_photo(tmp_path / f"images/{i}.jpg", i)
    path = coco(tmp_path, lambda i, k: [] if k == 1 else runs(i, k), lambda i: f"{i}.jpg")
    lines = import_folder(str(tmp_path / "images"), str(path), str(tmp_path / "out")).lines
    assert "left out: photos with boxes without shape: 1: 0.jpg" in lines
    lost = "left out: objects without a shape, background in these photos: 2: 3.jpg, 5.jpg"
    assert lost in lines


@pytest.mark.parametrize("ending", [".npy", ".mat", ".exr"])
def test_masks_that_are_no_pictures_are_named(tmp_path, ending):
    (tmp_path / "masks").mkdir()
    for i in range(3):
        write_photo(tmp_path / f"images/{i}.jpg", i)
        (tmp_path / f"masks/{i}{ending}").write_bytes(b"x")
    paths = [str(tmp_path / part) for part in ("images", "masks", "out")]
    with pytest.raises(ValueError, match=rf"Not read: 3 files of .*\({ending}\), 0\{ending}"):
        import_folder(*paths)
