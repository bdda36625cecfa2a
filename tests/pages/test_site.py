from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` does it: a link to what is not there ends it."""
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install "svf-fast[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "own-pictures.html", "LOG.html", "results/memory.html"} <= pages
    for name in ("few_shot/pascal.yaml", "images/own-pictures.jpg", "results/race.png"):
        assert (tmp_path / name).is_file()
