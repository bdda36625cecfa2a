"""What a user would pick instead, each as a conversion of a frozen pretrained network.

A peer is ``convert(model, layers, cache)``: in place, it returns the model. All compute the network
that was there before, to rounding, and differ in what trains and in what is kept for the backward
pass. ``layers`` names children of the model, None is all of it; ``cache`` is a folder for the
decompositions. The in-house ones stand for published code, as far as the method goes: SVF's own,
svdiff-pytorch, memsave_torch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import svf_fast
from fss.models.backbone import BasicBlock, Bottleneck
from svf_fast import SVFConv2d
from svf_fast.ops.convolution import Geometry, convolution, convolution_input_gradient

BUDGET = 0.0  # of activations, the least: layers 2-4 then keep half more maps than with svf_fast
Layers = Sequence[str] | None
Convert = Callable[[nn.Module, Layers, Path | None], nn.Module]


class Peer(NamedTuple):
    """A conversion and what to expect of it.

    trains: "S", "weights", "the head alone", or "nothing", where only the gradient of the input is
        asked for.
    compiled: it needs a C++ compiler when first called, and much time then.
    judged_in: the dtype whose rule its gradients are held to; "" for that of the race.
    """

    convert: Convert
    trains: str = "S"
    compiled: bool = False
    judged_in: str = ""


def official(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Convert to the paper's three layers: conv V, mul S, conv U; batch norm and ReLU stay."""
    return svf_fast.convert(model, layers, "reference", fuse=False, cache=cache, progress=False)


def checkpointed(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Convert as `official`; each residual block keeps only its input and runs again backward."""
    official(model, layers, cache)
    for part in parts(model, layers):
        for block in part.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def saved_in_8_bits(
    model: nn.Module, layers: Layers = None, cache: Path | None = None
) -> nn.Module:
    """Convert as `official`; every map that autograd saves is kept in 8 bits, masks included.

    What torch's hooks of saved tensors give to any network, with a range for each channel of each
    image, as published activation compression has it (ActNN, Chen et al. 2021, in 8 bits).
    """
    official(model, layers, cache)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Any:
        if x.dim() != 4 or id(x) in own or not x.is_floating_point():
            return x
        low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        step = (high - low).clamp_min(torch.finfo(x.dtype).tiny) / 255
        return ((x - low) / step).round().to(torch.uint8), low, step

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        codes, low, step = kept
        return codes.to(low.dtype) * step + low

    for part in parts(model, layers):
        part.forward = _hooked(part.forward, pack, unpack)
    return model


def _hooked(forward: Callable, pack: Callable, unpack: Callable) -> Callable:
    def run(x: Tensor) -> Tensor:
        # hooks hide what is saved from those around them, which may want to count it
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def packed(x: Tensor) -> Any:
            kept = pack(x)
            if around is not None:
                for tensor in kept if isinstance(kept, tuple) else (kept,):
                    around[0](tensor)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(packed, unpack):
            return forward(x)

    return run


def recomposed(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Compose W = U diag(S) Vᵀ at each call, with autograd through it; keeps x and W."""
    return _replace(official(model, layers, cache), layers, SVFConv2d, Recomposed)


def recomposed_folded(
    model: nn.Module, layers: Layers = None, cache: Path | None = None
) -> nn.Module:
    """Convert as `recomposed`, batch norm in U and a bias: W' = (γ/σ) U diag(S) Vᵀ."""
    recomposed(model, layers, cache)
    for parent, conv, norm in _pairs(model, layers, Recomposed):
        scale, shift = _affine(getattr(parent, norm))
        getattr(parent, conv).fold(scale, shift)
        setattr(parent, norm, nn.Identity())
    return model


def save_needed(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Convert as `official`, each operation keeping only what its own gradient needs.

    That is v = Vᵀ*x for dS and one byte per element for ReLU: a convolution with a frozen weight
    and a batch norm with frozen statistics need nothing.
    """
    official(model, layers, cache)
    _replace(model, layers, SVFConv2d, LeanSVFConv)
    _replace(model, layers, nn.BatchNorm2d, LeanBatchNorm)
    return _replace(model, layers, nn.ReLU, lambda _: LeanReLU())


def full(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Train all weights of the convolutions; the batch norms stay frozen."""
    for part in parts(model, layers):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_(True)
    return model


def frozen_bound(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Train nothing, batch norm folded, conv + ReLU in place: the bound, not a rival."""
    for parent, conv, norm in _pairs(model, layers, nn.Conv2d):
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    return model.requires_grad_(False)


def compiled(convert: Convert) -> Convert:
    """Return `convert` followed by torch.compile of each part, for the shapes that come."""

    def converted(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
        convert(model, layers, cache)
        for part in parts(model, layers):
            part.compile(dynamic=False, fullgraph=True)
        return model

    return converted


def compiled_within(convert: Convert, budget: float) -> Convert:
    """Return `compiled`, which computes again what `budget` has no room for.

    budget: 1 keeps what torch.compile keeps by itself, 0 the inputs of each part alone.
    """

    def compile_graph(graph: Any, inputs: Any) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        # what is found in torch's cache may be of another budget
        with torch._functorch.config.patch(
            activation_memory_budget=budget, enable_autograd_cache=False
        ):
            return compile_fx(graph, inputs)

    def converted(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
        convert(model, layers, cache)
        for part in parts(model, layers):
            part.compile(dynamic=False, fullgraph=True, backend=compile_graph)
        return model

    return converted


def ours(strategy: str = "auto", **options: Any) -> Convert:
    """Return svf_fast's conversion as a user calls it."""

    def converted(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
        return svf_fast.convert(model, layers, strategy, cache=cache, progress=False, **options)

    return converted


PEERS = {
    "official": Peer(official),
    "official, checkpoint per block": Peer(checkpointed),
    "official, 8 bits": Peer(saved_in_8_bits, judged_in="bfloat16"),
    "recomposed": Peer(recomposed),
    "recomposed, BN folded": Peer(recomposed_folded),
    "save what is needed": Peer(save_needed),
    "full": Peer(full, "weights"),
    "frozen bound": Peer(frozen_bound, "nothing"),
    "torch.compile of official": Peer(compiled(official), compiled=True),
    "torch.compile of recomposed": Peer(compiled(recomposed), compiled=True),
    "torch.compile of official, memory budget": Peer(
        compiled_within(official, BUDGET), compiled=True
    ),
    "svf_fast, unfused": Peer(ours(fuse=False)),
    "svf_fast": Peer(ours()),
    "svf_fast, 8 bits": Peer(ours(keep="int8"), judged_in="bfloat16"),
}
# What `fss train` makes of a backbone: the head trains in each of them.
REGIMES = {
    "freeze": Peer(lambda model, *_: model, "the head alone"),
    "official": PEERS["official"],
    "full": PEERS["full"],
    "svf_fast": PEERS["svf_fast"],
}
# One layer alone: no block to checkpoint, no batch norm to fold, but every strategy.
LAYER_PEERS = {
    name: peer
    for name, peer in PEERS.items()
    if name
    not in (
        "official, checkpoint per block",
        "recomposed, BN folded",
        "svf_fast, unfused",
        "svf_fast, 8 bits",
        "official, 8 bits",
        "torch.compile of official, memory budget",
    )
} | {f"svf_fast, {name}": Peer(ours(name)) for name in ("fold", "chain", "gram")}


class Recomposed(nn.Module):
    """A convolution of which the weight is composed anew at each call."""

    def __init__(self, layer: SVFConv2d) -> None:
        super().__init__()
        self.register_buffer("U", layer.U)
        self.register_buffer("V", layer.V)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.S = layer.S
        self.geometry = _geometry(layer)

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Fold in the affine ``scale·y + shift`` [Co] that follows."""
        self.U = self.U * scale[:, None]
        self.bias = shift if self.bias is None else scale * self.bias + shift

    def forward(self, x: Tensor) -> Tensor:
        weight = svf_fast.compose(self.U, self.S, self.V, self.geometry.groups)
        return functional.conv2d(x, weight, self.bias, *self.geometry)


class LeanSVFConv(nn.Module):
    """Conv V, mul S, conv U, keeping v alone."""

    def __init__(self, layer: SVFConv2d) -> None:
        super().__init__()
        self.register_buffer("U", layer.U[:, :, None, None])
        self.register_buffer("V", layer.V)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.S = layer.S
        self.geometry = _geometry(layer)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        v = FrozenConv.apply(x, self.V, None, self.geometry)
        scaled = v * self.S.to(x.dtype)[:, None, None]
        return FrozenConv.apply(scaled, self.U, self.bias, self.geometry.pointwise())


class FrozenConv(torch.autograd.Function):
    """A convolution with constant weight and bias: dx needs neither x nor y.

    The constants are cast to the dtype of x each time, so that no cast ones are kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.weight, ctx.shape, ctx.geometry = weight, x.shape, geometry
        bias = None if bias is None else bias.to(x.dtype)
        return convolution(x, weight.to(x.dtype), bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        weight = ctx.weight.to(grad_y.dtype)
        grad_x = convolution_input_gradient(grad_y, weight, ctx.shape, ctx.geometry)
        return grad_x, None, None, None


class LeanBatchNorm(nn.Module):
    """A batch norm in evaluation mode that does not train."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return FrozenBatchNorm.apply(x, self.norm)


class FrozenBatchNorm(torch.autograd.Function):
    """y = γ (x - μ)/σ + β with constants: dx = γ/σ · dy."""

    @staticmethod
    def forward(ctx, x, norm):
        ctx.scale = _affine(norm)[0].to(x.dtype)[:, None, None]
        return norm(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return grad_y * ctx.scale, None


class LeanReLU(nn.Module):
    """ReLU in place."""

    def forward(self, x: Tensor) -> Tensor:
        return MaskedReLU.apply(x)


class MaskedReLU(torch.autograd.Function):
    """ReLU in place that keeps where it was positive, one byte per element."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x > 0)
        ctx.mark_dirty(x)
        return x.relu_()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (positive,) = ctx.saved_tensors
        return grad_y * positive


@functools.cache
def compiler_missing() -> str:
    """Return why torch.compile does not work here; "" if it does."""
    # one code object serves many blocks and sizes: each is compiled, none falls back to eager
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:  # whatever it is, it is the reason
        return f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0][:160]}"
    return ""


def parts(model: nn.Module, layers: Layers) -> list[nn.Module]:
    """Return the modules that `layers` names; the model itself for None."""
    return [model] if layers is None else [model.get_submodule(name) for name in layers]


def _replace(model, layers: Layers, kind: type, make: Callable) -> nn.Module:
    """Replace each module of a kind by ``make(module)``."""
    for part in parts(model, layers):
        for name, module in list(part.named_modules()):
            if isinstance(module, kind):
                part.set_submodule(name, make(module))
    return model


def _pairs(model, layers: Layers, kind: type) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield parent and names of each convolution of a kind that a batch norm follows."""
    for part in parts(model, layers):
        for parent in list(part.modules()):
            names = list(parent._modules)
            for first, second in itertools.pairwise(names):
                conv, norm = parent._modules[first], parent._modules[second]
                if isinstance(conv, kind) and isinstance(norm, nn.BatchNorm2d):
                    yield parent, first, second


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift [C] of a batch norm in evaluation mode."""
    scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias.detach() - scale * norm.running_mean


def _geometry(layer: SVFConv2d) -> Geometry:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"padding: expected zeros in numbers, got {layer!r}")
    return Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
