"""What pages say of the package is so: tables, options, links, lengths."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fss.cli import build_parser
from fss.config import ModelConfig, RegimeConfig
from fss.data import coco
from fss.data.pascal import PascalSource
from fss.models import build_model
from fss.models.regimes import apply_regime
from fss.paper.tables import (
    FOLDS,
    default_folder,
    load_table,
    needs_base_learner,
    run_values,
    table_names,
)
from svf_fast.svd import decompose, guarded_directions

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rows(path: Path) -> Iterator[list[str]]:
    for line in path.read_text().splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_tables_of_the_paper_are_those_that_are_listed() -> None:
    page = ROOT / "docs/reproduce.md"
    listed = {row[0]: row[1:] for row in rows(page) if row[0].startswith("`fss reproduce T")}
    tables = [load_table(name, default_folder()) for name in table_names(default_folder())]
    trainings, learners = set(), set()
    for table in tables:
        own = {
            (table.data.name, row.run, shots)
            for row in table.rows
            if row.run
            for shots in row.paper
        }
        models = [row.settings.get("model", {}) for row in table.rows]
        bases = {
            (table.data.name, model.get("backbone", "resnet50"))
            for model in models
            if needs_base_learner(model)
        }
        counts = (len(table.rows), FOLDS * len(own), FOLDS * len(bases))
        assert listed.pop(f"`fss reproduce {table.name}`") == [table.title, *map(str, counts)]
        trainings |= own
        learners |= bases
    assert not listed
    text = " ".join(page.read_text().split())
    together = f"{FOLDS * len(trainings)} trainings and {FOLDS * len(learners)} base learners"
    assert f"All tables together need {together}." in text
    quoted = [table.name for table in tables for row in table.rows if row.quoted]
    total = sum(len(table.rows) for table in tables)
    assert f"The paper has {total} rows. {total - len(quoted)} hold" in text
    assert f"{len(quoted)} are quoted, both of Table 15" in text and set(quoted) == {"T15"}
    # what the page says of the first fold's validations
    svf = run_values(tables[15], tables[15].rows[-1], 1, 0, {})
    assert (svf["validation_every"], svf["validation_episodes"]) == ("1 epoch", 1000)
    assert (
        f"200 000 validation episodes beside {round(svf['steps'] * 8, -3):,}".replace(",", " ")
        in text
    )


def test_the_share_of_singular_values_is_the_one_that_is_explained() -> None:
    model = build_model(ModelConfig(weights="none"))
    apply_regime(model, RegimeConfig("svf", batch_norm="both"))
    backbone = model.get_submodule("backbone")
    trained = {name: p.numel() for name, p in backbone.named_parameters() if p.requires_grad}
    S = sum(count for name, count in trained.items() if name.endswith(".S"))
    plain = build_model(ModelConfig(weights="none")).get_submodule("backbone")
    own = sum(p.numel() for p in plain.parameters())
    classifier = 2048 * 1000 + 1000
    text = " ".join((ROOT / "docs/models.md").read_text().split())
    assert f"Of the {own:,} parameters of a ResNet-50".replace(",", " ") in text
    assert f"`regimes/svf` {S:,}. That is {100 * S / own:.3f} %".replace(",", " ") in text
    together = sum(trained.values())
    share = f"{100 * together / (own + classifier):.2f}"
    assert f"The paper says {share} %, which no choice of layers gives" in text
    said = f"{together:,} of the {(own + classifier) / 1e6:.1f} M parameters with the classifier"
    assert said.replace(",", " ") in text


def test_the_published_numbers_are_those_that_are_verified() -> None:
    page = {
        row[0]: [int(n) for n in row[1:]]
        for row in rows(ROOT / "docs/data.md")
        if row[-1].isdigit()
    }
    pascal = PascalSource.published
    assert pascal is not None
    assert tuple(page["Pascal train"]) == pascal.train
    assert tuple(page["Pascal train, †"]) == pascal.train_excluding_novel
    assert tuple(page["Pascal test"]) == pascal.test
    assert tuple(page["COCO train, † (`fwb`)"]) == coco._PUBLISHED.train_excluding_novel
    assert tuple(page["COCO test (`fwb`)"]) == coco._PUBLISHED.test


def test_the_guarded_directions_are_those_of_the_page(shared: Path) -> None:
    path = shared / "weights" / "resnet50_imagenet.safetensors"
    if not path.is_file():
        pytest.skip(f"no weights at {path}")
    weights = [
        weight
        for name, weight in load_file(path).items()
        if weight.ndim == 4 and re.match(r"layer[234]\.", name)
    ]
    guarded = [guarded_directions(decompose(weight)[1], 1, 1).shape[1] for weight in weights]
    some = [count for count in guarded if count]
    said = (
        f"Of the {len(guarded)} convolutions in layers 2 to 4 of an ImageNet ResNet-50, "
        f"{guarded.count(0)} need no guard and the others guard {min(some)} to {max(some)}"
    )
    assert said in " ".join((ROOT / "docs/gram.md").read_text().split())


@functools.cache
def options() -> set[str]:
    found: set[str] = set()
    parsers = [build_parser()]
    while parsers:
        parser = parsers.pop()
        found |= {option for action in parser._actions for option in action.option_strings}
        if parser._subcommands_action is not None:
            parsers += parser._subcommands_action._name_parser_map.values()
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_settings_and_options_exist(path: Path) -> None:
    known = options()
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.match("torchrun|pytest|python", code) or code == "--node-rank":
            continue
        for option in re.findall(r"(?:^| )(--[a-z][\w.-]*)", code):
            assert option in known, f"{path.name}: {option}"
        setting = re.match(r"((?:data|model|regime|optimizer)\.\w+)(?::|$)", code)
        if setting:
            assert f"--{setting[1]}" in known, f"{path.name}: {code}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#][^)]*)\)", path.read_text()):
        if not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    for path in PAGES:
        assert len(path.read_text().splitlines()) < 200, path.name
