"""DCAMA: its attention, positions and supports, and the authors' layout."""

from __future__ import annotations

import math

import pytest
import torch

from fss.models import DCAMA, build_backbone
from fss.models.dcama import MaskAggregation, sine_positions
from fss.models.official import official_keys
from tests.fss.models.test_hsnet import check_loaded, convolutions, episode, published_backbone
from tests.fss.models.test_hsnet import widening as widened

OPTIONS = DCAMA.backbone_options


def network(width: int = 4, dropout: float = 0.0, backbone: str = "resnet18") -> DCAMA:
    torch.manual_seed(0)
    return DCAMA(build_backbone(backbone, width=width, **OPTIONS), 16, dropout).double()


@torch.no_grad()
def test_the_mask_is_averaged_by_attention():
    """Head by head and token by token; positions begin anew in each support."""
    torch.manual_seed(0)
    block = MaskAggregation(16, 0.0).double()
    block.key.weight.copy_(torch.randn(16, 16))
    query, supports = torch.randn(2, 16, 2, 3).double(), torch.randn(2, 2, 16, 2, 2).double()
    masks = torch.rand(2, 2, 1, 2, 2).double()
    got = block(query, supports, masks)
    assert got.shape == (2, 2, 3)
    for b in range(2):
        tokens = [block.query(query[b, :, i // 3, i % 3] + position(i, 16)) for i in range(6)]
        keys = [
            block.key(supports[b, k, :, j // 2, j % 2] + position(j, 16))
            for k in range(2)
            for j in range(4)
        ]
        values = masks[b].flatten()
        for i, token in enumerate(tokens):
            heads = []
            for h in (slice(2 * n, 2 * n + 2) for n in range(8)):
                scores = torch.stack([(token[h] * key[h]).sum() / math.sqrt(2) for key in keys])
                heads.append((scores.exp() / scores.exp().sum()) @ values)
            expected = torch.stack(heads).mean()
            torch.testing.assert_close(got[b, i // 3, i % 3], expected, rtol=1e-9, atol=1e-9)


def position(index: int, channels: int) -> torch.Tensor:
    # of frequencies in float32, as published
    values = []
    for i in range(0, channels, 2):
        angle = torch.tensor(index) * torch.exp(torch.tensor(i) * -(math.log(10000) / channels))
        values += [angle.sin(), angle.cos()]
    return torch.stack(values).double()


def test_positions():
    found = sine_positions(30, 8, torch.zeros(()).double())
    for p, i in ((0, 0), (29, 0), (7, 2), (29, 3)):
        angle = p / 10000 ** (2 * i / 8)
        pair = torch.tensor([math.sin(angle), math.cos(angle)]).double()
        torch.testing.assert_close(found[p, 2 * i : 2 * i + 2], pair, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mask_of_one_value_stays_that_value():
    block = MaskAggregation(16, 0.0).double()
    query, supports = torch.randn(1, 16, 3, 3).double(), torch.randn(1, 3, 16, 3, 3).double()
    for value in (0.0, 1.0):
        masks = torch.full((1, 3, 1, 3, 3), value).double()
        expected = torch.full((1, 3, 3), value).double()
        torch.testing.assert_close(block(query, supports, masks), expected)


def test_both_projections_start_from_the_same_values():
    block = network().attention[1]
    assert torch.equal(block.query.weight, block.key.weight)
    assert block.query.weight is not block.key.weight


@torch.no_grad()
def test_a_support_that_is_given_twice_counts_once():
    query, supports, masks = episode(2)
    model = network().eval()
    once = model(query, supports[:, :1], masks[:, :1]).logits
    twice = model(query, supports[:, [0, 0]], masks[:, [0, 0]]).logits
    torch.testing.assert_close(twice, once, rtol=1e-10, atol=1e-10)
    both = model(query, supports, masks).logits
    assert (both - once).abs().max() > 1e-6


@pytest.mark.parametrize("size", [(40, 56), (33, 41), (31, 50)])
@torch.no_grad()
def test_any_size(size):
    logits = network(backbone="resnet50").eval()(*episode(1, *size)).logits
    assert logits.shape == (2, 2, *size) and logits.std() > 0


def test_dropout_is_for_training():
    model, batch = network(dropout=0.5), episode(1)
    evaluated = [model.eval()(*batch).logits for _ in range(2)]
    trained = [model.train()(*batch).logits for _ in range(2)]
    assert torch.equal(*evaluated) and not torch.equal(*trained)
    plain = network(dropout=0.0)
    torch.testing.assert_close(plain.train()(*batch).logits, evaluated[0])


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="multiple of 8 channels of layer 2, .*got 4; take a wi"):
        network(width=2)
    with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1, got 1"):
        network(dropout=1)


def published() -> dict[str, tuple[int, ...]]:
    shapes = published_backbone("feature_extractor.")
    for n, channels in enumerate((512, 1024, 2048)):
        shapes[f"model.pe.{n}.pe"] = (1, 10000, channels)
        for i in range(2):
            shapes[f"model.DCAMA_blocks.{n}.linears.{i}.weight"] = (channels, channels)
            shapes[f"model.DCAMA_blocks.{n}.linears.{i}.bias"] = (channels,)
    for n, depth, kernels in ((1, 3, (3, 3, 3)), (2, 6, (5, 3, 3)), (3, 4, (5, 5, 3))):
        shapes |= widened(f"model.conv{n}", (depth, 16, 64, 128), kernels)
    for n in (4, 5):
        shapes |= widened(f"model.conv{n}", (128,) * 4, (3, 3, 3))
    for n, channels in enumerate(((1664, 128, 64), (64, 64, 16), (16, 16, 2)), 1):
        shapes |= convolutions(f"model.mixer{n}", channels)
    return shapes


def test_the_authors_layout(tmp_path):
    model = DCAMA(build_backbone("resnet50", **OPTIONS))
    head = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert sum(p.numel() for p in head.values()) == 14_215_394
    unused = ("feature_extractor.fc.", "model.pe.")
    check_loaded(model, tmp_path / "model.pt", published(), unused)
    names = official_keys(model)
    for ours, theirs in {
        "attention.2.query.weight": "model.DCAMA_blocks.2.linears.0.weight",
        "attention.0.key.bias": "model.DCAMA_blocks.0.linears.1.bias",
        "mix.1.0.weight": "model.conv4.0.weight",
        "decoder.1.2.bias": "model.mixer2.2.bias",
    }.items():
        assert names[ours] == theirs
