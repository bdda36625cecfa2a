"""PMM and RPMM: the mixtures, what of the supports counts, the stages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.models import PMM, RPMM, build_backbone
from fss.models.features import Features
from fss.models.pmm import mixture

both = pytest.mark.parametrize("kind", [PMM, RPMM])


def network(kind: type[PMM]) -> PMM:
    """In float64, with batch norms that have statistics."""
    torch.manual_seed(0)
    model = kind(build_backbone("resnet18", width=4), channels=8, dropout=0.0).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def episode(shots: int = 1, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1 + shots, 3, 33, 41, generator=generator).double()
    masks = (torch.rand(batch, shots, 33, 41, generator=generator) > 0.5).long()
    return images[:, 0], images[:, 1:], masks


def test_a_mixture_step_by_step():
    """With sums over positions and prototypes written out."""
    x, start = torch.randn(4, 7).double(), functional.normalize(torch.randn(4, 3), dim=0).double()
    mu = [start[:, k].tolist() for k in range(3)]
    points = x.T.tolist()
    for _ in range(4):
        weights = []
        for p in points:
            e = [math.exp(2.5 * sum(a * b for a, b in zip(p, m))) for m in mu]
            weights.append([each / sum(e) for each in e])
        moved = []
        for k in range(3):
            total = sum(w[k] for w in weights) + 1e-6
            m = [sum(w[k] * p[c] for w, p in zip(weights, points)) / total for c in range(4)]
            length = math.sqrt(sum(value**2 for value in m)) + 1e-6
            moved.append([value / length for value in m])
        mu = moved
    found = mixture(x[None], start, 4, 2.5)
    exact = torch.tensor(mu, dtype=torch.float64)
    torch.testing.assert_close(found[0].T, exact, rtol=1e-9, atol=1e-9)


def test_a_mixture_finds_directions_and_leaves_out_what_is_masked():
    directions = functional.normalize(torch.randn(2, 16, 2), dim=1).double()
    x = directions.repeat_interleave(20, dim=2) + 0.01 * torch.randn(2, 16, 40).double()
    start = functional.normalize(torch.randn(16, 2), dim=0).double()
    found = mixture(x, start, 10, 20.0)
    cosines = (directions.mT @ found).amax(dim=2)
    assert (cosines > 0.99).all()
    padded = torch.cat([x[:, :, torch.randperm(40)], torch.zeros(2, 16, 9).double()], dim=2)
    torch.testing.assert_close(mixture(padded, start, 10, 20.0), found, rtol=1e-5, atol=1e-5)
    assert not mixture(torch.zeros(1, 16, 5), start.float(), 10, 20.0).any()


@torch.no_grad()
def test_prototypes_and_probabilities_are_those_of_all_shots():
    """The probability is a softmax over all prototypes, here of one position after the other."""
    model, (query, supports, masks) = network(PMM).eval(), episode(shots=2)
    features = model.features(query, supports, masks)
    reduced = model.reduced(*features.query)
    objects, shares = model.represent(reduced, features, model.starts)
    assert objects.shape == (2, 3, 8) and shares.shape == (2, 2, 5, 6)
    for b in range(2):
        maps = model.reduce(torch.cat(model.backbone.features(supports[b]), dim=1))
        mask = functional.interpolate(
            masks[b, :, None].double(), (5, 6), mode="bilinear", align_corners=True
        )
        sides = []
        for share in (1 - mask, mask):
            points = [
                (maps * share)[k, :, i, j] for k in (0, 1) for i in range(5) for j in range(6)
            ]
            sides.append(mixture(torch.stack(points, 1)[None], model.starts, 10, 20.0)[0])
        torch.testing.assert_close(objects[b].T, sides[1], rtol=1e-9, atol=1e-9)
        for i in range(5):
            for j in range(6):
                e = [
                    [math.exp(float(reduced[b, :, i, j] @ side[:, k])) for k in range(3)]
                    for side in sides
                ]
                total = sum(map(sum, e))
                assert shares[b, :, i, j].tolist() == pytest.approx(
                    [sum(side) / total for side in e], abs=1e-9
                )


@both
@pytest.mark.parametrize("shots", [1, 5])
def test_supports_train_nothing_but_count(kind, shots):
    model, (query, supports, masks) = network(kind).train(), episode(shots)
    query.requires_grad_()
    supports.requires_grad_()
    prediction = model(query, supports, masks)
    loss = model.loss(prediction, masks[:, 0])
    loss.backward()
    assert query.grad.abs().max() > 0
    assert supports.grad is None or not supports.grad.any()
    assert all(p.grad.isfinite().all() for p in model.reduce.parameters())
    assert all(p.grad.any() for p in model.comparison.parameters() if p.ndim > 1)
    model.eval()
    with torch.no_grad():
        first = model(query, supports, masks).logits
        assert torch.equal(model(query, supports, masks).logits, first)
        alone = model(query[:1], supports[:1], masks[:1]).logits
        torch.testing.assert_close(alone, first[:1], rtol=1e-9, atol=1e-9)
        for none in (torch.zeros_like(masks), torch.ones_like(masks)):
            other = model(query, supports, none).logits
            assert other.isfinite().all() and not torch.allclose(other, first)


@both
@torch.no_grad()
def test_five_times_the_same_support_is_one(kind):
    model, (query, supports, masks) = network(kind).eval(), episode()
    one = model.features(query, supports, masks)
    five = model.features(query, supports.expand(-1, 5, -1, -1, -1), masks.expand(-1, 5, -1, -1))
    reduced = model.reduced(*one.query)
    for start in model.starts.split(model.prototypes, dim=1):
        pairs = (model.represent(reduced, each, start) for each in (one, five))
        for a, b in zip(*pairs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_seed_does_not_change_where_a_mixture_starts():
    torch.manual_seed(1)
    first = RPMM(build_backbone("resnet18", width=4), channels=8)
    torch.manual_seed(2)
    second = RPMM(build_backbone("resnet18", width=4), channels=8)
    assert torch.equal(first.starts, second.starts) and first.starts.shape == (8, 10)
    torch.testing.assert_close(first.starts.norm(dim=0), torch.ones(10))
    assert "starts" not in first.state_dict()


def test_the_loss_of_rpmm_is_that_of_three_stages():
    model, (query, supports, masks) = network(RPMM).train(), episode()
    target = masks[:, 0].clone()
    target[:, :4] = 255
    prediction = model(query, supports, masks)
    logits = [
        functional.interpolate(each, (33, 41), mode="bilinear", align_corners=False)
        for each in prediction.auxiliary
    ]
    assert len(logits) == 2
    expected = 0.0
    for each in (*logits, prediction.logits):
        log = each.log_softmax(1)
        chosen = torch.where(target == 1, log[:, 1], log[:, 0])
        expected = expected - chosen[target != 255].mean()
    torch.testing.assert_close(model.loss(prediction, target), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_stages_begin_with_the_stage_before_and_several_shots_sum_them(monkeypatch):
    model, batch = network(RPMM).eval(), episode(shots=2)
    passes, optimize = [], model.optimize

    def watched(x: Tensor, mask: Tensor) -> Tensor:
        passes.append((mask, optimize(x, mask)))
        return passes[-1][1]

    monkeypatch.setattr(model, "optimize", watched)
    logits = model(*batch).logits
    (first, a), (second, b), (third, c) = passes
    assert not first.any()
    assert torch.equal(second, a.softmax(1)) and torch.equal(third, b.softmax(1))
    total = sum(each.softmax(1) for each in (a, b, c)) / 5
    wanted = functional.interpolate(total, (33, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    passes.clear()
    query, supports, masks = batch
    logits = model(query, supports[:, :1], masks[:, :1]).logits
    last = functional.interpolate(passes[-1][1], (33, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, last, rtol=1e-9, atol=1e-9)


def test_a_prototype_is_normed_by_itself():
    """While training each comparison is a batch of its own for the batch norm (PMM)."""
    model, batch = network(PMM).train(), episode()
    features = model.features(*batch)
    counted = model.comparison[1].num_batches_tracked.item()
    model.head(Features(features.query, features.supports), (33, 41))
    assert model.comparison[1].num_batches_tracked.item() == counted + 3
