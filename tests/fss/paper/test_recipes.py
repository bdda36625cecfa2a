"""The recipes of tables and files beside the arithmetic of the authors' code, number by number."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fss.cli import build_parser
from fss.config import DataConfig, ModelConfig, TrainConfig
from fss.data import build_source
from fss.models import build_backbone
from fss.models.pfenet import FeatureEnrichment
from fss.models.pspnet import PSPNet
from fss.paper.listing import listing
from fss.paper.plan import EpochCounter, Options, plan
from fss.paper.tables import (
    base_values,
    default_folder,
    load_table,
    published_images,
    run_values,
    table_names,
)
from fss.processes import build_fabric
from fss.training.base_learner import (
    BaseLearnerConfig,
    BaseLearnerData,
    BaseTrainer,
    parameter_groups,
)
from fss.training.optimizer import build_optimizer, build_scheduler

FOLDER = default_folder()
TABLES = {name: load_table(name, FOLDER) for name in table_names(FOLDER)}
USERS = {"data": {"root": "photos"}, "model": {"base_weights": "base"}}
OWN_PROTOCOL = ("panet", "canet", "ppnet", "cwt")
IMAGES = {"T1": (4208, 3726, 2752, 4510), "T2": (21917, 41809, 43045, 44614)}


class Recipe(NamedTuple):
    """Of a frozen method by its authors' code: train.py, util.py and config/*.yaml."""

    base_lr: float
    batch: int
    epochs: int
    validation: tuple[str, int]


PFENET = {
    "T1": Recipe(0.0025, 4, 200, ("2 epochs", 5000)),
    "T2": Recipe(0.005, 8, 50, ("1 epoch", 20000)),
}
BAM = {
    "T1": Recipe(0.005, 8, 200, ("1 epoch", 1000)),
    "T2": Recipe(0.005, 8, 50, ("0.5 epochs", 1000)),
}
FROZEN = [
    pytest.param(table, run, recipe[table], id=f"{table}-{run}")
    for table in ("T1", "T2")
    for run, recipe in (
        ("r50-pfenet-unfiltered-freeze", PFENET),
        ("vgg16-pfenet-freeze", PFENET),
        ("vgg16-baseline-freeze", PFENET),
        ("r50-bam-freeze", BAM),
        ("vgg16-bam-freeze", BAM),
    )
]


def poly_learning_rate(base_lr: float, current: int, most: int, group: int, index_split: int):
    """As in both authors' util.py: groups after `index_split` learn at ten times the rate."""
    lr = base_lr * (1 - current / most) ** 0.9
    return lr if group <= index_split else lr * 10


def row_of(table: str, run: str):
    return next(row for row in TABLES[table].rows if row.run == run)


def config_of(table: str, run: str, fold: int = 0) -> TrainConfig:
    """The configuration of a run; where an epoch is not published it has Pascal's photos."""
    row = row_of(table, run)
    values = run_values(TABLES[table], row, 1, fold, USERS, lambda data: 4760)
    return TrainConfig.from_dict(values)


def stated(command: str, name: str):
    """The configuration that a file of the package makes."""
    parser = build_parser()
    values = vars(parser.instantiate(parser.parse_args([command, "--config", name]))[command])
    kind = TrainConfig if command == "train" else BaseLearnerConfig
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


def check_frozen(config: TrainConfig, recipe: Recipe) -> None:
    """Rates of the first, a middle and the last step but one, and how it is validated."""
    network = Net()
    network.backbone.requires_grad_(False)
    optimizer = build_optimizer(network, config.optimizer)
    scheduler = build_scheduler(optimizer, config.optimizer, 1000)
    (head,) = optimizer.param_groups
    assert head["lr"] == 10 * recipe.base_lr
    assert (head["momentum"], head["weight_decay"]) == (0.9, 1e-4)
    for step in range(999):
        expected = poly_learning_rate(recipe.base_lr, step, 1000, 0, -1)
        assert head["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert config.batch_size == recipe.batch
    assert (config.validation_every, config.validation_episodes) == recipe.validation
    assert config.resize == "canvas" and config.regime.name == "freeze"


@pytest.mark.parametrize(("table", "run", "recipe"), FROZEN)
def test_frozen_rows_learn_as_their_code(table, run, recipe):
    for fold in range(4):
        config = config_of(table, run, fold)
        check_frozen(config, recipe)
        if config.data.exclude_novel:
            assert config.steps == recipe.epochs * (IMAGES[table][fold] // recipe.batch)
    # PFENet's backbone is in training mode, BAM's code fixes its batch norms
    as_pfenets = (("all",), "batch") if recipe in PFENET.values() else (None, "frozen")
    signature = config.regime.signature()
    layers = signature["layers"] and tuple(signature["layers"])
    assert (layers, config.regime.batch_norm_statistics) == as_pfenets


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("pascal_pfenet", PFENET["T1"]),
        ("coco_pfenet", PFENET["T2"]),
        ("pascal_bam", BAM["T1"]),
        ("coco_bam", BAM["T2"]),
    ],
)
def test_the_files_say_what_the_tables_say(name, recipe):
    config = stated("train", name)
    check_frozen(config, recipe)
    table, method = {"pascal": "T1", "coco": "T2"}[name.split("_")[0]], name.split("_")[1]
    row = config_of(table, f"vgg16-{method}-freeze")
    assert config.optimizer == row.optimizer and config.regime == row.regime
    assert config.steps == row.steps and config.model.bins == row.model.bins
    svf = stated("train", f"{name}_svf")
    row = config_of(table, f"r50-{method}-svf")
    assert svf.optimizer == row.optimizer and svf.steps == row.steps
    assert svf.model.bins == row.model.bins
    assert (svf.validation_every, svf.validation_episodes, svf.resize) == (
        row.validation_every,
        row.validation_episodes,
        row.resize,
    )


@pytest.mark.parametrize(
    ("run", "images"),
    [("r50-cyctr-freeze", IMAGES["T1"]), ("r50-cyctr-unfiltered-freeze", (4760, 4588, 4097, 5108))],
)
def test_cyctr_learns_as_its_code(run, images):
    """Groups of its train.py and rates of its util.py, where all but the transformer learn faster.

    Of that code's 200 epochs of whole batches.
    """
    network = nn.ModuleDict({"cycle_transformer": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    network.transformer = ("cycle_transformer.",)
    for fold in range(4):
        config = config_of("T12", run, fold)
        assert config.steps == 200 * (images[fold] // 4) and config.batch_size == 4
        assert config.regime.name == "freeze" and not config.regime.reads_layers
    optimizer = build_optimizer(network, config.optimizer)
    scheduler = build_scheduler(optimizer, config.optimizer, 1000)
    head, *others = optimizer.param_groups
    assert [group["weight_decay"] for group in others] == [1e-2, 0]
    for step in range(999):
        expected = 1.5 * poly_learning_rate(0.0025, step, 1000, 0, -1)
        assert head["lr"] == pytest.approx(expected, rel=1e-9)
        assert [group["lr"] for group in others] == [1e-4, 1e-4]
        optimizer.step()
        scheduler.step()


def test_the_files_of_cyctr():
    row, svf = config_of("T12", "r50-cyctr-freeze"), config_of("T1", "r50-pfenet-svf")
    pascal, tuned, coco = (
        stated("train", name) for name in ("pascal_cyctr", "pascal_cyctr_svf", "coco_cyctr")
    )
    assert dataclasses.replace(pascal, out=row.out, data=row.data) == row
    assert pascal.data == dataclasses.replace(row.data, root="data")
    expected = dataclasses.replace(
        svf.optimizer, transformer_lr=1e-4, transformer_schedule="constant"
    )
    assert tuned.optimizer == expected and tuned.regime == svf.regime
    assert tuned.steps == svf.steps
    assert coco.optimizer == dataclasses.replace(row.optimizer, lr=0.005)
    assert coco.steps == 50 * (IMAGES["T2"][0] // 8)
    assert (coco.batch_size, coco.data.size, coco.validation_episodes) == (8, 473, 5000)


def test_every_row_scores_on_the_canvas_but_those_of_their_authors():
    own = {f"r50-{name}" for name in ("rpmm", *(f"{m}-unfiltered" for m in OWN_PROTOCOL))}
    rows = [(t, row) for t in TABLES.values() for row in t.rows if row.run not in {None, *own}]
    assert len(rows) == 145
    for table, row in rows:
        values = run_values(table, row, 1, 0, USERS, lambda data: 4760)
        config = TrainConfig.from_dict(values)
        assert config.resize == "canvas" and str(config.validation_every).endswith(("epoch", "s"))


@pytest.mark.parametrize(
    ("table", "index_split", "epochs", "images"), [("T1", 0, 100, 5953), ("T2", -1, 20, 82081)]
)
@pytest.mark.parametrize("fold", [0, 3])
def test_base_learners_learn_as_bams(table, index_split, epochs, images, fold):
    """Groups of its get_optim: encoder, PPM, classifier."""
    row = row_of(table, "r50-bam-svf")
    values = base_values(TABLES[table], row, fold, {"data": {"root": "data"}})
    config = BaseLearnerConfig(**values, out="base")
    network = PSPNet(build_backbone("resnet18", width=2), 15)
    groups = {id(p): g["lr"] for g in parameter_groups(network, config) for p in g["params"]}
    parts = (network.backbone, network.base_learner.pool, network.base_learner.classifier)
    for group, part in enumerate(parts):
        rate = poly_learning_rate(2.5e-4, 0, 1, group, index_split)
        assert sorted({groups.pop(id(p)) for p in part.parameters()}) == [pytest.approx(rate)]
    assert not groups
    assert config.data.size == 417 and not config.data.exclude_novel
    assert config.scale == (0.5, 2.0) and config.batch_size == 12
    assert config.steps == epochs * (images // 12)
    assert config.steps == {"T1": 49_600, "T2": 136_800}[table]
    assert (config.validation_every, config.validation_images) == ("1 epoch", 0)
    recipe = stated("train-base", {"T1": "pascal_bam_base", "T2": "coco_bam_base"}[table])
    assert recipe == dataclasses.replace(config, out=recipe.out, data=recipe.data)
    assert recipe.data == dataclasses.replace(config.data, fold=0)


def test_a_base_learner_sees_every_photo(tiny, monkeypatch, tmp_path):
    """Of the list, also those with a novel class, or without any; and all test photos."""
    data = {"source": "shapes", "min_area": 0.3, "workers": 0}
    source = build_source(DataConfig(**data, size=33))
    novel = set(source.folds[1])
    clean = [i for i in source.indices("train") if not novel & set(source.class_areas(i))]

    def trainer(**changes):
        model = ModelConfig(backbone="resnet18", width=2, weights="none")
        own = BaseLearnerData(**data, fold=1, **changes)
        config = BaseLearnerConfig(own, model, steps=2, batch_size=4, out=str(tmp_path / "x"))
        return BaseTrainer(config, build_fabric(config))

    monkeypatch.setattr("fss.training.loop.build_source", lambda config: source)
    all_photos = trainer(size=33)
    assert all_photos.dataset.images == source.indices("train") != clean
    assert all_photos.held_out.images == source.indices("test")
    assert all_photos.validation_every == len(source.indices("train")) // 4
    assert trainer(size=33, exclude_novel=True).dataset.images == clean
    assert trainer().dataset[0]["image"].shape == (3, 417, 417)
    assert BaseLearnerConfig(DataConfig(root="x", size=33)).data.size == 33


@pytest.mark.parametrize(
    ("table", "run", "side", "expected"),
    [
        # 641 px: 81 positions of a ResNet, 41 of VGG, whose layer 3 has another stride
        ("T2", "r50-pfenet-svf", 81, [81, 40, 20, 10]),
        ("T2", "vgg16-pfenet-freeze", 41, [41, 20, 10, 5]),
        ("T2", "vgg16-pfenet-svf", 41, [41, 20, 10, 5]),
        ("T2", "r50-pfenet-unfiltered-freeze", 81, [81, 40, 20, 10]),
        ("T1", "r50-pfenet-svf", 60, [60, 30, 15, 8]),
        ("T1", "vgg16-pfenet-freeze", 30, [60, 30, 15, 8]),
    ],
)
def test_pfenets_bins_by_the_size_of_the_map(table, run, side, expected):
    enrich = FeatureEnrichment(2, config_of(table, run).model.bins, 0.0).train()
    query, prototype = torch.randn(1, 2, side, side), torch.randn(1, 2, 1, 1)
    _, logits = enrich(query, prototype, torch.rand(1, 1, side, side))
    assert [one.shape[-1] for one in logits] == expected


def test_a_share_of_a_small_map_is_a_cell_at_least():
    enrich = FeatureEnrichment(2, (1, 0.5, 0.25, 0.125), 0.0).train()
    maps = torch.randn(1, 2, 5, 5)
    _, logits = enrich(maps, maps[..., :1, :1], maps[:, :1])
    assert [one.shape[-1] for one in logits] == [5, 2, 1, 1]


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 21917),
        ({"fold": 2}, 43045),
        ({"exclude_novel": False}, None),
        ({"folds": "panet"}, None),
        ({"train_list": "mine.txt", "val_list": "val.txt"}, None),
        ({"min_area": 1024}, None),
        ({"source": "folder"}, None),
    ],
)
def test_published_numbers_are_of_the_published_lists(changes, images):
    settings = {"source": "coco", "root": "data", "fold": 0} | changes
    assert published_images(TABLES["T2"].data, settings) == images


def test_the_epoch_of_other_lists_is_counted(monkeypatch, capsys):
    """On the embedded photos, in place of the user's: what is listed, and whole batches of it."""
    config = DataConfig(source="shapes", size=33, min_area=0.05)
    source = build_source(config)
    built = []
    monkeypatch.setattr(
        "fss.paper.plan.build_source", lambda config: built.append(config.fold) or source
    )
    monkeypatch.setattr("fss.paper.tables._LISTING", ("source", "min_area"))
    count = EpochCounter("COCO-20i")
    numbers = []
    for fold in (0, 1, 0):
        novel = set(source.folds[fold])
        areas = [source.class_areas(i) for i in source.indices("train")]
        listed = sum(
            any(area >= 0.05 * 33 * 33 for c, area in each.items() if c not in novel)
            for each in areas
        )
        settings = {"source": "shapes", "size": 33, "min_area": 0.05, "exclude_novel": False}
        numbers.append(count(settings | {"fold": fold, "shots": 1}))
        assert numbers[-1] == listed > 0
    assert built == [0]
    printed = capsys.readouterr().err
    assert printed.count("counted in your data") == 2
    assert f"fold 1, without the † filter: an epoch has {numbers[1]} training photos" in printed
    settings = {"data": settings | {"size": 33}, "model": {"weights": "none"}}
    table = TABLES["T2"]
    runs = plan(table, Options(rows=["r50-pfenet-unfiltered-freeze"], settings=_without(settings)))
    assert [run.reason for run in runs] == [None] * 8
    assert [run.config.steps for run in runs[:2]] == [50 * (n // 8) for n in numbers[:2]]


def _without(settings):
    data = {k: v for k, v in settings["data"].items() if k not in ("fold", "shots")}
    return settings | {"data": data}


def test_a_row_whose_epoch_is_not_published_can_run():
    lines = [line for line in listing(TABLES["T2"], Options()) if "unfiltered" in line]
    assert lines and not any("cannot run" in line for line in lines)
