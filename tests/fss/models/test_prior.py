import pytest
import torch

from fss.models.prior import prior_masks
from fss.training.measure import saved_bytes


def _inputs(shots=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 6, 3, 4, generator=generator).relu()
    support = torch.randn(2, shots, 6, 3, 4, generator=generator).relu()
    mask = torch.zeros(2, shots, 1, 3, 4)
    mask[..., 1:, :2] = 1
    return query, support, mask


def test_spans_zero_to_one_per_image():
    (prior,) = prior_masks(*_inputs())
    assert prior.shape == (2, 1, 3, 4)
    assert prior.amin(dim=(1, 2, 3)).tolist() == [0, 0]
    torch.testing.assert_close(prior.amax(dim=(1, 2, 3)), torch.ones(2), rtol=0, atol=1e-5)


def test_finds_the_support_feature_at_its_place():
    query = torch.zeros(1, 3, 4, 5)
    query[:, 0] = 1
    query[0, :, 2, 3] = torch.tensor([0.0, 2.0, 0.0])
    support = torch.zeros(1, 1, 3, 4, 5)
    support[0, 0, :, 0, 0] = torch.tensor([0.0, 5.0, 0.0])
    mask = torch.zeros(1, 1, 1, 4, 5)
    mask[..., 0, 0] = 1
    expected = torch.zeros(4, 5)
    expected[2, 3] = 1
    torch.testing.assert_close(prior_masks(query, support, mask)[0, 0, 0], expected)


def test_shots_are_normalized_each_by_itself():
    query, support, mask = _inputs(shots=3)
    single = [prior_masks(query, support[:, k : k + 1], mask[:, k : k + 1]) for k in range(3)]
    torch.testing.assert_close(prior_masks(query, support, mask), torch.cat(single))


def test_supports_of_another_size():
    query, support, mask = _inputs()
    larger = prior_masks(query, support.repeat(1, 1, 1, 2, 2), mask.repeat(1, 1, 1, 2, 2))
    torch.testing.assert_close(larger, prior_masks(query, support, mask))


def test_an_empty_support_gives_zeros_and_finite_gradients():
    query, support, mask = _inputs()
    query.requires_grad_()
    support.requires_grad_()
    prior = prior_masks(query, support, torch.zeros_like(mask))
    prior.sum().backward()
    assert not prior.any()
    assert query.grad.isfinite().all()
    assert support.grad.isfinite().all()


def test_gradcheck():
    query, support, mask = (tensor.double() for tensor in _inputs(shots=2))
    query = (query + torch.rand_like(query)).requires_grad_()
    support = (support + torch.rand_like(support)).requires_grad_()
    assert torch.autograd.gradcheck(prior_masks, (query, support, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_keep_a_float32_prior(dtype):
    query, support, mask = _inputs()
    prior = prior_masks(query.to(dtype), support.to(dtype), mask)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior, prior_masks(query, support, mask), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_nothing_that_grows_with_the_square_of_the_positions(dtype):
    shots, height, width = 3, 40, 41
    maps = [
        torch.randn(size, 8, height, width).relu().to(dtype).requires_grad_() for size in (1, shots)
    ]
    mask = torch.rand(1, shots, 1, height, width)
    with saved_bytes(torch.nn.Module()) as saved:
        prior = prior_masks(maps[0], maps[1].unsqueeze(0), mask)
    prior.sum().backward()
    given = sum(tensor.untyped_storage().nbytes() for tensor in (*maps, mask))
    assert saved.total - given <= 32 * shots * height * width
