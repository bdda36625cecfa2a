"""A chain of SVF convolutions, each with frozen batch norm and ReLU, and a shortcut: one node.

A bottleneck keeps y1 and y2, the outputs of its first two convolutions, and one bit per element
of its last ReLU (none where it ends in the sum). x2 and x3 are ``relu(bn(y1))`` and
``relu(bn(y2))``, rebuilt when they are read; the Gram matrices of conv1 and conv2 need y1 and y2,
that of conv3 needs x3; x is not needed. In 8 bits y1 and y2 serve the Gram matrices alone: the
masks that their codes tell are exact, and so is dL/dx.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from svf_fast.ops import maps
from svf_fast.ops.activation_gradients import activation_gradients
from svf_fast.ops.convolution import convolution, memory_format
from svf_fast.ops.factors import (
    Activation,
    Flow,
    Gradient,
    Kept,
    Kind,
    SVFConvolution,
    parted,
)
from svf_fast.ops.node import (
    AS_REFERENCE,
    INPUT_CHANGED,
    differentiable_once,
    keeps_graph,
    no_autocast,
    unpack_saved,
)
from svf_fast.ops.pointwise import Extras, fuses, pointwise
from svf_fast.ops.program import Programs, runs_programs
from svf_fast.ops.quantize import coded, quantized_backward
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


_T = TypeVar("_T")


class Stage(NamedTuple):
    """A convolution and the affine map ``y·scale_c + shift_c`` of the batch norm that follows.

    scale, shift [Co]: in float32, float64 for float64 maps. The scale is folded into ``conv`` where
    no ReLU stands between the gradient that the stage gets and its y: in a shortcut's own stage,
    and in the last one where a shortcut is added or no ReLU ends the block. Before a sum with the
    shortcut's own stage the last stage's shift is that of both.
    """

    conv: SVFConvolution
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, kind: Kind, tensors: Sequence[Any]) -> Stage:
        """Return the stage that has these :attr:`tensors`."""
        return cls(SVFConvolution.of(kind, tensors[:-2]), *tensors[-2:])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of it that is a tensor, or None."""
        return *self.conv.tensors, self.scale, self.shift


class Keeps(NamedTuple):
    """What a stage keeps for the backward pass.

    y: read by its own Gram matrix, or to rebuild the next stage's input.
    mask: the sign of what its ReLU got, where it cannot be computed from y.
    recomputes: y and v are computed a second time instead.
    """

    y: bool
    mask: bool
    recomputes: bool


class Form(NamedTuple):
    """How a block computes: everything but its tensors.

    kinds: of each stage, that of the shortcut last if it has one.
    shortcut: what is added before the last ReLU: "" (nothing), "identity" (x), "given" (a map), or
        "convolution" (a stage of its own).
    relu: whether a ReLU ends it. Between the stages there always is one.
    recompute: y of the second stage is not kept but computed again from the first's.
    int8: x and y are kept in 8 bits, but for a y that another is computed from again.
    keeps: of each stage beside the shortcut.
    """

    kinds: tuple[Kind, ...]
    shortcut: str
    relu: bool
    recompute: bool
    int8: bool
    keeps: tuple[Keeps, ...]

    @classmethod
    def of(
        cls, kinds: tuple[Kind, ...], shortcut: str, relu: bool, recompute: bool, int8: bool
    ) -> Form:
        """Decide what each stage keeps."""
        count, keeps = len(kinds) - (shortcut == "convolution"), []
        recompute = recompute and count > 1
        for index in range(count):
            y, recomputes = kinds[index].keeps == "y", recompute and index == 1
            if index == count - 1:
                mask = relu and (shortcut != "" or not y)
            else:
                is_source = recompute and index == 0
                y = y or is_source or kinds[index + 1].keeps == "x"
                mask = not y
            keeps.append(Keeps(y, mask, recomputes))
        return cls(kinds, shortcut, relu, recompute, int8, tuple(keeps))

    def split(self, every: Sequence[_T]) -> tuple[Sequence[_T], _T | None]:
        """Part the stages, or what there is of each, from the shortcut's, which is the last."""
        return (every[:-1], every[-1]) if self.shortcut == "convolution" else (every, None)


_form = functools.lru_cache(maxsize=256)(Form.of)  # a network has few


def block(
    x: Tensor,
    stages: Sequence[Stage],
    shortcut: Stage | str = "",
    shortcut_x: Tensor | None = None,
    relu: bool = True,
    recompute: bool = False,
    programs: Programs | None = None,
    int8: bool = False,
) -> Tensor:
    """Compute ``relu(stage_n(… relu(stage_1(x))) + shortcut)``, differentiable in x and every S.

    x [N, C, H, W] in one dtype with the weights. The shortcut is a stage applied to ``shortcut_x``
    (x where None), or "identity" (x itself), "given" (``shortcut_x`` itself), or "" (nothing). With
    ``recompute`` (two stages at least) the second convolution runs again in the backward pass
    instead of being kept. ``programs``: of calls whose stages differ in S and what follows from it
    alone. With ``int8`` what is kept for the gradients of S alone is kept in 8 bits, see
    :func:`svf_fast.ops.quantize.quantize`: the output and dL/dx are as without, to the bit, the
    gradients of S are not.
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
    kinds = tuple(stage.conv.kind for stage in every)
    if torch.compiler.is_compiling():  # a trace wants to see every tensor
        form = Form.of(kinds, kind, relu, recompute, int8)
        tensors = [t for stage in every for t in stage.tensors]
        return _Block.apply(x, shortcut_x, form, None, None, *tensors)
    form = _form(kinds, kind, relu, recompute, int8)
    if programs is not None and not runs_programs():
        programs = None
    trained = [x for stage in every for x in stage.conv.all_trained]
    return _Block.apply(x, shortcut_x, form, every, programs, *trained)


class _Block(torch.autograd.Function):
    """The node. It takes the stages and what trains of each; traced, all as tensors."""

    @staticmethod
    def forward(ctx, x, shortcut_x, form, stages, programs, *tensors):
        every = stages or _unpack_stages(form, tensors)
        run = functools.partial(_forward_pass, form, every, x, shortcut_x)
        if programs is None:
            (out, *kept), ctx.past = run()
        else:
            inputs = [x, shortcut_x, *_values(every)]
            constants = functools.partial(_constants, every)
            key = form, *_switches(x)
            (out, *kept), ctx.past = programs.run(key, run, inputs, constants)
        # the factors too: a change of theirs in place is noticed
        own = [t for s in every for t in s.conv.factors] if stages else tensors
        ctx.save_for_backward(*kept, *own)
        ctx.stages, ctx.programs = stages, programs
        return out

    @staticmethod
    @differentiable_once("fused block", AS_REFERENCE)
    def backward(ctx, grad):
        past, stages, programs = ctx.past, ctx.stages, ctx.programs
        tensors = unpack_saved(ctx, "fused block", INPUT_CHANGED)
        count = len(past.form.kinds)
        kept, own = tensors[: count * len(Maps._fields)], tensors[count * len(Maps._fields) :]
        stages = stages or _unpack_stages(past.form, own)
        needs = ctx.needs_input_grad[:2]
        run = functools.partial(_backward_pass, past, stages, kept, needs, grad)
        with no_autocast(grad):
            if programs is None or not runs_programs():
                (grad_x, grad_shortcut_x, *grads_S), _ = run()
            else:
                inputs = [grad, *kept, *_values(stages)]
                constants = functools.partial(_constants, stages)
                key = past, needs, *_switches(grad)
                (grad_x, grad_shortcut_x, *grads_S), _ = programs.run(key, run, inputs, constants)
        grads: list[Tensor | None] = []
        for stage, grad_S in zip(stages, grads_S, strict=True):
            found = stage.conv.gradients(grad_S)
            none = [] if ctx.stages else [None] * (len(stage.tensors) - len(found))
            grads += [*found, *none]
        if not keeps_graph():
            ctx.stages = ctx.programs = None
        return grad_x, grad_shortcut_x, None, None, None, *grads


def _unpack_stages(form: Form, tensors: Sequence[Any]) -> list[Stage]:
    """Return the stages whose :attr:`Stage.tensors` these are, one after another."""
    return list(map(Stage.of, form.kinds, parted(form.kinds, tensors)))


def _values(stages: Sequence[Stage]) -> list[Tensor | None]:
    """List S of each stage and what follows from it."""
    return [x for stage in stages for x in stage.conv.values]


def _constants(stages: Sequence[Stage]) -> list[Tensor | None]:
    """List what else the passes read of the stages."""
    return [x for stage in stages for x in (*stage.conv.constants, stage.scale, stage.shift)]


def _switches(x: Tensor) -> tuple:
    """Return torch's switches by which the passes over maps like x decide."""
    on_gpu = maps.on_gpu(x)
    products = maps.float32_products() if on_gpu and x.dtype == torch.float32 else None
    return on_gpu, products, torch.is_autocast_enabled(x.device.type)


class Maps(NamedTuple):
    """The maps of a stage that are kept, as far as its kind and :class:`Keeps` say so.

    x: of the first stage and the shortcut's; that of another is rebuilt from y of the one before.
    x_grid, y_grid: where x and y are codes of 8 bits, else None.
    """

    x: Tensor | None
    x_grid: Tensor | None
    v: Tensor | None
    y: Tensor | None
    y_grid: Tensor | None
    mask: Tensor | None

    def kept(self, dtype: torch.dtype, x: Activation | None = None) -> Kept:
        """Return what its convolution's gradients read, with `x` where its own is not kept.

        dtype: of maps that codes stand for.
        """
        own = Activation.of(self.x, self.x_grid, dtype)
        return Kept(x if own is None else own, self.v, Activation.of(self.y, self.y_grid, dtype))


def _pack(every: Sequence[Maps]) -> list[Tensor | None]:
    return [x for one in every for x in [*one]]  # a list for torch.compile of torch 2.11


def _unpack(tensors: Sequence[Any]) -> list[Maps]:
    size = len(Maps._fields)
    return [Maps(*tensors[at : at + size]) for at in range(0, len(tensors), size)]


class Past(NamedTuple):
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
) -> tuple[list[Tensor | None], Past]:
    """Compute the block's output, then the :class:`Maps` of every stage, packed."""
    stages, shortcut = form.split(every)
    shapes, formats = [], []
    kept: list[Maps] = []

    residual, residual_scale = (x if form.shortcut == "identity" else shortcut_x), None
    if shortcut is not None:
        conv, residual_scale = shortcut.conv, shortcut.scale
        source = conv.sample(x if shortcut_x is None else shortcut_x)
        residual, v = conv.forward(source)
        of_shortcut = Maps(
            *_stored(form, source if conv.kind.keeps == "x" else None),
            _sampled_v(form, conv, source) if v is None else v,
            *_stored(form, residual if conv.kind.keeps == "y" else None),
            None,
        )

    h = Activation(x)
    for index, stage in enumerate(stages):
        shapes.append(h.y.shape)
        if stage.conv.kind.strides:
            h = Activation(stage.conv.sample(h.tensor()))
        added = (residual, residual_scale) if index == len(stages) - 1 else (None, None)
        h, one = _run_stage(form, stages, index, h, *added)
        formats.append(memory_format(h.y))
        kept.append(one)
    if shortcut is not None:
        kept.append(of_shortcut)
    shape = None if shortcut_x is None else shortcut_x.shape
    return [h.y, *_pack(kept)], Past(form, tuple(shapes), tuple(formats), shape)


def _run_stage(
    form: Form,
    stages: Sequence[Stage],
    index: int,
    h: Activation,
    residual: Tensor | None,
    residual_scale: Tensor | None,
) -> tuple[Activation, Maps]:
    """Compute what the next stage reads; the last stage adds the residual."""
    conv, scale, shift = stages[index]
    last = index == len(stages) - 1
    keeps = form.keeps[index]
    keeps_y = keeps.y and not keeps.recomputes
    relu = form.relu or not last
    x = h.y if index == 0 and conv.kind.keeps == "x" else None
    read, geometry, v = conv.last(h)
    guards = v is None and conv.constants.tail_V is not None
    if conv.kind.samples:  # computed from x again, unless that is kept in 8 bits
        guards = guards and form.int8 and not (form.recompute and index > 0)
    on_gpu = maps.on_gpu(read.y)
    prologue = Prologue(read.scale, read.shift)
    epilogue = Epilogue(
        scale, shift, residual, residual_scale, relu=relu, keep=keeps_y, mask=keeps.mask
    )
    edge = scale if relu and not keeps.mask else None  # its mask is to be told by y
    term = None if edge is None else shift
    of_source = form.recompute and index == 0  # another y is computed from it again
    if on_gpu and fuses(read.y, conv.weight, geometry, Extras.of(prologue, epilogue)):
        out, y, mask = pointwise(read.y, conv.weight.flatten(1), prologue, epilogue)
        v = conv.guarded(h.tensor()) if guards else v
        stored = _stored(form, y, edge, term, of_source) if keeps_y else (None, None)
    else:
        entering = read.tensor()
        y = convolution(entering, conv.weight, None, geometry)
        v = conv.guarded(entering) if guards else v
        if on_gpu and keeps_y and not last and _rebuilds_input(form, stages, index + 1, y):
            stored = _stored(form, y, scale, shift, of_source)
            return Activation(y, scale, shift), Maps(*_stored(form, x), v, *stored, None)
        stored = _stored(form, y, edge, term, of_source) if keeps_y else (None, None)
        if stored[0] is y:
            out, mask = _activate(y, scale, shift, residual, residual_scale, relu, keeps.mask)
        else:  # y is this node's own and read by nobody else
            mask = _activate_(y, scale, shift, residual, residual_scale, relu, keeps.mask)
            out = y
    kept_v = None if keeps.recomputes else v
    kept_mask = mask if keeps.mask else None
    return Activation(out), Maps(*_stored(form, x), kept_v, *stored, kept_mask)


def _stored(
    form: Form,
    x: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    exactly: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is kept of a map, and its grid if that is codes.

    scale, shift: before the ReLU whose mask the codes are to tell.
    """
    if x is None or exactly or not form.int8:
        return x, None
    return coded(x, scale, shift)


def _sampled_v(form: Form, conv: SVFConvolution, x: Tensor) -> Tensor | None:
    """Compute v of the guarded directions where x, off which it is read, is kept in 8 bits."""
    return conv.guarded(x) if form.int8 and conv.kind.samples else None


def _rebuilds_input(form: Form, stages: Sequence[Stage], index: int, y: Tensor) -> bool:
    """Tell whether a stage's kernel recomputes its input from y of the stage before."""
    conv, keeps = stages[index].conv, form.keeps[index]
    if conv.kind.strategy == "chain":
        return False
    extras = Extras(
        in_scale=True,
        scale=True,
        residual=form.shortcut != "" and index == len(stages) - 1,
        keep=keeps.y and not keeps.recomputes,
        mask=keeps.mask,
    )
    return fuses(y, conv.weight, conv.kind.geometry, extras)


def _backward_pass(
    past: Past,
    every: Sequence[Stage],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    grad: Tensor,
) -> tuple[list[Tensor | None], None]:
    """Compute dL/dx and dL/dshortcut_x as far as they are needed, then that of what trains.

    tensors: as the forward pass packed them.
    """
    form, kept = past.form, _unpack(tensors)
    stages, shortcut = form.split(every)
    if form.recompute:
        kept[1] = _recompute(stages, kept)
    last = kept[len(stages) - 1]

    # masks are in the memory order of what left a stage; a gradient may have taken another
    grad = grad.contiguous(memory_format=past.formats[-1])
    total = Gradient(grad, last.mask if form.relu and form.shortcut else None)  # of the sum
    flow = Flow(total)
    dtype = grad.dtype
    if form.relu and not form.shortcut:
        flow = Flow(Gradient(_relu_gradient(grad, stages[-1], last)))
    grads_S: list[Tensor | None] = [None] * len(every)
    for index in reversed(range(1, len(stages))):
        flow = stages[index].conv.through_U(flow, kept[index].v)
        grads_S[index], flow = _through_stage(stages, kept, index, flow, past)

    into = total if form.shortcut == "identity" and form.relu else None  # a map of this node's own
    grad_shortcut_x = total.tensor() if form.shortcut == "given" else None
    if shortcut is not None:
        own_x = past.shortcut_shape is not None
        shape = past.shortcut_shape or past.shapes[0]
        arriving, own = Flow(total), kept[-1].kept(dtype)
        found, grads_S[-1] = shortcut.conv.backward(arriving, shape, own, needs[own_x])
        if own_x:
            grad_shortcut_x = found
        elif found is not None:
            into = Gradient(found)
    grad_x, grads_S[0] = stages[0].conv.backward(
        flow, past.shapes[0], kept[0].kept(dtype), needs[0], into
    )
    if grad_x is not None and form.shortcut == "identity" and not form.relu:
        grad_x.add_(total.tensor())
    grads = (s.conv.trained_gradient(g) for s, g in zip(every, grads_S, strict=True))
    return [grad_x, grad_shortcut_x, *grads], None


def _through_stage(
    stages: Sequence[Stage], kept: Sequence[Maps], index: int, flow: Flow, past: Past
) -> tuple[Tensor | None, Flow]:
    """Compute dL/dS of a stage after the first, and what arrives at the stage before it.

    flow: past U. The stage's input is ``x = relu(y·scale + shift)`` of the stage before.
    """
    conv, (before, scale, shift) = stages[index].conv, stages[index - 1]
    dtype = flow.grad_y.value.dtype
    _, _, _, y, y_grid, mask = kept[index - 1]
    own = kept[index].kept(dtype, _rebuilt_input(conv, stages[index - 1], kept[index - 1], dtype))
    grad_x = conv.input_gradient(flow.grad_y, past.shapes[index])
    if not conv.kind.samples:
        grad_S = conv.scale_gradient(flow, own)

    of_before = read_off = None  # dL/dS [G, R] of the stage before; of this one, if it samples
    if conv.kind.strides or (conv.kind.samples and not conv.kind.core.is_diagonal):
        read_off = conv.read_off(own.x, Activation(grad_x))
        grad_x = conv.spread(grad_x, past.shapes[index])
    grad_x = grad_x.contiguous(memory_format=past.formats[index - 1])
    if mask is not None:
        _back_(grad_x, None, mask, scale, None)
    else:
        assert y is not None
        reads = before.kind.keeps == "y" and before.kind.core.is_diagonal
        of_y = before.reader if reads else None
        of_x = conv.reader if conv.kind.samples and read_off is None else None
        grad_x, of_before, found = activation_gradients(grad_x, y, scale, shift, of_y, of_x, y_grid)
        read_off = found if read_off is None else read_off
    if conv.kind.samples:
        grad_S = conv.scale_gradient(Flow(flow.grad_y, read_off), own)
    return grad_S, Flow(Gradient(grad_x), of_before)


def _relu_gradient(grad: Tensor, stage: Stage, kept: Maps) -> Tensor:
    """Compute dL/dy of a stage from the gradient of its ReLU's output."""
    if kept.mask is not None:
        return _back(grad, None, kept.mask, stage.scale, None)
    if kept.y_grid is not None:
        assert kept.y is not None
        return quantized_backward(grad, kept.y, kept.y_grid, stage.scale)
    return _back(grad, kept.y, None, stage.scale, stage.shift)


def _recompute(stages: Sequence[Stage], kept: Sequence[Maps]) -> Maps:
    """Compute v and y of the second stage from y of the first."""
    conv, before = stages[1].conv, stages[0]
    assert kept[0].y is not None
    x = Activation(kept[0].y, before.scale, before.shift).tensor()
    y, v = conv.forward(conv.sample(x))
    return kept[1]._replace(v=v, y=y)


def _rebuilt_input(
    conv: SVFConvolution, before: Stage, kept: Maps, dtype: torch.dtype
) -> Activation | None:
    """Return the input of a stage after the first, if dS is computed from it."""
    if conv.kind.keeps != "x":
        return None
    assert kept.y is not None
    x = Activation(kept.y, before.scale, before.shift, kept.y_grid, dtype)
    return Activation(conv.sample(x.tensor())) if conv.kind.strides else x
