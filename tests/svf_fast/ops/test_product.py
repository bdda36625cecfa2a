"""The CPU's 1×1 convolution of maps as they lie, and its sum into a map that is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from svf_fast import build_info
from svf_fast.ops.convolution import Geometry, convolution
from tests.svf_fast.drawn import maps
from tests.svf_fast.tolerance import accumulated, assert_error_within

product, product_add_ = (
    torch.ops.svf_fast.product.default,
    torch.ops.svf_fast.product_add_.default,
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced"]
# images, channels in and out, height, width: odd, one of each, nothing, no channel that goes in
CASES = [(2, 5, 7, 3, 4), (1, 1, 1, 1, 1), (3, 8, 1, 1, 1), (0, 4, 3, 2, 2), (2, 0, 3, 2, 2)]


def check(got: Tensor, x: Tensor, weight: Tensor, added: Tensor | None = None) -> None:
    def definition(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
        y = torch.einsum("dc,nchw->ndhw", weight, x)
        return y if added is None else y + added

    wide = [None if t is None else t.double() for t in (x, weight, added)]
    terms = [None if t is None else t.abs() for t in wide]
    assert got.dtype == x.dtype
    assert_error_within(
        got,
        definition(x, weight, added),
        definition(*wide),
        magnitude=accumulated(definition(*terms), x.dtype),
        channel_dim=None,
    )


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case, dtype, layout, transposed, poisoned_memory) -> None:
    images, inputs, outputs, *side = case
    x = maps((images, inputs, *side), dtype, layout)
    weight = torch.randn(outputs, inputs, dtype=torch.float64).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    y = product(x, weight)
    check(y, x, weight)
    for own in LAYOUTS[:2]:
        into = maps(tuple(y.shape), dtype, own)
        before = into.clone()
        assert product_add_(into, x, weight) is None
        check(into, x, weight, before)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("images", [1, 3])
def test_sizes_beyond_a_block_at_any_number_of_threads(
    images, dtype, layout, threads, poisoned_memory
) -> None:
    """Of csrc/cpu/packed_product.cpp, whose blocks have 256 terms, 672 rows and 1024 columns."""
    x = maps((images, 257, 31, 41), dtype, layout)
    weight = torch.randn(691, 257, dtype=torch.float64).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = product(x, weight)
        into = maps(tuple(y.shape), dtype, layout)
        added = into.clone()
        product_add_(into, x, weight)
    finally:
        torch.set_num_threads(before)
    check(y, x, weight)
    check(into, x, weight, added)


def test_the_machine_says_how_it_multiplies() -> None:
    facts = build_info()
    expected = "packed" if facts["instruction_set"] == "avx512" and not is_intel() else "BLAS"
    assert facts["matrix_products"] == expected


def is_intel() -> bool:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)


def test_layout_is_that_of_the_convolution() -> None:
    x, weight = torch.randn(2, 6, 5, 4), torch.randn(3, 6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = product(x.contiguous(memory_format=memory_format), weight)
        assert y.is_contiguous(memory_format=memory_format)
        expected = functional.conv2d(x, weight[:, :, None, None])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        asked = convolution(
            x.contiguous(memory_format=memory_format), weight[:, :, None, None], None, Geometry()
        )
        assert torch.equal(asked, y)


def test_opcheck_and_memory_safety() -> None:
    x, weight = torch.randn(2, 6, 5, 4), torch.randn(3, 6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format)
        torch.library.opcheck(product, (given, weight))
        torch.library.opcheck(product_add_, (torch.randn(2, 3, 5, 4), given, weight))
    for bad in ((x, weight[:, :5]), (x[0], weight), (x, weight[0])):
        with pytest.raises(RuntimeError, match=r"x must be \[N, C, H, W\] and weight"):
            product(*bad)
    with pytest.raises(RuntimeError, match="of one dtype"):
        product(x, weight.double())
    for into in (
        torch.randn(2, 3, 5, 5),
        torch.randn(2, 3, 10, 4)[:, :, ::2],
        torch.randn(2, 3, 5),
    ):
        with pytest.raises(RuntimeError, match="out must be dense"):
            product_add_(into, x, weight)
