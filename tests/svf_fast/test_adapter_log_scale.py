"""Adapters of layers that train s' of S·exp(s'): those of layers that train S, both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import svf_fast
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.small_model import build, converted, images

X = images()


def trained() -> nn.Module:
    model = converted(trains="log_scale")
    torch.manual_seed(3)
    with torch.no_grad():
        for log_scale in svf_fast.svf_parameters(model):
            log_scale.copy_(0.5 * torch.randn(len(log_scale)))
    return model


def test_a_file_does_not_tell_what_trained(tmp_path):
    ours, theirs = trained(), converted()
    for a, b in zip(svf_layers(ours).values(), svf_layers(theirs).values(), strict=True):
        b.assign(a.singular_values())
    for name, model in (("ours", ours), ("theirs", theirs)):
        svf_fast.save_adapter(model, tmp_path / name, {"data": "x"}, also=("1",))
    a, b = (load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert a.keys() == b.keys() >= {"0.S", "3.S", "5.S"}
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    a, b = (svf_fast.Adapter.load(tmp_path / name) for name in ("ours", "theirs"))
    assert a.fingerprints == b.fingerprints and a.card == b.card


@pytest.mark.parametrize("strategy", ("auto", "reference"))
def test_values_come_back_to_rounding(tmp_path, strategy):
    model = trained()
    expected = model(X)
    svf_fast.save_adapter(model, tmp_path / "a")
    fresh = converted(trains="log_scale", strategy=strategy)
    fresh(X)
    for other in (fresh, build(), converted(trains="S")):
        svf_fast.load_adapter(
            other, tmp_path / "a", **({} if svf_layers(other) else {"trains": "log_scale"})
        )
        torch.testing.assert_close(other(X), expected, rtol=1e-5, atol=1e-6)
        for a, b in zip(svf_layers(other).values(), svf_layers(model).values(), strict=True):
            torch.testing.assert_close(a.singular_values(), b.singular_values(), rtol=1e-6, atol=0)
    pretrained = svf_fast.Adapter.of(converted())
    pretrained.apply(fresh)
    for layer in svf_layers(fresh).values():
        assert not layer.log_scale.any() and torch.equal(layer.singular_values(), layer.S)
    half = svf_fast.interpolate_adapters(pretrained, svf_fast.Adapter.of(model), 0.5)
    half.apply(fresh)
    for name, values in svf_fast.Adapter.of(fresh).S.items():
        torch.testing.assert_close(values, half.S[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("S", "value", "words"),
    [
        (None, -1.0, r"got -1 at 2 where it is 0\.\d+ \(1 such of 8\); convert .* trains='S'"),
        (None, 0.0, "got 0 at 2 where it is 0"),
        (0.0, 1.0, "got 1 at 2 where it is 0 "),
        (1e-39, 1e5, r"got 1e\+05 at 2 where it is 1e-39"),
    ],
)
def test_values_that_no_factor_reaches_are_named_and_nothing_changes(S, value, words):
    adapter, model = svf_fast.Adapter.of(converted()), trained()
    before = copy.deepcopy(model.state_dict())
    adapter.S["3"][2] = value
    if S is not None:
        model[3].S[2] = before["3.S"][2] = S
    with pytest.raises(ValueError, match=f"adapter: 3.S: expected values of the sign .* {words}"):
        adapter.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapter.apply(converted())


def test_a_value_of_zero_stays():
    model, adapter = trained(), svf_fast.Adapter.of(converted())
    model[3].S[2] = adapter.S["3"][2] = 0
    adapter.apply(model)
    assert model[3].singular_values()[2] == 0 and model[3].log_scale[2] == 0
    assert model(X).isfinite().all()
