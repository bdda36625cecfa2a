"""cosine_max against its definition: values, choice among equals, gradients, memory."""

import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import svf_fast.ops.cosine_max as module
from svf_fast import cosine_max
from svf_fast.ops.cosine_max import paired_cosine_max_backward, tiled_cosine_max
from svf_fast.reference.cosine_max import cosine_max as reference_cosine_max
from tests.svf_fast.tolerance import accumulated, assert_error_within

raw = torch.ops.svf_fast
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced"]
MASKS = ["ones", "binary", "fractional", "zeros"]

# Odd sizes; fewer positions than a vector has lanes, and more than a tile of 1024; one channel, no
# channel, and more than a unit of work has.
SHAPES = [
    (2, 5, 7, 11),
    (1, 1, 3, 1),
    (1, 130, 65, 33),
    (2, 3, 1030, 19),
    (1, 4, 17, 2100),
    (1, 0, 3, 4),
]


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
        tiled = tiled_cosine_max(query, support, mask)[0]
    expected = reference_cosine_max(query.double(), support.double(), mask.double())
    assert similarity.dtype == tiled.dtype == torch.float32
    torch.testing.assert_close(tiled.double(), expected, rtol=1e-5, atol=1e-6)
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


def _laid_out(x, layout):
    if layout == "channels_last":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return x.repeat_interleave(2, dim=2)[:, :, ::2]
    return x


def _mask(kind, batch, supports):
    if kind == "ones":
        return torch.ones(batch, supports)
    if kind == "zeros":
        return torch.zeros(batch, supports)
    mask = torch.rand(batch, supports)
    mask[mask < 0.4] = 0
    return mask.ceil() if kind == "binary" else mask


def _cosine_of_pairs(query, support, mask, index, flat_norms=False):
    """The definition where the maximum is known to be at `index`."""
    weight = mask.gather(1, index).unsqueeze(1)
    chosen = support.gather(2, index.unsqueeze(1).expand_as(query)) * weight
    norms = query.norm(dim=1) * chosen.norm(dim=1)
    if flat_norms:
        norms = norms.detach()
    return (query * chosen).sum(dim=1) / (norms + 1e-7)


def _check(forward, backward, query, support, mask):
    """Values against the definition; gradients against those of the pairs that were chosen."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = mask.to(dtype)
    values, index = forward(query, support, mask)
    arguments = [x.to(dtype) for x in (query, support, mask)]
    exact = [x.double() for x in arguments]
    truth = reference_cosine_max(*exact)
    assert values.dtype == dtype
    # a sum of products, whatever it cancels to, is rounded at the size of its terms
    magnitude = accumulated(torch.maximum(truth.abs(), torch.tensor(1.0)), dtype)
    comparison = {"magnitude": magnitude, "dtype": dtype, "channel_dim": None}
    assert_error_within(values, reference_cosine_max(*arguments), truth, **comparison)
    at_index = _cosine_of_pairs(*exact, index)
    assert_error_within(at_index, at_index, truth, name="cosine at index", **comparison)

    grad = torch.randn(values.shape).to(dtype)
    gradients = backward(grad, query, support, mask, values, index)
    pairs = []
    for inputs, flat_norms in ((arguments, False), (exact, False), (exact, True)):
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]
        cosine = _cosine_of_pairs(*leaves, inputs[2], index, flat_norms)
        pairs.append(torch.autograd.grad(cosine, leaves, grad.to(cosine.dtype)))
    names = "gradient of the query", "gradient of the support"
    for name, actual, reference, truth, terms in zip(names, gradients, *pairs):
        assert actual.dtype == query.dtype
        # two terms that cancel, wholly where there is one channel
        magnitude = accumulated(torch.maximum(truth.abs(), terms.abs()), dtype)
        reference = reference.to(query.dtype)
        assert_error_within(
            actual, reference, truth, magnitude=magnitude, channel_dim=None, name=name
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, dtype, layout, mask, poisoned_memory):
    batch, channels, queries, supports = shape
    query = _laid_out(torch.randn(batch, channels, queries), layout).to(dtype)
    support = _laid_out(torch.randn(batch, channels, supports), layout).to(dtype)
    mask = _mask(mask, batch, supports)
    _check(raw.cosine_max, raw.cosine_max_backward, query, support, mask)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_maps_of_different_layouts(left, right):
    query, support, mask = _inputs(dtype=torch.float32)
    arguments = _laid_out(query, left), _laid_out(support, right), mask
    _check(raw.cosine_max, raw.cosine_max_backward, *arguments)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_devices_without_a_kernel_compute_the_definition_by_tiles(dtype, mask):
    query, support = torch.randn(2, 6, 1100).to(dtype), torch.randn(2, 6, 31).to(dtype)
    _check(tiled_cosine_max, paired_cosine_max_backward, query, support, _mask(mask, 2, 31))


@pytest.mark.parametrize("forward", [raw.cosine_max, tiled_cosine_max])
@pytest.mark.parametrize("seed", range(8))
def test_of_equal_cosines_the_first_counts(forward, seed):
    # few integer directions: each is there many times, and products are exact
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-1, 2, (2, 3, 300), generator=generator).double()
    support = torch.randint(-1, 2, (2, 3, 1500), generator=generator).double()
    mask = (torch.rand(2, 1500, generator=generator) < 0.5).double()
    # as many zeros as there are in the definition: masked, no direction, and orthogonal
    support[0] = -support[0].abs()
    query[0] = query[0].abs()
    masked = support * mask.unsqueeze(1)
    norms = query.norm(dim=1).unsqueeze(2) * masked.norm(dim=1).unsqueeze(1)
    expected = (query.mT @ masked / (norms + 1e-7)).max(dim=2)
    values, index = forward(query, support, mask)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(values, expected.values, rtol=1e-14, atol=0)


def test_directions_of_norm_zero_have_the_gradient_of_the_definition():
    query, support, mask = _inputs()
    query[:, :, 2] = 0
    support[:, :, 1] = 0
    # the null direction is the maximum where all others point away
    query[:, :, 3:] = query[:, :, 3:].abs()
    support[:, :, 2:] = -support[:, :, 2:].abs()
    support[:, :, 0] = support[:, :, 2]
    arguments = query.requires_grad_(), support.requires_grad_()
    weights = torch.randn(2, 7, dtype=torch.float64)
    expected, actual = (
        torch.autograd.grad((function(query, support, mask) * weights).sum(), arguments)
        for function in (reference_cosine_max, cosine_max)
    )
    assert expected[1][:, :, 1].any()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_nan_comes_through_and_a_masked_one_does_not():
    query, support, mask = _inputs()
    mask[:, 3] = 0
    expected = cosine_max(query, support, mask)
    support[:, :, 3] = torch.nan
    for forward in (raw.cosine_max, tiled_cosine_max):
        assert torch.equal(cosine_max(query, support, mask), expected)
        nan_query = query.clone()
        nan_query[0, 1, 4] = torch.nan
        for some_mask in (mask, torch.zeros_like(mask)):
            found = forward(nan_query, support, some_mask)[0].isnan()
            assert found.nonzero().tolist() == [[0, 4]]
        nan_support = support.clone()
        nan_support[1, 0, 5] = torch.nan
        values, index = forward(query, nan_support, mask)
        assert values.isnan().all(dim=1).tolist() == [False, True]
        assert index[1].eq(5).all()


def test_a_masked_nan_gets_no_gradient():
    query, support, mask = _inputs()
    mask[:, :6] = 0
    support[:, :, 2] = torch.nan
    arguments = query.requires_grad_(), support.requires_grad_()
    for gradient in torch.autograd.grad(cosine_max(query, support, mask).sum(), arguments):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("share", (1.0, 0.3), ids=("all support positions", "a few"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_its_arguments_and_a_few_bytes_per_position(dtype, share):
    """Of the support only the positions that are the nearest to a query's, where these are few."""
    query = torch.randn(2, 40, 1500).to(dtype).requires_grad_()
    support = torch.randn(2, 40, 700).to(dtype).requires_grad_()
    mask = torch.rand(2, 700) < share
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = cosine_max(query, support, mask)
    assert kept.pop(query.data_ptr())
    size, positions, columns = out.element_size(), 700, 0
    if share == 1.0:
        assert kept.pop(support.data_ptr())
    else:
        index = torch.ops.svf_fast.cosine_max(query, support, mask.to(out.dtype))[1]
        positions = max(len(each.unique()) for each in index)
        assert positions <= mask.sum(dim=1).max() < 350
        columns = positions * (8 + 40 * support.element_size())
    assert sum(kept.values()) == 2 * (1500 * (size + 8) + positions * size + columns)


def test_a_support_that_is_kept_anyway_is_not_copied():
    """As the output of a ReLU is, seen through views; that of a convolution is not."""
    mask = torch.zeros(1, 300)
    mask[:, :5] = 1
    query = torch.randn(1, 20, 300).requires_grad_()
    for make, copied in ((torch.relu, False), (lambda x: 2 * x, True)):
        support = make(torch.randn(1, 2, 20, 15, 20).requires_grad_())[:, 1].flatten(2)
        kept = set()

        def pack(x, kept=kept):
            kept.add(x.data_ptr())
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            cosine_max(query, support, mask)
        assert (support.data_ptr() not in kept) == copied


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_from_the_nearest_alone(monkeypatch, dtype, layout):
    """As from the whole support, to the bit; each image of the batch has another number of them."""
    query, support = torch.randn(2, 3, 20, 300).to(dtype)
    if layout == "channels_last":
        query, support = (x.mT.contiguous().mT for x in (query, support))
    mask = torch.zeros(3, 300)
    mask[0, 40:45], mask[1, 100:200] = 1, torch.rand(100)  # and none of the third
    found = []
    for nearest in (module._nearest, lambda support, index: None):
        monkeypatch.setattr(module, "_nearest", nearest)
        leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in (query, support)]
        out = cosine_max(*(x.requires_grad_() for x in leaves), mask)
        grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
        found.append(torch.autograd.grad(out, leaves, grad))
    for mine, whole in zip(*found, strict=True):
        assert torch.equal(mine, whole) and mine.stride() == whole.stride()
    assert found[0][1][0].ne(0).any(dim=0).sum() <= 5


def test_is_deterministic():
    query, support, mask = torch.randn(1, 40, 1500), torch.randn(1, 40, 1300), torch.rand(1, 1300)
    values, index = raw.cosine_max(query, support, mask)
    again = raw.cosine_max(query, support, mask)
    assert torch.equal(values, again[0]) and torch.equal(index, again[1])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for maps in (
                (query, support),
                (_laid_out(x, "channels_last") for x in (query, support)),
            ):
                results.append(raw.cosine_max_backward(values, *maps, mask, values, index))
    finally:
        torch.set_num_threads(threads)
    for result in results[2:]:
        for left, right in zip(result, results[0], strict=True):
            torch.testing.assert_close(left, right)
    for result in results[2::2]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    arguments = [
        (*(x.to(dtype) for x in _inputs(2, 67, 70, 35, seed=3)[:2]), layout)
        for dtype in DTYPES
        for layout in LAYOUTS[:2]
    ]
    inputs = [(_laid_out(q, layout), _laid_out(s, layout)) for q, s, layout in arguments]
    mask = _mask("fractional", 2, 35)
    torch.save((inputs, mask), tmp_path / "inputs.pt")
    script = (
        "import sys, torch, svf_fast\n"
        "raw = torch.ops.svf_fast\n"
        "inputs, mask = torch.load(sys.argv[1] + '/inputs.pt')\n"
        "results = []\n"
        "for q, s in inputs:\n"
        "    m = mask.to(torch.promote_types(q.dtype, torch.float32))\n"
        "    v, i = raw.cosine_max(q, s, m)\n"
        "    results.append((v, i, *raw.cosine_max_backward(v, q, s, m, v, i)))\n"
        "torch.save(results, sys.argv[1] + '/results.pt')\n"
        "print(svf_fast.build_info()['instruction_set'])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "avx512" not in done.stdout
    for (query, support), found in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        weights = mask.to(found[0].dtype)
        values, index = raw.cosine_max(query, support, weights)
        gradients = raw.cosine_max_backward(values, query, support, weights, values, index)
        torch.testing.assert_close(found, (values, index, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(dtype, layout):
    query, support, mask = _inputs(dtype=torch.float32)
    query, support = _laid_out(query, layout).to(dtype), support.to(dtype)
    torch.library.opcheck(raw.cosine_max.default, (query, support, mask))
    values, index = raw.cosine_max(query, support, mask)
    arguments = (values, query, support, mask, values, index)
    torch.library.opcheck(raw.cosine_max_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_as_one_graph(layout):
    query, support, mask = _inputs(dtype=torch.float32)
    leaves = [_laid_out(x, layout).detach().requires_grad_() for x in (query, support)]

    def prior(query, support, mask):
        return cosine_max(query * 2, support, mask > 0.3).square()

    compiled = torch.compile(prior, fullgraph=True)
    expected, actual = prior(*leaves, mask), compiled(*leaves, mask)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(out.sum(), leaves) for out in (actual, expected))
    torch.testing.assert_close(*gradients)


def test_no_second_derivative():
    query, support, mask = _inputs()
    query.requires_grad_()
    loss = cosine_max(query, support, mask).square().sum()
    with pytest.raises(RuntimeError, match="cosine_max: expected .* without create_graph=True"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_transforms_and_tangents_are_refused_or_right():
    query, support, mask = (torch.stack([x, x.flip(0)]) for x in _inputs())
    mapped = torch.func.vmap(cosine_max)(query, support, mask)
    assert torch.equal(mapped, torch.stack([cosine_max(*x) for x in zip(query, support, mask)]))

    def prior(x):
        return cosine_max(x, support[0], mask[0])

    for transformed in (
        lambda: torch.func.grad(lambda x: prior(x).sum())(query[0]),
        lambda: torch.func.jvp(prior, (query[0],), (query[0],)),
        lambda: torch.func.jacrev(prior)(query[0]),
        lambda: torch.autograd.functional.jacobian(prior, query[0], vectorize=True),
    ):
        with pytest.raises(RuntimeError, match="cosine_max: expected no transform of torch.func"):
            transformed()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        prior(torch.autograd.forward_ad.make_dual(query[0], query[0]))


def test_memory_is_safe_behind_the_python_checks():
    query, support, mask = _inputs(dtype=torch.float32)
    values, index = raw.cosine_max(query, support, mask)
    with pytest.raises(RuntimeError, match="differ in shape"):
        raw.cosine_max(query, support, mask[:, :7])
    with pytest.raises(RuntimeError, match="differ in dtype"):
        raw.cosine_max(query, support.double(), mask)
    with pytest.raises(RuntimeError, match="mask must be float32"):
        raw.cosine_max(query, support, mask.half())
    with pytest.raises(RuntimeError, match="no support position"):
        raw.cosine_max(query, support[:, :, :0], mask[:, :0])
    with pytest.raises(RuntimeError, match="index out of range"):
        raw.cosine_max_backward(values, query, support, mask, values, index + 11)
    with pytest.raises(RuntimeError, match=r"must be \[B, N\]"):
        raw.cosine_max_backward(values[:, :2], query, support, mask, values, index)
    with pytest.raises(RuntimeError, match="index int64"):
        raw.cosine_max_backward(values, query, support, mask, values, index.int())


QUERY, SUPPORT, MASK = torch.zeros(2, 5, 7), torch.zeros(2, 5, 11), torch.ones(2, 11)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([[0.0]], SUPPORT, MASK), TypeError, "query: expected a tensor, got list"),
        ((QUERY.long(), SUPPORT, MASK), TypeError, "query: .*floating-point.*got torch.int64"),
        ((QUERY.to(torch.float8_e5m2), SUPPORT, MASK), TypeError, "query: .*got torch.float8_e5m2"),
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
