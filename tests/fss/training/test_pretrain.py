from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from fss.data.shapes import PRETRAINING_CLASSES
from fss.models.backbone import build_backbone
from fss.models.weights import load_backbone
from fss.training.pretrain import main

ARGUMENTS = ["--steps", "2", "--batch-size", "4", "--size", "33", "--threads", "1"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr("fss.training.pretrain.HELD_OUT", 10)


def test_writes_weights_that_fit_the_backbone(tmp_path, capsys):
    path = tmp_path / "backbone.safetensors"
    main(["--out", str(path), *ARGUMENTS])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(t.dtype == torch.float16 for t in tensors.values() if t.is_floating_point())
    assert "--steps 2" in metadata["command"] and metadata["seed"] == "0"
    assert metadata["accuracy"].endswith("on 10 held-out images")
    assert json.loads(metadata["classes"]) == [shape.name for shape in PRETRAINING_CLASSES]
    assert path.stat().st_size < 4 * 2**20
    backbone = build_backbone("resnet18", width=24)
    load_backbone(backbone, str(path))
    torch.testing.assert_close(backbone.conv1.weight, tensors["conv1.weight"].float())
    assert backbone.bn1.running_var.ne(1).any()
    assert "accuracy" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["backbone.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/x.safetensors"], "existing folder"),
        (["--out", "x.pth"], "expected a .safetensors file"),
        (["--out", "x.safetensors", "--steps", "0"], "--steps: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_embedded_weights_load():
    backbone = build_backbone("resnet18", width=24)
    load_backbone(backbone, "shapes")
    with torch.no_grad():
        features = backbone.eval()(torch.randn(1, 3, 65, 65))
    assert features.isfinite().all() and features.std() > 0
