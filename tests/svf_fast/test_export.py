"""What leaves svf_fast: plain state dicts, torch.export, ONNX."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import svf_fast


def block(inner: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, inner, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )


@pytest.fixture
def network() -> nn.Module:
    """Fused sequences, a grouped convolution and a linear layer."""
    model = nn.Sequential(
        block(10),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    return model.eval().requires_grad_(False)


def trained(network: nn.Module, **options) -> nn.Module:
    model = svf_fast.convert(copy.deepcopy(network), None, **options)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(model):
            S.mul_(0.5 + torch.rand_like(S))
    return model


def test_merged_is_a_plain_state_dict(network):
    x = torch.randn(2, 6, 17, 17)
    model = trained(network)
    expected = model(x)
    state = svf_fast.merge(model).state_dict()
    assert list(state) == list(network.state_dict())  # no parametrizations, no factors
    assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in state.values())
    network.load_state_dict(state, strict=True)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("merged", (True, False), ids=("merged", "converted"))
def test_torch_export(network, merged):
    x = torch.randn(2, 6, 17, 17)
    model = trained(network)
    if merged:
        svf_fast.merge(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    torch.testing.assert_close(loaded.module()(x), model(x))
    targets = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert any("svf_fast" in target for target in targets) != merged


def test_onnx_of_a_merged_model(network, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 6, 17, 17)
    model = trained(network)
    expected = model(x)
    path = tmp_path / "model.onnx"
    torch.onnx.export(svf_fast.merge(model), (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
