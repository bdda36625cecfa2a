"""CyCTR's transformer: deformable self-attention and cycle-consistent cross-attention.

Zhang et al., "Few-Shot Segmentation via Cycle-Consistent Transformer", NeurIPS 2021, section 3;
deformable attention as in Zhu et al., "Deformable DETR", ICLR 2021, on one map; positions as in
Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.models.token_sampling import Drawn, draw_tokens

# Added to the attention to a token that is not to be seen. If no token is, all are, as published.
_UNSEEN = -10000.0


class DeformableAttention(nn.Module):
    """Each token looks at some points of the map, for each head at the places that it chooses.

    With the token's position p, pixels, and the values v of the map, of one head,

        out(x) = Σ_n a_n(x)·v(p + o_n(x)),   a = softmax(A(x + position)),  o = O(x + position)

    v between pixels is bilinear, and 0 outside of the map. Offsets begin at 1 to `points` pixels in
    the direction of the head, weights as a mean. Values of padded tokens are 0; while training so
    are some others, at random, and the rest stays as it is. Points are in float32 at least.

    Args:
        channels: of the tokens.
        heads: a divisor of `channels`.
        points: that a head looks at.
        dropout: probability that a weight is dropped, and that a token's values are.
    """

    def __init__(self, channels: int, heads: int, points: int = 9, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.points, self.dropout = heads, points, dropout
        self.offsets = nn.Linear(channels, heads * points * 2)
        self.weights = nn.Linear(channels, heads * points)
        self.values = nn.Linear(channels, channels, bias=False)
        self.project = nn.Linear(channels, channels, bias=False)
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, points + 1)
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.values, self.project):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, tokens: Tensor, position: Tensor, padded: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Compute [B, h·w, C].

        Args:
            tokens: of a map, row by row [B, h·w, C].
            position: added to them to choose points [B, h·w, C].
            padded: bool [B, h·w].
            size: h and w.
        """
        placed = tokens + position
        offsets = self.offsets(placed).unflatten(2, (self.heads, self.points, 2))
        weights = self.weights(placed).unflatten(2, (self.heads, self.points)).softmax(dim=3)
        weights = functional.dropout(weights, self.dropout, self.training)
        values = self.values(tokens)
        hidden = padded
        if self.training and self.dropout:
            hidden = hidden | (torch.rand(padded.shape, device=padded.device) < self.dropout)
        values = values.masked_fill(hidden[..., None], 0.0)
        return self.project(self._look(values, offsets, weights, size).to(tokens.dtype))

    def _look(
        self, values: Tensor, offsets: Tensor, weights: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Average values [B, h·w, C] at offsets [B, h·w, heads, points, 2], x and y in pixels."""
        height, width = size
        dtype = torch.promote_types(values.dtype, torch.float32)
        offsets = offsets.to(dtype)
        centers = [
            (torch.arange(side, dtype=dtype, device=values.device) + 0.5) / side
            for side in (width, height)
        ]
        x, y = (each.flatten()[:, None, None] for each in torch.meshgrid(*centers, indexing="xy"))
        places = torch.stack([x + offsets[..., 0] / width, y + offsets[..., 1] / height], dim=4)
        maps = values.to(dtype).mT.unflatten(1, (self.heads, -1)).flatten(0, 1)
        seen = functional.grid_sample(
            maps.unflatten(2, (height, width)),
            2 * places.transpose(1, 2).flatten(0, 1) - 1,
            align_corners=False,
        )
        weights = weights.to(dtype).transpose(1, 2).flatten(0, 1)
        seen = (seen * weights[:, None]).sum(dim=3)
        return seen.unflatten(0, (-1, self.heads)).flatten(1, 2).mT


class CycleAttention(nn.Module):
    """Tokens of the query attend to those tokens of the supports that are cycle-consistent.

    For each head, with A_ij = q_i·k_j/√d of query token i and support token j,

        i* = argmax_i A_ij,   j* = argmax_j A_i*j,   j is consistent if mask(j*) = mask(j)

    (the paper's equation 3). The other ones are not seen by any query token, nor are padded ones;
    while training some are spared, at random.

    Args:
        channels: of the tokens.
        heads: a divisor of `channels`.
        dropout: probability that an attention is dropped, that an output is, and that a token is
            spared.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.project = (
            nn.Linear(channels, channels, bias=False) for _ in range(4)
        )
        for linear in (self.query, self.key, self.value, self.project):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, tokens: Tensor, supports: Tensor, drawn: Drawn) -> Tensor:
        """Compute [B, N, C] for tokens [B, N, C] of the query and [B, n, C] drawn of supports."""
        query, key, value = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, tokens), (self.key, supports), (self.value, supports))
        )
        unseen = ~self.consistent(query, key, drawn)
        if self.training and self.dropout:
            unseen &= torch.rand(unseen.shape, device=unseen.device) >= self.dropout
        bias = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill(unseen | drawn.padded[:, None], _UNSEEN)
        if drawn.valid is not None:
            bias = bias.masked_fill(~drawn.valid[:, None], -math.inf)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(
            query, key, value, bias[:, :, None].expand(-1, -1, tokens.shape[1], -1), dropout
        )
        out = self.project(seen.transpose(1, 2).flatten(2))
        return functional.dropout(out, self.dropout, self.training)

    @torch.no_grad()
    def consistent(self, query: Tensor, key: Tensor, drawn: Drawn) -> Tensor:
        """Tell which support tokens are consistent, bool [B, heads, n].

        Args:
            query, key: [B, heads, N, d] and [B, heads, n, d].
            drawn: of these support tokens.
        """
        found = []
        for one, other in zip(query.unbind(1), key.unbind(1), strict=True):  # a head at a time
            attention = one @ other.mT
            nearest = attention.argmax(dim=1)
            if drawn.valid is not None:
                attention = attention.masked_fill(~drawn.valid[:, None], -math.inf)
            back = attention.argmax(dim=2).gather(1, nearest)
            found.append(drawn.foreground.gather(1, back) == drawn.foreground)
        return torch.stack(found, dim=1)


class CycleLayer(nn.Module):
    """Self-attention of the query, then attention to its supports, each with a feed-forward part.

    After each of the four a residual and a layer norm.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = DeformableAttention(channels, heads, dropout=dropout)
        self.cross_attention = CycleAttention(channels, heads, dropout)
        self.feed_forward = nn.ModuleList(_feed_forward(channels, dropout) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(4))

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        padded: Tensor,
        size: Sequence[int],
        supports: Tensor,
        drawn: Drawn,
    ) -> Tensor:
        """Compute [B, h·w, C]; see `DeformableAttention` and `CycleAttention`."""
        x = tokens
        x = self.norms[0](x + self.dropout(self.self_attention(x, position, padded, size)))
        x = self.norms[1](x + self.feed_forward[0](x))
        x = self.norms[2](x + self.cross_attention(x, supports, drawn))
        return self.norms[3](x + self.feed_forward[1](x))


class CycleTransformer(nn.Module):
    """Brings what supports show into the features of a query.

    The support tokens of each layer are drawn anew while training; otherwise the first draw serves
    all layers, as in the published code. See `draw_tokens`.

    Args:
        channels: a multiple of 12, of which there are then 12 heads, or of 8, for 8 heads.
        dropout: of both attentions and of the feed-forward parts.
        depth: number of layers.
    """

    def __init__(self, channels: int = 256, dropout: float = 0.1, depth: int = 2) -> None:
        super().__init__()
        if channels % 12 and channels % 8:
            raise ValueError(
                "model.channels: expected a multiple of 8 or 12, which the transformer's heads "
                f"share, got {channels}"
            )
        heads = 8 if channels % 12 else 12
        self.layers = nn.ModuleList(CycleLayer(channels, heads, dropout) for _ in range(depth))
        self.level = nn.Parameter(torch.empty(1, channels))
        nn.init.xavier_uniform_(self.level)

    def forward(
        self,
        query: Tensor,
        padding: Tensor,
        supports: Tensor,
        foreground: Tensor,
        padded: Tensor,
        seeds: Tensor,
    ) -> Tensor:
        """Compute [B, C, h, w].

        Args:
            query: features of the queries [B, C, h, w].
            padding: where these are padding, bool [B, h, w].
            supports: features of the supports [B, K, C, h, w].
            foreground: where these are the object, bool [B, K, h, w]; in each support somewhere,
                and somewhere not.
            padded: where they are padding, bool [B, K, h, w].
            seeds: of the draws, int64 [B].
        """
        shots = supports.shape[1]
        tokens = query.flatten(2).mT
        position = sine_position(padding, tokens.shape[2]).to(tokens.dtype) + self.level
        seen = supports.flatten(3).transpose(2, 3).flatten(1, 2)
        for number, layer in enumerate(self.layers):
            if self.training or not number:
                drawn = draw_tokens(
                    seeds, number, foreground.flatten(1), padded.flatten(1), shots, self.training
                )
                chosen = seen.gather(1, drawn.index[..., None].expand(-1, -1, seen.shape[2]))
            tokens = layer(tokens, position, padding.flatten(1), query.shape[2:], chosen, drawn)
        return tokens.mT.unflatten(2, query.shape[2:])


def sine_position(padding: Tensor, channels: int) -> Tensor:
    """Compute DETR's position [B, h·w, channels] of each pixel, float32, y before x.

    Pixels that are not padding are numbered by row and by column, from 1 to n. Of number i half of
    the channels are sin(f) and cos(f) in turn, f = 2π·i/(n + 1e-6) / 10000^(2k/(channels/2)).

    Args:
        padding: bool [B, h, w].
        channels: a multiple of 4.
    """
    half = channels // 2
    powers = torch.arange(half, dtype=torch.float32, device=padding.device) // 2 * 2 / half
    waves = []
    for dim in (1, 2):
        number = (~padding).cumsum(dim).float()
        last = number.narrow(dim, number.shape[dim] - 1, 1)
        angle = (number / (last + 1e-6) * (2 * math.pi))[..., None] / 10000**powers
        waves.append(torch.stack([angle[..., ::2].sin(), angle[..., 1::2].cos()], dim=4).flatten(3))
    return torch.cat(waves, dim=3).flatten(1, 2)


def _feed_forward(channels: int, dropout: float) -> nn.Sequential:
    """Build two linear layers without bias, the inner three times as wide."""
    layers = nn.Sequential(
        nn.Linear(channels, 3 * channels, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(3 * channels, channels, bias=False),
        nn.Dropout(dropout),
    )
    for linear in (layers[0], layers[3]):
        nn.init.xavier_uniform_(linear.weight)
    return layers
