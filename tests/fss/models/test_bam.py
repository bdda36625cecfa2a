import pytest
import torch

from fss.models.ensemble import gram_distance, gram_matrix


def _maps(batch=2, channels=6, height=3, width=4):
    return torch.randn(batch, channels, height, width).relu()


def distances(query, support):
    """Of maps [B, C, h, w] and [B·K, C, h, w]."""
    return gram_distance(gram_matrix(query), gram_matrix(support).unflatten(0, (len(query), -1)))


def test_cosines_between_channels():
    maps = _maps()
    rows = maps.flatten(2)
    for i in range(6):
        for j in range(6):
            product = (rows[:, i] * rows[:, j]).sum(1)
            norms = rows[:, i].norm(dim=1) * rows[:, j].norm(dim=1)
            torch.testing.assert_close(gram_matrix(maps)[:, i, j], product / (norms + 1e-7))


def test_distance_of_each_support():
    query, support = _maps(), _maps(batch=6)
    distance = distances(query, support)
    assert distance.shape == (2, 3)
    for b in range(2):
        for k in range(3):
            difference = gram_matrix(query)[b] - gram_matrix(support)[3 * b + k]
            torch.testing.assert_close(distance[b, k], difference.norm() / 6)
    assert not distances(query, query).any()


def test_silent_channels_and_equal_images_have_finite_gradients():
    query = _maps()
    query[:, 2] = 0
    query.requires_grad_()
    support = torch.cat([query.detach()[:1], _maps(batch=1)]).requires_grad_()
    distances(query, support).sum().backward()
    assert query.grad.isfinite().all() and support.grad.isfinite().all()
    assert query.grad.any()


def test_gradcheck():
    maps = [torch.rand(n, 3, 2, 2, dtype=torch.float64, requires_grad=True) for n in (2, 4)]
    assert torch.autograd.gradcheck(distances, maps)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_a_float32_distance(autocast):
    query, support = _maps(), _maps()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        maps = (query, support) if autocast else (query.bfloat16(), support.bfloat16())
        distance = distances(*maps)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, distances(query, support), rtol=0.02, atol=0)
