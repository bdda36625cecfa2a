"""SVFLinear: a frozen linear layer of which the singular values train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svf_fast.layers.factored import Factored
from svf_fast.ops import maps
from svf_fast.ops.convolution import Geometry
from svf_fast.ops.core import Core
from svf_fast.ops.svf_conv2d import paper_layers, svf_conv2d
from svf_fast.svd import Factors


class SVFLinear(Factored):
    """``y = U (S ⊙ (Vᵀ x)) + bias``, U and V frozen: :class:`SVFConv2d` for ``nn.Linear``.

    Attributes: U [out, R], V [R, in] buffers; S [R] trains, or log_scale [R] in its place; bias
    [out] frozen, or None.
    Shapes: x [..., in] -> [..., out]. Raises as SVFConv2d does.
    """

    reads_square = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        strategy: str = "auto",
        trains: str = "S",
        core: str | Core = "diag",
    ):
        super().__init__(strategy, trains, core)
        self._configure(nn.Linear(in_features, out_features, bias, device, dtype), None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        strategy: str = "auto",
        factors: Factors | None = None,
        trains: str = "S",
        core: str | Core = "diag",
    ) -> SVFLinear:
        """Return the layer that computes what ``linear`` does, to rounding; shares no memory.

        Raises TypeError when ``linear`` is not an ``nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        Factored.__init__(layer, strategy, trains, core)
        layer._configure(linear, factors)
        layer.train(linear.training)
        return layer

    def _configure(self, linear: nn.Linear, factors: Factors | None) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adopt(linear.weight, linear.bias, factors)

    @property
    def geometry(self) -> Geometry:
        return Geometry()

    @property
    def kernel(self) -> Tensor:
        return self.V[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype(x, "SVFLinear")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"SVFLinear: expected x of shape [..., {self.in_features}], got {list(x.shape)}"
            )
        positions = maps.of_tokens(x.to(dtype))
        conv = self.convolution(dtype)
        if conv is not None:
            y = svf_conv2d(positions, conv, self.bias)
        else:
            y = paper_layers(
                positions, self.U, self.differentiable_core, self.kernel, self.bias, Geometry()
            )
        return maps.to_tokens(y, x.shape)

    def merged(self) -> nn.Linear:
        """Return the plain ``nn.Linear`` with the composed weight; shares no memory with it."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.composed_weight(), self.weight_trained)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.weight_trained)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.repr_of_factors()}"
        )
