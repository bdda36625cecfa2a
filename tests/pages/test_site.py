from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fss.segment.segmenter import FewShotSegmenter, Segmentation

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


def test_the_figure_of_own_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded backbone and a step, which is enough to draw it."""
    spec = importlib.util.spec_from_file_location("own_pictures", ROOT / "docs/own_pictures.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "STEPS", 1)
    rows = script.segment(FewShotSegmenter(size=65, device="cpu"))
    assert [name for name, *_ in rows] == ["untuned", "S tuned"] * 2
    figure = script.draw(rows)
    photo, truth = script.load(6)
    assert photo.shape == (*truth.shape, 3) and 0.02 < truth.mean() < 0.1
    assert len(figure.axes) == 4 * 6
    shown = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert shown[0] == "1 shown: untuned" and shown[-1].startswith("IoU 0.")
    truth_found = Segmentation(photo, truth.astype("float32"), truth)
    assert script.iou(truth_found, 6) == 1 and 0 <= script.iou(rows[0][2][-1], 6) < 1
