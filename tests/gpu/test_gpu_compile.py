"""torch.compile of a whole model, our ops opaque in its graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import svf_fast

# Inductor fuses and rounds otherwise; a wrong gradient is off by more than any of these.
ALLOWED = {torch.bfloat16: 5e-2, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_a_compiled_model_has_the_gradients_of_the_eager_one(trunk, maps, gradients, dtype):
    model, x = trunk(), maps()
    whole = nn.Sequential(model[0][:2], nn.ReLU())  # two blocks: one with a shortcut's convolution
    expected = gradients(whole, x, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, dynamic=False)
    got = gradients(compiled, x, dtype)
    assert len(got) == len(expected) == 2 + len(list(svf_fast.svf_parameters(whole)))
    for index, (mine, true) in enumerate(zip(got, expected, strict=True)):
        error = (mine.double() - true.double()).norm() / true.double().norm()
        assert error <= ALLOWED[dtype], f"tensor {index}: {error:.1e}"


def test_compiled_follows_a_change_of_S(trunk, maps, gradients):
    model, x = trunk(), maps()
    block = nn.Sequential(model[0][1])
    x = gradients(nn.Sequential(model[0][0]), x, torch.float32)[0].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    gradients(compiled, x, torch.float32)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(block):
            S.mul_(1.1)
    got, expected = gradients(compiled, x, torch.float32), gradients(block, x, torch.float32)
    for mine, true in zip(got, expected, strict=True):
        assert (mine - true).norm() <= 1e-4 * true.norm()
