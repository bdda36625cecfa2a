"""A chain of SVF convolutions, each with frozen batch norm and ReLU, and a shortcut: one node.

A bottleneck keeps y1 and y2, the outputs of its first two convolutions, and one bit per element
of its last ReLU. x2 and x3 are ``relu(bn(y1))`` and ``relu(bn(y2))``, rebuilt when they are read;
the Gram matrices of conv1 and conv2 need y1 and y2, that of conv3 needs x3; x is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from svf_fast.ops.convolution import Geometry, convolution
from svf_fast.ops.gram import activation_grams
from svf_fast.ops.pointwise import fuses, pointwise
from svf_fast.ops.svf_conv2d import (
    Activation,
    Factors,
    Gradient,
    memory_format,
    no_autocast,
    saved,
)


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


def _ends(form: Form, stages: Sequence[Stage], index: int) -> list[str]:
    """What follows a stage's product, as :func:`svf_fast.ops.pointwise.fuses` names it."""
    keep = _Kept.of(form, stages, index)
    adds = index == len(stages) - 1 and form.shortcut != ""
    names = {"scale": True, "residual": adds, "keep": _keeps_y(keep), "mask": keep.mask}
    return [name for name, wanted in names.items() if wanted]


def _keeps_y(keep: _Kept) -> bool:
    return keep.y and not keep.again


def _forward(
    form: Form,
    stages: Sequence[Stage],
    index: int,
    h: Activation,
    residual: Tensor | None,
    residual_scale: Tensor | None,
) -> tuple[Activation, _Maps]:
    """What the next stage reads, and what of this one is kept; the last one adds the residual."""
    factors, scale, shift = stages[index]
    keep, ends = _Kept.of(form, stages, index), _ends(form, stages, index)
    relu = form.relu or index < len(stages) - 1
    read, weight, geometry, v = factors.last(h)
    guards = v is None and factors.tail is not None
    if fuses(read.y, weight, geometry, *([] if read.scale is None else ["in_scale"]), *ends):
        out, y, mask = pointwise(
            read.y,
            weight.flatten(1),
            in_scale=read.scale,
            in_shift=read.shift,
            scale=scale,
            shift=shift,
            residual=residual,
            residual_scale=residual_scale,
            relu=relu,
            keep=_keeps_y(keep),
            mask=keep.mask,
        )
        v = factors.guarded(h.tensor()) if guards and not factors.samples else v
    else:
        x = read.tensor()
        y = convolution(x, weight, None, geometry)
        v = factors.guarded(x) if guards else v
        if _keeps_y(keep) and _rebuilds(form, stages, index + 1, y):
            return Activation(y, scale, shift), _Maps(v, y, None)
        if _keeps_y(keep):
            out, mask = affine_act(y, scale, shift, residual, residual_scale, relu, keep.mask)
        else:  # y is this node's own and read by nobody else
            mask = affine_act_(y, scale, shift, residual, residual_scale, relu, keep.mask)
            out = y
    kept = y if _keeps_y(keep) else None
    return Activation(out), _Maps(None if keep.again else v, kept, mask if keep.mask else None)


def _rebuilds(form: Form, stages: Sequence[Stage], index: int, y: Tensor) -> bool:
    """Whether a stage rebuilds its input from the y before as it reads it."""
    if index == len(stages):
        return False
    factors = stages[index].factors
    if factors.weight is None:
        return False
    ends = _ends(form, stages, index)
    return fuses(y, factors.weight, factors.geometry, "in_scale", *ends)


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

        h = Activation(x)
        if shortcut is not None:
            stages[-1] = stages[-1]._replace(shift=stages[-1].shift + shortcut.shift)
        for index, stage in enumerate(stages):
            shapes.append(h.y.shape)
            if stage.factors.samples and stage.factors.geometry.stride != (1, 1):
                h = Activation(stage.factors.sampled(h.tensor()))
            if index == 0:
                sources.append(h.y if stage.factors.keeps == "x" else None)
            added: tuple[Tensor | None, Tensor | None] = (None, None)
            if index == len(stages) - 1:
                added = (residual, residual_scale)
            h, maps = _forward(form, stages, index, h, *added)
            formats.append(memory_format(h.y))
            kept += maps

        size = _FACTORS + _CONSTANTS
        SUV = [t for at in range(0, len(tensors), size) for t in tensors[at : at + _FACTORS]]
        ctx.save_for_backward(*sources, *kept, *SUV)
        ctx.constants = tuple(
            t for at in range(0, len(tensors), size) for t in tensors[at + _FACTORS : at + size]
        )
        ctx.form, ctx.shapes, ctx.formats = form, tuple(shapes), tuple(formats)
        ctx.shortcut_shape = None if shortcut_x is None else shortcut_x.shape
        return h.y

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
    total = Gradient(grad, kept[-1].mask if form.relu and form.shortcut else None)
    arriving, scaled = total, False
    if form.relu and not form.shortcut:
        arriving, scaled = Gradient(_through(grad, stages[-1], kept[-1])), True
    grads_S: list[Tensor | None] = []
    M: Tensor | None = None  # of the arriving gradient and y, where it is there already
    grad_x: Tensor | None
    for index in reversed(range(1, len(stages))):
        stage, maps = stages[index], kept[index]
        arriving, scale, grad_S = _through_norm(stage, arriving, scaled, maps.v)
        grad_x = stage.factors.input_gradient(arriving, ctx.shapes[index], scale)
        x = _input(stages, kept, index)
        g, M_before, M_after = _between(stages, kept, index, grad_x, x, ctx)
        if stage.factors.keeps in ("x", "y"):
            M = M_after if stage.factors.samples else M
            grad_S = stage.factors.scale_gradient(M, arriving, x, maps.v, maps.y, scale)
        grads_S.insert(0, grad_S)
        arriving, scaled, M = Gradient(g), True, M_before
    identity, own = form.shortcut == "identity", ctx.shortcut_shape is not None
    into = total if identity and form.relu else None  # this node's own, once its mask is applied
    grad_shortcut_x = total.tensor() if form.shortcut == "given" else None
    grad_shortcut_S: list[Tensor | None] = []
    if shortcut is not None:
        shape, needs_x = ctx.shapes[0], ctx.needs_input_grad[0]
        if own:
            shape, needs_x = ctx.shortcut_shape, ctx.needs_input_grad[1]
        grad_shortcut_x, grad_S = _through_first(
            shortcut, total, False, shape, sources[0], shortcut_kept, needs_x
        )
        grad_shortcut_S = [grad_S]
        if not own and grad_shortcut_x is not None:
            into, grad_shortcut_x = Gradient(grad_shortcut_x), None
    grad_x, grad_S = _through_first(
        stages[0],
        arriving,
        scaled,
        ctx.shapes[0],
        sources[-1],
        kept[0],
        ctx.needs_input_grad[0],
        into,
        M,
    )
    if grad_x is not None and identity and not form.relu:
        grad_x = grad_x + total.tensor()
    grads_S = [grad_S, *grads_S, *grad_shortcut_S]
    grads = [g for grad_S in grads_S for g in (grad_S, *[None] * (_FACTORS + _CONSTANTS - 1))]
    return grad_x, grad_shortcut_x, None, *grads


def _through_norm(
    stage: Stage, grad: Gradient, scaled: bool, v: Tensor | None
) -> tuple[Gradient, Tensor | None, Tensor | None]:
    """The gradient of y, of S⊙v for ``chain``; the scale still to apply to it; dL/dS of chain."""
    factors, scale, _ = stage
    if not scaled and not factors.samples:
        grad, scaled = Gradient(_scale(grad.tensor(), scale)), True
    if factors.strategy != "chain":
        return grad, None if scaled else scale, None
    value, grad_S = factors.through_U(grad.tensor(), v)
    return Gradient(value), None, grad_S


def _through_first(
    stage: Stage,
    grad: Gradient,
    scaled: bool,
    shape: torch.Size,
    source: Tensor | None,
    kept: _Maps,
    needs_x: bool,
    into: Gradient | None = None,
    M: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dx, added to ``into``, and dL/dS of a stage that reads what enters the block."""
    factors, x = stage.factors, None if source is None else Activation(source)
    grad, scale, grad_S = _through_norm(stage, grad, scaled, kept.v)
    grad_x: Tensor | None = None
    if factors.samples:  # its matrix wants its own gradient alone
        assert x is not None
        sampled = factors.input_gradient(grad, shape, scale)
        M = x.gram(sampled, factors.geometry.groups)
        if needs_x:
            grad_x = factors.spread(sampled, shape, None if into is None else into.tensor())
    elif needs_x:
        grad_x = factors.input_gradient(grad, shape, scale, into)
    if factors.keeps in ("x", "y"):
        grad_S = factors.scale_gradient(M, grad, x, kept.v, kept.y, scale)
    return grad_x, grad_S


def _between(
    stages: Sequence[Stage],
    kept: Sequence[_Maps],
    index: int,
    grad_x: Tensor,
    x: Activation | None,
    ctx,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Back through the activation before a stage, from the gradient of the stage's input.

    -> the gradient of the y before, the Gram matrix of these two where the stage before reads its S
    off it, and that of x and grad_x where this stage does. grad_x is overwritten.
    """
    before, factors = stages[index - 1], stages[index].factors
    _, y, mask = kept[index - 1]
    after, M_after = factors.geometry.groups if factors.samples else 0, None
    if after and factors.geometry.stride != (1, 1):
        assert x is not None
        after, M_after = 0, x.gram(grad_x, after)
        grad_x = factors.spread(grad_x, ctx.shapes[index])
    grad_x = grad_x.contiguous(memory_format=ctx.formats[index - 1])
    if mask is not None:
        return affine_act_backward_(grad_x, mask=mask, scale=before.scale), None, M_after
    assert y is not None
    groups = before.factors.geometry.groups if before.factors.keeps == "y" else 0
    g, M_before, found = activation_grams(grad_x, y, before.scale, before.shift, groups, after)
    return g, M_before, found if after else M_after


def _through(grad: Tensor, stage: Stage, kept: _Maps) -> Tensor:
    """From the gradient of a stage's ReLU to that of its y."""
    if kept.mask is not None:
        return affine_act_backward(grad, mask=kept.mask, scale=stage.scale)
    return affine_act_backward(grad, y=kept.y, scale=stage.scale, shift=stage.shift)


def _scale(grad: Tensor, scale: Tensor) -> Tensor:
    return affine_act(grad, scale, torch.zeros_like(scale), relu=False)[0]


def _again(stages: Sequence[Stage], kept: Sequence[_Maps]) -> _Maps:
    """The maps of the second stage, v and y computed from y of the first."""
    factors = stages[1].factors
    y, v = factors.forward(factors.sampled(kept[0].activation(stages[0]).tensor()))
    return _Maps(v, y, kept[1].mask)


def _input(stages: Sequence[Stage], kept: Sequence[_Maps], index: int) -> Activation | None:
    """The input of a stage after the first whose gradient of S reads it."""
    factors = stages[index].factors
    if factors.keeps != "x":
        return None
    activation = kept[index - 1].activation(stages[index - 1])
    if factors.geometry.stride == (1, 1) or not factors.samples:
        return activation
    return Activation(factors.sampled(activation.tensor()))
