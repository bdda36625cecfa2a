"""Transformer blocks as networks have them, small: the forward passes of timm's and DINOv2's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """As timm's: torch's attention, norms of queries and keys, dropout."""

    def __init__(self, channels, heads, qk_norm=False, attention_drop=0.0, drop=0.0, bias=True):
        super().__init__()
        self.num_heads, self.head_dim = heads, channels // heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attention_drop)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask, dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class PlainAttention(Attention):
    """As DINOv2's without xFormers: products and a softmax."""

    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        B, N, C = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).reshape(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.head_dim**-0.5, qkv[1], qkv[2]
        attn = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)))


class LayerScale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drops a branch of some images."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = x.new_empty(shape).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class Mlp(nn.Module):
    def __init__(self, channels, hidden, act=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(channels, hidden), act()
        self.drop1, self.norm = nn.Dropout(drop), nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, channels), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    """As timm's ``Block``, of C channels; every option of it that leaves it a block to fuse."""

    attention = Attention

    def __init__(
        self,
        channels=16,
        heads=2,
        scaled=True,
        act=nn.GELU,
        norm=nn.LayerNorm,
        drop=0.0,
        drop_path=0.0,
        ratio=4,
        **options,
    ):
        super().__init__()
        self.norm1 = norm(channels, eps=1e-6)
        self.attn = self.attention(channels, heads, drop=drop, **options)
        self.ls1 = LayerScale(channels) if scaled else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(channels, eps=1e-6)
        self.mlp = Mlp(channels, ratio * channels, act, drop)
        self.ls2 = LayerScale(channels) if scaled else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DinoBlock(Block):
    """As DINOv2's ``NestedTensorBlock``: takes a tensor, or a list that it does not take here."""

    attention = PlainAttention

    def __init__(self, channels=16, heads=2, drop_path=0.0, **options):
        super().__init__(channels, heads, drop_path=drop_path, **options)
        self.sample_drop_ratio = drop_path

    def forward(self, x_or_x_list):
        if isinstance(x_or_x_list, Tensor):
            return self.forward_one(x_or_x_list)
        raise AssertionError

    def forward_one(self, x: Tensor) -> Tensor:
        def attn_residual_func(x: Tensor) -> Tensor:
            return self.ls1(self.attn(self.norm1(x)))

        def ffn_residual_func(x: Tensor) -> Tensor:
            return self.ls2(self.mlp(self.norm2(x)))

        if self.training and self.sample_drop_ratio > 0.0:
            x = x + self.drop_path1(attn_residual_func(x))
            return x + self.drop_path1(ffn_residual_func(x))
        x = x + attn_residual_func(x)
        return x + ffn_residual_func(x)


class CalledNorm(nn.LayerNorm):
    """As timm's ``LayerNorm``, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class CalledGelu(nn.Module):
    """As timm's ``GELU``."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x)


class TanhGelu(nn.GELU):
    def __new__(cls):
        return nn.GELU(approximate="tanh")


def drawn(module: nn.Module) -> nn.Module:
    """Frozen in evaluation mode, every scale and shift drawn."""
    for inner in module.modules():
        if isinstance(inner, nn.LayerNorm):
            nn.init.normal_(inner.weight)
            nn.init.normal_(inner.bias)
    return module.eval().requires_grad_(False)


BLOCKS = {
    "timm": Block,
    "timm without LayerScale": lambda: Block(scaled=False),
    "timm with norms of its own": lambda: Block(norm=CalledNorm, act=CalledGelu),
    "timm with norms of queries and keys": lambda: Block(qk_norm=True),
    "timm, tanh": lambda: Block(act=TanhGelu),
    "timm, narrow MLP": lambda: Block(ratio=1),
    "DINOv2": DinoBlock,
}
