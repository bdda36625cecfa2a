from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import svf_fast
from fss.cli import main
from fss.models import build_backbone
from fss.runs.folder import RunFolder
from fss.training.adapters import adapter_files
from fss.training.run import train


def test_a_run_leaves_its_adapters(tiny, tmp_path, capsys):
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

    files = [str(folder / "pretrained.safetensors"), str(folder / "adapter.safetensors")]
    half = str(tmp_path / "half.safetensors")
    assert main(["adapter", *files, "--interpolate", "0.5", "--out", half]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{half}: Adapter(") and "\n  interpolated: 0.5\n" in text
    assert "\n  layer2.0.conv1: 8 values\n" in text and "mIoU" not in text
    lines = adapter_files([*files, half]).splitlines()
    assert [line.partition(":")[0] for line in lines] == [*files, half]
    assert all(f"backbone {trained.backbone[:8]}" in line for line in lines)
    assert json.dumps(trained.card["metric"]) in lines[1] and "fold: 0" in lines[1]


def test_a_run_that_trains_a_factor_of_S_leaves_what_it_computes_with(tiny):
    train(tiny(steps=2, regime={"name": "svf_scale"}, optimizer={"lr": 0.5}))
    folder = Path(tiny().out)
    weights = torch.load(folder / "best.pt", weights_only=True)["model"]
    trained = svf_fast.Adapter.load(folder / "adapter.safetensors")
    for name, values in trained.S.items():
        S, log_scale = (weights[f"backbone.{name}.{key}"] for key in ("S", "log_scale"))
        torch.testing.assert_close(values, S * log_scale.exp())
    assert any(weights[f"backbone.{name}.log_scale"].abs().max() > 1e-4 for name in trained.S)
    assert svf_fast.Adapter.load(folder / "pretrained.safetensors").backbone == trained.backbone
    backbone = trained.apply(RunFolder(folder).network("best.pt")[0].backbone)
    for name, values in svf_fast.Adapter.of(backbone).S.items():
        torch.testing.assert_close(values, trained.S[name])


@pytest.mark.parametrize("core", ["band:1", "lowrank:2"])
def test_a_run_that_trains_beside_S_leaves_all_of_it(tiny, core):
    config = tiny(steps=2, regime={"name": "svf", "core": core}, optimizer={"lr": 0.5})
    train(config)
    folder = Path(config.out)
    assert RunFolder(folder).config().regime.core == core
    trained = svf_fast.Adapter.load(folder / "adapter.safetensors")
    weights = torch.load(folder / "best.pt", weights_only=True)["model"]
    assert trained.cores.keys() == trained.S.keys()
    for name, own in trained.cores.items():
        assert str(own.core) == core
        for part, values in own.parts.items():
            assert torch.equal(values, weights[f"backbone.{name}.{part}"])
    last = "core_B" if core.startswith("lowrank") else "off_diagonal"
    assert any(own.parts[last].any() for own in trained.cores.values())
    backbone = svf_fast.merge(RunFolder(folder).network("best.pt")[0]).backbone
    pretrained = svf_fast.Adapter.load(folder / "pretrained.safetensors")
    fresh = RunFolder(folder).network("best.pt")[0].backbone
    x = torch.randn(1, 3, 49, 49)
    pretrained.apply(fresh)
    before = fresh(x)
    trained.apply(fresh)
    after = fresh(x)
    for mine, merged in zip(after, backbone(x), strict=True):
        torch.testing.assert_close(mine, merged, rtol=1e-4, atol=1e-4)
    assert not torch.equal(after[-1], before[-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--interpolate", "0.5"], "out: expected with the other"),
        (["--interpolate", "0.5", "--out", "x"], "files: expected two to interpolate, got 1"),
        ([], "adapter .*stranger: not a readable safetensors file"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    stranger = tmp_path / "stranger"
    if "--out" in options:
        svf_fast.save_adapter(svf_fast.convert(build_backbone("resnet18", width=2)), stranger)
    else:
        stranger.write_text("no adapter")
    assert main(["adapter", str(stranger), *options]) == 2
    assert re.search(words, capsys.readouterr().err)


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
    left = [path.name for path in Path(config.out).glob("*.safetensors")]
    # where S trains its first values stay, for the report
    assert left == (["pretrained.safetensors"] if "batch_norm" in regime else [])
