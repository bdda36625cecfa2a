"""Adapters of layers with a core: all of Σ, in whatever signs a decomposition has on a machine."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import svf_fast
from svf_fast import Adapter, Factors
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.layers.test_core import CORES, moved
from tests.svf_fast.small_model import build, converted, images

X = images()


def trained(core: str, **options) -> nn.Module:
    torch.manual_seed(3)
    model = moved(converted(core=core, **options))
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.trained.mul_(0.5 + torch.rand_like(layer.trained))
    return model


def flipped() -> dict[str, Factors]:
    """The same decomposition with every second pair of directions pointing the other way."""
    found = {}
    for name, layer in svf_layers(converted()).items():
        signs = (-1.0) ** torch.arange(layer.rank)
        V = layer.V * signs.reshape(-1, *[1] * (layer.V.dim() - 1))
        found[name] = Factors(layer.U * signs, layer.S.detach(), V)
    return found


@pytest.mark.parametrize("core", CORES)
def test_round_trip(core, tmp_path):
    model = trained(core)
    svf_fast.save_adapter(model, tmp_path / "a", {"data": "x"}, also=("1",))
    names = {"band": {"off_diagonal"}, "block": {"off_diagonal"}, "lowrank": {"core_A", "core_B"}}
    own = {"S", "directions", *names[core.partition(":")[0]]}
    assert {key for key in load_file(tmp_path / "a") if key.startswith("3.")} == {
        f"3.{name}" for name in own
    }
    fresh = converted(core=core)
    fresh(X)
    for other in (fresh, build(), converted(core=core, strategy="reference")):
        svf_fast.load_adapter(other, tmp_path / "a")
        torch.testing.assert_close(other(X), model(X))
        assert all(str(layer.core) == core for layer in svf_layers(other).values())
    again = Adapter.of(fresh, {"data": "x"})
    assert all(torch.equal(x, again.S[name]) for name, x in Adapter.of(model).S.items())


@pytest.mark.parametrize("core", CORES)
def test_other_signs_of_the_directions(core, tmp_path):
    model = trained(core)
    Adapter.of(model).save(tmp_path / "a")
    turned = converted(core=core, factors=flipped())
    assert not torch.equal(turned[3].U, model[3].U)
    Adapter.load(tmp_path / "a").apply(turned)
    torch.testing.assert_close(turned(X), model(X))
    assert not torch.equal(turned[3].parts[-1], model[3].parts[-1])
    plain = build()
    Adapter.load(tmp_path / "a").apply(plain, factors=flipped())
    torch.testing.assert_close(plain(X), model(X))


def test_other_directions_are_refused_and_nothing_changes():
    """Of equal singular values any rotation is a decomposition, to which S alone is the same."""

    def made(turn: bool) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1))
        for conv in model[::2]:
            nn.init.orthogonal_(conv.weight)
        factors = {}
        if turn:
            Q = torch.linalg.qr(torch.randn(6, 6))[0]
            W = model[2].weight.detach().flatten(1)
            factors["2"] = Factors(Q, torch.ones(6), (Q.mT @ W)[:, :, None, None])
        return svf_fast.convert(model, None, factors=factors, core="band:1")

    model, other = moved(made(False)), made(True)
    before = copy.deepcopy(other.state_dict())
    words = "adapter: 2: expected the directions U and V that Σ was trained in, got others"
    with pytest.raises(ValueError, match=words):
        Adapter.of(model).apply(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    Adapter.of(model).apply(made(False))


@pytest.mark.parametrize("core", CORES)
def test_other_cores_are_refused_and_nothing_changes(core, tmp_path):
    Adapter.of(trained(core)).save(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    for there in {"diag", *CORES, "band:2"} - {core}:
        model = converted(core=there)
        before = copy.deepcopy(model.state_dict())
        words = f"0: expected a model with core='{core}', as the adapter has it, got .*'{there}'"
        with pytest.raises(ValueError, match=words):
            adapter.apply(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with pytest.raises(ValueError, match=f"expected a model with core='{core}'"):
            adapter.apply(build(), core=there)


@pytest.mark.parametrize("core", CORES)
def test_S_alone_fits_every_core(core):
    diagonal, model = trained("diag"), trained(core)
    adapter = Adapter.of(diagonal)
    for other in (model, build()):
        adapter.apply(other, **({} if svf_layers(other) else {"core": core}))
        torch.testing.assert_close(other(X), diagonal(X))
        assert all(str(layer.core) == core for layer in svf_layers(other).values())
        for layer in svf_layers(other).values():
            assert not layer.parts[-1].any()
            if core.startswith("lowrank"):  # else B would never train
                assert layer.core_A.any()


def test_with_log_scale():
    model = moved(converted(core="band:1", trains="log_scale"))
    with torch.no_grad():
        model[3].log_scale.normal_()
    other = converted(core="band:1")
    Adapter.of(model).apply(other)
    torch.testing.assert_close(other(X), model(X))
    back = converted(core="band:1", trains="log_scale")
    Adapter.of(other).apply(back)
    torch.testing.assert_close(back(X), model(X))


def test_mixtures():
    a, b = Adapter.of(trained("block:4")), Adapter.of(moved(converted(core="block:4")))
    middle = svf_fast.interpolate_adapters(a, b, 0.25)
    for name, core in middle.cores.items():
        mean = (
            0.75 * a.cores[name].parts["off_diagonal"] + 0.25 * b.cores[name].parts["off_diagonal"]
        )
        torch.testing.assert_close(core.parts["off_diagonal"], mean)
    model = converted(core="block:4", factors=flipped())
    b.apply(model)
    torch.testing.assert_close(
        svf_fast.interpolate_adapters(a, Adapter.of(model), 0.25).cores["3"].parts["off_diagonal"],
        middle.cores["3"].parts["off_diagonal"],
    )
    for other in ("diag", "band:1", "lowrank:2"):
        with pytest.raises(ValueError, match=f"core of a, 'block:4', .* got '{other}' in"):
            svf_fast.interpolate_adapters(a, Adapter.of(converted(core=other)), 0.5)
    low_rank = Adapter.of(trained("lowrank:2"))
    with pytest.raises(ValueError, match="no 'lowrank:r', of which a mixture has rank 2r"):
        svf_fast.interpolate_adapters(low_rank, low_rank, 0.5)


def test_cores_of_several_kinds_in_one_model():
    model = svf_fast.convert(build(), ["0"], core="band:1")
    moved(svf_fast.convert(model, None, core="lowrank:1"))
    adapter = Adapter.of(model)
    other = svf_fast.convert(build(), ["0"], core="band:1")
    adapter.apply(svf_fast.convert(other, None, core="lowrank:1"))
    torch.testing.assert_close(other(X), model(X))
    with pytest.raises(ValueError, match="expected one core, to convert a plain model with, got"):
        adapter.apply(build())


def test_strange_files(tmp_path):
    Adapter.of(trained("band:1"), {}).save(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "a")
    cores = json.loads(metadata["cores"])
    entries = tensors["3.off_diagonal"]

    some = {key: value for key, value in tensors.items() if key != "3.directions"}
    cases = [
        (some, cores, "core 'band:1': expected directions, off_diagonal, got off_diagonal"),
        ({**tensors, "3.more": entries + 1}, cores, "expected directions, off_diagonal, got direc"),
        ({**tensors, "3.off_diagonal": entries[:, 1:]}, cores, "3: core='band:1': expected shapes"),
        ({**tensors, "3.off_diagonal": entries[0]}, cores, "3: core='band:1': expected shapes"),
        ({**tensors, "3.off_diagonal": entries.new_empty(0, 4)}, cores, "3: core='band:1': exp"),
        ({**tensors, "3.off_diagonal": entries / 0}, cores, "3: off_diagonal: expected finite"),
        ({**tensors, "3.off_diagonal": entries.int()}, cores, "3.off_diagonal: expected .* in one"),
        (tensors, {**cores, "3": "band:2"}, "3: core='band:2': expected shapes"),
        (tensors, {**cores, "3": "lowrank:1"}, "core 'lowrank:1': expected core_A, core_B, dir"),
        (tensors, {**cores, "3": "full"}, "core: expected 'diag', 'band:k'"),
        (tensors, {**cores, "3": 7}, "core: expected a text, got 7"),
        (tensors, {**cores, "9": "band:1"}, "core 'band:1': expected .*, got nothing"),
        (tensors, {}, "expected names of layers and '.S', got"),
        (tensors, [1], "cores: expected a JSON object, got list"),
    ]
    for number, (values, texts, words) in enumerate(cases):
        path = tmp_path / f"{number}"
        own = {key: value.contiguous() for key, value in values.items()}
        save_file(own, path, {**metadata, "cores": json.dumps(texts)})
        with pytest.raises(ValueError, match=words):
            Adapter.load(path)
    assert Adapter.load(tmp_path / "a").cores.keys() == {"0", "3", "5"}
