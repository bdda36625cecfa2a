"""The Triton kernels of cosine_max: interpreted on the CPU, run where a GPU is."""

import pytest
import torch
import triton
import triton.language as tl

from svf_fast.ops.cosine_max import paired_cosine_max_backward, tiled_cosine_max
from svf_fast.reference.cosine_max import cosine_max as reference_cosine_max
from svf_fast.triton import cosine_max as forward_kernels
from svf_fast.triton import cosine_max_backward as backward_kernels
from svf_fast.triton import tuning
from svf_fast.triton.cosine_max import cosine_max
from svf_fast.triton.cosine_max_backward import cosine_max_backward
from svf_fast.triton.language import dot
from tests.svf_fast.tolerance import accumulated, assert_error_within

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["channels_last", "contiguous", "sliced"]
MASKS = ["ones", "binary", "fractional", "zeros"]

# Odd sizes, less than a tile and more; several splits; one channel and none; the most channels.
SHAPES = [(1, 1, 3, 1), (1, 70, 35, 67), (1, 0, 3, 4), (1, 2047, 3, 5)]
SMALL = {"QUERIES": 16, "SUPPORTS": 16, "CHANNELS": 16, "num_warps": 4, "num_stages": 2}


def _inputs(shape, dtype, device, layout="channels_last", kind="fractional"):
    batch, channels, queries, supports = shape
    maps = (torch.randn(batch, channels, n, device=device) for n in (queries, supports))
    query, support = (_laid_out(x.to(dtype), layout) for x in maps)
    mask = torch.rand(batch, supports, device=device)
    mask[mask < 0.4] = 0
    if kind != "fractional":
        mask = {"ones": torch.ones_like, "zeros": torch.zeros_like, "binary": torch.ceil}[kind](
            mask
        )
    return query, support, mask


def _laid_out(x, layout):
    if layout == "channels_last":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return x.repeat_interleave(2, dim=2)[:, :, ::2]
    return x


def _check(query, support, mask):
    """Values against the definition; gradients against those of the pairs that were chosen."""
    values, index = cosine_max(query, support, mask)
    truth, _ = tiled_cosine_max(query.double(), support.double(), mask.double())
    expected, _ = tiled_cosine_max(query, support, mask)
    assert values.dtype == torch.float32 and index.dtype == torch.int64
    # a sum of products, whatever it cancels to, is rounded at the size of its terms
    magnitude = accumulated(torch.maximum(truth.abs(), truth.new_ones(())), torch.float32)
    assert_error_within(values, expected, truth, magnitude=magnitude, channel_dim=None)
    exact = query.double(), support.double(), mask.double()
    at_index = _cosine_at(*exact, index)
    assert_error_within(
        at_index, at_index, truth, magnitude=magnitude, dtype=torch.float32, channel_dim=None
    )

    grad = torch.randn_like(values)
    actual = cosine_max_backward(grad, query, support, mask, values, index)
    given = paired_cosine_max_backward(grad, query, support, mask, values, index)
    truths = paired_cosine_max_backward(grad.double(), *exact, at_index, index)
    # the first of its two terms, which cancel, wholly where there is one channel
    terms = paired_cosine_max_backward(grad.double(), *exact, torch.zeros_like(at_index), index)
    for name, found, reference, truth, term in zip(
        ("query", "support"), actual, given, truths, terms, strict=True
    ):
        assert found.dtype == query.dtype
        assert_error_within(
            found,
            reference,
            truth,
            magnitude=accumulated(torch.maximum(truth.abs(), term.abs()), query.dtype),
            channel_dim=None,
            name=f"gradient of the {name}",
        )


def _cosine_at(query, support, mask, index):
    chosen = support.gather(2, index.unsqueeze(1).expand_as(query))
    chosen = chosen * mask.gather(1, index).unsqueeze(1)
    norms = query.norm(dim=1) * chosen.norm(dim=1)
    return (query * chosen).sum(dim=1) / (norms + 1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, dtype, device, poisoned_memory):
    _check(*_inputs(shape, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_any_mask(kind, dtype, device, poisoned_memory):
    _check(*_inputs((2, 5, 7, 11), dtype, device, kind=kind))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_maps_of_different_layouts(left, right, device, poisoned_memory):
    shape = 2, 5, 7, 11
    query = _inputs(shape, torch.float32, device, left)[0]
    _, support, mask = _inputs(shape, torch.float32, device, right)
    _check(query, support, mask)
    arguments = query, support, mask
    values, index = cosine_max(*arguments)
    gradients = cosine_max_backward(values, *arguments, values, index)
    raw = torch.ops.svf_fast.cosine_max_backward
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = raw(*(mode.from_tensor(x) for x in (values, *arguments, values, index)))
    assert [x.stride() for x in gradients] == [x.stride() for x in fake]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_any_number_of_splits_gives_the_same(splits, device, poisoned_memory):
    arguments = _inputs((1, 33, 19, 71), torch.bfloat16, device)
    values, index = cosine_max(*arguments)
    found = cosine_max(*arguments, config={**SMALL, "SPLITS": splits})
    torch.testing.assert_close(found[0], values, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_cosines_the_first_counts(dtype, splits, device):
    # few integer directions: each is there many times, and products are exact
    query = torch.randint(-1, 2, (2, 3, 40), device=device).to(dtype)
    support = torch.randint(-1, 2, (2, 3, 100), device=device).to(dtype)
    mask = (torch.rand(2, 100, device=device) < 0.5).float()
    # as many zeros as there are in the definition: masked, no direction, and orthogonal
    support[0] = -support[0].abs()
    query[0] = query[0].abs()
    expected = tiled_cosine_max(query.double(), support.double(), mask.double())
    values, index = cosine_max(query, support, mask, config={**SMALL, "SPLITS": splits})
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(values.double(), expected[0], rtol=1e-6, atol=0)


@triton.jit
def _rounded_by_column(a, b, acc, PRECISION: tl.constexpr):
    column = tl.arange(0, b.shape[1])[None, :].to(tl.float32)
    product = dot(a, b, acc, PRECISION)
    return product + tl.abs(product) * column * 2**-23


@pytest.mark.skipif(not tuning.INTERPRETED, reason="a product of its own needs the interpreter")
def test_positions_are_listed_ones_where_columns_of_equals_are_rounded_apart(monkeypatch):
    monkeypatch.setattr(forward_kernels, "dot", _rounded_by_column)
    query, support, mask = _inputs((2, 5, 40, 11), torch.float32, "cpu")
    index = cosine_max(query, support, mask)[1]
    assert torch.equal(index, tiled_cosine_max(query, support, mask)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_weights_may_be_negative_or_tiny(device):
    query, support, mask = _inputs((1, 6, 20, 30), torch.float32, device)
    mask[0, ::3] *= -1
    mask[0, 1::3] *= 1e-7  # epsilon is of the size of the norms there
    _check(query, support, mask)


@pytest.mark.parametrize("device", DEVICES)
def test_directions_of_norm_zero_have_the_gradient_of_the_definition(device):
    query, support, mask = _inputs((2, 5, 7, 11), torch.float32, device, kind="ones")
    query[:, :, 2] = 0
    support[:, :, 1] = 0
    # the null direction is the maximum where all others point away
    query[:, :, 3:] = query[:, :, 3:].abs()
    support[:, :, 2:] = -support[:, :, 2:].abs()
    support[:, :, 0] = support[:, :, 2]
    values, index = cosine_max(query, support, mask)
    assert (index == 1).any()
    leaves = query.double().requires_grad_(), support.double().requires_grad_()
    reference = reference_cosine_max(*leaves, mask.double())
    expected = torch.autograd.grad(reference.sum(), leaves)
    grad = torch.ones_like(values)
    for found, truth in zip(
        cosine_max_backward(grad, query, support, mask, values, index), expected, strict=True
    ):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_comes_through_and_a_masked_one_does_not(dtype, device):
    query, support, mask = _inputs((2, 5, 7, 11), dtype, device, kind="ones")
    mask[:, 3] = 0
    expected = cosine_max(query, support, mask)
    support[:, :, 3] = torch.nan
    for found, truth in zip(cosine_max(query, support, mask), expected, strict=True):
        assert torch.equal(found, truth)
    for poison in (torch.nan, torch.inf):
        poisoned = query.clone()
        poisoned[0, 1, 4] = poison
        for some_mask in (mask, torch.zeros_like(mask)):
            values = cosine_max(poisoned, support, some_mask)[0]
            assert values.isnan().nonzero().tolist() == [[0, 4]]
    poisoned = support.clone()
    poisoned[1, 0, 5:7] = torch.nan
    values, index = cosine_max(query, poisoned, mask)
    assert values.isnan().all(dim=1).tolist() == [False, True]
    assert index[1].eq(5).all()


@pytest.mark.parametrize("device", DEVICES)
def test_masked_positions_have_no_gradient(device, poisoned_memory):
    query, support, mask = _inputs((2, 5, 7, 11), torch.bfloat16, device)
    mask[:, :6] = 0
    support[:, :, 2] = torch.nan
    grad = torch.ones(2, 7, device=device)
    for some_mask in (mask, torch.zeros_like(mask)):
        values, index = cosine_max(query, support, some_mask)
        gradients = cosine_max_backward(grad, query, support, some_mask, values, index)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[1][:, :, :6].any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5, 7, 11), (2, 5, 0, 11)])
def test_nothing_to_compare(shape, device, poisoned_memory):
    query, support, mask = _inputs(shape, torch.float32, device)
    values, index = cosine_max(query, support, mask)
    assert values.shape == index.shape == (shape[0], shape[2])
    gradients = cosine_max_backward(values, query, support, mask, values, index)
    assert [x.shape for x in gradients] == [query.shape, support.shape]
    assert not gradients[1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_one_support_of_all_queries_and_equal_bits_from_run_to_run(device, poisoned_memory):
    query, support, mask = _inputs((2, 20, 50, 17), torch.bfloat16, device, kind="binary")
    hub = mask[0].nonzero()[1, 0]
    query[0] += 40 * support[0, :, hub, None]
    grad = torch.randn(2, 50, device=device)
    runs = []
    for _ in range(2):
        values, index = cosine_max(query, support, mask)
        gradients = cosine_max_backward(grad, query, support, mask, values, index)
        runs.append((values, index, *gradients))
    assert index[0].eq(hub).all()
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))
    truth = paired_cosine_max_backward(grad, query.float(), support.float(), mask, values, index)
    torch.testing.assert_close(gradients[1].float(), truth[1], rtol=1e-2, atol=1e-4)


def test_every_problem_has_a_key_and_candidates():
    for problems in (forward_kernels.problems, backward_kernels.problems):
        for problem in problems():
            assert problem.key()
            for arch in (80, 90):
                found = problem.candidates(arch)
                assert len(found) == len({tuple(sorted(config.items())) for config in found}) > 4


def test_a_configuration_is_looked_up_by_the_key(monkeypatch):
    sought = []

    def find(kernel, problem):
        sought.append((kernel, problem.key()))
        return problem.candidates(tuning.gpu().arch)[0]

    monkeypatch.setattr(tuning, "find", find)
    arguments = _inputs((1, 4, 5, 6), torch.float16, DEVICES[0])
    values, index = cosine_max(*arguments)
    cosine_max_backward(values, *arguments, values, index)
    key = "16-bit C4 N1024 M1024"
    assert sought == [("cosine_max", key), ("cosine_max_backward", key)]
