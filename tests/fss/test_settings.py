"""The files of settings in fss/configs: found by name, valid, the same as the tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import yaml

from fss.cli import build_parser, main
from fss.config import RegimeConfig, TrainConfig
from fss.models import build_model
from fss.paper.tables import load_table, run_values
from fss.settings import FOLDER, config_file, config_names, flat_settings, merged, read_settings

NAMES = config_names()
PARSER = build_parser()
BASE = [name for name in NAMES if name.endswith("_base")]
# The row of Tables 1 (Pascal-5i) and 2 (COCO-20i) that a file makes the first fold of, on another
# backbone: Table 2 has no PFENet† with a frozen ResNet-50.
ROWS = {
    "svf": "vgg16-baseline-svf",
    "pfenet": "vgg16-pfenet-freeze",
    "pfenet_svf": "vgg16-pfenet-svf",
    "bam": "vgg16-bam-freeze",
    "bam_svf": "vgg16-bam-svf",
}


@functools.cache
def parsed(command: str, *arguments: str):
    return PARSER.instantiate(PARSER.parse_args([command, *arguments]))[command]


def config(name: str) -> TrainConfig:
    values = dict(vars(parsed("train", "--config", name)))
    for option in ("config", "resume", "overwrite", "debug"):
        values.pop(option)
    return TrainConfig(**values)


def test_a_path_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("demo") == FOLDER / "demo.yaml"
    assert config_file("regimes/svf") == FOLDER / "regimes" / "svf.yaml"
    (tmp_path / "demo").write_text("steps: 3")
    assert config_file("demo").read_text() == "steps: 3"
    for name in ("nowhere.yaml", "svf", "paper/T1", "../configs/demo", ""):
        with pytest.raises(FileNotFoundError, match="config: expected a YAML file, clothing, coco"):
            config_file(name)


def test_settings_of_a_file_over_others(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {shots: 5}\nsteps: 3")
    values = {"data": {"fold": 1, "shots": 1}, "out": "runs"}
    assert merged(values, read_settings(path)) == {
        "data": {"fold": 1, "shots": 5},
        "out": "runs",
        "steps": 3,
    }
    assert values["data"]["shots"] == 1
    assert flat_settings(values, {"out"}) == {"data.fold": 1, "data.shots": 1}
    for text, message in (("data: {sise: 9}", "data: 'sise' is no setting"), ("[1]", "got a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_settings(path)
    with pytest.raises(FileNotFoundError, match="settings: expected a YAML file at .*nowhere"):
        read_settings(tmp_path / "nowhere")


def test_names_on_the_command_line(capsys):
    settings = parsed("train", "--config", "demo", "--config", "regimes/factors_US", "--steps", "9")
    assert settings.model.width == 24 and settings.steps == 9
    assert settings.regime.factors == ("U", "S")
    assert main(["train", "--config", "pascal_svg"]) == 2
    error = capsys.readouterr().err.strip()
    assert "pascal_svf" in error and error.count("\n") == 0 and "got 'pascal_svg'" in error


def test_a_regime_of_a_later_file_takes_the_place_of_an_earlier_ones(tmp_path):
    def regime(*arguments: str) -> RegimeConfig:
        return parsed("train", "--data.root", "photos", *arguments).regime

    ppnet, freeze = ("--config", "pascal_ppnet"), ("--config", "regimes/freeze")
    assert regime(*ppnet) == RegimeConfig(
        "full", ("layer3", "layer4"), batch_norm="both", batch_norm_statistics="batch"
    )
    assert regime(*ppnet, *freeze) == RegimeConfig("freeze")
    assert regime(*ppnet, "--config", "regimes/svf_layer4") == RegimeConfig("svf", ("layer4",))
    assert regime(*ppnet, "--regime.name", "svf").layers == ("layer3", "layer4")
    # what the command line says stays, whatever stands before it
    assert regime("--regime.layers", "[layer4]", *freeze).layers == ("layer4",)
    typed = (*ppnet, "--regime.layers", "[layer2]", "--config", "regimes/svf")
    assert regime(*typed) == RegimeConfig("svf", ("layer2",))
    path = tmp_path / "statistics.yaml"
    path.write_text("regime.layers: [layer4]\nregime.batch_norm: both")
    assert regime("--config", str(path), *freeze) == RegimeConfig("freeze")
    path.write_text("regime: {batch_norm_statistics: batch}")
    assert regime(*ppnet, "--config", str(path)) == regime(*ppnet)
    assert regime(*freeze, "--config", str(path)) == RegimeConfig(
        "freeze", batch_norm_statistics="batch"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_valid_and_states_only_differences(name):
    command = "train-base" if name in BASE else "train"
    settings = parsed(command, "--config", name)
    defaults = parsed(command, "--data.root", "photos")
    for key, value in flat(yaml.safe_load(config_file(name).read_text())):
        found, default = (
            functools.reduce(getattr, key.split("."), s) for s in (settings, defaults)
        )
        assert found == (tuple(value) if isinstance(found, tuple) else value) != default, key


@pytest.mark.parametrize(
    "name", ["clothing", "demo", "pascal_pfenet_svf", "coco_bam", "pascal_hsnet", "coco_dcama"]
)
def test_the_network_of_a_file(name):
    model = config(name).model
    narrow = {"width": 4, "channels": 8, "weights": "none"}
    narrow |= {"base_weights": "none"} if model.name == "bam" else {}
    assert build_model(dataclasses.replace(model, **narrow), {1: "cat", 2: "dog"})


@pytest.mark.parametrize("data", ["pascal", "coco"])
@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_the_first_fold_of_its_row(data, name):
    table = load_table({"pascal": "T1", "coco": "T2"}[data], FOLDER / "paper")
    row = next(row for row in table.rows if row.run == ROWS[name])
    model = {"backbone": "resnet50", "base_weights": f"runs/{data}_bam_base"}
    values = run_values(table, row, 1, 0, {"model": model, "data": {"root": "data"}})
    expected = TrainConfig.from_dict(values).to_dict()
    got = config(f"{data}_{name}").to_dict()
    if (data, name) == ("pascal", "svf"):  # which is the defaults
        assert got["steps"] == pytest.approx(TrainConfig.steps, rel=0.002)
    del expected["out"], got["out"]
    assert got == expected


@pytest.mark.parametrize("name", BASE)
def test_a_base_learner_lands_where_bam_looks_for_it(name):
    base = parsed("train-base", "--config", name)
    for recipe in (name.removesuffix("_base"), name.replace("_base", "_svf")):
        bam = config(recipe)
        assert bam.model.base_weights == base.out and bam.data.root == base.data.root
    assert base.data.size == 417 and base.batch_size == 12


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
