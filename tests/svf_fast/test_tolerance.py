"""The tolerance helper accepts eager's own error and refuses wrong gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.svf_fast.tolerance import assert_error_within


@pytest.fixture
def gradient() -> tuple[Tensor, Tensor]:
    """dW of a linear layer in float32 and in float64, [32, 16]."""
    x, g = torch.randn(100, 16), torch.randn(100, 32)
    return g.T @ x, g.double().T @ x.double()


def test_accepts_the_reference_and_the_truth(gradient: tuple[Tensor, Tensor]) -> None:
    reference, truth = gradient
    assert_error_within(reference, reference, truth)
    assert_error_within(truth.float(), reference, truth)
    assert_error_within(truth.float(), truth.float(), truth)


def _scaled(x: Tensor) -> Tensor:
    return x * 1.0001


def _one_sign_flipped(x: Tensor) -> Tensor:
    x[3, 5] *= -1
    return x


def _biased(x: Tensor) -> Tensor:
    return x + 1e-4


def _bfloat16_inside(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _one_nan(x: Tensor) -> Tensor:
    x[0, 0] = torch.nan
    return x


def _one_infinity(x: Tensor) -> Tensor:
    x[0, 0] = torch.inf
    return x


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_scaled, "L2 error"),
        (_one_sign_flipped, "error"),
        (_biased, "L2 error"),
        (_bfloat16_inside, "L2 error"),
        (_one_nan, "NaN"),
        (_one_infinity, "NaN or infinite"),
        (torch.zeros_like, "L2 error"),
    ],
)
def test_refuses_a_wrong_gradient(gradient, break_it, message: str) -> None:
    reference, truth = gradient
    with pytest.raises(AssertionError, match=message):
        assert_error_within(break_it(reference.clone()), reference, truth)


def test_maximum_error_counts_where_the_norm_hides_it() -> None:
    truth = torch.ones(10**6, dtype=torch.float64)
    reference = truth.float() + 1e-6
    actual = reference.clone()
    actual[7] += 1e-4
    with pytest.raises(AssertionError, match="maximum error"):
        assert_error_within(actual, reference, truth)


def test_refuses_a_channel_that_is_silently_zero() -> None:
    truth = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    actual = torch.tensor([1.0, 0.0])  # far below eps of the norm, yet lost
    with pytest.raises(AssertionError, match=r"channels \[1\] are all zero"):
        assert_error_within(actual, truth.float(), truth)
    assert_error_within(actual, truth.float(), truth, channel_dim=None)


def test_zero_is_right_where_the_truth_rounds_to_zero() -> None:
    truth = torch.tensor([1.0, 1e-30], dtype=torch.float64)
    assert_error_within(truth.half(), truth.half(), truth)


def test_magnitude_raises_the_floor() -> None:
    truth = torch.tensor([1e-3], dtype=torch.float64)  # 1000.001 - 1000 in float32
    actual = truth.float() + 5e-5
    with pytest.raises(AssertionError, match="L2"):
        assert_error_within(actual, truth.float(), truth)
    assert_error_within(
        actual, truth.float(), truth, magnitude=torch.tensor([1e3], dtype=torch.float64)
    )


def test_refuses_shapes_and_truths_that_do_not_fit() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_error_within(torch.ones(3), torch.ones(3), torch.ones(1, dtype=torch.float64))
    with pytest.raises(AssertionError, match="must be float64"):
        assert_error_within(torch.ones(3), torch.ones(3), torch.ones(3))
