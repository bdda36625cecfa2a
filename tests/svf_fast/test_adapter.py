from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svf_fast


def make(seed: int = 0, layers=None) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU())
    return svf_fast.convert(model, layers)


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    model = make()
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(torch.rand_like(S))
    svf_fast.save_adapter(model, path)
    other = make()
    assert svf_fast.load_adapter(other, path) is other
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    # the fingerprint is of the original weight: another dtype is still the same backbone
    svf_fast.load_adapter(make().bfloat16(), path)


def test_another_backbone_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "x.safetensors"
    svf_fast.save_adapter(make(), path)
    other = make(seed=1)
    before = [S.clone() for S in svf_fast.svf_parameters(other)]
    with pytest.raises(ValueError, match=r"trained on another backbone.*0, 2 of 2 layers"):
        svf_fast.load_adapter(other, path)
    assert all(map(torch.equal, before, svf_fast.svf_parameters(other)))


def test_other_layers_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    svf_fast.save_adapter(make(layers=("0",)), path)
    with pytest.raises(ValueError, match=r"expected the 2 SVF layers.*got 1; not in the file: 2.S"):
        svf_fast.load_adapter(make(), path)
    svf_fast.save_adapter(make(), path)
    with pytest.raises(ValueError, match=r"not in the model: 2.S"):
        svf_fast.load_adapter(make(layers=("0",)), path)


def test_bad_files(tmp_path):
    model = make()
    with pytest.raises(FileNotFoundError, match="no such file"):
        svf_fast.load_adapter(model, tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x10")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        svf_fast.load_adapter(model, cut)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, other)
    with pytest.raises(ValueError, match="expected format 'svf_fast adapter 1', got None"):
        svf_fast.load_adapter(model, other)
    with pytest.raises(ValueError, match="expected SVF layers, found none; call svf_fast.convert"):
        svf_fast.save_adapter(nn.Linear(1, 1), other)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    model = make()
    svf_fast.save_adapter(model, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        svf_fast.save_adapter(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
