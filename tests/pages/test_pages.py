"""What pages say of the package is so: tables, options, links, lengths."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fss.cli import build_parser
from fss.data import coco
from fss.data.pascal import PascalSource
from fss.paper.tables import FOLDS, default_folder, load_table, table_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rows(path: Path) -> Iterator[list[str]]:
    for line in path.read_text().splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_tables_of_the_paper_are_those_that_are_listed() -> None:
    listed = {
        row[0]: row[1:] for row in rows(ROOT / "docs/reproduce.md") if re.match(r"T\d", row[0])
    }
    folder = default_folder()
    for name in table_names(folder):
        table = load_table(name, folder)
        runs = {(row.run, shots) for row in table.rows if row.run for shots in row.paper}
        assert listed.pop(name) == [table.title, str(len(table.rows)), str(FOLDS * len(runs))]
    assert not listed


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
