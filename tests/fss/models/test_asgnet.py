"""ASGNet: its seeds by scipy, its clusters in loops, its allocation, and its files."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from fss.models import build_backbone
from fss.models.asgnet import ASGNet, allocate, cluster, place_seeds
from fss.models.official import load_official, official_keys
from tests.fss.models.test_official import _pfenet_shapes, _save, _state


def _tiny():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", width=4)
    return ASGNet(backbone, channels=8, dropout=0.0, bins=(1.0, 0.5)).double()


def _episodes(shots=1, size=161):
    """Foregrounds of 168 to 320 of the 441 positions, which ask for 2 or 3 seeds, and one of 12."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 3, size, size, generator=generator).double()
    supports = torch.randn(2, shots, 3, size, size, generator=generator).double()
    masks = torch.zeros(2, shots, size, size, dtype=torch.int64)
    for n in range(shots):
        masks[0, n, 8 : 120 + 8 * n, 16:112] = 1
        masks[1, n, 24:152, 8:] = 1
    masks[1, 0] = 0
    masks[1, 0, 24:48, 8:40] = 1
    return query, supports, masks


def _seeds_by_scipy(mask, most=5):
    """Rows and columns of the seeds, by a new distance transform of the box after each."""
    count = min(int(np.round(mask.sum() / 100)), most)
    found = np.zeros((most, 2), dtype=np.int64)
    if count < 2:
        return found
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    box = mask[top : rows.max() + 1, left : columns.max() + 1].copy()
    for n in range(count):
        distance = distance_transform_edt(box)
        row, column = np.argwhere(distance == distance.max())[0]
        box[row, column] = False
        found[n] = row + top, column + left
    return found


def test_seeds_are_those_of_distance_transforms():
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(33)
    masks = []
    for n in range(24):
        mask = torch.zeros(33, 33, dtype=torch.bool)
        for y, x, r in (torch.rand(3, 3, generator=generator) * 33).tolist():
            mask |= (grid[:, None] - y) ** 2 + (grid - x) ** 2 < (r / 2) ** 2
        if n % 4 == 1:  # all of its box
            mask = torch.zeros_like(mask)
            mask[n : n + 10, : 9 + n] = True
        if n % 4 == 2:
            mask = torch.rand(33, 33, generator=generator) < n / 24
        masks.append(mask)
    masks += [torch.zeros_like(mask), torch.ones_like(mask)]
    seeds, counts = place_seeds(torch.stack(masks))
    expected = [_seeds_by_scipy(mask.numpy()) for mask in masks]
    np.testing.assert_array_equal(seeds.numpy(), np.stack(expected))
    used = [max(np.count_nonzero(e[:, 0]), np.count_nonzero(e[:, 1])) for e in expected]
    assert counts.tolist() == used and {0, 2, 5} <= set(used)


def test_a_cluster_is_a_mean_weighted_by_distance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 5, 4, generator=generator).double()
    region = torch.rand(1, 1, 5, 4, generator=generator) > 0.3
    seeds = torch.tensor([[[1, 2], [4, 0]]])
    points = [
        [*features[0, :, y, x].tolist(), y / 10, x / 10]
        for y in range(5)
        for x in range(4)
        if region[0, 0, y, x]
    ]
    centers = [[*features[0, :, y, x].tolist(), y / 10, x / 10] for y, x in seeds[0].tolist()]
    for _ in range(3):
        moved = []
        for center in centers:
            weights = [np.exp(-np.linalg.norm(np.subtract(point, center))) for point in points]
            moved.append(np.average(points, axis=0, weights=weights))
        centers = moved
    found = cluster(features, region, seeds, 3)
    np.testing.assert_allclose(found[0].numpy(), np.array(centers)[:, :3], rtol=1e-9, atol=1e-9)
    far = cluster(1e4 * features.float(), region, seeds, 3)  # whose exp(-d) are all 0
    assert far.isfinite().all()
    assert not cluster(features, region & False, seeds, 2).any()


def test_each_position_gets_the_nearest_prototype_that_there_is():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 3, generator=generator).double()
    prototypes = torch.randn(2, 6, 4, generator=generator).double()
    exists = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).double()
    guide, probability = allocate(query, prototypes, exists)
    for b in range(2):
        kept = prototypes[b][exists[b] == 1]
        for y in range(3):
            for x in range(3):
                at = query[b, :, y, x]
                cosines = kept @ at / (kept.norm(dim=1) * at.norm())
                assert torch.equal(guide[b, :, y, x], kept[cosines.argmax()])
                torch.testing.assert_close(probability[b, 0, y, x], cosines.sum())


def test_the_order_of_the_supports_does_not_matter_and_any_number_will_do():
    model, (query, supports, masks) = _tiny().eval(), _episodes(3)
    logits = model(query, supports, masks).logits
    assert torch.equal(model(query, supports, masks).logits, logits)
    flipped = model(query, supports.flip(1), masks.flip(1)).logits
    torch.testing.assert_close(flipped, logits, rtol=1e-9, atol=1e-9)
    alone = model(query[1:], supports[1:], masks[1:]).logits
    torch.testing.assert_close(alone, logits[1:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(query, supports[:, :1], masks[:, :1]).logits, logits)


def test_supports_have_as_many_prototypes_as_their_area_asks_for():
    model, (_, supports, masks) = _tiny(), _episodes(2)
    masks[0, 1] = 255
    _, exists = model.features(torch.zeros_like(supports[:, 0]), supports, masks).supports
    assert exists.sum(dim=2).tolist() == [[2, 1], [1, 3]]


def test_supports_teach_nothing_but_queries_do():
    model, (query, supports, masks) = _tiny(), _episodes()
    supports.requires_grad_()
    query.requires_grad_()
    prediction = model(query, supports, masks)
    assert len(prediction.auxiliary) == 2
    model.loss(prediction, masks[:, 0]).backward()
    assert not supports.grad.any() and query.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_it_clusters_longer_while_training():
    model, (query, supports, masks) = _tiny(), _episodes()
    trained, seen = (model.train(mode)(query, supports, masks).logits for mode in (True, False))
    assert not torch.equal(trained, seen)


def _asgnet_shapes():
    shapes = {
        key.replace("init_merge.", "corr_conv.").replace("down_query.", "down_conv."): shape
        for key, shape in _pfenet_shapes(vgg=False).items()
    }
    del shapes["down_supp.0.weight"]
    return shapes


@torch.no_grad()
def test_official(tmp_path):
    state = _state(_asgnet_shapes())
    model = ASGNet(build_backbone("resnet50", stem="deep"))
    load_official(model, _save(tmp_path, state))
    names = official_keys(model)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[names[key]]), key
    unread = {key for key in state if key not in names.values()}
    assert unread and all(key.startswith("layer4.") for key in unread)
    del state["corr_conv.3.0.weight"]
    with pytest.raises(ValueError, match=r"1 missing: corr_conv.3.0.weight"):
        load_official(model, _save(tmp_path, state))
