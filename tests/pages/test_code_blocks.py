"""Every code block of README.md and docs/ runs, or is checked without running and says why.

Python blocks of a page run in order in one namespace, in a folder of their own; a page may have
hidden ones, in a comment ``<!-- setup … -->``. Lines of bash blocks go through the real parser of
their command. A bash block is marked with ``<!-- run -->`` or ``<!-- run with: OPTIONS -->``, which
runs `fss` lines with further options, or with
``<!-- not run: REASON -->``, as is a python block that cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.distributed.run import get_args_parser

from fss import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {
    "downloads",
    "installs",
    "needs a GPU",
    "needs timm",
    "needs the data set",
    "on several machines",
    "serves until stopped",
    "takes minutes",
    "writes into the checkout",
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run(?: with: [^\n]*)?|not run: [^\n]*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """line: where its code begins in the page. mark: see above, or empty."""

    line: int
    language: str
    mark: str
    code: str


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    found = []
    for match in BLOCK.finditer(text):
        part = "setup" if match["setup"] is not None else "code"
        language = "python" if part == "setup" else match["language"]
        line = text.count("\n", 0, match.start(part)) + 1
        code = re.sub(f"^{match['indent'] or ''}", "", match[part], flags=re.MULTILINE)
        found.append(Block(line, language, match["mark"] or "", code))
    return found


def commands(code: str) -> list[list[str]]:
    """The words of each line of a shell block, comments and variables in front left off."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    for words in lines:
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
    return [words for words in lines if words]


def check(words: list[str], run: bool = False) -> None:
    """Raises where a command could not be given like this."""
    program, *arguments = words
    if program == "fss":
        parser = command_line()
        if "--help" in arguments or "--version" in arguments:
            assert run or arguments[0].startswith("-") or arguments[0] in help_names()
            return
        parser.instantiate(parser.parse_args(arguments))
        assert not run or cli.main(arguments) == 0
    elif program == "torchrun":
        script = get_args_parser().parse_args(arguments)
        assert (script.module, script.training_script) == (True, "fss.cli")
        check(["fss", *script.training_script_args])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all("=" in word or word in targets for word in arguments), words
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), words
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), words
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        text = (ROOT / "pyproject.toml").read_text()
        known = re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1], re.M)
        assert all(name in known for extra in extras for name in extra.split(",")), words
    else:
        assert program in ("git", "cd", "ls", "cat", "pre-commit", "uv"), words


@functools.cache
def command_line() -> ArgumentParser:
    return cli.build_parser()


def help_names() -> list[str]:
    return list(command_line()._subcommands_action._name_parser_map)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # what a page sets stays with it: a port of its own would stop every later group of processes
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(path):
        where = f"{path.name}, line {block.line}"
        if block.language == "python" and not block.mark.startswith("not run"):
            # as many lines before it as in the page, for the traceback
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            exec(code, namespace)
        elif block.language == "bash":
            assert block.mark, f"{where}: expected <!-- run --> or <!-- not run: REASON --> before"
            run, _, options = block.mark.partition(" with: ")
            for words in commands(block.code):
                extra = shlex.split(options) if words[0] == "fss" else []
                try:
                    check([*words, *extra], run == "run")
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{where}: {shlex.join(words)}: {error}") from error
        elif block.language == "yaml":
            file = tmp_path / "block.yaml"
            file.write_text(block.code)
            command_line().parse_args(["train", "--config", str(file)])


def test_what_does_not_run_says_why(record_property: pytest.RecordProperty) -> None:
    every = [block for path in PAGES for block in blocks(path)]
    reasons = Counter(
        block.mark.partition(": ")[2] for block in every if block.mark.startswith("not run")
    )
    assert set(reasons) <= REASONS
    record_property("blocks", len(every))
    record_property("not run", dict(reasons))
    print(f"{len(every)} blocks, not run: {dict(reasons)}")
    python = [block for block in every if block.language == "python"]
    assert sum(not block.mark for block in python) >= 0.8 * len(python)


def test_bad_blocks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup\nx = 1\n-->\ntext\n\n<!-- not run: downloads -->\n```bash\n"
        "fss train --nonsense 1\n```\n\n    ```python\n    assert x == 2\n    ```\n"
    )
    setup, bash, python = blocks(page)
    assert setup.code == "x = 1\n" and bash.mark == "not run: downloads"
    assert python.code == "assert x == 2\n" and python.line == 12
    for line in ("fss train --nonsense 1", "make nothing", "python no/such.py", "rm -r x"):
        with pytest.raises((Exception, SystemExit)):
            check(shlex.split(line))
    with pytest.raises(AssertionError, match="line 8"):
        test_blocks(page, tmp_path, monkeypatch)
    assert torch.is_grad_enabled()
