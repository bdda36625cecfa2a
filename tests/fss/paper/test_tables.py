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
from fss.settings import merged

FOLDER = default_folder()
TABLES = {name: load_table(name, FOLDER) for name in table_names(FOLDER)}
REGIMES = sorted((FOLDER.parent / "regimes").glob("*.yaml"))
# What the rows need beside their table: folders of photos and of base learners.
USERS = {"data": {"root": "photos"}, "model": {"base_weights": "base/{data}-{backbone}-{fold}"}}


def rows():
    return [
        pytest.param(table, row, id=f"{table.name}-{number}")
        for table in TABLES.values()
        for number, row in enumerate(table.rows, 1)
    ]


def test_tables_are_in_the_papers_order():
    assert list(TABLES)[:5] == ["T1", "T2", "T3", "T9", "T10"]
    assert list(TABLES)[-1] == "T24"


@pytest.mark.parametrize(("table", "row"), rows())
def test_a_row_is_a_valid_configuration(table, row):
    assert row.settings or row.run is None
    for shots, published in row.paper.items():
        assert shots in (1, 5)
        if published.folds is not None:
            # the paper rounds each number: their mean may be off by as much
            assert statistics.fmean(published.folds) == pytest.approx(published.mean, abs=0.0101)
    if row.run is None or (table.name, row.note) == (
        "T2",
        "printed without †, unlike all around it",
    ):
        return
    for fold in range(4):
        values = run_values(table, row, 1, fold, USERS)
        config = TrainConfig.from_dict(values)
        assert config.data.fold == fold and config.optimizer.momentum == 0.9
        assert 20_000 < config.steps < 280_000
        if config.model.name == "bam":
            expected = f"base/{table.data.name.lower()}-{config.model.backbone}-{fold}"
            assert config.model.base_weights == expected


def test_rows_share_a_run_exactly_if_they_are_the_same_experiment():
    by_run: dict[tuple[str, str], dict] = {}
    for table in TABLES.values():
        for row in table.rows:
            if row.run is not None:
                settings = merged(table.data.settings, row.settings)
                assert by_run.setdefault((table.data.name, row.run), settings) == settings, row
    runs = list(by_run.items())
    for index, ((data, _), settings) in enumerate(runs):
        for (other_data, _), other in runs[:index]:
            assert (data, settings) != (other_data, other)


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
        ("regime: batch_norm\n", "regime: none\n", "expected a YAML file at .*none.yaml"),
        ("regime: batch_norm\n", "regimes: full\n", "missing regime; unknown regimes"),
        ("recipe: pfenet", "recipe: mine", "recipe: expected one of pfenet, bam, got 'mine'"),
        ("run: r50-baseline-svf", "run: ../r50", "run: expected the name of a folder"),
        ("61.93", "161.93", "paper: expected percentages"),
        ("61.93, ", "", "paper: expected percentages, a mean or those of folds 0 to 3"),
        ("1: [61.93", "one: [61.93", "paper: expected a number of shots, got 'one'"),
        ("data: pascal", "data: ade", "expected a file .*ade.yaml, found none"),
        ("title: ", "metric: dice\ntitle: ", "metric: expected miou or fb_iou, got 'dice'"),
        ("title: ", "titel: ", "missing title; unknown titel"),
        ("title: ", "title: {", "expected YAML"),
        ("regime: svf\n", "regime: svf\n    episodes: 0\n", "episodes: expected a number from 1"),
        (
            "regime: svf\n",
            "regime: svf\n    settings: {data: {sise: 9}}\n",
            "data: 'sise' is no setting; expected source, root",
        ),
        ("regime: svf\n", "regime: svf\n    settings: {lr: 9}\n", "'lr' is no setting"),
    ],
)
def test_a_spoilt_table_says_where_and_what(folder, old, new, message):
    path = folder / "T16.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_table("T16", folder)


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
