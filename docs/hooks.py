"""What mkdocs adds to the pages: measured tables, the log, plans, and the commands' help."""

from __future__ import annotations

import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What pages link to in benchmarks, under the same names: results, the log, plans."""
    results = sorted((BENCHMARKS / "results").iterdir())
    shown = [path for path in results if path.suffix in (".md", ".png")]
    for path in [*shown, BENCHMARKS / "LOG.md", *sorted(BENCHMARKS.glob("few_shot/*.yaml"))]:
        name = path.relative_to(BENCHMARKS).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("results/"):
        return f"# {Path(page.file.src_uri).stem}\n\n{markdown}"
    if page.file.src_uri != "LOG.md":
        markdown = markdown.replace("](../benchmarks/", "](")
    return re.sub(r"^<!-- help: ([a-z -]+) -->$", _help, markdown, flags=re.MULTILINE)


def _help(match: re.Match[str]) -> str:
    """The help text of a command, to unfold."""
    from fss.cli import build_parser

    parser = build_parser()
    for name in match[1].split():
        parser = parser._subcommands_action._name_parser_map[name]
    text = html.escape(parser.format_help())
    return (
        f"<details><summary>fss {match[1]} --help</summary>\n"
        f'<pre class="help">{text.replace(chr(10) * 2, chr(10) + "&#8203;" + chr(10))}</pre>'
        "</details>"
    )
