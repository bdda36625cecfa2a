from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import svf_fast
from fss.cli import main
from fss.data import ShapesSource
from fss.data.images import ENDINGS
from fss.segment.predict import find_pictures, parse_mask, predict_files
from fss.segment.segmenter import FewShotSegmenter


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """support.png with mask.png and, in queries/, pictures of several sizes and kinds."""
    folder = tmp_path_factory.mktemp("photos")
    source = ShapesSource(size=97)
    image, classes = source.load(2003)
    class_id = int(classes[classes > 0][0])
    Image.fromarray(image).save(folder / "support.png")
    Image.fromarray((classes == class_id) * np.uint8(255)).save(folder / "mask.png")
    queries = folder / "queries"
    (queries / "deeper").mkdir(parents=True)
    Image.fromarray(image[:60]).save(queries / "a.png")
    Image.fromarray(image[..., 0]).save(queries / "grey.PNG")
    Image.fromarray(source.load(2004)[0]).save(queries / "deeper" / "a.jpg")
    (queries / ".hidden.png").write_bytes(b"")
    (queries / "notes.txt").write_text("none")
    return folder


def predict(photos, *arguments: str) -> int:
    support = ["--support", str(photos / "support.png"), str(photos / "mask.png")]
    return main(["predict", *support, "--size", "65", "--device", "cpu", *arguments])


def pictures(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_three_files_of_each_picture_of_a_folder(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(photos, "--query", str(photos / "queries"), "--out", str(out)) == 0
    names = ("a", "deeper/a", "grey")
    kinds = ("mask", "overlay", "probability")
    assert pictures(out) == [f"{name}.{kind}.png" for name in names for kind in kinds]
    assert "3 pictures segmented" in capsys.readouterr().out
    segmenter = FewShotSegmenter(size=65, device="cpu")
    segmenter.support(photos / "support.png", photos / "mask.png")
    result = segmenter(photos / "queries" / "a.png")
    mask, overlay, probability = (Image.open(out / f"a.{kind}.png") for kind in kinds)
    assert mask.mode == probability.mode == "L" and overlay.mode == "RGB"
    np.testing.assert_array_equal(np.array(mask), result.mask * 255)
    np.testing.assert_allclose(np.array(probability) / 255, result.probability, atol=0.003)
    np.testing.assert_array_equal(np.array(overlay), np.array(result.overlay()))


def test_boxes_polygons_and_several_supports(photos, tmp_path):
    path = str(photos / "support.png")
    arguments = ["--support", path, "5,5,60,60", "--support", path, "0,0 90,0 90.5,90"]
    query = str(photos / "queries" / "a.png")
    assert predict(photos, *arguments, "--query", query, "--out", str(tmp_path)) == 0
    segmenter = FewShotSegmenter(size=65, device="cpu")
    masks = [photos / "mask.png", (5, 5, 60, 60), [(0, 0), (90, 0), (90.5, 90)]]
    expected = segmenter.support([path] * 3, masks)(query).mask
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.mask.png")), expected * 255)


def test_results_are_not_overwritten_unasked(photos, tmp_path, capsys):
    query = str(photos / "queries" / "a.png")
    arguments = ["--query", query, "--out", str(tmp_path)]
    (tmp_path / "a.probability.png").write_bytes(b"mine")
    assert predict(photos, *arguments) == 2
    assert "a.probability.png is there already" in capsys.readouterr().err
    assert pictures(tmp_path) == ["a.probability.png"]
    assert predict(photos, *arguments, "--overwrite") == 0
    assert len(pictures(tmp_path)) == 3 and Image.open(tmp_path / "a.probability.png").size


def test_unreadable_pictures_are_named_and_the_others_done(photos, tmp_path, capsys):
    queries = tmp_path / "queries"
    queries.mkdir()
    (queries / "bad1.jpg").write_bytes(b"no")
    (queries / "bad2.png").write_bytes(b"")
    Image.new("RGB", (20, 30)).save(queries / "good.png")
    out = tmp_path / "out"
    assert predict(photos, "--query", str(queries), "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert "2 of 3 pictures cannot be read" in error
    assert "bad1.jpg" in error and "bad2.png" in error and "good.png" not in error
    assert len(pictures(out)) == 3


def test_no_picture_is_left_out_without_a_word(photos, tmp_path, capsys):
    """Formats of phones and browsers: read where the libraries can, else named and counted."""
    queries = tmp_path / "queries"
    queries.mkdir()
    picture = Image.new("RGB", (20, 30), (9, 99, 200))
    read = [f"a{e}" for e in (".jpg", ".ppm", ".webp", ".bmp", ".tif", ".jfif", ".jp2", ".avif")]
    read = [name for name in read if name[1:] in ENDINGS]
    for name in read:
        picture.save(queries / name)
    for name in ("b.heic", "c.jxl", "d.DNG"):
        (queries / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    out = tmp_path / "out"
    assert predict(photos, "--query", str(queries), "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert f"3 of {len(read) + 3} pictures cannot be read and are left out" in error
    assert all(name in error for name in ("b.heic", "c.jxl", "d.DNG", "JPEG, PNG"))
    assert len(pictures(out)) == 3 * len(read)


@pytest.mark.parametrize("ending", [".heic", ".jxl", ".psd"])
def test_a_format_that_cannot_be_read_is_told_which_can(photos, tmp_path, capsys, ending):
    (tmp_path / f"a{ending}").write_bytes(b"something else")
    query = str(tmp_path / f"a{ending}")
    assert predict(photos, "--query", query, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"a{ending}" in error and "expected JPEG, PNG" in error and "convert" in error


def test_how_masks_were_read_is_said(photos, tmp_path, capsys):
    support, query = str(photos / "support.png"), ["--query", str(photos / "queries" / "a.png")]
    object_ = np.array(Image.open(photos / "mask.png")) > 0
    ids = object_ * np.uint8(15)
    ids[:3] = 255
    Image.fromarray(ids).save(tmp_path / "ids.png")
    arguments = ["--support", support, str(tmp_path / "ids.png"), "--support", support, "5,5,60,60"]
    assert predict(photos, *arguments, *query, "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said == "support masks read as: 0 and 255; class id 15, 255 ignored; box"


@pytest.mark.parametrize("value, factor", [("7", 1), ("0,0,90", 0), ("9", 2)])
def test_a_value_of_the_masks_is_chosen(photos, tmp_path, capsys, value, factor):
    """Of two classes, as ids and in colors; without the option they are an error that names it."""
    from_support, query = str(photos / "support.png"), str(photos / "queries" / "a.png")
    first = np.array(Image.open(photos / "mask.png")) > 0
    if factor:
        mask = first * np.uint8(7)
        mask[:30, :30] = 9
    else:
        mask = first[..., None] * np.array([0, 0, 90], np.uint8)
        mask[:30, :30] = (90, 0, 0)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["predict", "--support", from_support, str(tmp_path / "mask.png"), "--query", query]
    arguments += ["--size", "65", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "--mask_value" in capsys.readouterr().err
    assert main([*arguments, "--mask_value", value]) == 0
    chosen = (mask == int(value)) if factor else (mask[..., 2] == 90)
    segmenter = FewShotSegmenter(size=65, device="cpu").support([from_support], [chosen])
    result = np.array(Image.open(tmp_path / "out/a.mask.png")) > 0
    np.testing.assert_array_equal(result, segmenter(query).mask)


@pytest.mark.parametrize(
    "mask, message",
    [
        ("0.2,0.3,0.8,0.9", "from 0 to 1: shares of the picture?"),
        ("0.1,0.1 0.9,0.1 0.9,0.9", "polygon are from 0 to 1: shares"),
        ("40,30,20,10", "as in COCO? give (40, 30, 60, 40)"),
        ("5,5,600,600", "reaches outside of its picture"),
    ],
)
def test_coordinates_that_are_no_pixels(photos, tmp_path, capsys, mask, message):
    query = str(photos / "queries" / "a.png")
    arguments = ["--support", str(photos / "support.png"), mask, "--query", query]
    assert predict(photos, *arguments, "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, queries, names",
    [
        (["x/a.png", "y/a.png"], ["x", "y"], ["x/a", "y/a"]),
        (["x/a.png", "y/a.png"], ["x/a.png", "y/a.png"], ["x/a", "y/a"]),
        (["p/x/a.png", "q/x/a.png"], ["p/x", "q/x"], ["p/x/a", "q/x/a"]),
        (["x/a.png", "x/a.bmp"], ["x"], ["a.bmp", "a.png"]),
        (["x/a.png", "x/A.bmp"], ["x"], ["A.bmp", "a.png"]),
        (["x/a.png", "x/a.bmp", "y/a.png"], ["x", "y"], ["x/a.bmp", "x/a.png", "y/a.png"]),
        (["x/a.png", "x/z/b.png"], ["x", "x/a.png"], ["a", "z/b"]),
        (["x/a.png", "x/z/b.png"], ["x/z", "x"], ["b", "a"]),
    ],
)
def test_no_result_takes_the_place_of_another(photos, tmp_path, monkeypatch, files, queries, names):
    monkeypatch.chdir(tmp_path)
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    assert predict(photos, "--query", *queries, "--out", "out") == 0
    expected = sorted(f"{n}.{k}.png" for n in names for k in ("mask", "overlay", "probability"))
    assert pictures(tmp_path / "out") == expected


def test_results_among_the_queries_are_not_segmented(photos, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for out in (tmp_path, tmp_path / "out"):
        assert predict(photos, "--query", str(tmp_path), "--out", str(out)) == 0
        assert [p.name for p in find_pictures([str(tmp_path)], tmp_path / "out")] == ["a.png"]


def test_results_are_upright(photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert predict(photos, "--query", str(tmp_path / "turned.jpg"), "--out", str(tmp_path)) == 0
    for kind in ("mask", "overlay", "probability"):
        result = Image.open(tmp_path / f"turned.{kind}.png")
        assert result.size == (20, 30) and not result.getexif()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--query", "nowhere.png"], "file or a folder at nowhere.png"),
        (["--query", "."], "expected pictures (.jpg"),
        (["--query", "a.txt", "--support", "a.txt", "1,2,3"], 'a box "x0,y0,x1,y1"'),
        (["--query", "a.txt", "--batch_size", "0"], "batch_size"),
        (["--query", "a.txt", "--threshold", "2"], "threshold"),
        (["run", "--query", "a.txt"], "size: a run brings its own"),
        (["--query", "a.txt", "--adapter", "none.safetensors"], "no such file"),
        (["--query", "a.txt", "--weights", "none.pt"], "none.pt"),
        (["--query"], "expected at least one argument"),
        (["--query", "a.txt", "--device", "tpu"], "tpu"),
    ],
)
def test_wrong_use_is_explained(photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("no picture, but asked for")
    assert predict(photos, *arguments, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_support_is_needed(photos, tmp_path, capsys):
    query = str(photos / "support.png")
    assert main(["predict", "--query", query, "--out", str(tmp_path)]) == 2
    assert "support: expected at least one picture" in capsys.readouterr().err


def test_masks_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1,2,3,4").touch()
    assert parse_mask("mask.png") == "mask.png"
    assert parse_mask("1,2,3,4") == "1,2,3,4"  # a file of that name
    assert parse_mask("1,2,3.5,4") == (1, 2, 3.5, 4)
    assert parse_mask("1,2 3,4 5,6") == [(1, 2), (3, 4), (5, 6)]
    for text in ("1,2", "1,2 3,4", "1,2,3 4,5,6 7,8,9", "1,,2"):
        with pytest.raises(ValueError, match="polygon"):
            parse_mask(text)


def test_a_run_predicts(photos, tmp_path, tiny):
    from fss.training.run import train

    config = tiny(steps=1)
    train(config)
    out, query = tmp_path / "out", str(photos / "support.png")
    support = (query, str(photos / "mask.png"))
    predict_files([query], [support], str(out), run=config.out, device="cpu")
    with_adapter = predict_files(
        [query],
        [support],
        str(out),
        run=config.out,
        adapter=f"{config.out}/adapter.safetensors",
        overwrite=True,
    )
    assert "1 picture segmented" in with_adapter and len(pictures(out)) == 3


def test_tuning_on_the_supports_first(photos, tmp_path, capsys, monkeypatch):
    query = ["--query", str(photos / "queries" / "a.png"), "--out", str(tmp_path)]
    file = tmp_path / "tuned.safetensors"
    tune = ["--tune", "2", "--tune_lr", "0.05", "--save_adapter", str(file)]
    assert predict(photos, *query, *tune) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "held-out IoU" in each]
    begin = "tuned svf on 1 support and 1 picture without a mask: held-out IoU 0."
    assert line.startswith(begin) and str(file) in line
    tuned = np.array(Image.open(tmp_path / "a.probability.png"))
    assert svf_fast.Adapter.load(file).card["tuned"] == "svf"
    assert predict(photos, *query, "--overwrite", "--adapter", str(file)) == 0
    np.testing.assert_allclose(Image.open(tmp_path / "a.probability.png"), tuned, atol=1)
    again = ["--query", query[1], "--out", str(tmp_path / "other"), *tune]
    assert predict(photos, *again) == 2  # a tuned file is not replaced unasked
    assert f"save_adapter: {file} is there already" in capsys.readouterr().err
    # from there on, with the queries as backgrounds; what is no picture is named in the end
    seen = []
    own = FewShotSegmenter.tune

    def spied(self, *arguments, **named):
        seen.append([image.shape for image in named["unlabeled"]])
        return own(self, *arguments, **named)

    monkeypatch.setattr(FewShotSegmenter, "tune", spied)
    (tmp_path / "bad.png").write_bytes(b"none")
    both = [*query[:2], str(tmp_path / "bad.png"), *query[2:]]
    assert predict(photos, *both, "--overwrite", "--tune", "1") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "bad.png") in error and "held-out IoU" in error
    assert seen == [[np.array(Image.open(query[1])).shape]]
    more = ["--tune", "1", "--tune_what", "bias", "--adapter", str(file), "--overwrite"]
    assert predict(photos, *query, *more) == 0
    assert "tuned bias on 1 support and 1 picture" in capsys.readouterr().out


def test_nothing_that_goes_wrong_with_tuning_keeps_pictures_back(
    photos, tmp_path, capsys, monkeypatch
):
    query = ["--query", str(photos / "queries" / "a.png"), "--overwrite", "--out"]
    assert predict(photos, *query, str(tmp_path / "untuned")) == 0
    capsys.readouterr()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tune = ["--tune", "1", "--save_adapter", str(tmp_path / "a.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr("fss.segment.tuning._Loop._measure", stopped)
        assert predict(photos, *query, str(tmp_path / "stopped"), *tune) == 0
    assert "not tuned: stopped by ctrl-C before the first step" in capsys.readouterr().out
    expected = (tmp_path / "untuned" / "a.probability.png").read_bytes()
    assert (tmp_path / "stopped" / "a.probability.png").read_bytes() == expected
    with monkeypatch.context() as patch:
        patch.setattr(svf_fast.Adapter, "save", full)
        assert predict(photos, *query, str(tmp_path / "full"), *tune) == 2
    error = capsys.readouterr().err
    assert "save_adapter: " in error and "No space left" in error and "held-out IoU" in error
    assert len(pictures(tmp_path / "full")) == 3
    (tmp_path / "bad.png").write_bytes(b"none")
    bad = ["--query", str(tmp_path / "bad.png"), "--out", str(tmp_path / "none")]
    assert predict(photos, *bad, "--tune", "1") == 2
    error = capsys.readouterr().err
    assert "1 of 1 pictures cannot be read and nothing is segmented" in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tune", "0"], "tune: expected at least 1, got 0"),
        (["--tune", "3", "--tune_what", "svd"], "tune_what: expected one of svf, svf_scale"),
        (["--tune", "3", "--tune_lr", "-1"], "tune_lr: expected a number above 0"),
        (["--tune", "3", "--save_adapter", "."], "save_adapter: expected a file, . is a folder"),
        (["--tune", "3", "--save_adapter", "/proc/x/a.st"], "save_adapter: /proc/x/a.st cannot be"),
        (["--save_adapter", "a.st"], "save_adapter: expected with --tune STEPS"),
        (["--tune_what", "full"], "tune_what: expected with --tune STEPS"),
        (["--tune", "3", "--tune_what", "full", "--save_adapter", "a.st"], "singular values alone"),
    ],
)
def test_wrong_tuning_is_explained(photos, tmp_path, capsys, options, message):
    query = str(photos / "queries" / "a.png")
    assert predict(photos, "--query", query, "--out", str(tmp_path), *options) == 2
    assert message in capsys.readouterr().err
    assert not pictures(tmp_path)


def test_a_place_that_cannot_be_written_is_told_first(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FewShotSegmenter, "support", None)  # not so far
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results"
    assert predict(photos, "--query", str(photos / "queries"), "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert f"out: {out}" in error and "cannot be written (Not a directory)" in error
