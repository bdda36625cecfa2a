"""The GPU's path through the blocks, on CPU tensors: its choices, and its kernels interpreted."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from svf_fast import svd
from svf_fast.ops import maps, pointwise
from svf_fast.reference import gram as gram_definition
from svf_fast.reference import pointwise as definition
from svf_fast.reference.affine_act import pack_mask


def defined_pointwise(x, weight, *arguments):
    *rest, keep, mask = arguments
    out, y = definition.pointwise(x, weight, *rest)
    if keep:  # out is made of y as it is kept
        assert y.dtype == x.dtype
    out, y = (value.contiguous(memory_format=torch.channels_last) for value in (out, y))
    bits = pack_mask(out) if mask else x.new_empty(0, dtype=torch.uint8)
    return out, y if keep else x.new_empty(0), bits


def defined_activation_grams(grad, y, scale, shift, before, after):
    g, M_before, M_after = gram_definition.activation_grams(grad, y, scale, shift)
    nothing = scale.new_empty(0)
    g = g.contiguous(memory_format=torch.channels_last)
    return g, M_before if before else nothing, M_after if after else nothing


def defined_compose(U, S, V, groups, dtype):
    return svd.compose(U, S, V, groups).to(dtype)


def defined() -> dict[str, Callable]:
    return {
        "compose": defined_compose,
        "pointwise": defined_pointwise,
        "pointwise_dot": definition.pointwise_dot,
        "activation_grams": defined_activation_grams,
    }


def interpreted() -> dict[str, Callable]:
    """The Triton kernels, which Triton's interpreter runs on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from svf_fast.triton.activation_grams import activation_grams
    from svf_fast.triton.compose import compose
    from svf_fast.triton.gram import gram
    from svf_fast.triton.pointwise import pointwise, pointwise_dot

    kernels = (activation_grams, compose, gram, pointwise, pointwise_dot)
    return {kernel.__name__: kernel for kernel in kernels}


@contextlib.contextmanager
def on_gpu(kernels: dict[str, Callable]) -> Iterator[Counter[str]]:
    """Tensors of the CPU take the GPU's path; counts the calls of each op."""
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable) -> Callable:
        def call(*arguments):
            if name != "compose":  # once per change of S
                calls[name] += 1
            return kernel(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "on_gpu", lambda x: True)
        patch.setattr(pointwise, "_wins", lambda x, weight, ends: True)
        library = torch.library.Library("svf_fast", "IMPL")
        for name, kernel in kernels.items():
            library.impl(name, counted(name, kernel), "CPU", allow_override=True)
        try:
            yield calls
        finally:
            library._destroy()
