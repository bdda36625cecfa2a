"""A chain of SVF convolutions, each with frozen batch norm and ReLU, and a shortcut: one node.

A bottleneck keeps y1 and y2, the outputs of its first two convolutions, and one bit per element
of its last ReLU. x2 and x3 are ``relu(bn(y1))`` and ``relu(bn(y2))``, rebuilt when they are read;
the Gram matrices of conv1 and conv2 need y1 and y2, that of conv3 needs x3; x is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svf_fast.ops.affine_act import (
    affine_act,
    affine_act_,
    affine_act_backward,
    affine_act_backward_,
)
from svf_fast.ops.convolution import Geometry
from svf_fast.ops.svf_conv2d import Activation, Factors, memory_format, no_autocast, saved


class Stage(NamedTuple):
    """A convolution and the affine map ``y·scale_c + shift_c`` of the batch norm that follows.

    scale, shift [Co]: in float32, float64 for float64 maps.
    """

    factors: Factors
    scale: Tensor
    shift: Tensor


class Form(NamedTuple):
    """What of a block is not a tensor.

    convolutions: geometry and strategy of each stage, that of the shortcut last if it has one.
    shortcut: what is added before the last ReLU: "" (nothing), "identity" (x), "given" (a map), or
        "convolution" (a stage of its own).
    relu: whether a ReLU ends it. Between the stages there always is one.
    recompute: y of the second stage is not kept but computed again from the first's.
    """

    convolutions: tuple[tuple[Geometry, str], ...]
    shortcut: str
    relu: bool
    recompute: bool


def block(
    x: Tensor,
    stages: Sequence[Stage],
    shortcut: Stage | str = "",
    shortcut_x: Tensor | None = None,
    relu: bool = True,
    recompute: bool = False,
) -> Tensor:
    """``relu(stage_n(… relu(stage_1(x))) + shortcut)``, differentiable in x and every S.

    x [N, C, H, W] in one dtype with the weights. The shortcut is a stage applied to ``shortcut_x``
    (x where None), or "identity" (x itself), "given" (``shortcut_x`` itself), or "" (nothing). With
    ``recompute`` (two stages at least) the second convolution runs again in the backward pass
    instead of being kept.
    Definition: :func:`svf_fast.reference.block.block`.
    """
    if isinstance(shortcut, str) and shortcut not in ("", "identity", "given"):
        raise ValueError(f"shortcut: expected a stage, '', 'identity' or 'given', got {shortcut!r}")
    if (shortcut == "given" and shortcut_x is None) or (
        shortcut in ("", "identity") and shortcut_x is not None
    ):
        raise ValueError(f"shortcut_x: expected a map for 'given' and none for {shortcut!r}")
    every = [*stages, *([] if isinstance(shortcut, str) else [shortcut])]
    kind = shortcut if isinstance(shortcut, str) else "convolution"
    form = Form(
        tuple((stage.factors.geometry, stage.factors.strategy) for stage in every),
        kind,
        relu,
        recompute and len(stages) > 1,
    )
    tensors = [t for stage in every for t in (*stage.factors[:6], stage.scale, stage.shift)]
    return _Block.apply(x, shortcut_x, form, *tensors)


_CONSTANTS = 5  # weight, tail, dual, scale, shift
_FACTORS = 3  # S, U, V


def _stages(form: Form, tensors: Sequence[Any]) -> tuple[list[Stage], Stage | None]:
    """The stages, and that of the shortcut, of the tensors as :func:`block` lays them out."""
    stages, size = [], _FACTORS + _CONSTANTS
    for index, (geometry, strategy) in enumerate(form.convolutions):
        S, U, V, weight, tail, dual, scale, shift = tensors[size * index : size * (index + 1)]
        factors = Factors(S, U, V, weight, tail, dual, geometry, strategy)
        stages.append(Stage(factors, scale, shift))
    return (stages[:-1], stages[-1]) if form.shortcut == "convolution" else (stages, None)


class _Kept(NamedTuple):
    """What a stage leaves for the backward pass, all of it derived from the form."""

    y: bool  # read by its own Gram matrix, or to rebuild the next stage's input
    mask: bool  # the sign of what its ReLU got, where it cannot be computed from y
    again: bool  # y and v are computed a second time instead

    @classmethod
    def of(cls, form: Form, stages: Sequence[Stage], index: int) -> _Kept:
        y = stages[index].factors.keeps == "y"
        again = form.recompute and index == 1
        if index == len(stages) - 1:
            return cls(y, form.relu and (form.shortcut != "" or not y), again)
        feeds_again = form.recompute and index == 0
        y = y or feeds_again or stages[index + 1].factors.keeps == "x"
        return cls(y, not y, again)


class _Maps(NamedTuple):
    """What a stage left: v, y and the mask as far as :class:`_Kept` says so."""

    v: Tensor | None
    y: Tensor | None
    mask: Tensor | None

    def activation(self, stage: Stage) -> Activation:
        """relu(bn(y)) of its stage, which the next one reads."""
        assert self.y is not None
        return Activation(self.y, stage.scale, stage.shift)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shortcut_x, form, *tensors):
        stages, shortcut = _stages(form, tensors)
        sources, shapes, formats, kept = [], [], [], []  # kept: v, y and mask of each stage

        residual, residual_scale = (x if form.shortcut == "identity" else shortcut_x), None
        if shortcut is not None:
            source = shortcut.factors.sampled(x if shortcut_x is None else shortcut_x)
            residual, v = shortcut.factors.forward(source)
            residual_scale = shortcut.scale
            sources.append(source if shortcut.factors.keeps == "x" else None)
            kept += [v, residual if shortcut.factors.keeps == "y" else None, None]

        h = x
        for index, (factors, scale, shift) in enumerate(stages):
            keep, last = _Kept.of(form, stages, index), index == len(stages) - 1
            shapes.append(h.shape)
            h = factors.sampled(h)
            if index == 0:
                sources.append(h if factors.keeps == "x" else None)
            y, v = factors.forward(h)
            added: tuple[Tensor | None, Tensor | None] = (None, None)
            if last:
                shift = shift if shortcut is None else shift + shortcut.shift
                added = (residual, residual_scale)
            relu = form.relu or not last
            keeps_y = keep.y and not keep.again
            if keeps_y:
                h, mask = affine_act(y, scale, shift, *added, relu, keep.mask)
            else:  # y is this node's own and read by nobody else
                mask = affine_act_(y, scale, shift, *added, relu, keep.mask)
                h = y
            formats.append(memory_format(h))
            kept += [
                None if keep.again else v,
                y if keeps_y else None,
                mask if keep.mask else None,
            ]

        size = _FACTORS + _CONSTANTS
        SUV = [t for at in range(0, len(tensors), size) for t in tensors[at : at + _FACTORS]]
        ctx.save_for_backward(*sources, *kept, *SUV)
        ctx.constants = tuple(
            t for at in range(0, len(tensors), size) for t in tensors[at + _FACTORS : at + size]
        )
        ctx.form, ctx.shapes, ctx.formats = form, tuple(shapes), tuple(formats)
        ctx.shortcut_shape = None if shortcut_x is None else shortcut_x.shape
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with no_autocast(grad):
            return _backward(ctx, grad)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    form, count = ctx.form, len(ctx.form.convolutions)
    tensors = saved(ctx, "fused block")
    sources = tensors[: 2 if form.shortcut == "convolution" else 1]
    rest = tensors[len(sources) :]
    kept = [_Maps(*rest[3 * index : 3 * index + 3]) for index in range(count)]
    every: list[Any] = []
    for index in range(count):
        every += rest[3 * count + _FACTORS * index :][:_FACTORS]
        every += ctx.constants[_CONSTANTS * index :][:_CONSTANTS]
    stages, shortcut = _stages(form, every)
    if shortcut is not None:
        shortcut_kept, *kept = kept
    if form.recompute:
        kept[1] = _again(stages, kept)

    # masks are in the memory order of what left a stage; a gradient may have taken another
    grad = grad.contiguous(memory_format=ctx.formats[-1])
    total = _through_relu(grad, stages[-1], kept[-1], form)
    arriving, scaled = total, form.relu and not form.shortcut
    grads_S: list[Tensor | None] = []
    for index in reversed(range(len(stages))):
        factors, scale, _ = stages[index]
        if not scaled and not factors.samples:
            arriving, scaled = _scale(arriving, scale), True
        into = None
        if index == 0 and form.shortcut == "identity" and form.relu:
            into = total  # a map of this node's own
        grad_x, grad_S = factors.backward(
            arriving,
            ctx.shapes[index],
            _input(stages, kept, index, sources[-1]),
            kept[index].v,
            kept[index].y,
            index > 0 or ctx.needs_input_grad[0],
            None if scaled else scale,
            into,
        )
        grads_S.insert(0, grad_S)
        if index > 0:
            assert grad_x is not None
            before = stages[index - 1]  # whose ReLU's gradient takes the place of grad_x
            arriving = grad_x.contiguous(memory_format=ctx.formats[index - 1])
            arriving = _through(arriving, before, kept[index - 1], affine_act_backward_)
            scaled = True
    if form.shortcut == "identity" and not form.relu and grad_x is not None:
        grad_x = grad_x + total

    grad_shortcut_x = total if form.shortcut == "given" else None
    if shortcut is not None:
        own = ctx.shortcut_shape is not None
        factors = shortcut.factors
        grad_shortcut_x, grad_S = factors.backward(
            total if factors.samples else _scale(total, shortcut.scale),
            ctx.shortcut_shape if own else ctx.shapes[0],
            None if sources[0] is None else Activation(sources[0]),
            shortcut_kept.v,
            shortcut_kept.y,
            ctx.needs_input_grad[1 if own else 0],
            shortcut.scale if factors.samples else None,
            None if own else grad_x,
        )
        grads_S.append(grad_S)
        if not own:
            grad_x, grad_shortcut_x = grad_shortcut_x, None
    grads = [g for grad_S in grads_S for g in (grad_S, *[None] * (_FACTORS + _CONSTANTS - 1))]
    return grad_x, grad_shortcut_x, None, *grads


def _through_relu(grad: Tensor, last: Stage, kept: _Maps, form: Form) -> Tensor:
    """The gradient of the sum before the last ReLU; of y itself where nothing is added."""
    if not form.relu:
        return grad
    if form.shortcut:
        return affine_act_backward(grad, mask=kept.mask)
    return _through(grad, last, kept)


def _through(
    grad: Tensor,
    stage: Stage,
    kept: _Maps,
    backward: Callable[..., Tensor] = affine_act_backward,
) -> Tensor:
    """From the gradient of a stage's ReLU to that of its y."""
    if kept.mask is not None:
        return backward(grad, mask=kept.mask, scale=stage.scale)
    return backward(grad, y=kept.y, scale=stage.scale, shift=stage.shift)


def _scale(grad: Tensor, scale: Tensor) -> Tensor:
    return affine_act(grad, scale, torch.zeros_like(scale), relu=False)[0]


def _again(stages: Sequence[Stage], kept: Sequence[_Maps]) -> _Maps:
    """The maps of the second stage, v and y computed from y of the first."""
    factors = stages[1].factors
    y, v = factors.forward(factors.sampled(kept[0].activation(stages[0]).tensor()))
    return _Maps(v, y, kept[1].mask)


def _input(
    stages: Sequence[Stage], kept: Sequence[_Maps], index: int, x: Tensor | None
) -> Activation | None:
    """The input of a stage whose gradient of S reads it."""
    factors = stages[index].factors
    if factors.keeps != "x":
        return None
    if index == 0:
        return None if x is None else Activation(x)
    activation = kept[index - 1].activation(stages[index - 1])
    if factors.geometry.stride == (1, 1) or not factors.samples:
        return activation
    return Activation(factors.sampled(activation.tensor()))
