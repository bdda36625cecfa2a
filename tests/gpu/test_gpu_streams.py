"""Streams, devices and repetition: the same numbers whatever runs beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import svf_fast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def _repeatable_convolutions() -> Iterator[None]:
    """cuDNN may add up in another order each time; ours never does."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.usefixtures("_repeatable_convolutions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_to_run_bitwise_equal(trunk, maps, gradients, dtype):
    model, x = trunk(), maps()
    first = gradients(model, x, dtype)
    for _ in range(4):
        again = gradients(model, x, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("_repeatable_convolutions")
def test_two_streams_at_once(trunk, maps, gradients):
    """Two models at work on two streams: each computes what it computes alone."""
    dtype = torch.bfloat16
    models, inputs = [trunk(), trunk()], [maps(), maps()]
    with torch.no_grad():
        inputs[1].mul_(0.7)
        for S in svf_fast.svf_parameters(models[1]):
            S.mul_(0.9)
    pairs = list(zip(models, inputs, strict=True))
    alone = [gradients(model, x, dtype) for model, x in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in models]
    for _ in range(3):
        together = []
        for stream, (model, x) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                together.append(gradients(model, x, dtype))
        torch.cuda.synchronize()
        for expected, got in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.usefixtures("_repeatable_convolutions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_device_than_the_current_one(trunk, maps, gradients, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    expected = gradients(trunk(first), maps(first), dtype)
    with torch.cuda.device(first):
        got = gradients(trunk(second), maps(second), dtype)
    for mine, true in zip(got, expected, strict=True):
        assert mine.device == second
        assert (mine.cpu().double() - true.cpu().double()).norm() <= 2e-2 * true.double().norm()


def test_cosine_max_on_another_device_than_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    query, support = torch.randn(2, 32, 50), torch.randn(2, 32, 70)
    mask = torch.ones(2, 70)
    on = [svf_fast.cosine_max(*(t.to(f"cuda:{n}") for t in (query, support, mask))) for n in (0, 1)]
    assert on[1].device.index == 1
    assert torch.equal(on[0].cpu(), on[1].cpu())
