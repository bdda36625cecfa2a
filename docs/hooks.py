"""What mkdocs adds to the pages: the measured tables, and the help texts of the command line."""

from __future__ import annotations

import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """benchmarks/results as pages and pictures in results/."""
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".md", ".png"):
            file = File.generated(config, f"results/{path.name}", abs_src_path=str(path))
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("results/"):
        return f"# {Path(page.file.src_uri).stem}\n\n{markdown}"
    markdown = markdown.replace("](../benchmarks/results/", "](results/")
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
