"""A chain of SVF convolutions, each with frozen batch norm and ReLU, and a shortcut: one node.

A bottleneck keeps y1 and y2, the outputs of its first two convolutions, and one bit per element
of its last ReLU. x2 and x3 are ``relu(bn(y1))`` and ``relu(bn(y2))``, rebuilt when they are read;
the Gram matrices of conv1 and conv2 need y1 and y2, that of conv3 needs x3; x is not needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svf_fast.ops import maps
from svf_fast.ops.activation_gradients import activation_gradients
from svf_fast.ops.convolution import convolution
from svf_fast.ops.pointwise import Extras, fuses, pointwise
from svf_fast.ops.program import Programs, runs_programs
from svf_fast.ops.svf_conv2d import (
    Activation,
    Gradient,
    Kind,
    Layer,
    keeps_graph,
    memory_format,
    no_autocast,
    saved,
)
from svf_fast.reference.pointwise import Epilogue, Prologue

# of svf_fast.ops.affine_act, whose checks are the caller's here
_activate, _activate_ = (
    torch.ops.svf_fast.affine_act.default,
    torch.ops.svf_fast.affine_act_.default,
)
_back, _back_ = (
    torch.ops.svf_fast.affine_act_backward.default,
    torch.ops.svf_fast.affine_act_backward_.default,
)


class Stage(NamedTuple):
    """A convolution and the affine map ``y·scale_c + shift_c`` of the batch norm that follows.

    scale, shift [Co]: in float32, float64 for float64 maps. The scale is folded into ``layer``
    where no ReLU stands between the gradient that the stage gets and its y: :func:`folds_scale`.
    Before a sum with the shortcut's own stage the last stage's shift is that of both.
    """

    layer: Layer
    scale: Tensor
    shift: Tensor


class Kept(NamedTuple):
    """What a stage leaves for the backward pass.

    y: read by its own Gram matrix, or to rebuild the next stage's input.
    mask: the sign of what its ReLU got, where it cannot be computed from y.
    again: y and v are computed a second time instead.
    """

    y: bool
    mask: bool
    again: bool


class Form(NamedTuple):
    """What of a block is not a tensor.

    kinds: of each stage, that of the shortcut last if it has one.
    shortcut: what is added before the last ReLU: "" (nothing), "identity" (x), "given" (a map), or
        "convolution" (a stage of its own).
    relu: whether a ReLU ends it. Between the stages there always is one.
    recompute: y of the second stage is not kept but computed again from the first's.
    kept: of each stage beside the shortcut.
    """

    kinds: tuple[Kind, ...]
    shortcut: str
    relu: bool
    recompute: bool
    kept: tuple[Kept, ...]

    @classmethod
    def of(cls, kinds: tuple[Kind, ...], shortcut: str, relu: bool, recompute: bool) -> Form:
        count, kept = len(kinds) - (shortcut == "convolution"), []
        recompute = recompute and count > 1
        for index in range(count):
            y, again = kinds[index].keeps == "y", recompute and index == 1
            if index == count - 1:
                mask = relu and (shortcut != "" or not y)
            else:
                feeds_again = recompute and index == 0
                y = y or feeds_again or kinds[index + 1].keeps == "x"
                mask = not y
            kept.append(Kept(y, mask, again))
        return cls(kinds, shortcut, relu, recompute, tuple(kept))


_form = functools.lru_cache(maxsize=256)(Form.of)  # a network has few


def folds_scale(index: int, count: int, shortcut: bool, relu: bool) -> bool:
    """Whether a stage's ``layer`` takes the gradient of its batch norm's output, not of its y.

    Of the stage ``index`` of ``count`` beside the shortcut; a shortcut's own stage always does.
    """
    return index == count - 1 and (shortcut or not relu)


def block(
    x: Tensor,
    stages: Sequence[Stage],
    shortcut: Stage | str = "",
    shortcut_x: Tensor | None = None,
    relu: bool = True,
    recompute: bool = False,
    programs: Programs | None = None,
) -> Tensor:
    """``relu(stage_n(… relu(stage_1(x))) + shortcut)``, differentiable in x and every S.

    x [N, C, H, W] in one dtype with the weights. The shortcut is a stage applied to ``shortcut_x``
    (x where None), or "identity" (x itself), "given" (``shortcut_x`` itself), or "" (nothing). With
    ``recompute`` (two stages at least) the second convolution runs again in the backward pass
    instead of being kept. ``programs``: of calls whose stages differ in S and what follows from it
    alone.
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
    kinds = tuple(stage.layer.kind for stage in every)
    if torch.compiler.is_compiling():  # a trace wants to see every tensor
        form = Form.of(kinds, kind, relu, recompute)
        tensors = [t for stage in every for t in (*stage.layer[1:], stage.scale, stage.shift)]
        return _Block.apply(x, shortcut_x, form, None, None, *tensors)
    form = _form(kinds, kind, relu, recompute)
    if programs is not None and not runs_programs():
        programs = None
    return _Block.apply(x, shortcut_x, form, every, programs, *[stage.layer.S for stage in every])


_TENSORS = len(Layer._fields) + 1  # of a stage: those of its layer, scale, shift
_FACTORS = 3  # S, U and V, the first of them


def _stages(form: Form, tensors: Sequence[Any]) -> list[Stage]:
    """The stages, that of the shortcut last, of the tensors as :func:`block` lays them out."""
    found = []
    for index, kind in enumerate(form.kinds):
        *layer, scale, shift = tensors[_TENSORS * index : _TENSORS * (index + 1)]
        found.append(Stage(Layer(kind, *layer), scale, shift))
    return found


class _Maps(NamedTuple):
    """What a stage left: v, y and the mask as far as :class:`Kept` says so."""

    v: Tensor | None
    y: Tensor | None
    mask: Tensor | None


def _forward(
    form: Form,
    stages: Sequence[Stage],
    index: int,
    h: Activation,
    residual: Tensor | None,
    residual_scale: Tensor | None,
) -> tuple[Activation, _Maps]:
    """What the next stage reads, and what of this one is kept; the last one adds the residual."""
    layer, scale, shift = stages[index]
    last = index == len(stages) - 1
    keep = form.kept[index]
    keeps_y = keep.y and not keep.again
    relu = form.relu or not last
    read, geometry, v = layer.last(h)
    guards = v is None and layer.tail_V is not None
    on_gpu = maps.on_gpu(read.y)
    prologue = Prologue(read.scale, read.shift)
    epilogue = Epilogue(
        scale, shift, residual, residual_scale, relu=relu, keep=keeps_y, mask=keep.mask
    )
    if on_gpu and fuses(read.y, layer.weight, geometry, Extras.of(prologue, epilogue)):
        out, y, mask = pointwise(read.y, layer.weight.flatten(1), prologue, epilogue)
        v = layer.guarded(h.tensor()) if guards else v
    else:
        x = read.tensor()
        y = convolution(x, layer.weight, None, geometry)
        v = layer.guarded(x) if guards else v
        if on_gpu and keeps_y and not last and _rebuilds(form, stages, index + 1, y):
            return Activation(y, scale, shift), _Maps(v, y, None)
        if keeps_y:
            out, mask = _activate(y, scale, shift, residual, residual_scale, relu, keep.mask)
        else:  # y is this node's own and read by nobody else
            mask = _activate_(y, scale, shift, residual, residual_scale, relu, keep.mask)
            out = y
    kept = y if keeps_y else None
    return Activation(out), _Maps(None if keep.again else v, kept, mask if keep.mask else None)


def _rebuilds(form: Form, stages: Sequence[Stage], index: int, y: Tensor) -> bool:
    """Whether a stage rebuilds its input from the y before as it reads it."""
    layer, keep = stages[index].layer, form.kept[index]
    if layer.kind.strategy == "chain":
        return False
    extras = Extras(
        in_scale=True,
        scale=True,
        residual=form.shortcut != "" and index == len(stages) - 1,
        keep=keep.y and not keep.again,
        mask=keep.mask,
    )
    return fuses(y, layer.weight, layer.kind.geometry, extras)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shortcut_x, form, stages, programs, *tensors):
        traced, every = stages is None, stages or _stages(form, tensors)
        run = functools.partial(_forward_pass, form, every, x, shortcut_x)
        if programs is None:
            (y, *kept), ctx.past = run()
        else:
            inputs = [x, shortcut_x, *_changing(every)]
            constants = functools.partial(_constants, every)
            key = form, *_switches(x)
            (y, *kept), ctx.past = programs.run(key, run, inputs, constants)
        # the factors too: a change of theirs in place is noticed
        factors = [t for stage in every for t in stage.layer[1 : 1 + _FACTORS]]
        ctx.save_for_backward(*kept, *factors)
        ctx.stages, ctx.programs = None if traced else every, programs
        ctx.others = [(*s.layer[1 + _FACTORS :], *s[1:]) for s in every] if traced else ()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        past, programs = ctx.past, ctx.programs
        tensors = saved(ctx, "fused block")
        end = len(tensors) - _FACTORS * len(past.form.kinds)
        kept, factors = tensors[:end], tensors[end:]
        stages = list(ctx.stages or ())
        for index, (*others, scale, shift) in enumerate(ctx.others):  # traced
            own = factors[_FACTORS * index :][:_FACTORS]
            stages.append(Stage(Layer(past.form.kinds[index], *own, *others), scale, shift))
        needs = ctx.needs_input_grad[:2]
        run = functools.partial(_backward_pass, past, stages, kept, needs, grad)
        with no_autocast(grad):
            if programs is None or not runs_programs():
                (grad_x, grad_shortcut_x, *grads_S), _ = run()
            else:
                inputs = [grad, *kept, *_changing(stages)]
                constants = functools.partial(_constants, stages)
                key = past, needs, *_switches(grad)
                (grad_x, grad_shortcut_x, *grads_S), _ = programs.run(key, run, inputs, constants)
        none = [None] * (0 if ctx.stages else _TENSORS - 1)
        if not keeps_graph():
            ctx.stages, ctx.others, ctx.programs = None, (), None
        grads = [g for grad_S in grads_S for g in (grad_S, *none)]
        return grad_x, grad_shortcut_x, None, None, None, *grads


def _changing(stages: Sequence[Stage]) -> list[Tensor | None]:
    """S of each stage and what follows from it."""
    return [x for s in stages for x in (s.layer.S, s.layer.weight, s.layer.scaled)]


def _constants(stages: Sequence[Stage]) -> list[Tensor | None]:
    """What else the passes read of the stages."""
    return [x for s in stages for x in (*s.layer[2:4], *s.layer[6:], s.scale, s.shift)]


def _switches(x: Tensor) -> tuple:
    """Of torch, by which the passes over maps like x decide."""
    on_gpu = maps.on_gpu(x)
    products = maps.float32_products() if on_gpu and x.dtype == torch.float32 else None
    return on_gpu, products, torch.is_autocast_enabled(x.device.type)


class _Past(NamedTuple):
    """What a forward pass leaves for the backward pass besides tensors.

    shapes: of what enters each stage; formats: of what leaves it. shortcut_shape: of a map of the
    shortcut's own.
    """

    form: Form
    shapes: tuple[torch.Size, ...]
    formats: tuple[torch.memory_format, ...]
    shortcut_shape: torch.Size | None


def _forward_pass(
    form: Form, every: Sequence[Stage], x: Tensor, shortcut_x: Tensor | None
) -> tuple[list[Tensor | None], _Past]:
    """The block's output, then what the backward pass reads: sources, and v, y, mask of stages."""
    stages = list(every)
    shortcut = stages.pop() if form.shortcut == "convolution" else None
    sources, shapes, formats = [], [], []
    kept: list[Tensor | None] = []

    residual, residual_scale = (x if form.shortcut == "identity" else shortcut_x), None
    leaves: tuple[Any, ...] = ()
    if shortcut is not None:
        source = shortcut.layer.sampled(x if shortcut_x is None else shortcut_x)
        residual, v = shortcut.layer.forward(source)
        residual_scale = shortcut.scale
        sources.append(source if shortcut.layer.kind.keeps == "x" else None)
        leaves = v, residual if shortcut.layer.kind.keeps == "y" else None, None

    h = Activation(x)
    for index, stage in enumerate(stages):
        shapes.append(h.y.shape)
        if stage.layer.kind.samples and stage.layer.kind.geometry.stride != (1, 1):
            h = Activation(stage.layer.sampled(h.tensor()))
        if index == 0:
            sources.append(h.y if stage.layer.kind.keeps == "x" else None)
        added = (residual, residual_scale) if index == len(stages) - 1 else (None, None)
        h, maps = _forward(form, stages, index, h, *added)
        formats.append(memory_format(h.y))
        kept += [*maps]  # a list for torch.compile of torch 2.11
    shape = None if shortcut_x is None else shortcut_x.shape
    return [h.y, *sources, *kept, *leaves], _Past(form, tuple(shapes), tuple(formats), shape)


def _backward_pass(
    past: _Past,
    stages: Sequence[Stage],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    grad: Tensor,
) -> tuple[list[Tensor | None], None]:
    """dL/dx and dL/dshortcut_x as far as they are needed, then dL/dS of each stage.

    tensors: as the forward pass left them.
    """
    form, count, stages = past.form, len(past.form.kinds), list(stages)
    sources = tensors[: 2 if form.shortcut == "convolution" else 1]
    rest = tensors[len(sources) :]
    kept = [_Maps(*rest[3 * index : 3 * index + 3]) for index in range(count)]
    shortcut, shortcut_kept = None, None
    if form.shortcut == "convolution":
        shortcut, shortcut_kept = stages.pop(), kept.pop()
    if form.recompute:
        kept[1] = _again(stages, kept)

    # masks are in the memory order of what left a stage; a gradient may have taken another
    grad = grad.contiguous(memory_format=past.formats[-1])
    total = Gradient(grad, kept[-1].mask if form.relu and form.shortcut else None)
    arriving = total
    grad_x: Tensor | None
    if form.relu and not form.shortcut:
        arriving = Gradient(_through(grad, stages[-1], kept[-1]))
    grads_S: list[Tensor | None] = [None] * len(stages)
    read_off: Tensor | None = None  # dL/dS of the stage that comes next, as far as it is known
    for index in reversed(range(1, len(stages))):
        layer, maps = stages[index].layer, kept[index]
        x = _input(stages, kept, index)
        if layer.kind.strategy == "chain":
            value, grads_S[index] = layer.through_U(arriving.tensor(), maps.v)
            arriving = Gradient(value)
        own = layer.input_gradient(arriving, past.shapes[index])
        if not layer.kind.samples and layer.kind.keeps in ("x", "y") and read_off is None:
            grads_S[index] = layer.scale_gradient(arriving, None, x, maps.v, maps.y)
        elif read_off is not None:
            grads_S[index] = layer.with_exact(read_off, arriving, x, maps.v)
        g, read_off, after = _between(stages, kept, index, own, x, past)
        if layer.kind.samples:
            assert after is not None
            grads_S[index] = layer.with_exact(after, arriving, x, maps.v)
        arriving = Gradient(g)
    identity, other_x = form.shortcut == "identity", past.shortcut_shape is not None
    into = total if identity and form.relu else None  # this node's own, once its mask is applied
    grad_shortcut_x = total.tensor() if form.shortcut == "given" else None
    if shortcut is not None and shortcut_kept is not None:
        shape, needs_x = past.shapes[0], needs[0]
        if other_x:
            assert past.shortcut_shape is not None
            shape, needs_x = past.shortcut_shape, needs[1]
        grad_shortcut_x, grad_S = _through_first(
            shortcut.layer, total, shape, sources[0], shortcut_kept, needs_x
        )
        grads_S.append(grad_S)
        if not other_x and grad_shortcut_x is not None:
            into, grad_shortcut_x = Gradient(grad_shortcut_x), None
    grad_x, grads_S[0] = _through_first(
        stages[0].layer,
        arriving,
        past.shapes[0],
        sources[-1],
        kept[0],
        needs[0],
        into,
        read_off,
    )
    if grad_x is not None and identity and not form.relu:
        grad_x = grad_x + total.tensor()
    return [grad_x, grad_shortcut_x, *grads_S], None


def _through_first(
    layer: Layer,
    grad: Gradient,
    shape: torch.Size,
    source: Tensor | None,
    kept: _Maps,
    needs_x: bool,
    into: Gradient | None = None,
    read_off: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dx, added to ``into``, and dL/dS of a layer that reads what enters the block."""
    x = None if source is None else Activation(source)
    grad_S: Tensor | None = None
    if layer.kind.strategy == "chain":
        value, grad_S = layer.through_U(grad.tensor(), kept.v)
        grad = Gradient(value)
    grad_x: Tensor | None = None
    if layer.kind.samples:  # its matrix wants its own gradient alone
        sampled = layer.input_gradient(grad, shape)
        grad_S = layer.scale_gradient(grad, sampled, x, kept.v, kept.y)
        if needs_x:
            grad_x = layer.spread(sampled, shape, None if into is None else into.tensor())
        return grad_x, grad_S
    if needs_x:
        grad_x = layer.input_gradient(grad, shape, into)
    if read_off is not None:
        grad_S = layer.with_exact(read_off, grad, x, kept.v)
    elif layer.kind.keeps in ("x", "y"):
        grad_S = layer.scale_gradient(grad, None, x, kept.v, kept.y)
    return grad_x, grad_S


def _between(
    stages: Sequence[Stage],
    kept: Sequence[_Maps],
    index: int,
    grad_x: Tensor,
    x: Activation | None,
    past: _Past,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Back through the activation before a stage, from the gradient of the stage's input.

    -> the gradient of the y before, dL/dS [G, R] of the stage before where it is read off these
    two, and that of this stage where it is read off x and grad_x. grad_x is overwritten.
    """
    before, layer = stages[index - 1], stages[index].layer
    _, y, mask = kept[index - 1]
    after, strided = (layer if layer.kind.samples else None), None
    if after and layer.kind.geometry.stride != (1, 1):
        assert x is not None
        after, strided = None, layer.read_off(x, grad_x)
        grad_x = layer.spread(grad_x, past.shapes[index])
    grad_x = grad_x.contiguous(memory_format=past.formats[index - 1])
    if mask is not None:
        _back_(grad_x, None, mask, before.scale, None)
        return grad_x, None, strided
    assert y is not None
    own = before.layer if before.layer.kind.keeps == "y" else None
    g, read_off, found = activation_gradients(
        grad_x,
        y,
        before.scale,
        before.shift,
        None if own is None else (*own.reading, own.S),
        None if after is None else (*after.reading, after.S),
    )
    return g, read_off, found if strided is None else strided


def _through(grad: Tensor, stage: Stage, kept: _Maps) -> Tensor:
    """From the gradient of a stage's ReLU to that of its y."""
    if kept.mask is not None:
        return _back(grad, None, kept.mask, stage.scale, None)
    return _back(grad, kept.y, None, stage.scale, stage.shift)


def _again(stages: Sequence[Stage], kept: Sequence[_Maps]) -> _Maps:
    """The maps of the second stage, v and y computed from y of the first."""
    layer, before = stages[1].layer, stages[0]
    assert kept[0].y is not None
    x = Activation(kept[0].y, before.scale, before.shift).tensor()
    y, v = layer.forward(layer.sampled(x))
    return _Maps(v, y, kept[1].mask)


def _input(stages: Sequence[Stage], kept: Sequence[_Maps], index: int) -> Activation | None:
    """The input of a stage after the first whose gradient of S reads it."""
    layer, before, y = stages[index].layer, stages[index - 1], kept[index - 1].y
    if layer.kind.keeps != "x":
        return None
    assert y is not None
    activation = Activation(y, before.scale, before.shift)
    if layer.kind.geometry.stride == (1, 1) or not layer.kind.samples:
        return activation
    return Activation(layer.sampled(activation.tensor()))
