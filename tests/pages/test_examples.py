"""The examples run as a user would run them, and print what they claim."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

import svf_fast

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What an example prints, in a folder of its own."""

    def run(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        state = torch.get_rng_state()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        torch.set_rng_state(state)
        return capsys.readouterr().out

    return run


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number) for number in found.groups()]


def test_image_classification(run):
    text = run("image_classification.py")
    pattern = r"(\d+) values of the backbone trained: loss (\d\.\d+), (0\.\d+) of 200 pictures"
    frozen, svf = (numbers(pattern, line) for line in text.splitlines())
    assert frozen[0] == 0 and 1000 < svf[0] < 3000
    assert svf[1] < frozen[1]
    assert min(frozen[2], svf[2]) > 0.4  # chance is 0.2


def test_few_shot_segmentation(run, tmp_path):
    text = run("few_shot_segmentation.py")
    pattern = r"^\w+: IoU (0\.\d+) of 8 pictures, all of them object (0\.\d+)"
    found, chance = numbers(pattern, text)
    (other,) = numbers(r"with softer.safetensors: IoU (0\.\d+)", text)
    (again,) = numbers(r"without: IoU (0\.\d+)", text)
    assert found > 1.5 * chance
    assert again == found != other
    assert Image.open(tmp_path / "overlay.png").size == (97, 97)
    assert svf_fast.Adapter.load(tmp_path / "softer.safetensors").card["data"] == "none"


def test_vision_transformer(run):
    pytest.importorskip("timm")
    text = run("vision_transformer.py")
    trained, whole = numbers(r"^(\d+) values train of (\d+)", text)
    first, last = numbers(r"loss (\d\.\d+) in the first pass, (\d\.\d+) in the last", text)
    (right,) = numbers(r"(\d\.\d+) of the 160 pictures told apart", text)
    (change,) = numbers(r"merging changes the logits by at most (\S+)", text)
    assert trained < 0.01 * whole
    assert last < first and right > 0.5  # chance is 0.2
    assert change < 1e-3
