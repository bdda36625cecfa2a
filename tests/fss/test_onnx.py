"""Whole few-shot models in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import svf_fast
from fss.config import ModelConfig
from fss.data import MEAN
from fss.engine import train
from fss.export import INPUTS, export_onnx, export_run
from fss.models import build_model


def network(name: str, shots: int = 1):
    torch.manual_seed(0)
    config = ModelConfig(
        name=name,
        backbone="resnet18",
        width=8,
        weights="none",
        base_weights="none" if name == "bam" else None,
        channels=8,
    )
    return build_model(config, {1: "cat", 2: "dog"}, shots).eval()


def logits(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = dict(zip(INPUTS, (x.numpy() for x in inputs), strict=True))
    return torch.from_numpy(session.run(["logits"], values)[0])


@pytest.mark.parametrize(("name", "shots"), [("baseline", 1), ("pfenet", 2), ("bam", 1)])
def test_a_model_computes_the_same_in_onnxruntime(tmp_path, name, shots):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    model = network(name, shots)
    model.backbone.requires_grad_(False)
    svf_fast.convert(model.backbone)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(0.5 + torch.rand_like(S))
    images, masks = torch.randn(1, 1 + shots, 3, 33, 33), torch.randint(0, 2, (1, shots, 33, 33))
    masks[:, :, :4] = 255
    inputs = images[:, 0], images[:, 1:].contiguous(), masks
    with torch.no_grad():
        expected = model(*inputs).logits
    assert export_onnx(model, path, 33, shots) < 1e-4
    torch.testing.assert_close(logits(path, *inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_run(tiny, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    config = tiny(steps=1)
    train(config)
    path = tmp_path / "model.onnx"
    line = export_run(config.out, str(path))
    assert line.startswith(f"{path}: query_image, support_images, support_masks to logits, 1-shot")
    facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["fss"]
    assert json.loads(facts) == {
        "data": "shapes",
        "fold": 0,
        "model": "baseline",
        "size": 33,
        "shots": 1,
        "mean": MEAN.tolist(),
        "std": pytest.approx([0.229, 0.224, 0.225]),
    }


def test_without_the_tools(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match="onnxruntime is not installed; pip install 'svf-fast.onnx"
    ):
        export_onnx(network("baseline"), tmp_path / "x.onnx", 33)
    assert not list(tmp_path.iterdir())
