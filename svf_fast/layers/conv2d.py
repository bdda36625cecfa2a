"""SVFConv2d: a frozen convolution of which the singular values train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from svf_fast.layers.factored import Factored
from svf_fast.ops.convolution import Geometry
from svf_fast.ops.svf_conv2d import paper_layers, svf_conv2d
from svf_fast.svd import Factors


class SVFConv2d(Factored):
    """``y = U (S ⊙ (Vᵀ * x)) + bias`` where U and V are frozen and S trains (SVF paper, sec. 3.2).

    The arguments are those of ``torch.nn.Conv2d``; its random weight is decomposed. To
    convert a trained layer use :meth:`from_conv`, for a model :func:`svf_fast.convert`.

    Args:
        strategy: how the layer computes and what it keeps for the backward pass: ``"reference"``
            (the paper's three layers), ``"fold"``, ``"chain"``, ``"gram"``, or ``"auto"``: ``gram``
            unless the spectrum needs so many guarded directions that ``chain`` computes less.
            All give the same output and gradients up to rounding.

    Attributes:
        U [Co, R], V [G·R, Ci/G, kh, kw]: buffers. R = min(Co/G, Ci/G·kh·kw) values per group.
        S [G·R]: the parameter that trains, in descending order at conversion.
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
    ):
        super().__init__(strategy)
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
        cls, conv: nn.Conv2d, strategy: str = "auto", factors: Factors | None = None
    ) -> SVFConv2d:
        """Return the layer that computes what ``conv`` does, to rounding; shares no memory with it.

        ``factors``: the decomposition of ``conv.weight``, where it is known already.

        Raises TypeError when ``conv`` is not an ``nn.Conv2d``.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        layer = cls.__new__(cls)
        Factored.__init__(layer, strategy)
        layer._configure(conv, factors)
        layer.train(conv.training)
        return layer

    def _configure(self, conv: nn.Conv2d, factors: Factors | None) -> None:
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        # what nn.Conv2d derives from 'same': left, right, top, bottom
        self.explicit_padding = tuple(conv._reversed_padding_repeated_twice)
        self._adopt(conv.weight, conv.bias, factors)

    @property
    def pads_outside(self) -> bool:
        """Whether x is padded in a pass of its own: unevenly, or not with zeros."""
        left, right, top, bottom = self.explicit_padding
        return self.padding_mode != "zeros" or left != right or top != bottom

    @property
    def geometry(self) -> Geometry:
        left, _, top, _ = self.explicit_padding
        padding = (0, 0) if self.pads_outside else (top, left)
        return Geometry(self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]

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
            x = functional.pad(x, self.explicit_padding, mode=mode)
        conv = self.convolution(dtype)
        if conv is not None:
            return svf_conv2d(x, conv, self.bias)
        return paper_layers(x, self.U, self.S, self.V, self.bias, self.geometry)

    def merged(self) -> nn.Conv2d:
        """Return the plain ``nn.Conv2d`` with the composed weight; shares no memory with it."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
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
        return f"{text}, rank={self.rank}, strategy={self.strategy!r}"
