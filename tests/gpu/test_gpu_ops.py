"""Every op once, small, on channels_last maps: a first look, in seconds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import svf_fast
from svf_fast.ops.affine_act import affine_act, affine_act_backward
from svf_fast.ops.channel_dot import channel_dot, channel_dot_scale_
from svf_fast.ops.gram import gram
from svf_fast.reference import affine_act as affine_definition
from svf_fast.reference import gram as gram_definition
from svf_fast.reference.cosine_max import cosine_max as cosine_definition

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((2, 64, 9, 7), (1, 1, 5, 3), (3, 33, 4, 1), (0, 16, 4, 4))


def maps(shape, dtype, device, count: int) -> list[Tensor]:
    made = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    return [x.contiguous(memory_format=torch.channels_last) for x in made]


def near(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """To a few roundings of the dtype; what is empty is right."""
    assert got.shape == truth.shape and got.isfinite().all()
    allowed = 8 * torch.finfo(dtype).eps * truth.norm()
    assert (got.double() - truth).norm() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_act(shape, dtype, device):
    y, residual, grad = maps(shape, dtype, device, 3)
    scale, shift = (torch.randn(shape[1], device=device) for _ in range(2))
    wide = (y.double(), scale.double(), shift.double())
    out, mask = affine_act(y, scale, shift, residual, mask=True)
    near(out, affine_definition.affine_act(*wide, residual.double()), dtype)
    assert torch.equal(affine_definition.unpack_mask(mask, out), out > 0)
    got = affine_act_backward(grad, mask=mask, scale=scale)
    near(got, torch.where(out > 0, grad.double() * wide[1][:, None, None], 0), dtype)
    got = affine_act_backward(grad, y=y, scale=scale, shift=shift)
    near(got, affine_definition.affine_act_backward(grad.double(), y, None, *wide[1:]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_positions(shape, dtype, device):
    a, b = maps(shape, dtype, device, 2)
    truth = (a.double() * b.double()).sum(dim=(0, 2, 3))
    near(channel_dot(a, b), truth, dtype)
    near(gram(a, b), gram_definition.gram(a.double(), b.double()), dtype)
    s = torch.randn(shape[1], device=device)
    scaled = a.double() * s.double()[:, None, None]
    near(channel_dot_scale_(a, b, s), truth, dtype)
    near(a, scaled, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine_max(dtype, device):
    leaves = [torch.randn(2, 40, n, device=device).to(dtype).requires_grad_() for n in (70, 131)]
    doubled = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = (torch.rand(2, 131, device=device) > 0.6).to(dtype)
    got = svf_fast.cosine_max(*leaves, mask)
    truth = cosine_definition(*doubled, mask.double())
    near(got.detach(), truth.detach(), dtype)
    got.sum().backward()
    truth.sum().backward()
    for leaf, exact in zip(leaves, doubled, strict=True):
        assert exact.grad is not None and leaf.grad is not None
        # in 16 bits another support may be the nearest: its cosine is then as large, to rounding
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error <= (0.3 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network(trunk, maps, gradients, dtype):
    for tensor in gradients(trunk(), maps(), dtype):
        assert tensor.isfinite().all() and tensor.ne(0).any()
