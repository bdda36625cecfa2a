from __future__ import annotations

import json
import os
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svf_fast
from svf_fast.layers import factored
from svf_fast.ops import factors


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


def trained(seed: int = 0) -> nn.Module:
    model = make()
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(torch.rand(S.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def test_a_file_is_read_without_a_model(tmp_path):
    path = tmp_path / "x.safetensors"
    model = trained()
    card = {"data": "shapes", "fold": 0, "metric": {"mIoU": 0.25}, "who": "Zoë", "list": [1, None]}
    svf_fast.save_adapter(model, path, card)
    adapter = svf_fast.Adapter.load(path)
    assert adapter.card == card and adapter.path == path
    assert {name: len(S) for name, S in adapter.S.items()} == {"0": 6, "2": 4}
    assert torch.equal(adapter.S["0"], model[0].S)
    assert repr(adapter) == f"Adapter(2 layers, 10 values, backbone {adapter.backbone[:8]})"
    assert adapter.backbone == svf_fast.Adapter.of(make()).backbone
    assert adapter.backbone != svf_fast.Adapter.of(make(seed=1)).backbone
    path.unlink()  # what was read does not lean on the file
    adapter.save(path)
    again = svf_fast.Adapter.load(path)
    assert again.card == card and all(torch.equal(again.S[n], S) for n, S in adapter.S.items())
    assert path.stat().st_mode & 0o077 == 0o666 & ~umask() & 0o077


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_adapters_take_turns_and_each_weight_is_composed_once(monkeypatch):
    model = make()
    x = torch.randn(2, 3, 8, 8)
    pretrained = svf_fast.Adapter.of(model)
    expected = {"pretrained": model(x), 1: trained(1)(x), 2: trained(2)(x)}
    adapters = {"pretrained": pretrained, **{n: svf_fast.Adapter.of(trained(n)) for n in (1, 2)}}
    composed, decomposed = [], []
    compose, decompose = factors.compose, factored.decompose
    monkeypatch.setattr(factors, "compose", lambda *a: composed.append(a) or compose(*a))
    monkeypatch.setattr(factored, "decompose", lambda *a: decomposed.append(a) or decompose(*a))
    monkeypatch.setattr(factored, "dual", lambda *a: pytest.fail("U and V did not change"))
    for name in (1, "pretrained", 2, 1):
        composed.clear()
        adapters[name].apply(model)
        with torch.no_grad():
            first, second = model(x), model(x)
        assert torch.equal(first, second) and torch.equal(first, expected[name])
        assert len(composed) == 2 and not decomposed
        # who trains on changes the model, not the adapter
        with torch.no_grad():
            model[0].S.mul_(2)
        assert not torch.equal(model[0].S, adapters[name].S["0"])


def test_switching_plans_for_the_new_values():
    """A guarded direction of one adapter is none of the other, and gradients stay exact."""
    model = make().double()
    adapter = svf_fast.Adapter.of(model)
    assert model[0].guarded == 0
    values = {name: S.clone() for name, S in adapter.S.items()}
    values["0"][-1] = 0
    svf_fast.Adapter(values, adapter.fingerprints).apply(model)
    assert model[0].guarded == 1
    other = make().double()
    for layer in (other[0], other[2]):
        layer.strategy = "reference"
        layer.refresh()
    svf_fast.Adapter(values, adapter.fingerprints).apply(other)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for network in (model, other):
        network(x).square().sum().backward()
    for a, b in zip(svf_fast.svf_parameters(model), svf_fast.svf_parameters(other)):
        torch.testing.assert_close(a.grad, b.grad)
    adapter.apply(model)
    assert model[0].guarded == 0


def test_interpolation():
    a, b = (
        svf_fast.Adapter.of(trained(n), {"data": "shapes", "fold": n, "metric": 1}) for n in (1, 2)
    )
    for t in (0, 0.25, 1, -0.5):
        mixed = svf_fast.interpolate_adapters(a, b, t)
        assert mixed.card == {"data": "shapes", "interpolated": t}
        for name, S in mixed.S.items():
            exact = (1 - t) * a.S[name].double() + t * b.S[name].double()
            torch.testing.assert_close(S, exact.float())
    assert svf_fast.interpolate_adapters(a, b, 0.5, {"mine": 1}).card == {"mine": 1}
    other = svf_fast.Adapter.of(make(seed=1))
    with pytest.raises(ValueError, match="b: expected an adapter of the same backbone.*0, 2"):
        svf_fast.interpolate_adapters(a, other, 0.5)
    with pytest.raises(ValueError, match="b: .*differs in 2"):
        svf_fast.interpolate_adapters(a, svf_fast.Adapter.of(make(layers=("0",))), 0.5)
    with pytest.raises(ValueError, match="t: expected a finite number, got nan"):
        svf_fast.interpolate_adapters(a, b, float("nan"))
    with pytest.raises(TypeError, match="t: expected a number, got '1'"):
        svf_fast.interpolate_adapters(a, b, "1")
    with pytest.raises(TypeError, match="b: expected an Adapter, got Sequential"):
        svf_fast.interpolate_adapters(a, make(), 0.5)


@pytest.mark.parametrize(
    ("card", "error", "words"),
    [
        ("pascal", TypeError, "card: expected a dict, got str"),
        ({"metric": torch.ones(1)}, TypeError, "card: expected plain JSON.*Tensor"),
        ({"metric": float("nan")}, ValueError, "card: expected plain JSON"),
        ({"name": "\ud800"}, ValueError, "card: expected plain JSON"),
        ({"text": "x" * 20_000}, ValueError, "card: expected at most 16384 bytes of JSON, got 20"),
    ],
)
def test_cards_that_are_no_plain_json(tmp_path, card, error, words):
    with pytest.raises(error, match=words):
        svf_fast.save_adapter(make(), tmp_path / "x.safetensors", card)
    assert not list(tmp_path.iterdir())


def test_a_diverged_model_is_not_saved(tmp_path):
    model = make()
    model[2].S.data[1] = float("nan")
    with pytest.raises(ValueError, match="2.S: expected finite values, got NaN or Inf"):
        svf_fast.save_adapter(model, tmp_path / "x.safetensors")


FINE = {"0": "a" * 32}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"0.S": torch.tensor([1.0, torch.nan])}, {}, "0.S: expected finite values"),
        ({"0.S": torch.tensor([1.0, torch.inf])}, {}, "0.S: expected finite values"),
        ({"0.S": torch.ones(2, dtype=torch.int32)}, {}, r"0.S: expected \[R\] in one of F64.*I32"),
        ({"0.S": torch.ones(2, dtype=torch.float8_e4m3fn)}, {}, "0.S: expected .*F8_E4M3"),
        ({"0.S": torch.ones(2, 3)}, {}, r"0.S: expected \[R\].*\[2, 3\]"),
        ({"0.S": torch.ones(())}, {}, r"0.S: expected \[R\].*\[\]"),
        ({"0.S": torch.ones(0)}, {}, r"0.S: expected \[R\].*\[0\]"),
        ({"0.weight": torch.ones(2)}, {}, "expected names of layers and '.S', got '0.weight'"),
        ({"0\x1b[2J.S": torch.ones(2)}, {}, r"expected names of layers and '.S', got '0\\x1b"),
        ({}, {}, "at least one layer, got none"),
        ({"0.S": torch.ones(2)}, {"format": "svf_fast adapter 2"}, "expected format .*adapter 2'"),
        ({"0.S": torch.ones(2)}, {"fingerprints": None}, "fingerprints: expected JSON"),
        ({"0.S": torch.ones(2)}, {"fingerprints": "{"}, "fingerprints: expected JSON"),
        ({"0.S": torch.ones(2)}, {"fingerprints": "[1]"}, "expected a JSON object, got list"),
        ({"0.S": torch.ones(2)}, {"fingerprints": "[" * 10_000}, "recursion"),
        ({"0.S": torch.ones(2)}, {"fingerprints": "{}"}, "one for each layer.* 0"),
        ({"0.S": torch.ones(2)}, {"fingerprints": '{"0": 3}'}, "'0': expected 32 hex.*got 3"),
        (
            {"0.S": torch.ones(2)},
            {"fingerprints": '{"0": "ff"}'},
            "32 hexadecimal digits, got 'ff'",
        ),
        ({"0.S": torch.ones(2)}, {"card": "{"}, "card: expected JSON in the metadata"),
        ({"0.S": torch.ones(2)}, {"card": "3"}, "card: expected a JSON object, got int"),
        ({"0.S": torch.ones(2)}, {"card": '{"a": NaN}'}, "card: expected plain JSON"),
        ({"0.S": torch.ones(2)}, {"card": '{"a": "\\ud800"}'}, "card: expected plain JSON"),
        ({"0.S": torch.ones(2)}, {"card": json.dumps("x" * 20_000)}, "card"),
    ],
)
def test_a_strangers_file_is_refused_by_name(tmp_path, tensors, metadata, words):
    path = tmp_path / "stranger.safetensors"
    fine = {"format": "svf_fast adapter 1", "fingerprints": json.dumps(FINE)}
    metadata = {k: v for k, v in (fine | metadata).items() if v is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"adapter .*stranger.safetensors: .*{words}"):
        svf_fast.Adapter.load(path)


def test_files_from_before_cards_keep_loading(tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {"format": "svf_fast adapter 1", "fingerprints": json.dumps(FINE)}
    save_file({"0.S": torch.ones(2)}, path, metadata)
    assert svf_fast.Adapter.load(path).card == {}


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(ValueError, match="huge.safetensors: expected at most 67108864 bytes"):
        svf_fast.Adapter.load(path)


def test_damaged_files_are_value_errors(tmp_path):
    """Any byte of a file may be another."""
    path = tmp_path / "x.safetensors"
    svf_fast.save_adapter(trained(), path, {"data": "shapes"})
    whole = path.read_bytes()
    random = Random(0)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(content[: random.choice([len(content), random.randrange(len(content))])])
        try:
            adapter = svf_fast.Adapter.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(S.isfinite().all() for S in adapter.S.values())
