"""The page about real, tiny runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import pytest

from fss.cli import main
from fss.report import write_report
from fss.report.results import mean_rows
from fss.report.runs import read_runs
from fss.training.run import train

SECTIONS = ["results", "curves", "classes", "episodes", "singular-values", "components", "cost"]
PLOTS = {
    "curves",
    "classes",
    "singular-values",
    "singular-values-all",
    "components-1",
    "measured",
    "counted",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(store, tiny, tmp_path) -> tuple[Path, Path]:
    """Copies of a run of svf and one of freeze, trained once for all tests."""
    for name in ("svf", "freeze"):
        if not (store / name / "result.json").exists():
            pictures = 1 if name == "svf" else 0
            config = {"regime": {"name": name}, "out": str(store / name), "pictures": pictures}
            train(tiny(**config), overwrite=True)
        shutil.copytree(store / name, tmp_path / name)
    return tmp_path / "svf", tmp_path / "freeze"


@pytest.fixture
def page(store, runs) -> str:
    """The page about both, written once."""
    path = store / "report" / "report.html"
    if not path.exists():
        assert write_report(runs, path.parent) == path
    return path.read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    root = ElementTree.fromstring(page)
    (found,) = [part for part in root.iter("section") if part.get("id") == name]
    return ElementTree.tostring(found, encoding="unicode")


def words(markup: str) -> str:
    return " ".join("".join(ElementTree.fromstring(markup).itertext()).split())


def test_sections(page):
    root = ElementTree.fromstring(page)  # well-formed, all the way
    assert [part.get("id") for part in root.iter("section")] == [*SECTIONS, "settings"]
    shown = {name: section(page, name).count("<svg") for name in SECTIONS}
    assert shown == {
        "results": 0,
        "curves": 1,
        "classes": 1,
        "episodes": 0,
        "singular-values": 2,
        "components": 1,
        "cost": 2,
    }
    assert section(page, "episodes").count("data:image/webp;base64,") == 1
    assert "freeze: no regime that trains S alone" in words(section(page, "singular-values"))


def test_ids_are_unique_and_what_refers_to_them_finds_them(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page)
    assert used and set(used) <= set(ids)


def test_nothing_is_fetched_and_nothing_runs(page):
    addresses = re.findall(r'(?:src|href)="([^"#][^"]*)"', page)
    assert {one for one in addresses if not one.startswith("data:image/")} == {
        "https://arxiv.org/abs/2206.06122"
    }
    assert not re.search(r"<script|<link|<iframe|@import|url\(\s*['\"]?(?!#)|\son\w+=", page)


def test_plots_take_the_colour_of_the_page(page):
    plots = "".join(section(page, name) for name in SECTIONS if name != "results")
    assert "currentColor" in plots and "#24292f" not in plots


def test_files(page, store):
    folder = store / "report" / "pictures"
    assert {path.stem for path in folder.iterdir()} == {*PLOTS, "episodes-1"}
    for name in PLOTS:
        assert cv2.imread(str(folder / f"{name}.png")).shape[1] > 1500
        root = ElementTree.fromstring((folder / f"{name}.svg").read_bytes())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("aria-label")
        assert "prefers-color-scheme: dark" in root[0].text


def test_the_table_tells_what_result_json_tells(page, runs):
    root = ElementTree.fromstring(section(page, "results"))
    rows = next(root.iter("tbody")).findall("tr")
    for run, row in zip(runs, rows):
        result = json.loads((run / "result.json").read_text())
        name, *cells = ["".join(cell.itertext()).strip() for cell in row]
        test, trained = result["test"], result["parameters"]
        assert name.startswith(run.name)
        for place, key in ((0, "miou"), (2, "fb_iou")):
            assert cells[place] == f"{100 * test[key]['mean']:.2f} ± {100 * test[key]['std']:.2f}"
        assert cells[3] == f"{trained['trained_backbone']:,}"
        assert cells[4] == f"{trained['trained_head']:,}"
        assert float(cells[5]) == pytest.approx(result["saved_bytes_per_step"] / 2**20, rel=6e-3)
        assert float(cells[7].replace(",", "")) == pytest.approx(
            result["peak_memory_bytes"] / 2**20, abs=0.5
        )
        assert cells[8] == str(test["step"])
    assert "regime.name" in words(section(page, "results"))


def test_hostile_names(runs, tmp_path):
    name = "<img src=x onerror=alert(1)> & \"$x_{\\' {{ 7 * 7 }} \x07\n"
    runs[1].rename(tmp_path / name)
    result = json.loads((tmp_path / name / "result.json").read_text())
    result["commit"] = "<script>alert(2)</script>"
    result["test"]["iou"]["</text><b>$\\frac\x01"] = result["test"]["iou"].pop("star")
    (tmp_path / name / "result.json").write_text(json.dumps(result))
    page = write_report([tmp_path / name]).read_text(encoding="utf-8")
    root = ElementTree.fromstring(page)
    assert not list(root.iter("script")) and not list(root.iter("b")) and not list(root.iter("img"))
    assert "onerror=alert(1)" in "".join(root.itertext())
    assert "</text><b>$\\frac" in "".join(root.itertext())
    assert "{{ 7 * 7 }}" in "".join(root.itertext()) and "\x07" not in page


def test_a_run_of_an_installed_package_has_no_commit(runs, tmp_path):
    path = runs[1] / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": None}))
    page = write_report([runs[1]], str(tmp_path / "page")).read_text(encoding="utf-8")
    assert "none: not run from a checkout" in page


def test_a_run_in_progress(runs):
    svf = runs[0]
    (svf / "result.json").unlink()
    (svf / "episodes.png").unlink()
    with (svf / "train.csv").open("a") as file:
        file.write("4,0.")
    path = write_report([svf])
    assert path == svf / "report" / "report.html"
    page = path.read_text(encoding="utf-8")
    assert "in progress: step 3 of 3, best validation mIoU" in words(section(page, "results"))
    assert "No run has been tested yet" in words(section(page, "classes"))
    assert section(page, "components").count("<svg") == 1
    for name in ("last.pt", "best.pt"):
        (svf / name).unlink()
    page = write_report([svf]).read_text(encoding="utf-8")
    assert "svf: in progress, no checkpoint yet" in words(section(page, "singular-values"))


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "train.csv", "validation.csv", "best.pt"],
)
def test_a_missing_file_is_named(name, runs):
    (runs[0] / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(runs[0] / name))):
        write_report(runs)


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "result.json",
        "train.csv",
        "validation.csv",
        "best.pt",
        "episodes.png",
        "pretrained.safetensors",
    ],
)
def test_a_cut_file_is_named(name, runs):
    path = runs[0] / name
    content = path.read_bytes()
    end = len(content) * 2 // 3
    if name == "config.yaml":
        end = content.rindex(b":", 0, end)  # a cut between two lines leaves settings that fit
    path.write_bytes(content[:end])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        write_report(runs)


def test_a_log_cut_between_its_rows_is_noticed(runs):
    path = runs[0] / "train.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"ends at step 2, but result.json tells of 3 steps"):
        write_report(runs)


def test_runs_that_do_not_belong_together(runs, tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_report([runs[0], tmp_path / "freeze" / ".." / "svf"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report([tmp_path / "nowhere"])


def test_runs_of_one_name_and_of_other_classes(runs, tmp_path):
    other = tmp_path / "other" / "freeze"
    shutil.copytree(runs[1], other)
    result = json.loads((other / "result.json").read_text())
    result["test"]["iou"] = {"cat": result["test"]["iou"]["star"]}
    (other / "result.json").write_text(json.dumps(result))
    page = write_report([runs[1], other], tmp_path / "out").read_text(encoding="utf-8")
    assert f"{tmp_path.name}/freeze" in page and "other/freeze" in page
    shown = words(section(page, "classes"))
    assert "cat" in shown and "star" in shown and shown.count("fold 0") == 2


def test_the_mean_of_runs_that_differ_in_seed_or_fold_alone(runs, tmp_path):
    assert not mean_rows(read_runs(runs))
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    config = (other / "config.yaml").read_text().replace("fold: 0", "fold: 2")
    (other / "config.yaml").write_text(config)
    result = json.loads((other / "result.json").read_text())
    first = result["test"]["miou"]["mean"]
    result["test"]["miou"]["mean"] = first + 0.1
    (other / "result.json").write_text(json.dumps(result))
    (row,) = mean_rows(read_runs([*runs, other]))
    assert row["name"] == "mean of freeze, other" and row["of"] == "2 runs, fold 0, 2"
    assert row["miou"]["mean"] == pytest.approx(first + 0.05)
    assert row["miou"]["std"] == pytest.approx(0.1 / 2**0.5)


def test_photos_that_are_not_there(runs, tmp_path):
    config = (runs[0] / "config.yaml").read_text()
    config = config.replace("source: shapes", "source: folder").replace(
        "root: null", f"root: {tmp_path / 'gone'}"
    )
    (runs[0] / "config.yaml").write_text(config)
    page = write_report([runs[0]]).read_text(encoding="utf-8")
    assert "no heat maps" in words(section(page, "singular-values"))
    assert section(page, "components").count("<svg") == 0
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), cv2.imread(str(runs[0] / "episodes.png")))
    page = write_report([runs[0]], photo=photo).read_text(encoding="utf-8")
    assert "photo.png" in words(section(page, "components"))
    with pytest.raises(FileNotFoundError, match="--photo"):
        write_report([runs[0]], photo=tmp_path / "none.png")


def test_command(runs, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["report", str(runs[0]), "--out", str(out)]
    assert main([*command, "--layers", "layer2.0.conv1"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert "layer2.0.conv1, 3×3" in (out / "report.html").read_text(encoding="utf-8")
    assert main([*command, "--layers", "layer1.0.conv1"]) == 2
    assert "--layers: expected convolutions" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
