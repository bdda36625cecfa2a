"""The files of the tables against the text of the paper: numbers, and what each row says it runs.

A row holds if its numbers are the text's to the digit, and its run is what the cells beside them
say: model, backbone, † filter, what trains, by which recipe. What is quoted says why.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest

from fss.config import RegimeConfig, TrainConfig
from fss.paper.tables import Row, Table, default_folder, load_table, run_values, table_names
from fss.settings import FOLDER, read_settings
from tests.fss.paper.published import PrintedRow, printed_tables
from tests.fss.paper.trained import what_trains

TABLES = {name: load_table(name, default_folder()) for name in table_names(default_folder())}
USERS = {"data": {"root": "photos"}, "model": {"base_weights": "base/{data}-{backbone}-{fold}"}}
BY_THEIR_AUTHORS = {"PANet", "CANet", "RPMM", "PPNet", "CWT"}
# Of their code: epochs, and the batches of one by fold; the others train as long on every fold.
EPOCHS_OF_CODE = {"canet": (200, (2849, 2564, 1950, 2899)), "cwt": (20, (4760, 4588, 4097, 5108))}
ROWS = [(name, number) for name, table in TABLES.items() for number in range(len(table.rows))]

# The tables that print the same rows with their folds, where the text has all of their ticks too.
DETAILED = {"T4": "T16", "T5": "T17", "T6": "T18", "T7": "T19", "T8": "T20"}

FREEZE = RegimeConfig("freeze")
SVF = RegimeConfig("svf")
FULL = RegimeConfig("full", ("all",), batch_norm="both")
BIAS = RegimeConfig("bias", ("all",))
BATCH_NORM = RegimeConfig("freeze", ("all",), batch_norm="both")
OF_WORDS = {
    "freeze backbone": FREEZE,
    "fully fine-tune": FULL,
    "svf": SVF,
    "adapter": RegimeConfig("adapter"),
    "bias tuning": BIAS,
    "fine-tuning bn scale (weight)": RegimeConfig("freeze", ("all",), batch_norm="weight"),
    "fine-tuning bn shift (bias)": BIAS,
    "fine-tuning bn (weight+bias)": BATCH_NORM,
}
OF_FORMULA = {
    "W: -": FREEZE,
    "S'W: S'": RegimeConfig("scale_output"),
    "WS': S'": RegimeConfig("scale_input"),
    "RS'R'W: S'": RegimeConfig("rotated_scale"),
    "RS'RTW: S'": RegimeConfig("rotated_scale"),
    "USVT: S": SVF,
    "USS'VT: S'": RegimeConfig("svf_scale"),
    "USS'VT: S+S'": RegimeConfig("svf_scale", factors=("S", "S'")),
    "URSRTVT: -": RegimeConfig("rotated_svf", factors=()),
    "URSRTVT: S": RegimeConfig("rotated_svf"),
}


class Stated(NamedTuple):
    """What the cells of a row say of its experiment."""

    regime: RegimeConfig
    model: str = "baseline"
    backbone: str = "resnet50"
    exclude_novel: bool = True
    recipe_of_svf: bool = False
    episodes: int | None = None


@pytest.fixture(scope="session")
def printed(shared: Path) -> dict[str, list[PrintedRow]]:
    path = shared / "docs" / "svf_paper.md"
    if not path.is_file():
        pytest.skip(f"the text of the paper is not at {path}")
    return printed_tables(path.read_text())


@pytest.fixture(scope="session")
def printed_folds(printed) -> dict[tuple, list[float]]:
    """The numbers by fold of each experiment in whichever tables print them: they agree."""
    folds: dict[tuple, list[float]] = {}
    for name, number in ROWS:
        table, row = TABLES[name], TABLES[name].rows[number]
        for shots, numbers in printed[name][number].by_shots().items():
            if row.run and len(numbers) > 1:
                assert folds.setdefault(experiment(table, row, shots), numbers) == numbers
    return folds


def experiment(table: Table, row: Row, shots: int) -> tuple:
    return table.data.name, row.run, table.metric, row.episodes, shots


def test_all_rows_hold_or_are_quoted(printed):
    """Whether each does is tested below, row by row."""
    assert set(printed) == set(TABLES)
    for name, table in TABLES.items():
        assert len(table.rows) == len(printed[name]), name
    quoted = [(name, number) for name, number in ROWS if TABLES[name].rows[number].quoted]
    assert (len(ROWS), len(quoted)) == (152, 2)


@pytest.mark.parametrize(("name", "number"), ROWS)
def test_the_numbers_of_a_row(printed, printed_folds, name, number):
    table, row = TABLES[name], TABLES[name].rows[number]
    theirs = printed[name][number].by_shots()
    assert set(row.paper) == set(theirs)
    for shots, published in row.paper.items():
        assert published.mean == theirs[shots][-1]
        numbers = theirs[shots] if row.quoted else printed_folds.get(experiment(table, row, shots))
        assert published.folds == (tuple(numbers[:-1]) if numbers else None)


@pytest.mark.parametrize(("name", "number"), ROWS)
def test_the_experiment_of_a_row(printed, name, number):
    table, row = TABLES[name], TABLES[name].rows[number]
    cells = carried(printed[DETAILED.get(name, name)], number)
    method = cells[0].split(" ")[0]
    if row.quoted:
        assert (name, method) in {("T15", "PGNet"), ("T15", "PFENet")}
        assert row.label.startswith(method) and len(row.quoted) > 20
        return
    stated = what_is_stated(DETAILED.get(name, name), cells)
    for shots in row.paper:
        for fold in range(4):
            values = run_values(table, row, shots, fold, USERS, lambda listed: 44_000)
            config = TrainConfig.from_dict(values)
            assert (config.data.shots, config.data.fold) == (shots, fold)
            if method in BY_THEIR_AUTHORS:
                check_of_authors(config, row, stated)
            else:
                check(config, row, stated)


def check(config: TrainConfig, row: Row, stated: Stated) -> None:
    assert (config.model.name, config.model.backbone) == (stated.model, stated.backbone)
    assert config.data.exclude_novel == stated.exclude_novel
    assert (row.episodes or config.test_episodes) == (stated.episodes or 1000)
    backbone = config.model.backbone
    made, meant = what_trains(backbone, config.regime), what_trains(backbone, stated.regime)
    assert made[:2] == meant[:2], (config.regime, stated.regime)
    frozen = not made[0]
    published = frozen and not stated.recipe_of_svf
    # as in PFENet's code; of the rest the paper says nothing but that SVF trains no batch norm
    moving = published and stated.model in ("baseline", "pfenet")
    assert config.regime.batch_norm_statistics == ("batch" if moving else "frozen")
    assert config.optimizer.schedule == ("poly" if published else "cosine")
    if not published:
        assert (config.optimizer.lr, config.batch_size) == (0.015, 8)
        assert (config.optimizer.lr_factor, config.optimizer.momentum) == (1, 0.9)
        assert (config.data.seed, config.seed) == (321, 321)


def check_of_authors(config: TrainConfig, row: Row, stated: Stated) -> None:
    """All but photos, fold, shots and the places of files is as in the method's own file."""
    assert (config.model.name, config.model.backbone) == (stated.model, stated.backbone)
    # RPMM's code trains with the filter, which Table 15 does not say of its numbers
    assert config.data.exclude_novel == (stated.exclude_novel or stated.model == "rpmm")
    assert row.note is not None and "the recipe" in row.note and config.test_episodes == 1000
    own = TrainConfig.from_dict(read_settings(FOLDER / f"pascal_{stated.model}.yaml"))
    data = dataclasses.replace(own.data, root="photos", fold=config.data.fold)
    model = dataclasses.replace(
        own.model, backbone=stated.backbone, base_weights=config.model.base_weights
    )
    expected = dataclasses.replace(
        own, data=dataclasses.replace(data, shots=config.data.shots), model=model, out=config.out
    )
    epochs, batches = EPOCHS_OF_CODE.get(stated.model, (own.steps, (1,) * 4))
    assert config == dataclasses.replace(expected, steps=epochs * batches[config.data.fold])


def carried(rows: list[PrintedRow], number: int) -> list[str]:
    """Return the cells of a row, where they are empty, those of the method and backbone above."""
    cells = list(rows[number].cells)
    width = max(len(row.cells) for row in rows)
    cells += [""] * (width - len(cells))
    for column in range(width):
        for row in reversed(rows[:number]):
            here = row.cells[column] if column < len(row.cells) else ""
            if not cells[column] and here != "✓" and here != "-":
                cells[column] = here
    return cells


def what_is_stated(name: str, cells: list[str]) -> Stated:
    """Return what the cells of a row of a table say."""
    if name in ("T1", "T2", "T3", "T11", "T12", "T14", "T15"):
        return _compared(name, *cells)
    return Stated(_ablated(name, *cells))


def _compared(name: str, method: str, backbone: str, more: str = "") -> Stated:
    """Read rows of methods; T11 and T14 train with the filter, whose † they omit."""
    unfiltered = {"T11": False, "T14": False, "T12": more == "w/o"}.get(name, "†" not in method)
    return Stated(
        SVF if "SVF" in method else FREEZE,
        method.split(" ")[0].lower(),
        {"VGG16": "vgg16_bn", "VGG-16": "vgg16_bn"}.get(backbone, "resnet50"),
        not unfiltered,
        more == "ours",
        int(more) if name == "T14" and more != "1000" else None,
    )


def _ablated(name: str, *cells: str) -> RegimeConfig:
    """Read rows on the baseline with ResNet-50 and the filter: what trains in the backbone."""
    ticks = tuple(cell == "✓" for cell in cells)
    if name == "T16":
        both = RegimeConfig("svf", batch_norm="both")
        return {(0, 0): FREEZE, (1, 0): BATCH_NORM, (1, 1): both, (0, 1): SVF}[ticks[1:]]
    if name in ("T17", "T18", "T20"):
        if cells[1] == "-":
            return FREEZE
        layers = tuple(f"layer{number}" for number in cells[1].split(", "))
        if "SVF" in cells[0]:
            return RegimeConfig("svf", layers)
        kernel = {(1, 0): "3x3", (0, 1): "1x1"}.get(ticks[2:], "all")
        return FULL if "fully" in cells[0] else RegimeConfig("full", layers, kernel)
    if name == "T19":
        return RegimeConfig("svf", factors=[f for f, tick in zip("USV", ticks[1:]) if tick])
    if name in ("T10", "T13", "T21"):
        return OF_WORDS[cells[-1].lower()]
    return OF_FORMULA[": ".join(cell.replace(" ", "") for cell in cells[-2:])]
