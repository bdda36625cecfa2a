from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import svf_fast
from fss.adapter import interpolate_files, show_adapters
from fss.engine import train
from fss.models import build_backbone


def test_a_run_leaves_its_adapters(tiny, tmp_path):
    result = train(tiny(steps=2))
    folder = Path(tiny().out)
    trained = svf_fast.Adapter.load(folder / "adapter.safetensors")
    pretrained = svf_fast.Adapter.load(folder / "pretrained.safetensors")
    assert trained.card == {
        "backbone": "resnet18",
        "weights": "none",
        "layers": ["layer2", "layer3", "layer4"],
        "data": "shapes",
        "fold": 0,
        "shots": 1,
        "model": "baseline",
        "steps": result["test"]["step"],
        "metric": {"mIoU": result["test"]["miou"]["mean"]},
    }
    assert pretrained.card["steps"] == 0 and "metric" not in pretrained.card
    assert trained.backbone == pretrained.backbone
    assert any(not torch.equal(S, pretrained.S[name]) for name, S in trained.S.items())

    # both fit the backbone alone, and S is the tested checkpoint's
    weights = torch.load(folder / "best.pt", weights_only=True)["model"]
    prefix = "backbone."
    backbone = svf_fast.convert(build_backbone("resnet18", width=4))
    backbone.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    pretrained.apply(backbone)
    trained.apply(backbone)
    assert all(torch.equal(backbone.state_dict()[f"{n}.S"], S) for n, S in trained.S.items())

    half = tmp_path / "half.safetensors"
    text = interpolate_files(
        str(folder / "pretrained.safetensors"), str(folder / "adapter.safetensors"), 0.5, str(half)
    )
    assert "interpolated: 0.5" in text and "metric" not in text
    both = show_adapters((str(folder / "adapter.safetensors"), str(half)))
    assert [line.partition(":")[0] for line in both.splitlines()] == [
        str(folder / "adapter.safetensors"),
        str(half),
    ]
    assert f"backbone {trained.backbone[:8]}" in both and '"fold": 0' not in both
    assert "fold 0" in both and json.dumps(trained.card["metric"]) in both


@pytest.mark.parametrize(
    "regime",
    [
        {"name": "full"},
        {"name": "svf", "factors": ["S", "U"]},
        {"name": "svf", "batch_norm": "both"},
    ],
    ids=["full", "U", "batch_norm"],
)
def test_no_adapter_where_more_than_S_trains(tiny, regime):
    config = tiny(steps=1, regime=regime)
    train(tiny(steps=1))
    train(config, overwrite=True)
    assert not list(Path(config.out).glob("*.safetensors"))
