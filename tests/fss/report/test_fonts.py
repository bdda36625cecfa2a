"""Names in any script: drawn where a font has them, else other words, never a warning."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import FontProperties, fontManager

from fss.data import build_episodes
from fss.files import write_json
from fss.models import Prediction
from fss.report import write_report
from fss.report.episodes import draw_episodes
from fss.report.fonts import legible, with_fallbacks
from fss.report.plot import figure_style, new_figure, save_plot, write_png
from fss.report.runs import read_runs
from fss.training.run import train

NAMES = {
    "Chinese": "猫",
    "Japanese": "犬です",
    "Korean": "배나무",
    "Thai": "ดอกไม้",
    "Hindi": "बिल्ली",
    "emoji": "🐈",
}
INSTALLED = {"Chinese": "Noto Sans CJK SC", "Korean": "Malgun Gothic", "Thai": "Loma"}


@pytest.fixture(autouse=True)
def fonts(monkeypatch) -> None:
    """A machine with matplotlib's own font alone, where a warning is an error."""
    own = [font for font in fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(fontManager, "ttflist", own)
    fontManager._findfont_cached.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    fontManager._findfont_cached.cache_clear()


@pytest.fixture
def install(tmp_path) -> Callable[[str, str], None]:
    """Installs a font that draws each of these characters as a block."""

    def add(family: str, characters: str) -> None:
        pen = TTGlyphPen(None)
        for place, (x, y) in enumerate(((0, 0), (0, 900), (900, 900), (900, 0))):
            (pen.lineTo if place else pen.moveTo)((x, y))
        pen.closePath()
        block = pen.glyph()
        glyphs = {".notdef": block} | {f"uni{ord(c):04X}": block for c in characters}
        font = FontBuilder(1000)
        font.setupGlyphOrder(list(glyphs))
        font.setupCharacterMap({ord(c): f"uni{ord(c):04X}" for c in characters})
        font.setupGlyf(glyphs)
        font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
        font.setupHorizontalHeader(ascent=900, descent=-100)
        font.setupNameTable({"familyName": family, "styleName": "Regular"})
        font.setupOS2(sTypoAscender=900)
        font.setupPost()
        path = tmp_path / f"{family}.ttf"
        font.save(path)
        fontManager.addfont(path)

    return add


def title(path: Path, text: str, instead: dict[str, str]) -> np.ndarray:
    figure = new_figure(4, 1, instead)
    figure.suptitle(text)
    write_png(figure, path)
    return cv2.imread(str(path))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_no_font_has(name, tmp_path):
    font = FontProperties()
    instead = {name: "class 7", "fish": "class 8"}
    assert legible(f"support 1: {name}, fish", font, instead) == "support 1: class 7, fish"
    assert legible(f"{name}!", font, {}) == "?" * len(name) + "!"
    with_number = title(tmp_path / "a.png", f"support: {name}", instead)
    assert np.array_equal(with_number, title(tmp_path / "b.png", "support: class 7", {}))


def test_a_name_within_another():
    instead = {"猫": "class 1", "山猫": "class 2"}
    assert legible("猫, 山猫", FontProperties(), instead) == "class 1, class 2"


@pytest.mark.parametrize("script", INSTALLED)
def test_a_name_that_an_installed_font_has(script, install, tmp_path):
    name, family = NAMES[script], INSTALLED[script]
    install(family, name)
    font = FontProperties()
    assert legible(f"a {name}", font, {name: "class 7"}) == f"a {name}"
    assert with_fallbacks(f"a {name}", font).get_family() == ["sans-serif", family]
    assert with_fallbacks("a cat", font) is font
    drawn = title(tmp_path / "a.png", name, {name: "class 7"})
    em = 12 * 200 / 72  # pixels; marks above and below letters may lie on each other
    assert (drawn < 128).all(2).sum() == pytest.approx(len(name) * (0.9 * em) ** 2, rel=0.2)


def test_two_scripts_in_a_name(install):
    install("SimHei", "猫")
    install("Noto Sans Thai", "ดอก")
    both = "猫 ดอก"
    assert legible(both, FontProperties(), {both: "class 1"}) == both
    assert with_fallbacks(both, FontProperties()).get_family()[1:] == ["SimHei", "Noto Sans Thai"]
    assert legible("猫 배", FontProperties(), {"猫 배": "class 1"}) == "class 1"


def test_svg_keeps_the_names(tmp_path):
    with figure_style():
        figure = new_figure(4, 2, {"猫": "class 1"})
        axes = figure.subplots()
        axes.barh([0, 1], [1, 2])
        axes.set_yticks([0, 1], ["猫", "fish"])
    save_plot(figure, tmp_path, "plot", "text")
    assert "猫" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


class Nothing(torch.nn.Module):
    """Predicts background everywhere."""

    def forward(self, query_image, support_images, support_masks):
        background = torch.ones_like(query_image[:, 0])
        return Prediction(torch.stack([background, -background], dim=1), ())


@pytest.mark.parametrize("script", ["Chinese", "Korean", "Thai"])
def test_classes_of_the_episodes(script, tiny, tmp_path):
    episodes = build_episodes(tiny().data, "test", 20, 0)
    pictures = []
    for names in (
        dict.fromkeys(episodes.source.class_names, NAMES[script]),
        {number: f"class {number}" for number in episodes.source.class_names},
    ):
        # one name for all: the last class's number stands for it
        last = max(names)
        names = dict.fromkeys(names, names[last])
        draw_episodes(tmp_path / "a.png", Nothing(), episodes, names, 2, torch.device("cpu"))
        pictures.append(cv2.imread(str(tmp_path / "a.png")))
    assert np.array_equal(*pictures)


def test_dollars_in_a_class_name_are_no_formula(tiny, tmp_path):
    episodes = build_episodes(tiny().data, "test", 20, 0)
    names = dict.fromkeys(episodes.source.class_names, r"$\frac")
    draw_episodes(tmp_path / "a.png", Nothing(), episodes, names, 1, torch.device("cpu"))


def test_pictures_of_a_report(tiny, tmp_path):
    """A run, its classes and its photo have names that no font has."""
    train(tiny(out=str(tmp_path / "run")))
    (run,) = read_runs([tmp_path / "run"])
    photo = cv2.imread(str(tmp_path / "run" / "curves.png"))
    pictures = {}
    for word, shown in (("猫", "写真.png"), ("run 1", "photo")):
        folder = tmp_path / shown.replace(".", "-") / word
        shutil.copytree(tmp_path / "run", folder)
        test = run.result["test"]
        name = "星" if word == "猫" else f"class {test['class_ids']['star']}"
        one = {key: {name: test[key]["star"]} for key in ("iou", "class_ids")}
        write_json(folder / "result.json", run.result | {"test": test | one})
        cv2.imencode(".png", photo)[1].tofile(str(folder / shown))
        write_report([folder], photo=folder / shown)
        pictures[word] = {
            path.name: cv2.imread(str(path)) for path in (folder / "report/pictures").glob("*.png")
        }
    assert len(pictures["猫"]) > 6 and pictures["猫"].keys() == pictures["run 1"].keys()
    for name, picture in pictures["猫"].items():
        assert np.array_equal(picture, pictures["run 1"][name]), name
    assert "星" in (tmp_path / "写真-png/猫/report/report.html").read_text(encoding="utf-8")
