from __future__ import annotations

import copy
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from fss.cli import build_parser
from fss.config import ModelConfig, RegimeConfig, TrainConfig
from fss.models import build_model
from fss.models.regimes import apply_regime
from fss.paper.tables import (
    base_values,
    default_folder,
    load_table,
    run_values,
    table_names,
)
from tests.fss.paper.trained import what_trains

FOLDER = default_folder()
TABLES = {name: load_table(name, FOLDER) for name in table_names(FOLDER)}
REGIMES = sorted((FOLDER.parent / "regimes").glob("*.yaml"))
# What the rows need beside their table: folders of photos and of base learners.
USERS = {"data": {"root": "photos"}, "model": {"base_weights": "base/{data}-{backbone}-{fold}"}}


def listed(settings) -> int:
    """In place of the photos that are counted in a user's COCO."""
    return 44_000


def rows():
    return [
        pytest.param(table, row, id=f"{table.name}-{number}")
        for table in TABLES.values()
        for number, row in enumerate(table.rows, 1)
    ]


def test_tables_are_in_the_papers_order():
    assert list(TABLES) == [f"T{number}" for number in range(1, 25)]
    assert sum(len(table.rows) for table in TABLES.values()) == 152


def test_tables_of_means_have_the_rows_of_those_with_folds():
    for name, other in {"T4": "T16", "T5": "T17", "T6": "T18", "T7": "T19", "T8": "T20"}.items():
        assert TABLES[name].rows == TABLES[other].rows
        assert TABLES[name].title == f"{TABLES[other].title} (means of {other})"


@pytest.mark.parametrize(("table", "row"), rows())
def test_a_row_is_a_valid_configuration(table, row):
    assert (row.run is None) == (row.quoted is not None) == (not row.settings)
    for shots, published in row.paper.items():
        assert shots in (1, 5)
        if published.folds is not None:
            # the paper rounds each number: their mean may be off by as much
            numbers = (*published.folds, published.mean)
            digit = 0.1 if all(round(number, 1) == number for number in numbers) else 0.01
            assert statistics.fmean(published.folds) == pytest.approx(
                published.mean, abs=1.01 * digit
            )
    if row.run is None:
        return
    for fold in range(4):
        values = run_values(table, row, 1, fold, USERS, listed)
        config = TrainConfig.from_dict(values)
        assert config.data.fold == fold and config.optimizer.momentum == 0.9
        assert 20_000 < config.steps < 580_000
        if config.model.name == "bam":
            expected = f"base/{table.data.name.lower()}-{config.model.backbone}-{fold}"
            assert config.model.base_weights == expected


def test_rows_share_a_run_exactly_if_they_are_the_same_experiment():
    """By what trains: of two regimes with the same outcome the settings may differ."""
    runs: dict[tuple, str] = {}
    names: dict[tuple[str, str], tuple] = {}
    for table in TABLES.values():
        for row in table.rows:
            if row.run is not None:
                values = run_values(table, row, 1, 0, USERS, listed)
                config = TrainConfig.from_dict(values)
                values = config.to_dict() | {
                    "regime": what_trains(config.model.backbone, config.regime)
                }
                key = (table.data.name, repr(values))
                assert runs.setdefault(key, row.run) == row.run, (table.name, row.label)
                assert names.setdefault((table.data.name, row.run), key) == key, row.run


def test_what_trains_is_not_what_settings_say():
    """What the test above relies on: it sees through settings, and it sees differences."""
    biases = RegimeConfig("bias", ("all",))
    same = [
        (biases, RegimeConfig("freeze", ("all",), batch_norm="bias")),
        (RegimeConfig("svf"), RegimeConfig("svf", factors=("S",), strategy="gram")),
        (RegimeConfig("freeze"), RegimeConfig("freeze", ("layer4",))),
    ]
    for regime, other in same:
        assert what_trains("resnet50", regime) == what_trains("resnet50", other)
    different = [
        (biases, RegimeConfig("bias")),
        (biases, RegimeConfig("freeze", ("all",), batch_norm="weight")),
        (RegimeConfig("freeze"), RegimeConfig("rotated_svf", factors=())),
        (RegimeConfig("svf"), RegimeConfig("rotated_svf")),
        (RegimeConfig("bias"), RegimeConfig("bias", batch_norm_statistics="batch")),
    ]
    for regime, other in different:
        assert what_trains("resnet50", regime) != what_trains("resnet50", other)
    # VGG's convolutions have biases too
    assert what_trains("vgg16_bn", same[0][0]) != what_trains("vgg16_bn", same[0][1])


def test_the_numbers_of_a_run_are_the_same_in_every_table():
    found: dict[tuple, tuple] = {}
    for table in TABLES.values():
        for row in table.rows:
            for shots, published in row.paper.items() if row.run else ():
                key = (table.data.name, row.run, table.metric, row.episodes, shots)
                assert found.setdefault(key, published) == published, (table.name, row.label)
    assert sum(published.folds is None for published in found.values()) == 2 + 12


def test_fully_is_every_parameter_of_the_backbone():
    """The paper's words; with fewer it is its "part fine-tune"."""
    row = next(row for row in TABLES["T17"].rows if row.run == "r50-baseline-full")
    for backbone in ("resnet50", "vgg16_bn"):
        names, *_ = what_trains(backbone, RegimeConfig(**row.settings["regime"]))
        model = build_model(ModelConfig(backbone=backbone, width=2, weights="none", channels=4))
        assert set(names) == {
            name for name, _ in model.get_submodule("backbone").named_parameters()
        }


def test_steps_are_the_papers_epochs():
    table = TABLES["T16"]
    svf = next(row for row in table.rows if row.run == "r50-baseline-svf")
    steps = [run_values(table, svf, 1, fold, {})["steps"] for fold in range(4)]
    assert steps == [200 * (images // 8) for images in (4208, 3726, 2752, 4510)]
    freeze = next(row for row in table.rows if row.run == "r50-baseline-freeze")
    assert run_values(table, freeze, 1, 0, {})["steps"] == 200 * 4208 // 4
    assert run_values(table, freeze, 1, 0, {"steps": 7})["steps"] == 7


def test_an_epoch_of_unknown_length():
    table = TABLES["T2"]
    row = next(row for row in table.rows if "unfiltered" in str(row.run))
    with pytest.raises(ValueError, match="COCO-20i has no number of unfiltered .*give steps in"):
        run_values(table, row, 1, 0, {})


@pytest.mark.parametrize("path", REGIMES, ids=lambda path: path.stem)
def test_a_named_regime_applies(path):
    stated = yaml.safe_load(path.read_text())
    assert set(stated) == {"regime"} and set(stated["regime"]) >= {"name"}
    defaults = RegimeConfig()
    assert not [
        name
        for name, value in stated["regime"].items()
        if name != "name" and value == getattr(defaults, name)
    ]
    model = build_model(ModelConfig(backbone="resnet50", width=2, weights="none", channels=4))
    apply_regime(model, RegimeConfig(**stated["regime"]))
    trains = any(p.requires_grad for p in model.get_submodule("backbone").parameters())
    assert trains == (path.stem not in ("freeze", "rotated_frozen"))


def test_a_named_regime_goes_on_top_of_another_file():
    parser = build_parser()
    files = [FOLDER.parent / "demo.yaml", FOLDER.parent / "regimes" / "factors_US.yaml"]
    arguments = [word for path in files for word in ("--config", str(path))]
    config = parser.instantiate(parser.parse_args(["train", *arguments])).train
    assert config.regime == RegimeConfig(factors=("U", "S")) and config.model.width == 24


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16_bn"])
@pytest.mark.parametrize("key", ["bias", "svf_scale_both", "rotated_scale", "adapter", "full_3x3"])
def test_regimes_on_other_backbones(key, backbone):
    """VGG's convolutions have biases, its layers pools at their end."""
    stated = yaml.safe_load((FOLDER.parent / "regimes" / f"{key}.yaml").read_text())
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, width=2, weights="none", channels=4, dropout=0.0)
    model = build_model(config).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.2, 0.2)
    images = torch.randn(2, 2, 3, 33, 33, dtype=torch.float64)
    batch = (images[:, 0], images[:, 1:], (torch.rand(2, 1, 33, 33) < 0.5).long())
    before = model(*batch).logits
    apply_regime(model, RegimeConfig(**stated["regime"]))
    torch.testing.assert_close(model(*batch).logits, before, rtol=1e-9, atol=1e-11)
    backbone_names = {
        name for name, p in model.get_submodule("backbone").named_parameters() if p.requires_grad
    }
    assert backbone_names
    if key == "bias":
        assert all(name.endswith("bias") for name in backbone_names)


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16_bn"])
def test_batch_norms_next_to_singular_values_have_their_own_gradients(backbone):
    """The fused layers of SVF compute them too: as the plain network does."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, width=2, weights="none", channels=4, dropout=0.0)
    plain = build_model(config).double()
    both = copy.deepcopy(plain)
    apply_regime(plain, RegimeConfig(name="freeze", batch_norm="both"))
    apply_regime(both, RegimeConfig(name="svf", batch_norm="both"))
    images = torch.randn(2, 2, 3, 33, 33, dtype=torch.float64)
    masks = (torch.rand(2, 2, 33, 33) < 0.5).long()
    for model in (plain, both):
        prediction = model(images[:, 0], images[:, 1:], masks[:, 1:])
        model.loss(prediction, masks[:, 0]).backward()
    found = dict(both.named_parameters())
    norms = [(n, p) for n, p in plain.named_parameters() if p.grad is not None]
    assert any(name.startswith("backbone.layer2") for name, _ in norms)
    for name, parameter in norms:
        torch.testing.assert_close(
            found[name].grad, parameter.grad, rtol=1e-8, atol=1e-11, msg=name
        )


def test_a_path_of_base_learners_with_another_name_in_braces():
    table = TABLES["T11"]
    row = next(row for row in table.rows if "bam" in str(row.run))
    with pytest.raises(ValueError, match="model.base_weights: .*got 'base/{split}'"):
        run_values(table, row, 1, 0, {"model": {"base_weights": "base/{split}"}})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of configs/paper to spoil."""
    shutil.copytree(FOLDER.parent, tmp_path / "configs")
    return tmp_path / "configs" / "paper"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "run: r50-baseline-svf",
            "run: r50-svf",
            "T16.yaml: run: expected one of runs.yaml .*svf'",
        ),
        ("run: r50-baseline-svf", "run: [1]", "T16.yaml: run: expected one of runs.yaml"),
        ("run: r50-baseline-svf", "quoted: ' '", r"S \(SVF\): quoted: expected a reason, got ' '"),
        ("run: r50-baseline-svf", "quoted: by hand\n    run: x", "unknown run"),
        ("run: r50-baseline-svf", "quoted: by hand\n    episodes: 9", "unknown episodes"),
        ("run: r50-baseline-svf", "note: by hand", "missing run"),
        ("run: r50-baseline-svf\n", "run: r50-baseline-svf\n    regime: svf\n", "unknown regime"),
        ("rows:\n", "rows: {}\nothers:\n", "unknown others"),
        ("title: ", "means_of: T17\ntitle: ", "expected means_of; unknown data, rows, title"),
        ("61.93", "161.93", "paper: expected percentages"),
        ("61.93, ", "", "paper: expected percentages, a mean or those of folds 0 to 3"),
        ("1: [61.93", "one: [61.93", "paper: expected a number of shots, got 'one'"),
        ("data: pascal", "data: ade", "expected a file .*ade.yaml, found none"),
        ("title: ", "metric: dice\ntitle: ", "metric: expected miou or fb_iou, got 'dice'"),
        ("title: ", "titel: ", "missing title; unknown titel"),
        ("title: ", "title: {", "expected YAML"),
        ("svf\n", "svf\n    episodes: 0\n", "episodes: expected a number from 1"),
    ],
)
def test_a_spoilt_table_says_where_and_what(folder, old, new, message):
    _spoil(folder / "T16.yaml", old, new)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_table("T16", folder)


SVF = "r50-baseline-svf: {regime: svf}"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("r50-baseline-svf: {regime: none}", "expected a YAML file at .*none.yaml"),
        ("r50-baseline-svf: {regimes: svf}", "missing regime; unknown regimes"),
        ("r50-baseline-svf: svf", "runs.yaml: r50-baseline-svf: expected regime and perhaps"),
        (
            "r50-baseline-svf: {regime: svf, recipe: mine}",
            "r50-baseline-svf: recipe: expected one of pfenet, bam, cyctr, got 'mine'",
        ),
        (
            "r50-baseline-svf: {regime: svf, settings: {data: {sise: 9}}}",
            "r50-baseline-svf: data: 'sise' is no setting; expected source, root",
        ),
        ("r50-baseline-svf: {regime: svf, settings: {lr: 9}}", "'lr' is no setting"),
        ("r50-baseline: {regime: svf}", "expected one of runs.yaml beside it"),
        ("- r50", "expected YAML"),
    ],
)
def test_a_spoilt_run_says_where_and_what(folder, new, message):
    _spoil(folder / "runs.yaml", SVF, new)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_table("T16", folder)


def test_a_run_is_the_name_of_a_folder(folder):
    _spoil(folder / "runs.yaml", SVF, "../r50: {regime: svf}")
    _spoil(folder / "T16.yaml", "run: r50-baseline-svf", "run: ../r50")
    with pytest.raises(ValueError, match=r"runs.yaml: ../r50: expected the name of a folder"):
        load_table("T16", folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("means_of: T99", "means_of: expected one of T1, .* with rows of its own; got 'T99'"),
        ("means_of: T5", "means_of: expected one of T1, .* with rows of its own; got 'T5'"),
        ("means_of: T4", "means_of: expected one of T1, .* with rows of its own; got 'T4'"),
        ("- T16", "T4.yaml: expected values by name"),
    ],
)
def test_a_spoilt_table_of_means(folder, text, message):
    (folder / "T4.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_table("T4", folder)


def _spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_tables_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="tables: expected files like T16.yaml in"):
        table_names(tmp_path)
    with pytest.raises(ValueError, match="table: expected one of T1, T2, .*; got 'T99'"):
        load_table("T99", FOLDER)


@pytest.mark.parametrize("table", ["T1", "T2"])
def test_base_learners_take_the_settings_of_all_rows(table):
    """What they are by themselves, `test_recipes` tests."""
    table = TABLES[table]
    vgg = next(row for row in table.rows if row.run == "vgg16-bam-svf")
    values = base_values(table, vgg, 3, {"data": {"root": "data"}, "steps": 7, "devices": 2})
    assert (values["model"].backbone, values["data"].fold) == ("vgg16_bn", 3)
    assert (values["steps"], values["devices"]) == (7, 2)
