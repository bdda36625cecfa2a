"""Weights that are no ordinary tensors: without values yet, sharded, quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import svf_fast
from tests.svf_fast.small_model import build, converted, images


def trained() -> nn.Module:
    model = converted()
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(torch.rand(S.shape) + 0.5)
    return model


X = images()


def converted_on_meta() -> nn.Module:
    with torch.device("meta"):
        return converted()


def built_under_fake_tensors() -> nn.Module:
    with FakeTensorMode():
        return converted()


# each leaves a model without values
ABSENT = {
    "converted on meta": converted_on_meta,
    "moved to meta": lambda: converted().to("meta"),
    "moved to meta before it was converted": lambda: svf_fast.convert(
        build().to("meta"), None, progress=False
    ),
    "emptied": lambda: converted().to_empty(device="cpu"),
    "with a cache": lambda: svf_fast.convert(
        build().to("meta"), None, cache="nowhere", progress=False
    ),
    "reference": lambda: converted(strategy="reference").to("meta"),
    "chain, unfused": lambda: converted(strategy="chain", fuse=False).to("meta"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ABSENT)
def test_values_come_later(way, assign):
    expected = trained()
    model = ABSENT[way]()
    state = {name: value.clone() for name, value in expected.state_dict().items()}
    if not assign:
        model.to_empty(device="cpu")
        for value in model.state_dict().values():  # what such memory may hold
            value.fill_(float("nan") if value.is_floating_point() else 0)
    model.load_state_dict(state, assign=assign)
    for S in svf_fast.svf_parameters(model):
        S.requires_grad_()
    torch.testing.assert_close(model(X), expected(X))
    gradients = (
        torch.autograd.grad(m(X).square().sum(), list(svf_fast.svf_parameters(m)))
        for m in (model, expected)
    )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("make", [converted_on_meta, built_under_fake_tensors])
def test_shapes_are_those_of_the_values(make):
    model, expected = make(), converted()
    shapes = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in expected.state_dict().items()}


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_are_built_on_meta(groups):
    layer = svf_fast.SVFConv2d(4, 6, 3, groups=groups, device="meta")
    assert layer.S.is_meta
    assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 6, 6, 6)
    linear = svf_fast.SVFLinear(4, 6, device="meta")
    assert linear(torch.empty(2, 4, device="meta")).shape == (2, 6)


def test_factors_that_nobody_loaded_are_named():
    model = converted().to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    with pytest.raises(ValueError, match="independent directions.*load weights first"):
        model(X)


def of_dtype(dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


class Quantized(torch.Tensor):
    """Stands for the tensors of quantization libraries: its values are computed when asked for."""

    @staticmethod
    def __new__(cls, of: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(func)


def wrapped() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(Quantized(layer.weight.detach()), requires_grad=False)
    return layer


QUANTIZED = {
    "float8_e4m3fn": lambda: of_dtype(torch.float8_e4m3fn),
    "float8_e5m2": lambda: of_dtype(torch.float8_e5m2),
    "int8": lambda: of_dtype(torch.int8),
    "Quantized": wrapped,
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_named_and_the_model_is_as_it_was(kind):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), QUANTIZED[kind]())
    children = list(model)
    with pytest.raises(TypeError, match=rf"weight: expected .*got .*{kind}; convert .* dequantize"):
        svf_fast.convert(model, None, progress=False)
    assert list(model) == children


@pytest.fixture
def mesh(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_model_is_to_be_converted_first(mesh):
    for sharded in (fully_shard(build(), mesh=mesh), fully_shard(build().to("meta"), mesh=mesh)):
        with pytest.raises(TypeError, match="got a sharded DTensor; convert the model first"):
            svf_fast.convert(sharded, None, progress=False)


def test_a_report_is_asked_for_before_sharding(mesh):
    model = fully_shard(converted(), mesh=mesh)
    with pytest.raises(ValueError, match="got 0.S sharded; ask for the report before"):
        svf_fast.memory_report(model, X.shape)


@pytest.mark.parametrize("trains", ("S", "log_scale"))
def test_adapters_of_a_sharded_model(mesh, tmp_path, trains):
    model, expected = fully_shard(converted(trains=trains), mesh=mesh), converted(trains=trains)
    for m in (model, expected):
        optimizer = torch.optim.SGD(svf_fast.svf_parameters(m), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            m(X).square().mean().backward()
            optimizer.step()
    svf_fast.save_adapter(model, tmp_path / "sharded.safetensors")
    svf_fast.save_adapter(expected, tmp_path / "whole.safetensors")
    found, wanted = (load_file(tmp_path / f"{x}.safetensors") for x in ("sharded", "whole"))
    torch.testing.assert_close(found, wanted)

    another = fully_shard(converted(trains=trains), mesh=mesh)
    svf_fast.load_adapter(another, tmp_path / "whole.safetensors")
    torch.testing.assert_close(another(X), expected(X))
    state = copy.copy(another.state_dict())  # in whole weights too
    assert type(state[f"0.{trains}"]).__name__ == "DTensor"
    torch.testing.assert_close(another[0].composed_weight(), expected[0].composed_weight())


def test_a_sharded_model_gets_its_values_later(mesh):
    expected = trained()
    model = fully_shard(converted_on_meta(), mesh=mesh)
    model.to_empty(device="cpu")
    svf_fast_state = expected.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, svf_fast_state, options=options)
    torch.testing.assert_close(model(X), expected(X))


def test_merging_a_sharded_model_gathers(mesh):
    expected = svf_fast.merge(trained())
    model = fully_shard(trained(), mesh=mesh)
    merged = svf_fast.merge(model)
    for name in ("0.weight", "3.weight", "5.weight"):
        torch.testing.assert_close(
            merged.get_parameter(name), expected.get_parameter(name), atol=1e-6, rtol=1e-5
        )
