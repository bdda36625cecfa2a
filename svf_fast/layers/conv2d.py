"""SVFConv2d: a frozen convolution of which the singular values train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from svf_fast.layers.factored import Factored
from svf_fast.ops.convolution import Geometry
from svf_fast.ops.core import Core
from svf_fast.ops.svf_conv2d import paper_layers, svf_conv2d
from svf_fast.svd import Factors, check_weight


class SVFConv2d(Factored):
    """``y = U (S ⊙ (Vᵀ * x)) + bias`` where U and V are frozen and S trains (SVF paper, sec. 3.2).

    The arguments are those of ``torch.nn.Conv2d``; its random weight is decomposed. To
    convert a trained layer use :meth:`from_conv`, for a model :func:`svf_fast.convert`.

    Args:
        strategy: how the layer computes and what it keeps for the backward pass: ``"reference"``
            (the paper's three layers), ``"fold"``, ``"chain"``, ``"gram"``, or ``"auto"``: ``gram``
            unless the spectrum needs so many guarded directions that ``chain`` computes less.
            All give the same output and gradients up to rounding.
        trains: ``"S"``, or ``"log_scale"``: then S is frozen as pretrained, and the layer computes
            with ``S·exp(s')`` in its place, of which s' trains, with ``ds' = dS ⊙ S·exp(s')``. They
            keep their sign whatever the step, weight decay pulls them to the pretrained S, and a
            step of one size is the same change relative to each. A value of S that is 0 stays 0.
            Source: SVF (Sun et al. 2022), Table 23, appendix D.2.
        core: what trains beside S in Σ of ``y = U Σ (Vᵀ * x) + bias``, per group: ``"diag"``,
            nothing; ``"band:k"``, the entries with ``|i - j| <= k``; ``"block:b"``, those of the
            blocks of b along the diagonal; ``"lowrank:r"``, ``Σ = diag(S) + A Bᵀ``. It starts at 0,
            so that the layer computes what it did before (A is drawn, as in LoRA, and B is 0), and
            keeps no more for the backward pass than ``"diag"``. Of a rank of 1 all are ``"diag"``.

    Attributes:
        U [Co, R], V [G·R, Ci/G, kh, kw]: buffers. R = min(Co/G, Ci/G·kh·kw) values per group.
        S [G·R]: the parameter that trains, in descending order at conversion; in float32 (float64)
            whatever dtype the layer is converted to. With ``trains="log_scale"`` a buffer.
        log_scale [G·R]: s', which trains from 0 on in the dtype of S; None with ``trains="S"``.
        off_diagonal [G, n]: with ``"band:k"`` and ``"block:b"``, the diagonals of Σ beside S, block
            after block, from the lowest to the highest; trains in the dtype of S.
        core_A, core_B [G, R, r]: A and B of ``"lowrank:r"``; they train in the dtype of S.
        bias [Co]: a parameter that does not train (set ``requires_grad`` to change that), or None.

    Shapes: x [N, Ci, H, W] or [Ci, H, W] -> [N, Co, Ho, Wo] or [Co, Ho, Wo].

    Raises, when called: TypeError (x is no tensor, or of another dtype than the factors outside of
    autocast), ValueError (rank, channels or device of x).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        strategy: str = "auto",
        trains: str = "S",
        core: str | Core = "diag",
    ):
        super().__init__(strategy, trains, core)
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._configure(conv, None)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        strategy: str = "auto",
        factors: Factors | None = None,
        trains: str = "S",
        core: str | Core = "diag",
    ) -> SVFConv2d:
        """Return the layer that computes what ``conv`` does, to rounding; shares no memory with it.

        ``factors``: the decomposition, where it is known already; taken for the pretrained one.

        Raises TypeError when ``conv`` is not an ``nn.Conv2d``, or one with a forward of its own,
        which may use its weight in its own way; :func:`svf_fast.convert` looks into these.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        for name in ("forward", "_conv_forward"):
            if name in vars(conv) or getattr(type(conv), name) is not getattr(nn.Conv2d, name):
                raise TypeError(
                    f"conv: expected the {name} of nn.Conv2d, got a {type(conv).__name__} with its "
                    "own; svf_fast.convert converts those that compute a convolution"
                )
        layer = cls.__new__(cls)
        Factored.__init__(layer, strategy, trains, core)
        layer._configure(conv, factors)
        layer.train(conv.training)
        return layer

    def _configure(self, conv: nn.Conv2d, factors: Factors | None) -> None:
        check_weight(conv.weight)
        # of the weight that is there now: it may have been replaced since construction
        self.out_channels, inner, *kernel = conv.weight.shape
        self.in_channels, self.kernel_size = inner * conv.groups, tuple(kernel)
        self.stride, self.dilation = as_pair(conv.stride), as_pair(conv.dilation)
        self.padding = conv.padding if isinstance(conv.padding, str) else as_pair(conv.padding)
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        self._reversed_padding_repeated_twice = tuple(conv._reversed_padding_repeated_twice)
        self._adopt(conv.weight, conv.bias, factors, conv.groups)

    @property
    def explicit_padding(self) -> tuple[int, ...]:
        """How far x is padded: left, right, top, bottom."""
        return explicit_padding(self)

    @property
    def pads_outside(self) -> bool:
        """Whether x is padded in a pass of its own: unevenly, or not with zeros."""
        left, right, top, bottom = explicit_padding(self)
        return self.padding_mode != "zeros" or left != right or top != bottom

    @property
    def geometry(self) -> Geometry:
        """Stride, padding inside the convolution, dilation and groups, as they are set now."""
        left, right, top, bottom = explicit_padding(self)
        padding, zeros, stride = (top, left), self.padding_mode == "zeros", as_pair(self.stride)
        if not zeros or left != right or top != bottom:
            padding = (0, 0)
        if zeros and self.padding == "same" and stride != (1, 1):
            raise ValueError(
                f"SVFConv2d: padding 'same' expects a stride of 1, as nn.Conv2d does, got {stride}"
            )
        U, V = self._buffers["U"], self._buffers["V"]
        assert U is not None and V is not None
        if self.groups * U.shape[1] != V.shape[0]:
            raise ValueError(
                f"SVFConv2d: groups: expected {V.shape[0] // U.shape[1]}, by which the weight was "
                f"decomposed, got {self.groups}; set it before the conversion"
            )
        return Geometry(stride, padding, as_pair(self.dilation), self.groups)

    @property
    def kernel(self) -> Tensor:
        return self.V

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype(x, "SVFConv2d")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"SVFConv2d: expected x of shape [N, {self.in_channels}, H, W] or "
                f"[{self.in_channels}, H, W], got {list(x.shape)}"
            )
        if x.dim() == 3:
            return self.forward(x[None])[0]
        x = x.to(dtype)
        if self.pads_outside:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, explicit_padding(self), mode=mode)
        conv = self.convolution(dtype)
        if conv is not None:
            return svf_conv2d(x, conv, self.bias)
        return paper_layers(x, self.U, self.differentiable_core, self.V, self.bias, self.geometry)

    def merged(self) -> nn.Conv2d:
        """Return the plain ``nn.Conv2d`` with the composed weight; shares no memory with it."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            groups=self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        conv.stride, conv.padding, conv.dilation = self.stride, self.padding, self.dilation
        conv.padding_mode = self.padding_mode
        conv._reversed_padding_repeated_twice = list(self._reversed_padding_repeated_twice)
        conv.weight = nn.Parameter(self.composed_weight(), self.weight_trained)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), self.weight_trained)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )
        if self.groups != 1:
            text += f", groups={self.groups}"
        return f"{text}, {self.repr_of_factors()}"

    def __setstate__(self, state):
        if "explicit_padding" in state:  # pickled before it followed the padding
            state = {**state, "_reversed_padding_repeated_twice": state["explicit_padding"]}
            del state["explicit_padding"]
        super().__setstate__(state)


def explicit_padding(conv: nn.Conv2d | SVFConv2d) -> tuple[int, ...]:
    """Return how far a convolution pads its input as it is set now: left, right, top, bottom.

    As ``nn.Conv2d`` does: zeros by its ``padding`` of this moment, in the other modes as it derived
    from the padding at construction.
    """
    if conv.padding_mode != "zeros":
        return tuple(conv._reversed_padding_repeated_twice)
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        weight = conv.V if isinstance(conv, SVFConv2d) else conv.weight
        height, width = (
            dilation * (size - 1)
            for dilation, size in zip(as_pair(conv.dilation), weight.shape[2:], strict=True)
        )
        return (width // 2, width - width // 2, height // 2, height - height // 2)
    top, left = as_pair(conv.padding)  # type: ignore[arg-type]
    return (left, left, top, top)


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of what torch takes as either: a number, or one or two of them."""
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if len(value) == 2 else (value[0], value[0])  # type: ignore[return-value]
