"""HDMNet: the matching of each pair of positions in loops, its distillation, and its files."""

import math

import pytest
import torch
from torch import nn

from fss.config import OptimizerConfig
from fss.models import build_backbone
from fss.models.hdmnet import HDMNet, MatchingAttention, distillation
from fss.models.official import load_official, official_keys
from fss.training.optimizer import parameter_groups
from tests.fss.models.test_official import (
    _base_shapes,
    _bn,
    _conv,
    _reductions,
    _resnet50_shapes,
    _save,
    _state,
)


def _tiny(shots=1, **options):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", width=4)
    return HDMNet(backbone, 5, shots, channels=8, dropout=0.0, width=16, **options).double()


def _episodes(shots=1, batch=2, size=65):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, 3, size, size, generator=generator).double()
    supports = torch.randn(batch, shots, 3, size, size, generator=generator).double()
    masks = torch.zeros(batch, shots, size, size, dtype=torch.int64)
    for n in range(shots):
        masks[0, n, 8 : 30 + 8 * n, 16:50] = 1
        masks[1, n, 20:60, 3 + 8 * n : 50] = 1
    masks[:, :, 60:] = 255
    return query, supports, masks


@pytest.mark.parametrize("heads", [1, 2])
def test_the_matching_of_each_pair_of_positions(heads):
    torch.manual_seed(0)
    attention = MatchingAttention(6, heads).double()
    x, supports = torch.randn(2, 5, 6).double(), torch.randn(2, 7, 6).double()
    mask = (torch.rand(2, 7) > 0.4).double()
    found, correlation = attention(x, supports, mask)
    width = 6 // heads
    for b in range(2):
        merged, mean = torch.zeros(5, 6).double(), torch.zeros(5).double()
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            q, k, v = (
                tokens[b] @ layer.weight[rows].T
                for tokens, layer in (
                    (x, attention.query),
                    (supports, attention.key),
                    (supports, attention.value),
                )
            )
            c = torch.zeros(5, 7).double()
            for i in range(5):
                for j in range(7):
                    c[i, j] = (10 * (q[i] @ k[j]) / (q[i].norm() * k[j].norm())).item()
            for j in range(7):
                if mask[b, j]:
                    share = [math.exp(c[i, j]) for i in range(5)]
                    for i in range(5):
                        merged[i, rows] += share[i] / sum(share) * v[j]
            mean += (c * mask[b]).sum(dim=1) / mask[b].sum() / heads
        expected = merged @ attention.out.weight.T
        torch.testing.assert_close(found[b], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(correlation[b], mean, rtol=1e-7, atol=1e-9)


def test_distillation_is_a_divergence():
    maps = torch.randn(2, 4, 4).double()
    shifted = maps + torch.tensor([1.0, -2.0])[:, None, None]
    assert distillation(maps, shifted).abs() < 1e-12
    other = torch.randn(2, 4, 4).double()
    p, q = (nn.functional.softmax(each.flatten(1), dim=1) for each in (maps, other))
    expected = (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(distillation(maps, other), expected, rtol=1e-9, atol=1e-9)
    assert distillation(torch.randn(2, 9, 9).double(), maps) > 0


def test_the_loss_adds_the_mean_distillation_from_coarse_to_fine():
    model, (query, supports, masks) = _tiny(), _episodes()
    prediction = model(query, supports, masks, torch.tensor([0, -1]))
    mask = masks[:, 0]
    base = torch.where(mask == 1, 3, mask)
    plain = model.loss(prediction._replace(auxiliary=prediction.auxiliary[:2]), mask, base)
    correlations = prediction.auxiliary[2:]
    assert [tuple(c.shape[1:]) for c in correlations] == [(3, 3), (5, 5), (9, 9)]
    teacher = torch.where(mask == 1, 1.0, -1e9).double()
    terms = [distillation(t, s) for t, s in zip((teacher, *correlations), correlations)]
    torch.testing.assert_close(model.loss(prediction, mask, base) - plain, sum(terms) / 3)
    # a coarser correlation teaches, it is not taught by the finer
    gradient = torch.autograd.grad(terms[0], correlations[0], retain_graph=True)[0]
    whole = torch.autograd.grad(model.loss(prediction, mask, base), correlations[0])[0]
    # the correlations are leaves of no other term: their maps do not feed the logits
    torch.testing.assert_close(whole, gradient / 3)


def test_the_background_of_supports_is_nothing():
    """Neither pixels of the background nor of what is ignored matter; other foreground does."""
    model, (query, supports, masks) = _tiny(2).eval(), _episodes(2)
    logits = model(query, supports, masks).logits
    noise = torch.randn_like(supports)
    elsewhere = torch.where((masks == 1)[:, :, None], supports, noise)
    assert torch.equal(model(query, elsewhere, masks).logits, logits)
    inside = torch.where((masks == 1)[:, :, None], noise, supports)
    assert not torch.allclose(model(query, inside, masks).logits, logits)


@pytest.mark.parametrize("shots", [1, 5])
def test_gradients_reach_what_trains_and_no_batch_norm_moves(shots):
    model, (query, supports, masks) = _tiny(shots), _episodes(shots)
    with torch.no_grad():  # which begin blind
        for merge in (model.distance_merge, model.base_merge):
            merge.weight += 0.2
    model.backbone.requires_grad_(False)
    before = {key: value.clone() for key, value in model.named_buffers()}
    mask = masks[:, 0]
    prediction = model.train()(query, supports, masks, torch.tensor([0, -1]))
    model.loss(prediction, mask, torch.where(mask == 1, 3, mask)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("base_learner.", "shot_weights.")) for name in trained)
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_weights_stay_in_the_order_of_the_distances():
    """The first support gets that of the smallest distance, whichever support it is of."""
    model = _tiny(3)
    distances = torch.tensor([[0.3, 0.1, 0.2]]).double()
    expected = model.shot_weights(distances.sort(dim=1).values)
    assert torch.equal(model.weigh(distances), expected)
    model.shot_weights.restore_order = True
    torch.testing.assert_close(model.weigh(distances), expected[:, [2, 0, 1]])


@pytest.mark.parametrize("decayed", [False, True])
def test_the_transformer_has_a_rate_of_its_own(decayed):
    config = OptimizerConfig(
        "adamw",
        lr=1e-3,
        weight_decay=0.01,
        transformer_lr=1e-4,
        transformer_weight_decay=0.02,
        transformer_bias_decay=decayed,
    )
    model = _tiny()
    model.backbone.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(model, config)}
    biases = [
        p
        for name, p in model.named_parameters()
        if name.startswith(model.transformer) and name.endswith("bias")
    ]
    assert set(groups) == {"head", "transformer"} | (set() if decayed else {"transformer biases"})
    assert groups["head"]["lr"] == 1e-3 and groups["transformer"]["lr"] == 1e-4
    assert biases and all(
        any(p is q for q in groups["transformer"]["params"]) == decayed for p in biases
    )


def _hdmnet_shapes(shots):
    shapes = _resnet50_shapes()
    _base_shapes(shapes, False, "ppm", "cls")
    for part in ("weight", "bias"):  # the last convolution has a name of its own
        shapes[f"base_learnear.2.{part}"] = shapes.pop(f"cls.4.{part}")
    _reductions(shapes, False)
    _conv(shapes, "query_merge.0", 64, 514, 1)
    _conv(shapes, "supp_merge.0", 64, 512, 1)
    _conv(shapes, "gram_merge", 1, 2, 1)
    _conv(shapes, "cls_merge", 1, 2, 1)
    root = "transformer.mix_transformer."
    for n, (kernel, reduction) in enumerate(((1, 4), (3, 2), (3, 1))):
        _conv(shapes, f"{root}down_sample_layers.{n}.0.projection", 64, 64, kernel, bias=True)
        _norm(shapes, f"{root}down_sample_layers.{n}.0.norm")
        _norm(shapes, f"{root}down_sample_layers.{n}.3")
        for name, reduced in (
            (f"down_sample_layers.{n}.1", reduction),
            (f"down_sample_layers.{n}.2", reduction),
            (f"match_layers.{n}.0", 1),
        ):
            _block(shapes, root + name, reduced)
        _conv(shapes, f"{root}match_layers.{n}.1.conv", 64, 66, 3)
        _bn(shapes, f"{root}match_layers.{n}.1.bn", 64)
        _bottleneck(shapes, f"{root}parse_layers.{n}", 64)
        _bn(shapes, f"{root}parse_layers.{n}.5", 64)
    _bottleneck(shapes, f"{root}cls", 2)
    if shots > 1:
        _conv(shapes, "kshot_rw.0", 2, shots, 1, bias=True)
        _conv(shapes, "kshot_rw.2", shots, 2, 1, bias=True)
    return shapes


def _norm(shapes, name):
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (64,)


def _block(shapes, name, reduction):
    _norm(shapes, f"{name}.norm1")
    _norm(shapes, f"{name}.norm2")
    for letter in "qkvo":
        shapes[f"{name}.attn.attn.linear_{letter}.weight"] = (64, 64)
    if reduction > 1:
        _conv(shapes, f"{name}.attn.sr", 64, 64, reduction, bias=True)
        _norm(shapes, f"{name}.attn.norm")
    _conv(shapes, f"{name}.ffn.layers.0", 256, 64, 1, bias=True)
    _conv(shapes, f"{name}.ffn.layers.1", 256, 1, 3, bias=True)
    _conv(shapes, f"{name}.ffn.layers.4", 64, 256, 1, bias=True)


def _bottleneck(shapes, name, outputs):
    for i, out, into, kernel in ((0, 256, 64, 1), (2, 256, 256, 3), (4, outputs, 256, 1)):
        _conv(shapes, f"{name}.{i}", out, into, kernel, bias=True)
        if i < 4:
            _bn(shapes, f"{name}.{i + 1}", out)


@torch.no_grad()
def test_official(tmp_path):
    state = _state(_hdmnet_shapes(5))
    model = HDMNet(build_backbone("resnet50", stem="deep"), 15, shots=5)
    load_official(model, _save(tmp_path, state))
    names = official_keys(model)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[names[key]].reshape(value.shape)), key
    assert HDMNet.count_base_classes(state) == 15
    model.backbone.requires_grad_(False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_161_734
    del state["transformer.mix_transformer.cls.2.bias"]
    with pytest.raises(ValueError, match=r"1 missing: transformer.mix_transformer.cls.2.bias"):
        load_official(model, _save(tmp_path, state))
