"""What regimes other than SVF replace a convolution by, or append to a stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import svf_fast


class ComposedConv2d(nn.Module):
    """A convolution whose weight is computed from what trains, anew at every call.

    Gradients are autograd's, through the composition. The weight is composed in float32 at least,
    whatever the dtype of autocast. A bias is copied and does not train.

    Args:
        conv: the pretrained convolution; nothing of it is shared.

    Shapes: x [N, Ci, H, W] -> [N, Co, Ho, Wo].

    Raises:
        ValueError: grouped convolutions, or padding with anything but zeros, which no backbone of
            few-shot segmentation has.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                "conv: expected groups 1 and padding_mode 'zeros', got groups "
                f"{conv.groups} and {conv.padding_mode!r}"
            )
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), False)
        self.register_parameter("bias", bias)

    def composed_weight(self) -> Tensor:
        """Compute the weight [Co, Ci, kh, kw], differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.composed_weight()
        return functional.conv2d(
            x, weight.to(x.dtype), self.bias, self.stride, self.padding, self.dilation
        )


class FactoredConv2d(ComposedConv2d):
    """``W = U diag(S ⊙ exp(s')) V``, of which any of U, S, V and s' train.

    The names of the factors are those of `svf_fast.SVFConv2d`, which computes the same where S
    alone trains, or s' alone. Without S' there is no s'.

    Sources: SVF (Sun et al. 2022), Tables 19, 23 and 24. The paper has exp in Table 23 (appendix
    D.2); that S' of Table 24 is exp(s') too is our reading of "initialized with an identity".

    Args:
        conv: the pretrained convolution.
        U: left factor [Co, R].
        S: diagonal [R].
        V: right factor, folded back [R, Ci, kh, kw].
        trained: those of "U", "S", "V", "S'" which train; the others are buffers.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def __init__(
        self, conv: nn.Conv2d, U: Tensor, S: Tensor, V: Tensor, trained: tuple[str, ...]
    ) -> None:
        super().__init__(conv)
        for name, value in {"U": U, "S": S, "V": V}.items():
            factor = value.detach().to(conv.weight).contiguous()
            if name in trained:  # the one that was given stays as it is
                self.register_parameter(name, nn.Parameter(factor.clone()))
            else:
                self.register_buffer(name, factor)
        log_scale = nn.Parameter(torch.zeros_like(self.S)) if "S'" in trained else None
        self.register_parameter("log_scale", log_scale)

    def composed_weight(self) -> Tensor:
        """Compute ``U diag(S ⊙ exp(s')) V`` as [Co, Ci, kh, kw]."""
        dtype = torch.promote_types(self.S.dtype, torch.float32)
        S = self.S.to(dtype)
        if self.log_scale is not None:
            S = S * self.log_scale.to(dtype).exp()
        return svf_fast.compose(self.U, S, self.V)

    def extra_repr(self) -> str:
        trained = ", ".join(name for name, p in self.named_parameters() if p.requires_grad)
        return f"rank={len(self.S)}, trained: {trained}"


class ScaledConv2d(ComposedConv2d):
    """``S' W`` or ``W S'`` with a frozen W, folded to [Co, Ci·kh·kw], and S' = diag(exp(s')).

    Source: SVF (Sun et al. 2022), Table 22, whose S' starts as the identity; that it is exp(s') is
    our reading, after Table 23. Without exp weight decay would pull it to 0, with it to 1.

    Args:
        conv: the pretrained convolution.
        side: "output" scales the rows of W, s' [Co]; "input" its columns, s' [Ci·kh·kw].
    """

    weight: Tensor

    def __init__(self, conv: nn.Conv2d, side: str) -> None:
        super().__init__(conv)
        if side not in ("output", "input"):
            raise ValueError(f"side: expected output or input, got {side!r}")
        self.side = side
        self.register_buffer("weight", conv.weight.detach().clone())
        count = len(self.weight) if side == "output" else self.weight[0].numel()
        self.log_scale = nn.Parameter(self.weight.new_zeros(count))

    def composed_weight(self) -> Tensor:
        """Compute the scaled weight [Co, Ci, kh, kw]."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale = self.log_scale.to(dtype).exp()
        shape = (-1, 1, 1, 1) if self.side == "output" else self.weight.shape[1:]
        return self.weight.to(dtype) * scale.reshape(shape)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, side={self.side!r}"


class Adapter(nn.Module):
    """``x + up(relu(down(x)))`` with 1×1 convolutions; the identity at first, since up begins at 0.

    Sources: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019; SVF (Sun et al.
    2022), Table 10, which does not say how wide it is.

    Args:
        channels: of x.
        reduction: channels over those between down and up, which are at least one.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, C, H, W] to [N, C, H, W]."""
        return x + self.up(functional.relu(self.down(x)))


def random_rotation(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sample a rotation [size, size] uniformly (Haar measure) from torch's generator: det = 1.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups", 2007.
    """
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.slogdet(q).sign < 0:
        q[:, 0] = -q[:, 0]
    return q.to(dtype)
