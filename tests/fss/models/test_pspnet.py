import pytest
import torch
from torch.nn import functional

from fss.models.pspnet import BaseLearner, frozen_conv2d
from fss.training.measure import saved_bytes


@pytest.mark.parametrize("kernel, padding", [((3, 3), 1), ((1, 1), 0), ((3, 1), (1, 0))])
def test_equals_convolution_with_its_gradient(kernel, padding):
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    weight = torch.randn(4, 5, *kernel)
    out, expected = frozen_conv2d(x, weight, padding), functional.conv2d(x, weight, padding=padding)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (out, expected))
    )


def test_autocast():
    x, weight = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = frozen_conv2d(x, weight, 1)
        expected = functional.conv2d(x, weight, padding=1)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    grads = [torch.autograd.grad(y.float().sum(), x)[0] for y in (out, expected)]
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(*grads)


def test_second_gradient_is_that_of_convolution():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: frozen_conv2d(x, weight, 1).square(), x)
    found = []
    for convolve in (frozen_conv2d, functional.conv2d):
        out = convolve(x, weight, padding=1)
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_keeps_nothing_but_the_weight():
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    holder = torch.nn.ParameterList([torch.randn(2, 3, 3, 3)]).requires_grad_(False)
    with saved_bytes(holder) as saved:
        frozen_conv2d(x, holder[0], 1)
    assert saved.total == 0


def test_a_weight_that_trains_is_refused():
    with pytest.raises(ValueError, match="weight: expected one that needs no gradient"):
        frozen_conv2d(torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3, requires_grad=True))


def test_a_frozen_base_learner_keeps_less_and_computes_the_same():
    torch.manual_seed(0)
    learner = BaseLearner(16, classes=5, width=8).eval()
    x = torch.randn(2, 16, 9, 9, requires_grad=True)
    grads, kept = [], []
    for frozen in (False, True):
        learner.requires_grad_(not frozen)
        with saved_bytes(learner) as saved:
            out = learner(x)
        kept.append(saved.total)
        grads.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    torch.testing.assert_close(grads[0], grads[1])
    # the input [2, 16, 9, 9] and as many channels of pooled maps
    assert kept[0] - kept[1] >= 16 * 2 * 9 * 9 * 4
