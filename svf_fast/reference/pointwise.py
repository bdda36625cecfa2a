"""Definitions of the 1×1 convolution with what surrounds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svf_fast.reference.affine_act import affine_act, unpack_mask
from svf_fast.reference.channel_dot import channel_dot_scale_


class Prologue(NamedTuple):
    """How x is read: ``relu(x·scale + shift)``, or x where ``mask`` has a bit, or x itself.

    scale, shift [C]; mask: the bits of x as :func:`svf_fast.reference.affine_act.pack_mask` has
    them.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    mask: Tensor | None = None


class Epilogue(NamedTuple):
    """What becomes of y: ``relu?(y·scale + shift + residual'·residual_scale)``.

    scale, shift, residual_scale [D]; residual [N, D, *spatial], residual' is that where
    ``residual_mask`` has a bit. keep, mask: whether y and the bits of out are wanted too.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    residual_scale: Tensor | None = None
    residual_mask: Tensor | None = None
    relu: bool = False
    keep: bool = False
    mask: bool = False


PLAIN_INPUT, PLAIN_OUTPUT = Prologue(), Epilogue()


def pointwise(
    x: Tensor, weight: Tensor, prologue: Prologue = PLAIN_INPUT, epilogue: Epilogue = PLAIN_OUTPUT
) -> tuple[Tensor, Tensor]:
    """Compute ``y_p = weight x'_p``, with x' what the prologue makes of x, and the epilogue of y.

    x [N, C, *spatial], weight [D, C] -> out, y [N, D, *spatial] in the dtype of x, whether or not
    ``keep`` is set.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if prologue.scale is not None and prologue.shift is not None:
        x = affine_act(x, prologue.scale, prologue.shift)
    if prologue.mask is not None:
        x = torch.where(unpack_mask(prologue.mask, x), x, 0)
    y = torch.einsum("dc,nc...->nd...", weight.to(dtype), x.to(dtype)).to(x.dtype)
    residual = epilogue.residual
    if residual is not None and epilogue.residual_mask is not None:
        residual = torch.where(unpack_mask(epilogue.residual_mask, residual), residual, 0)
    ones = torch.ones(len(weight), dtype=dtype, device=x.device)
    scale = ones if epilogue.scale is None else epilogue.scale
    shift = 0 * ones if epilogue.shift is None else epilogue.shift
    return affine_act(y, scale, shift, residual, epilogue.residual_scale, epilogue.relu), y


def pointwise_dot(x: Tensor, weight: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``a_p = weight x_p`` -> ``a·s`` per channel and ``dot_d = Σ_p a_pd v_pd``.

    x [N, C, *spatial], weight [D, C], v [N, D, *spatial], s [D] -> [N, D, *spatial], [D].
    """
    a, _ = pointwise(x, weight)
    dot = channel_dot_scale_(a, v, s)
    return a, dot
