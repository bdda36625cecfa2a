"""The ReLU that keeps bits: torch's own, its gradient, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import svf_fast
from tests.svf_fast.saved_bytes import saved_by

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_that_of_torch(dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, 9, dtype=dtype)
    x[0, :, :2] = 0
    x[1, 0, 0] = torch.tensor(float("inf"))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        x = x[:, :, ::2, 1:]
    mine, theirs = (x.detach().requires_grad_() for _ in range(2))
    out, expected = svf_fast.relu(mine), theirs.relu()
    assert torch.equal(out, expected)
    grad = torch.randn_like(expected).transpose(2, 3).contiguous().transpose(2, 3)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(mine.grad, theirs.grad)


def test_nan_is_not_hidden():
    x = torch.full((1, 2, 3), torch.nan, requires_grad=True)
    out = svf_fast.relu(x)
    assert out.isnan().all()


def test_a_bit_a_value_is_kept():
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    assert 0 < saved_by(Between(), x) <= x.numel() // 8 + 16


class Between(nn.Module):
    def forward(self, x):
        return svf_fast.relu(x)


def test_without_a_gradient_and_under_transforms_it_is_torchs():
    x = torch.randn(2, 3, 4)
    assert svf_fast.relu(x).grad_fn is None
    grad = torch.func.grad(lambda x: svf_fast.relu(x).sum())(x)
    assert torch.equal(grad, (x > 0).float())
    assert torch.equal(svf_fast.relu(torch.tensor([-1.0, 2.0], requires_grad=True)), x.new([0, 2]))


def test_it_compiles_to_the_same():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = torch.compile(svf_fast.relu, fullgraph=True, backend="aot_eager")(x)
    out.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach().relu())


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"relu: expected .* use torch\.relu"):
        torch.autograd.grad(svf_fast.relu(x).square().sum(), x, create_graph=True)
