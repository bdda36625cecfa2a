"""What two weights are recognized by as one, to rounding, and how far others are said to be."""

from __future__ import annotations

import hashlib
import math
import re

import pytest
import torch
from torch import Tensor, nn

from svf_fast.layers import fingerprint
from svf_fast.layers.conv2d import SVFConv2d

SHAPES = [(6, 3, 3, 3), (64, 32, 1, 1), (16, 1, 3, 3), (40, 24), (128, 64, 3, 3), (1, 2)]


def text(weight: Tensor) -> str:
    [found] = fingerprint.as_texts([fingerprint.fingerprint(weight)])
    assert re.fullmatch(fingerprint.PATTERN, found)
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return fingerprint.distance(text(a), text(b))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_itself_in_other_dtypes_and_scales(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert apart(weight, weight.clone()) == apart(weight, weight.double()) == 0
    for other in (weight.half(), weight.bfloat16(), 1e-3 * weight, 50 * weight):
        assert apart(weight, other) < fingerprint.ROUNDING / 2
    assert apart(weight.half(), weight.bfloat16()) < fingerprint.ROUNDING / 2


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_another_weight_is_told_by_how_far_it_is(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    generator = torch.Generator().manual_seed(1)
    assert 0.7 < apart(weight, torch.randn(shape, generator=generator)) < 2.5
    if weight[0].numel() > 1:
        assert apart(weight, weight.flip(0)) > 0.7
    for share in (0.03, 0.1, 0.3):
        noise = torch.randn(shape, generator=generator)
        estimate = apart(weight, weight + share * noise * (weight.norm() / noise.norm()))
        assert share / 2 < estimate < 2 * share
        # of one direction only, which is what a step of SVF would change
        column = torch.randn(shape[0], generator=generator)
        row = torch.randn(weight[0].numel(), generator=generator)
        change = torch.outer(column, row).view(shape)
        estimate = apart(weight, weight + share * change * (weight.norm() / change.norm()))
        assert share / 2.5 < estimate < 2.5 * share


def test_a_weight_of_zeros_is_only_itself() -> None:
    assert apart(torch.zeros(4, 3), torch.zeros(4, 3)) == 0
    assert apart(torch.zeros(4, 3), torch.ones(4, 3)) == math.inf


def test_the_hash_is_that_of_older_versions() -> None:
    weight = torch.randn(6, 3, 3, 3)
    digest = hashlib.sha256(b"(6, 3, 3, 3)" + weight.numpy().tobytes())
    assert fingerprint.hash_of(text(weight)) == digest.hexdigest()[:32]
    kept = torch.tensor(list(digest.digest()[:16]), dtype=torch.uint8)
    for old in (kept, kept.float() + 1e-4, kept.float() - 1e-4):  # as averages leave them
        [found] = fingerprint.as_texts([fingerprint.of_older_version(old)])
        assert found == digest.hexdigest()[:32]
        assert fingerprint.distance(found, text(weight)) == 0
        assert fingerprint.distance(found, text(weight.half())) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_layer_keeps_it_in_any_dtype(dtype: torch.dtype) -> None:
    layer = SVFConv2d.from_conv(nn.Conv2d(5, 7, 3))
    [before] = fingerprint.as_texts([layer.fingerprint])
    [after] = fingerprint.as_texts([layer.to(dtype).fingerprint])
    assert fingerprint.hash_of(before) == fingerprint.hash_of(after)
    sums = torch.randn(7, 5, 3, 3)
    assert fingerprint.distance(after, text(sums)) == pytest.approx(
        fingerprint.distance(before, text(sums)), rel=0.01
    )
