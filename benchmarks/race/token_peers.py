"""What a user would pick to fine-tune a vision transformer, each as a conversion of a frozen one.

Of the same kind as those of `peers`, and as they are. LoRA stands for peft's (Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", 2022), on all linear layers.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import svf_fast
from benchmarks.race.peers import Convert, Layers, Peer, official, ours


def full(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Train all weights and biases of linear layers and norms."""
    return model.requires_grad_(True)


def frozen_bound(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
    """Train nothing: the bound, not a rival."""
    return model.requires_grad_(False)


def lora(rank: int) -> Convert:
    """Return a conversion that adds a trained product of two matrices to each linear layer."""

    def converted(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
        torch.manual_seed(0)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(name, LoRA(module, rank))
        return model

    return converted


class LoRA(nn.Module):
    """``linear(x) + scale · B A x`` with A [r, in] and B [out, r]; B begins as zeros."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float = 16) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.A = nn.Linear(linear.in_features, rank, bias=False)
        self.B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)
        self.A.to(linear.weight), self.B.to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.B(self.A(x)) * self.scale


def recomputed(keep: str = "exact") -> Convert:
    """Return svf_fast's conversion with blocks that compute the input of GELU twice."""

    def converted(model: nn.Module, layers: Layers = None, cache: Path | None = None) -> nn.Module:
        ours(keep=keep)(model, layers, cache)
        for module in model.modules():
            if isinstance(module, svf_fast.SVFTransformerBlock):
                module.recompute = True
        return model

    return converted


TOKEN_PEERS = {
    "official": Peer(official),
    "full": Peer(full, "weights"),
    "LoRA, rank 4": Peer(lora(4), "LoRA"),
    "LoRA, rank 16": Peer(lora(16), "LoRA"),
    "frozen bound": Peer(frozen_bound, "nothing"),
    "svf_fast, unfused": Peer(ours(fuse=False)),
    "svf_fast": Peer(ours()),
    "svf_fast, 8 bits": Peer(ours(keep="int8"), judged_in="bfloat16"),
    "svf_fast, recompute": Peer(recomputed()),
    "svf_fast, recompute, 8 bits": Peer(recomputed("int8"), judged_in="bfloat16"),
    "svf_fast, chain": Peer(ours("chain")),
}
