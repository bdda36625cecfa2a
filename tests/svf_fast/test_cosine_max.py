import pytest
import torch

from svf_fast import cosine_max
from svf_fast.reference.cosine_max import cosine_max as reference_cosine_max


def _inputs(batch=2, channels=5, queries=7, supports=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, channels, queries, generator=generator, dtype=dtype)
    support = torch.randn(batch, channels, supports, generator=generator, dtype=dtype)
    mask = torch.rand(batch, supports, generator=generator, dtype=dtype)
    return query, support, mask


@pytest.mark.parametrize("function", [cosine_max, reference_cosine_max])
def test_equals_a_loop_over_positions(function):
    query, support, mask = _inputs()
    expected = torch.empty(2, 7, dtype=torch.float64)
    for b in range(2):
        for i in range(7):
            q = query[b, :, i]
            expected[b, i] = max(
                q
                @ (mask[b, j] * support[b, :, j])
                / (q.norm() * (mask[b, j] * support[b, :, j]).norm() + 1e-7)
                for j in range(11)
            )
    torch.testing.assert_close(function(query, support, mask), expected, rtol=1e-12, atol=1e-12)


def test_masked_supports_count_as_similarity_zero():
    query = torch.tensor([[[1.0], [0.0]]])
    support = torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]])
    assert cosine_max(query, support, torch.tensor([[1.0, 0.0]])).item() == 0.0
    assert cosine_max(query, support, torch.tensor([[1.0, 1.0]])).item() == pytest.approx(1.0)
    assert cosine_max(query, support, torch.tensor([[True, False]])).item() == 0.0


def test_a_soft_mask_does_not_change_the_cosine_but_through_epsilon():
    query, support, _ = _inputs()
    ones = torch.ones(2, 11, dtype=torch.float64)
    half = cosine_max(query, support, 0.5 * ones)
    torch.testing.assert_close(half, cosine_max(query, support, ones), rtol=1e-6, atol=0)


def test_an_empty_mask_gives_zeros_and_zero_gradients():
    query, support, mask = _inputs()
    query.requires_grad_()
    support.requires_grad_()
    similarity = cosine_max(query, support, torch.zeros_like(mask))
    similarity.sum().backward()
    assert not similarity.any()
    assert not query.grad.any()
    assert not support.grad.any()


def test_the_first_of_equal_supports_gets_the_gradient():
    query = torch.ones(1, 3, 2)
    support = torch.tensor([[-1.0, 1.0, 1.0, 1.0]]).expand(1, 3, 4).clone()
    support[:, 0] *= 2
    support.requires_grad_()
    cosine_max(query, support, torch.ones(1, 4)).sum().backward()
    touched = support.grad.abs().sum(dim=(0, 1)) > 0
    assert touched.tolist() == [False, True, False, False]


def test_gradcheck():
    query, support, mask = _inputs()
    mask[0, :4] = 0
    query.requires_grad_()
    support.requires_grad_()
    assert torch.autograd.gradcheck(cosine_max, (query, support, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    query, support, mask = _inputs(channels=64, dtype=torch.float32)
    query, support = query.to(dtype), support.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        similarity = cosine_max(query, support, mask)
    expected = reference_cosine_max(query.double(), support.double(), mask.double())
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch, queries", [(0, 7), (2, 0)])
def test_nothing_to_compare_gives_an_empty_result(batch, queries):
    query, support, mask = _inputs(batch=batch, queries=queries)
    assert cosine_max(query, support, mask).shape == (batch, queries)


def test_strided_inputs():
    query, support, mask = _inputs()
    doubled = support.repeat_interleave(2, dim=2)[:, :, ::2]
    permuted = query.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    expected = cosine_max(query, support, mask)
    torch.testing.assert_close(cosine_max(permuted, doubled, mask), expected)


QUERY, SUPPORT, MASK = torch.zeros(2, 5, 7), torch.zeros(2, 5, 11), torch.ones(2, 11)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([[0.0]], SUPPORT, MASK), TypeError, "query: expected a tensor, got list"),
        ((QUERY.long(), SUPPORT, MASK), TypeError, "query: .*floating-point.*got torch.int64"),
        ((QUERY, SUPPORT.double(), MASK), TypeError, "support: .*torch.float32, got torch.float64"),
        ((QUERY, SUPPORT, MASK.long()), TypeError, "mask: .*got torch.int64; .*mask == 1"),
        ((QUERY[0], SUPPORT, MASK), ValueError, r"query: expected \[B, C, N\], got shape \[5, 7\]"),
        ((QUERY, SUPPORT[0], MASK), ValueError, r"support: expected \[2, 5, M\].*got .*\[5, 11\]"),
        ((QUERY, SUPPORT[:1], MASK), ValueError, r"support: expected \[2, 5, M\].*\[1, 5, 11\]"),
        ((QUERY, SUPPORT[:, :4], MASK), ValueError, r"support: expected \[2, 5, M\].*\[2, 4, 11\]"),
        ((QUERY, SUPPORT[:, :, :0], MASK[:, :0]), ValueError, "at least one position"),
        ((QUERY, SUPPORT, MASK[:, :7]), ValueError, r"mask: expected \[2, 11\].*got .*\[2, 7\]"),
        ((QUERY, SUPPORT.to("meta"), MASK), ValueError, "support: .*device cpu, got meta"),
        ((QUERY, SUPPORT, MASK.to("meta")), ValueError, "mask: .*device cpu, got meta"),
        ((QUERY, SUPPORT, MASK.clone().requires_grad_()), ValueError, "mask.detach()"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        cosine_max(*arguments)
