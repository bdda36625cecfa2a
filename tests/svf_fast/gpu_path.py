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
from svf_fast.reference import pointwise as definition
from svf_fast.reference import quantize
from svf_fast.reference.activation_gradients import activation_gradients as activation_definition
from svf_fast.reference.affine_act import pack_mask
from svf_fast.reference.guard import guards_hold
from svf_fast.reference.scale_gradient import scale_gradient as scale_definition


@pointwise.with_ends
def defined_pointwise(x, weight, prologue, epilogue):
    out, y = definition.pointwise(x, weight, prologue, epilogue)
    if epilogue.keep:  # out is made of y as it is kept
        assert y.dtype == x.dtype
    out, y = (value.contiguous(memory_format=torch.channels_last) for value in (out, y))
    bits = pack_mask(out) if epilogue.mask else x.new_empty(0, dtype=torch.uint8)
    return out, y if epilogue.keep else x.new_empty(0), bits


def defined_scale_gradient(a, b, scale, shift, left, right, S, grid=None):
    return scale_definition(a, b, left, right, S, scale, shift, grid)


def defined_activation_gradients(grad, y, scale, shift, before, after, grid=None):
    g, *found = activation_definition(grad, y, scale, shift, before, after, grid)
    g = g.contiguous(memory_format=torch.channels_last)
    return g, *(scale.new_empty(0) if dS is None else dS for dS in found)


def defined_compose(U, S, V, groups, dtype, scale):
    W = svd.compose(U, S, V, groups)
    scaled = W.new_empty(0) if scale is None else W * scale.reshape(-1, 1, 1, 1)
    return W.to(dtype), scaled.to(dtype)


def defined_compose_all(U, S, V, groups, scale, dtype, table):
    layers = zip(U, S, V, groups, scale, strict=True)
    return [W for u, s, v, g, c in layers for W in defined_compose(u, s, v, g, dtype, c)]


def defined() -> dict[str, Callable]:
    return {
        "guards_hold": guards_hold,
        "compose": defined_compose,
        "compose_all": defined_compose_all,
        "pointwise": defined_pointwise,
        "pointwise_dot": definition.pointwise_dot,
        "scale_gradient": defined_scale_gradient,
        "activation_gradients": defined_activation_gradients,
        **{name: getattr(quantize, name) for name in ("dequantize", "quantized_backward")},
        "quantize": quantize.quantize,
    }


def interpreted() -> dict[str, Callable]:
    """The Triton kernels, which Triton's interpreter runs on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from svf_fast.triton.activation_gradients import activation_gradients
    from svf_fast.triton.compose import compose, compose_all
    from svf_fast.triton.gram import gram, scale_gradient
    from svf_fast.triton.pointwise import pointwise as kernel
    from svf_fast.triton.pointwise import pointwise_dot
    from svf_fast.triton.quantize import dequantize, quantize, quantized_backward

    products = (activation_gradients, compose, compose_all, gram, scale_gradient, pointwise_dot)
    kernels = (*products, quantize, dequantize, quantized_backward)
    found: dict[str, Callable] = {kernel.__name__: kernel for kernel in kernels}
    return {**found, "pointwise": pointwise.with_ends(kernel), "guards_hold": guards_hold}


@contextlib.contextmanager
def on_gpu(kernels: dict[str, Callable]) -> Iterator[Counter[str]]:
    """Tensors of the CPU take the GPU's path; counts the calls of each op."""
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable) -> Callable:
        def call(*arguments):
            calls[name] += 1
            return kernel(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "on_gpu", lambda x: True)
        patch.setattr(pointwise, "_wins", lambda x, weight, extras: True)
        library = torch.library.Library("svf_fast", "IMPL")
        for name, kernel in kernels.items():
            library.impl(name, counted(name, kernel), "CPU", allow_override=True)
        try:
            yield calls
        finally:
            library._destroy()
