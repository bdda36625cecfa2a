"""S stays in float32 whatever the dtype of the weights: in 16 bits no step would move it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import svf_fast
from svf_fast import SVFConv2d, SVFLinear, merge, svf_parameters
from tests.svf_fast.small_model import build, converted, images

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


# every way in which a model gets 16-bit weights
CONVERSIONS = {
    "to": lambda dtype: converted().to(dtype),
    "half or bfloat16": lambda dtype: getattr(
        converted(), {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    )(),
    "type": lambda dtype: converted().type(dtype),
    "to by a tensor": lambda dtype: converted().to(torch.empty(0, dtype=dtype)),
    "narrow before convert": lambda dtype: svf_fast.convert(
        build().to(dtype), None, progress=False
    ),
    "from float64": lambda dtype: converted().double().to(dtype),
    "reference": lambda dtype: converted(strategy="reference").to(dtype),
    "chain, unfused": lambda dtype: converted(strategy="chain", fuse=False).to(dtype),
    "copied": lambda dtype: copy.deepcopy(converted().to(dtype)),
    "pickled": lambda dtype: pickle.loads(pickle.dumps(converted().to(dtype))),
}


@NARROW
@pytest.mark.parametrize("way", CONVERSIONS)
def test_every_step_moves_S_of_16_bit_weights(way, dtype):
    model = CONVERSIONS[way](dtype)
    S = list(svf_parameters(model))
    assert {s.dtype for s in S} == {torch.float32}
    factors = [layer for layer in model.modules() if isinstance(layer, SVFConv2d | SVFLinear)]
    assert {t.dtype for layer in factors for t in (layer.U, layer.V, layer.weight)} == {dtype}
    start = [s.detach().clone() for s in S]
    optimizer = torch.optim.SGD(S, lr=1e-2)  # steps far below half a unit of the last place
    for _ in range(3):
        optimizer.zero_grad()
        out = model(images(dtype))
        assert out.dtype == dtype
        out.float().square().mean().backward()
        assert {s.grad.dtype for s in S} == {torch.float32}
        optimizer.step()
    assert all((s != before).float().mean() > 0.9 for s, before in zip(S, start, strict=True))


@NARROW
def test_values_and_gradient_of_S_are_kept_exactly(dtype):
    model = converted()
    S = list(svf_parameters(model))
    model(images(torch.float32)).square().mean().backward()
    values, gradients = [s.detach().clone() for s in S], [s.grad.clone() for s in S]
    model.to(dtype)
    assert all(a is b for a, b in zip(S, svf_parameters(model), strict=True))
    for s, value, gradient in zip(S, values, gradients, strict=True):
        assert torch.equal(s, value)
        assert torch.equal(s.grad, gradient)
    model.float()
    assert all(torch.equal(s, value) for s, value in zip(S, values, strict=True))
    assert {s.dtype for s in svf_parameters(model.double())} == {torch.float64}


@NARROW
def test_S_of_narrow_weights_is_not_rounded(dtype):
    weight = build()[0].weight.detach().to(dtype)
    _, S, _ = svf_fast.decompose(weight)
    _, exact, _ = svf_fast.decompose(weight.double())
    torch.testing.assert_close(S.double(), exact, rtol=1e-6, atol=0)


@NARROW
@pytest.mark.parametrize("assign", [False, True])
def test_files_with_narrow_S_load(dtype, assign):
    old = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in converted().to(dtype).state_dict().items()
    }
    assert old["0.S"].dtype == dtype
    model = converted().to(dtype)
    with torch.no_grad():
        for s in svf_parameters(model):
            s.zero_()
    model.load_state_dict(old, assign=assign)
    for name, s in model.named_parameters():
        if name.endswith(".S"):
            assert s.dtype == torch.float32
            assert s.requires_grad
            assert torch.equal(s, old[name].float())
    assert model(images(dtype)).isfinite().all()


@NARROW
def test_adapters_of_narrow_S_load(dtype, tmp_path):
    model = converted().to(dtype)
    adapter = svf_fast.Adapter.of(model)
    old = svf_fast.Adapter({k: v.to(dtype) for k, v in adapter.S.items()}, adapter.fingerprints)
    old.save(tmp_path / "old.safetensors")
    svf_fast.load_adapter(model, tmp_path / "old.safetensors")
    for name, s in model.named_parameters():
        if name.endswith(".S"):
            assert s.dtype == torch.float32
            assert torch.equal(s, adapter.S[name.removesuffix(".S")].to(dtype).float())


@NARROW
def test_merged_layers_have_the_dtype_of_the_weights(dtype):
    model = converted().to(dtype)
    plain = build().to(dtype)
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    eps = torch.finfo(dtype).eps
    for a, b in zip(merged.parameters(), plain.parameters(), strict=True):
        assert (a.double() - b.double()).norm() <= 4 * eps * b.double().norm()


@NARROW
def test_a_cache_of_older_narrow_factors_is_made_anew(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    def convert() -> nn.Module:
        return svf_fast.convert(build().to(dtype), None, cache=tmp_path, progress=False)

    first = list(svf_parameters(convert()))
    for path in tmp_path.glob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    for _ in range(2):
        again = list(svf_parameters(convert()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert {load_file(path)["S"].dtype for path in tmp_path.iterdir()} == {torch.float32}
