"""Whole few-shot models in onnxruntime."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import svf_fast
from fss.cli import main
from fss.config import ModelConfig
from fss.data import MEAN, STD, build_episodes, collate_episodes
from fss.models import MODELS, build_model
from fss.runs.folder import RunFolder
from fss.segment.export import INPUTS, export_onnx
from fss.training.run import train
from tests.long import LONG


def network(name: str, shots: int = 1):
    torch.manual_seed(0)
    config = ModelConfig(
        name=name,
        backbone="resnet18",
        width=8,
        weights="none",
        base_weights="none" if MODELS[name].needs_base_learner else None,
        channels=8,
    )
    return build_model(config, {1: "cat", 2: "dog"}, shots).eval()


def logits(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = dict(zip(INPUTS, (x.numpy() for x in inputs), strict=True))
    return torch.from_numpy(session.run(["logits"], values)[0])


@pytest.mark.parametrize(
    ("name", "shots"),
    [("pfenet", 2), ("bam", 1), ("cyctr", 2)]
    + [(name, 2) for name in MODELS if LONG and name not in ("pfenet", "bam", "cyctr")],
)
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
    size = 65 if name == "hdmnet" else 33  # whose maps read pixels at whole positions
    images = torch.randn(1, 1 + shots, 3, size, size)
    masks = torch.randint(0, 2, (1, shots, size, size))
    masks[:, :, :4] = 255
    inputs = images[:, 0], images[:, 1:].contiguous(), masks
    with torch.no_grad():
        expected = model(*inputs).logits
    assert export_onnx(model, path, size, shots) < 1e-4
    torch.testing.assert_close(logits(path, *inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_run_of_the_baseline(tiny, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    config = tiny(steps=1)
    train(config)
    path = tmp_path / "model.onnx"
    assert main(["export", config.out, "--out", str(path)]) == 0
    start = f"{path}: query_image, support_images, support_masks to logits, 1-shot, 33 pixels"
    assert capsys.readouterr().out.startswith(start)
    facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["fss"]
    assert json.loads(facts) == {
        "data": "shapes",
        "fold": 0,
        "model": "baseline",
        "size": 33,
        "shots": 1,
        "mean": MEAN.tolist(),
        "std": STD.tolist(),
    }
    episodes = build_episodes(config.data, "test", 1, seed=0)
    batch = collate_episodes([episodes[0]])
    inputs = [batch[name] for name in INPUTS]
    inputs[2] = inputs[2].long()
    model, _ = RunFolder(config.out).network("best.pt")
    with torch.no_grad():
        expected = model.eval()(*inputs).logits
    torch.testing.assert_close(logits(path, *inputs), expected, rtol=1e-4, atol=1e-4)


def test_without_the_tools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match="onnxruntime is not installed; pip install 'svf-fast.onnx"
    ):
        export_onnx(network("baseline"), tmp_path / "x.onnx", 33)
    assert not list(tmp_path.iterdir())
