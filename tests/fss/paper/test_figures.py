"""The paper's figures: which runs, which panels, and that what is drawn is what the runs hold."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file

import fss.paper.figures
import fss.paper.runs
from fss.cli import build_parser, main
from fss.config import TrainConfig
from fss.paper.figures import figure_names, load_figure
from fss.paper.tables import default_folder, run_values
from fss.report.components import test_photos as photos_of
from fss.report.curves import Panel, plot_panels
from fss.report.runs import read_runs
from fss.runs.checkpoint import load_checkpoint
from fss.training.trainer import Trainer

FIGURES = [f"F{number}" for number in range(2, 13)]
FOLDER = default_folder()
SETTINGS = {
    "data": {"size": 33, "min_area": 0.01},
    "model": {"backbone": "resnet50", "width": 4, "weights": "none", "channels": 8},
    "optimizer": {"lr": 0.05},
    "steps": 4,
    "batch_size": 2,
    "validation_every": 2,
    "validation_episodes": 3,
    "test_episodes": 8,
    "test_seeds": [1],
    "pictures": 0,
    "log_every": 1,
    "accelerator": "cpu",
}
BLOCKS = {"layer2": 4, "layer3": 6}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def command(store, tmp_path):
    """Runs `fss reproduce` on a tiny network, with two runs trained once for all tests."""

    def run(*arguments: str, out: Path = tmp_path / "out") -> int:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
        options = ["--settings", str(tmp_path / "tiny.yaml"), "--out", str(out), "--scale-down"]
        return main(["reproduce", *arguments, *options])

    if not (store / "scaled-down").exists():
        assert run("F3", "--rows", "1", "r50-baseline-svf", out=store) == 0
    shutil.copytree(store / "scaled-down/pascal-5i", tmp_path / "out/scaled-down/pascal-5i")
    return run


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The runs that are trained, as they begin."""
    names: list[str] = []
    original = fss.paper.runs.train

    def note(config, **options):
        names.append(Path(config.out).parent.name)
        return original(config, **options)

    monkeypatch.setattr(fss.paper.runs, "train", note)
    return names


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The pictures that are drawn."""
    pictures: list[Figure] = []
    original = fss.paper.figures.save_plot

    def note(picture, *arguments):
        pictures.append(picture)
        return original(picture, *arguments)

    monkeypatch.setattr(fss.paper.figures, "save_plot", note)
    return pictures


def folder_of(tmp_path: Path, run: str) -> Path:
    return tmp_path / "out/scaled-down/pascal-5i" / run / "1shot-fold0"


def values_of(folder: Path, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """S of a layer before and after training, by the pretrained ones in descending order."""
    before = load_file(folder / "pretrained.safetensors")[f"{layer}.S"]
    checkpoint = json.loads((folder / "result.json").read_text())["test"]["checkpoint"]
    after = load_checkpoint(folder / checkpoint)["model"][f"backbone.{layer}.S"]
    order = before.argsort(descending=True, stable=True)
    return before[order].double().numpy(), after[order].double().numpy()


def titles(picture: Figure) -> list[str]:
    return [a.get_title("left") or a.get_title() for a in picture.axes if a.get_visible()]


def test_all_figures_that_measure_something():
    assert figure_names(FOLDER) == FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_runs_that_can_be_made(name):
    figure = load_figure(name.lower(), FOLDER)
    assert figure.name == name and figure.table.title
    for row in figure.table.rows:
        for fold in range(4):
            values = run_values(figure.table, row, 1, fold, {"data": {"root": "photos"}})
            config = TrainConfig.from_dict(values)
            assert config.data.fold == fold and config.data.exclude_novel
            assert config.model.name == ("pfenet" if name == "F2" else "baseline")


def test_the_regimes_of_the_curves():
    """By the captions of Figures 2 and 3, and the regimes of Tables 5 and 6."""

    def regimes(name: str) -> list[tuple[str, ...]]:
        found = []
        for row in load_figure(name, FOLDER).table.rows:
            regime = TrainConfig.from_dict({"data": {"root": "x"}} | row.settings).regime
            frozen = regime.name == "freeze" and regime.batch_norm == "none"
            found.append(("freeze",) if frozen else (regime.name, regime.layers, regime.kernel))
        return found

    stages = ("layer2", "layer3", "layer4")
    svf = ("svf", stages, "all")
    frozen = ("freeze",)
    assert regimes("F2") == [frozen, ("full", ("all",), "all"), svf]
    assert regimes("F3") == [frozen, ("full", stages, "all"), ("full", stages, "1x1"), svf]
    assert regimes("F7") == [
        frozen,
        ("full", ("all",), "all"),
        ("full", stages, "all"),
        ("full", stages[1:], "all"),
        ("full", stages[2:], "all"),
        ("full", stages, "3x3"),
        ("full", stages, "1x1"),
        svf,
    ]


@pytest.mark.parametrize("name", ["F1", "F13", "F14"])
def test_what_is_no_figure(name, capsys):
    assert main(["reproduce", name]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "expected one of F2, F3" in error
    assert ("is a drawing" in error) == (name != "F14")


def test_curves(command, trained, drawn, tmp_path, capsys):
    assert command("F3", "--draw") == 0
    assert trained == []
    (picture,) = drawn
    assert titles(picture) == [
        "(a) backbone frozen",
        "(b) layers 2-4",
        "(c) all 1×1",
        "(d) SVF",
    ]
    for place, run in ((0, "r50-baseline-freeze"), (3, "r50-baseline-svf")):
        folder = folder_of(tmp_path, run)
        rows = list(csv.DictReader((folder / "validation.csv").open()))
        assert len(rows) == 2
        images = json.loads((folder / "result.json").read_text())["epoch_images"]
        lines = {line.get_label(): line for line in picture.axes[place].get_lines()}
        assert set(lines) == {"training", "validation"}
        for label, column in (("training", "train_miou"), ("validation", "miou")):
            epochs = [int(row["step"]) / (images // SETTINGS["batch_size"]) for row in rows]
            np.testing.assert_allclose(lines[label].get_xdata(), epochs)
            percent = [100 * float(row[column]) for row in rows]
            np.testing.assert_allclose(lines[label].get_ydata(), percent)
        assert picture.axes[place].get_xlabel() == "epoch"
    for place in (1, 2):
        assert picture.axes[place].texts[0].get_text() == "not trained yet"
        assert not picture.axes[place].get_lines()
    for ending in ("png", "svg"):
        assert (tmp_path / f"out/scaled-down/F3.{ending}").is_file()
    printed = capsys.readouterr().out
    assert "4  r50-baseline-svf: SVF; finished" in printed
    assert "2  r50-baseline-full-layers2-4: layers 2-4; not started" in printed
    *_, last = printed.splitlines()
    assert last.startswith("2 of 4 runs are missing; with the same settings: fss reproduce F3 ")
    words = shlex.split(last.partition(": ")[2])[1:]
    options = build_parser().parse_args(words).reproduce
    assert options.rows == ["r50-baseline-full-layers2-4", "r50-baseline-full-1x1"]
    assert options.out == str(tmp_path / "out") and options.scale_down


def test_what_is_missing_is_trained(command, trained, drawn, capsys):
    assert command("F3", "--list") == 0
    assert trained == [] and drawn == []
    listed = capsys.readouterr().out
    assert "r50-baseline-full-1x1, 1-shot: all 1×1; folds not started: 0" in listed
    assert command("F3") == 0
    assert trained == ["r50-baseline-full-layers2-4", "r50-baseline-full-1x1"]
    assert all(len(axes.get_lines()) == 2 for axes in drawn[0].axes)
    assert "runs are missing" not in capsys.readouterr().out


def test_an_interrupted_figure_is_drawn_and_goes_on(
    command, trained, drawn, monkeypatch, capsys, tmp_path
):
    original = Trainer._loss

    def loss(self, batch):
        if self.step == 2:
            monkeypatch.setattr(Trainer, "_loss", original)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    assert command("F2", "--rows", "2", "--folds", "1") == 130
    assert "F2.png, the same command goes on" in capsys.readouterr().err
    assert titles(drawn[0])[1] == "(b) entire backbone (in progress)"
    # the length of an epoch of this run is known when it is finished
    assert drawn[0].axes[1].get_xlabel() == "step"
    assert command("F2", "--rows", "2", "--folds", "1", "--draw") == 0
    printed = capsys.readouterr().out
    assert "2  r50-pfenet-full: entire backbone; in progress, step 3 of 4" in printed
    assert command("F2", "--rows", "2", "--folds", "1") == 0
    assert trained == ["r50-pfenet-full"] * 2
    assert titles(drawn[-1])[1] == "(b) entire backbone"


def test_a_run_that_fails_stands_in_its_panel(command, drawn, monkeypatch, capsys):
    def loss(self, batch):
        raise FloatingPointError("loss: expected a finite number, got nan")

    monkeypatch.setattr(Trainer, "_loss", loss)
    assert command("F3", "--rows", "3") == 0
    words = " ".join(drawn[0].axes[2].texts[0].get_text().split())
    assert words == "failed: loss: expected a finite number, got nan"
    assert "all 1×1; failed: loss" in capsys.readouterr().out


def test_nothing_is_there(command, drawn, tmp_path, capsys):
    assert command("F8", "--draw", "--folds", "2") == 0
    printed = capsys.readouterr().out
    assert "Not drawn: none of its runs is there." in printed and drawn == []
    assert "1 of 1 runs is missing" in printed and "--folds 2" in printed
    assert main(["reproduce", "F8", "--draw", "--out", str(tmp_path / "empty")]) == 0
    assert "--data.root FOLDER" in capsys.readouterr().out
    assert command("F8", "--folds", "0", "1") == 2
    assert "folds: expected one for a figure, got [0, 1]" in capsys.readouterr().err
    assert command("T16", "--draw") == 2
    assert "draw: expected a figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "stage", "convolution"),
    [
        ("F8", "layer3", "conv2"),
        ("F9", "layer2", "conv2"),
        ("F10", "layer3", "conv3"),
        ("F11", "layer2", "conv3"),
    ],
)
def test_changes(name, stage, convolution, command, drawn, tmp_path):
    assert command(name) == 0
    layers = [f"{stage}.{block}.{convolution}" for block in range(BLOCKS[stage])]
    kernel = "3×3" if convolution == "conv2" else "1×1"
    assert titles(drawn[0]) == [f"{layer} {kernel}" for layer in layers]
    for layer, axes in zip(layers, drawn[0].axes, strict=False):
        before, after = values_of(folder_of(tmp_path, "r50-baseline-svf"), layer)
        assert not np.array_equal(before, after)
        dots = axes.get_lines()[0]
        assert list(dots.get_xdata()) == [*range(1, min(30, len(before)) + 1)]
        np.testing.assert_allclose(dots.get_ydata(), (after - before)[:30], rtol=1e-12)
    assert drawn[0].get_supylabel() == "change of S_r"


@pytest.mark.parametrize(("name", "largest"), [("F6", 30), ("F12", None)])
def test_values(name, largest, command, drawn, tmp_path):
    assert command(name) == 0
    layers = ["layer3.5.conv2 3×3", "layer3.5.conv3 1×1"]
    grid = np.array(drawn[0].axes).reshape(2, 2)
    assert [axes.get_title("left") for axes in grid[0]] == layers[:: -1 if name == "F6" else 1]
    for values, changes in grid.T:
        layer = values.get_title("left").split()[0]
        before, after = values_of(folder_of(tmp_path, "r50-baseline-svf"), layer)
        assert len(before) < 30 or largest is None or len(values.get_lines()[0].get_xdata()) == 30
        lines = {line.get_label(): line.get_ydata() for line in values.get_lines()}
        np.testing.assert_allclose(lines["before"], before[:largest])
        np.testing.assert_allclose(lines["after: SVF"], after[:largest])
        np.testing.assert_allclose(changes.get_lines()[0].get_ydata(), (after - before)[:largest])


@pytest.mark.parametrize(("name", "layer"), [("F4", "layer3.5.conv2"), ("F5", "layer3.5.conv3")])
def test_cues(name, layer, command, drawn, tmp_path):
    assert command(name) == 0
    folder = folder_of(tmp_path, "r50-baseline-svf")
    (run,) = read_runs([folder])
    photos = photos_of(run, 5)
    assert len(photos) == 5 and len({photo.name for photo in photos}) == 5
    left, fell, rose = ([*part.axes] for part in drawn[0].subfigs)
    assert [axes.get_images()[0].get_array().shape for axes in left] == [
        photo.pixels.shape for photo in photos
    ]
    assert drawn[0].subfigs[1].get_suptitle() == "(a) singular values that fell most"
    before, after = values_of(folder, layer)
    change = after - before
    for part, sign in ((fell, 1), (rose, -1)):
        order = (sign * change).argsort(kind="stable")
        shown = [axes.get_title() for axes in part if axes.get_title()]
        assert len(shown) == 3
        for title, place in zip(shown, order[:3], strict=True):
            head, words = title.split("\n")
            assert head.startswith(f"r = {place + 1}: ")
            first, second = (float(each) for each in words.split(" → "))
            assert first != second
            assert first == pytest.approx(before[place], abs=abs(change[place]) / 10)
            assert second == pytest.approx(after[place], abs=abs(change[place]) / 10)
        maps = [axes.get_images()[0].get_array() for axes in part if axes.get_images()]
        assert len(maps) == 5 * 3 and all(one.max() > 0 for one in maps)
    assert cv2.imread(str(tmp_path / f"out/scaled-down/{name}.png")).shape[1] > 1500


def test_photos_that_are_gone(command, tmp_path, capsys):
    path = folder_of(tmp_path, "r50-baseline-svf") / "config.yaml"
    config = path.read_text().replace("source: shapes", "source: folder")
    path.write_text(config.replace("root: null", f"root: {tmp_path / 'gone'}"))
    assert command("F4", "--draw") == 0
    assert re.search(rf"Not drawn: .*{tmp_path / 'gone'} does not exist", capsys.readouterr().out)
    assert not (tmp_path / "out/scaled-down/F4.png").exists()
    assert command("F4", "--draw", "--data.root", str(tmp_path / "moved")) == 0
    assert re.search(rf"Not drawn: .*{tmp_path / 'moved'} does not exist", capsys.readouterr().out)


def test_a_backbone_without_the_papers_convolutions(command, tmp_path, capsys):
    """A ResNet-18 has 1×1 convolutions in its shortcuts alone, another none."""
    path = tmp_path / "tiny.yaml"
    small = SETTINGS | {"model": {"width": 4, "weights": "none", "channels": 8}}
    path.write_text(yaml.safe_dump(small))
    options = ["--settings", str(path), "--out", str(tmp_path / "small"), "--scale-down"]
    assert main(["reproduce", "F10", *options]) == 0
    assert (tmp_path / "small/scaled-down/F10.png").is_file()
    small["model"]["backbone"] = "vgg16_bn"
    path.write_text(yaml.safe_dump(small))
    options[3] = str(tmp_path / "vgg")
    assert main(["reproduce", "F10", *options]) == 2
    assert "F10: expected a 1×1 convolution" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "count"), [((1, 1), 1), ((1, 3), 3), ((2, 4), 8), ((3, 4), 9)])
def test_panels_of_any_number(rows, count):
    panels = [Panel(f"run {number}", None, missing="no") for number in range(count)]
    picture = plot_panels(panels)
    assert len(picture.axes) == rows[0] * rows[1]
    assert titles(picture) == [f"({chr(97 + n)}) run {n}" for n in range(count)]
