"""HDMNet: Peng et al., "Hierarchical Dense Correlation Distillation", CVPR 2023.

The published code is the reference where it says more than the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fss.models.backbone import Backbone
from fss.models.ensemble import WithBaseLearner, gram_distance, gram_matrix
from fss.models.episode import Prediction
from fss.models.features import Features, Maps, Supports
from fss.models.layers import pointwise, pointwise_cat
from fss.models.pooling import masked_average_pool, nearest, resize
from fss.models.prior_guided import PriorGuided
from svf_fast import cosine_max

_TEMPERATURE = 0.1
_LAYER_NORM_EPSILON = 1e-6


class Attention(nn.Module):
    """The projections of multi-head attention, without biases, and of its result.

    Args:
        width: channels.
        heads: number of heads, a divisor of `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """Split tokens [B, L, C] by head, [B, heads, L, C/heads]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Join what the heads found, [B, heads, L, C/heads], to tokens [B, L, C]."""
        return self.out(x.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Attention of a map to itself; the keys are of a map reduced by a convolution (SegFormer).

    Args:
        width: channels.
        heads: number of heads.
        reduction: kernel and stride of that convolution; 1 reduces nothing.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__(width, heads)
        self.reduction = reduction
        if reduction > 1:
            self.shrink = nn.Conv2d(width, width, reduction, stride=reduction)
            self.shrink_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Map tokens [B, h·w, C] of a map of size [h, w] to as many."""
        source = x
        if self.reduction > 1:
            maps = to_map(x, size)
            # a map smaller than the kernel, which their code refuses, is one key
            lacking = (max(0, self.reduction - side) for side in (size[1], size[0]))
            right, below = lacking
            if right or below:
                maps = functional.pad(maps, (0, right, 0, below))
            source = self.shrink_norm(to_tokens(self.shrink(maps)))
        query, key, value = self.query(x), self.key(source), self.value(source)
        query, key, value = (self.split(each) for each in (query, key, value))
        scale = 1 / (math.sqrt(query.shape[3]) + 1e-9)
        return self.join(functional.scaled_dot_product_attention(query, key, value, scale=scale))


class MatchingAttention(Attention):
    """The matching module: correlations c_ij of query i and support position j (section 3.3).

    With the cosine of their projections, c_ij = cos(q_i, k_j) / 0.1, each position of the support
    distributes its value over the query,

        out_i = Σ_j m_j · exp(c_ij) / (Σ_i' exp(c_i'j)) · v_j

    where m_j is 1 in the foreground and 0 elsewhere; the sum of the weights of a query position is
    not 1. The mean of c_ij over the foreground and the heads is what correlation distillation
    compares; it needs no c_ij, because it is linear in k_j.
    """

    def forward(self, x: Tensor, supports: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Match queries [B, L, C] with supports [B, M, C] under a mask [B, M].

        Returns tokens [B, L, C] and mean correlations [B, L].
        """
        query, key = (
            functional.normalize(self.split(project(tokens)), dim=3)
            for project, tokens in ((self.query, x), (self.key, supports))
        )
        mask = mask[:, None, :, None]
        value = self.split(self.value(supports)) * mask.to(x.dtype)
        attention = (query @ key.mT / _TEMPERATURE).softmax(dim=2)
        out = self.join(attention.to(value.dtype) @ value)
        mean_key = (key * mask).sum(dim=2, keepdim=True) / (mask.sum(dim=2, keepdim=True) + 1e-9)
        correlation = (query * mean_key).sum(dim=3).mean(dim=1) / _TEMPERATURE
        return out, correlation


class Block(nn.Module):
    """Attention and a feed-forward part with a depthwise 3×3 convolution, each with a shortcut.

    Args:
        attention: what maps tokens to tokens.
        width: channels.
        dropout: probability that a value is dropped.
    """

    def __init__(self, attention: Attention, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON)
        hidden = 4 * width
        self.feedforward = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, width, 1),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Map tokens [B, h·w, C] of a map of size [h, w] to as many, by attention to themselves."""
        return self._add(x, self.attention(self.norm1(x), size), size)

    def match(
        self, x: Tensor, size: Sequence[int], supports: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map tokens to as many by attention to supports, see `MatchingAttention`."""
        found, correlation = self.attention(self.norm1(x), self.norm1(supports), mask)
        return self._add(x, found, size), correlation

    def _add(self, x: Tensor, found: Tensor, size: Sequence[int]) -> Tensor:
        x = x + self.dropout(found)
        return x + to_tokens(self.feedforward(to_map(self.norm2(x), size)))


class Stage(nn.Module):
    """A convolution that may halve the map, and two blocks of self-attention.

    Args:
        width: channels.
        kernel, stride: of the convolution.
        heads, reduction: of the attention.
        dropout: probability that a value is dropped.
    """

    def __init__(
        self, width: int, kernel: int, stride: int, heads: int, reduction: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(width, width, kernel, stride, padding=stride // 2)
        self.embed_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON)
        self.blocks = nn.ModuleList(
            Block(SelfAttention(width, heads, reduction), width, dropout) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map [B, C, h, w] to tokens [B, h'·w', C] and their size [h', w']."""
        x = self.embed(x)
        size = (x.shape[2], x.shape[3])
        x = self.embed_norm(to_tokens(x))
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x), size


class HDMNet(WithBaseLearner, PriorGuided):
    """The hierarchically decoupled matching network, with BAM's base learner and ensemble.

    Layers 2 and 3 of the backbone are reduced to `channels` channels, for query and support each,
    and merged with the support's mean feature under its mask, the query's also with two
    similarities: the largest cosine of each of its positions to the support's foreground, in layer
    4 and in what the base learner's classifier finds there. Each of three stages of self-attention
    (strides 1, 2, 2) sees query and supports apart. Then, from the coarsest map to the finest, the
    query is matched with its supports, see `MatchingAttention`, and what was found at one scale is
    added to the next.

    As published:

    - supports are photos whose background is 0 (the mean colour) before the backbone;
    - a map is resized to the next scale, and what is distilled to the size of the finer map,
      without aligned corners; all else with;
    - the batch norms of the head never use the statistics of a batch, and their stored ones stay 0
      and 1: they are a trained scale and shift per channel;
    - the weights of K supports stay as they are drawn: no optimizer has them. They are not given
      back to the supports whose distances they are of, see `ShotWeights`: the order of the supports
      matters a little. Any other K than that of training needs a network of its own;
    - the distillation has no weight of its own, nor a temperature.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        base_classes: number of base classes.
        shots: supports per query (K) that the ensemble is for; a single one needs no weight.
        channels: width of the reduced features.
        dropout: probability that a reduced channel is dropped; unless it is 0, the transformer
            drops 0.1 of its values too.
        width: channels of the transformer, a multiple of 8.
    """

    transformer = ("stages.", "matching.", "parsing.", "classifier.")
    official_names: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        backbone: Backbone,
        base_classes: int,
        shots: int = 1,
        channels: int = 256,
        dropout: float = 0.5,
        width: int = 64,
    ) -> None:
        super().__init__(backbone, channels, dropout)
        self.query_merge = pointwise(2 * channels + 2, width)
        self.support_merge = pointwise(2 * channels, width)
        dropped = 0.1 if dropout else 0.0
        self.stages = nn.ModuleList(
            Stage(width, kernel, stride, heads, reduction, dropped)
            for kernel, stride, heads, reduction in ((1, 1, 2, 4), (3, 2, 4, 2), (3, 2, 8, 1))
        )
        self.matching = nn.ModuleList(
            nn.ModuleDict(
                {
                    "block": Block(MatchingAttention(width, heads=2), width, dropped),
                    "merge": _merge(width + 2, width),
                }
            )
            for _ in self.stages
        )
        self.parsing = nn.ModuleList(
            nn.Sequential(*_bottleneck(width, width), nn.BatchNorm2d(width), nn.ReLU())
            for _ in self.stages
        )
        self.classifier = nn.Sequential(*_bottleneck(width, 2))
        self.add_ensemble(backbone, base_classes, shots, restore_order=False)
        if shots > 1:
            self.shot_weights.requires_grad_(False)

    def train(self, mode: bool = True) -> HDMNet:
        """Set the mode of the head, but for its batch norms, which use stored statistics."""
        super().train(mode)
        for name, part in self.named_children():
            if name != "backbone":
                for module in part.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def maps(self, images: Tensor) -> Maps:
        """Return the photos: the backbone sees those of supports under their masks."""
        return (images,)

    def query_maps(self, *maps: Tensor) -> Maps:
        """Compute layers 2 to 4 of the queries and what the base learner finds in the last."""
        return self._layers(maps[0])

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute what the head reads of supports whose background is 0.

        In this order: tokens [N, L, C'] and masks [N, L] at each of the scales, the prototype
        [N, C, 1, 1], the Gram matrix of layer 2, and layer 4, what the base learner finds there
        [N, C'', h, w], and their mask [N, h·w].
        """
        photos = maps[0] * (masks == 1).unsqueeze(1)
        with self._recorded(photos):
            low, middle, high, embedded = self._layers(photos)
        reduced = pointwise_cat(self.support_reduce, middle, low)
        prototype = masked_average_pool(reduced, self.shrink_mask(masks, middle))
        merged = pointwise_cat(self.support_merge, reduced, prototype.to(reduced.dtype))
        foreground = (masks == 1).to(self._parameter().dtype)
        scales: list[Tensor] = []
        for tokens, size in self._encode(merged):
            scales += [tokens, nearest(foreground, size).flatten(1)]
        mask = nearest(foreground, high.shape[-2:]).flatten(1)
        return Supports((*scales, prototype, gram_matrix(low), high, embedded, mask))

    def head(
        self, features: Features, size: Sequence[int], base_class: Tensor | None = None
    ) -> Prediction:
        """Match the queries with their supports, and combine that with the base learner.

        Auxiliary are, while training, the logits of the meta learner [B, 2, h, w] and of the base
        learner [B, 1 + n, h, w], and mean correlations [B, h', w'] from the coarsest scale to the
        finest.

        Args:
            features: of K supports; K is 1 or `shots`.
            size: height and width of the logits.
            base_class: int64 [B], index of the episode's class among the base classes, -1 for a
                novel one; needed while training, and else not used.
        """
        _, low, middle, high, embedded = features.query
        *scales, prototypes, grams, support_high, support_embedded, mask = features.supports
        distances = gram_distance(gram_matrix(low), grams)
        distance = (self.weigh(distances) * distances).sum(dim=1)

        similarity = torch.cat(
            [
                _similarity(embedded, support_embedded, mask),
                _similarity(high, support_high, mask),
            ],
            dim=1,
        )
        query = pointwise_cat(self.query_reduce, middle, low)
        similarity = similarity.to(query.dtype)
        prototype = prototypes.mean(dim=1).to(query.dtype)
        query = pointwise_cat(self.query_merge, query, prototype, 10 * similarity)
        meta, correlations = self._match(query, scales, similarity)
        base = self.base_learner.classify(embedded)
        final = self.combine(meta, base, distance, base_class, size)
        return Prediction(final, (meta, base, *correlations) if self.training else ())

    def loss(
        self,
        prediction: Prediction,
        query_mask: Tensor,
        query_base_mask: Tensor,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Add to the losses of both learners and their ensemble the mean of the distillations.

        The coarsest correlation is distilled from the mask, each finer one from the next coarser,
        see `distillation`.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 ignored.
            query_base_mask: int64 [B, H, W]; 0 background, 1 to n the base classes, 255 ignored.
            class_weight: weights of background and foreground [2], not for the base learner; each
                mean is divided by the weights' sum.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        loss = super().loss(prediction, query_mask, query_base_mask, class_weight)
        correlations = prediction.auxiliary[2:]
        if correlations:
            dtype = torch.promote_types(correlations[0].dtype, torch.float32)
            teacher = torch.where(query_mask == 1, 1.0, -1e9).to(dtype)
            terms = []
            for correlation in correlations:
                terms.append(distillation(teacher, correlation.to(dtype)))
                teacher = correlation.detach().to(dtype)
            loss = loss + torch.stack(terms).mean().to(loss.dtype)
        return loss

    def _layers(self, photos: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute layers 2, 3 and 4 of photos, and what the base learner finds in the last."""
        low, middle = self.backbone.features(photos)
        high = self.backbone.layer4(middle)
        return low, middle, high, self.base_learner.embed(high)

    def _encode(self, x: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """Compute tokens [B, h·w, C] and their size [h, w] at each scale, the finest first."""
        encoded = []
        for stage in self.stages:
            tokens, size = stage(x)
            encoded.append((tokens, size))
            x = to_map(tokens, size)
        return encoded

    def _match(
        self, query: Tensor, scales: Sequence[Tensor], similarity: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute logits [B, 2, h, w] and mean correlations, the coarsest first.

        Args:
            query: merged features [B, C, h, w].
            scales: tokens [B, K, L, C] and masks [B, K, L] of the supports at each scale.
            similarity: of the query to its supports [B, 2, h, w].
        """
        encoded = self._encode(query)
        found: Tensor | None = None
        correlations = []
        for n in reversed(range(len(encoded))):
            tokens, size = encoded[n]
            supports, mask = (each.flatten(1, 2) for each in scales[2 * n : 2 * n + 2])
            match = self.matching[n]
            out, correlation = match["block"].match(tokens, size, supports, mask)
            correlations.append(correlation.unflatten(1, size))
            x = match["merge"](torch.cat([to_map(out, size), resize(similarity, size)], dim=1))
            if found is None:
                found = self.parsing[n](x)
            else:
                found = resize(found, size, align_corners=False)
                found = found + self.parsing[n](x + found)
        return self.classifier(found), correlations


def distillation(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the divergence of two correlation maps as distributions over positions.

    With p_t and p_s their softmax over all positions, Σ p_t·(log p_t - log p_s), the mean of the
    batch (section 3.4); 1e-12 is added before each logarithm. Maps [B, h, w]; the teacher is
    resized to the student's size, without aligned corners.
    """
    teacher = resize(teacher.unsqueeze(1), student.shape[-2:], align_corners=False).squeeze(1)
    target, found = (each.flatten(1).softmax(dim=1) for each in (teacher, student))
    terms = target * ((target + 1e-12).log() - (found + 1e-12).log())
    return terms.sum(dim=1).mean()


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Lay out tokens [B, h·w, C] as a map [B, C, h, w]."""
    return tokens.mT.unflatten(2, (size[0], size[1]))


def to_tokens(maps: Tensor) -> Tensor:
    """List the positions of a map [B, C, h, w] as tokens [B, h·w, C]."""
    return maps.flatten(2).mT


def _similarity(query: Tensor, supports: Tensor, mask: Tensor) -> Tensor:
    """Compute the largest cosine to the foreground, the mean of K supports: [B, 1, h, w].

    query [B, C, h, w], supports [B, K, C, h, w], mask [B, K, h·w]. The background has cosine 0.
    """
    shots = [
        cosine_max(query.flatten(2), support.flatten(2), foreground)
        for support, foreground in zip(supports.unbind(1), mask.unbind(1), strict=True)
    ]
    return torch.stack(shots).mean(dim=0).unflatten(1, query.shape[-2:]).unsqueeze(1)


def _merge(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build a 3×3 convolution, batch norm and ReLU; He's normal distribution by fan-out."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _bottleneck(channels: int, outputs: int) -> list[nn.Module]:
    """Build a 1×1, a 3×3 and a 1×1 convolution of four times the width, and batch norms between.

    As published there is no ReLU between them.
    """
    hidden = 4 * channels
    return [
        nn.Conv2d(channels, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.BatchNorm2d(hidden),
        nn.Conv2d(hidden, outputs, 1),
    ]


def _official_names() -> dict[str, str]:
    root = "transformer.mix_transformer."

    def block(ours: str, theirs: str) -> dict[str, str]:
        return {
            f"{ours}norm": f"{theirs}norm",
            f"{ours}attention.query.": f"{theirs}attn.attn.linear_q.",
            f"{ours}attention.key.": f"{theirs}attn.attn.linear_k.",
            f"{ours}attention.value.": f"{theirs}attn.attn.linear_v.",
            f"{ours}attention.out.": f"{theirs}attn.attn.linear_o.",
            f"{ours}attention.shrink.": f"{theirs}attn.sr.",
            f"{ours}attention.shrink_norm.": f"{theirs}attn.norm.",
            f"{ours}feedforward.": f"{theirs}ffn.layers.",
        }

    names = {
        "query_reduce.": "down_query.",
        "support_reduce.": "down_supp.",
        "query_merge.": "query_merge.",
        "support_merge.": "supp_merge.",
        "distance_merge.": "gram_merge.",
        "base_merge.": "cls_merge.",
        "shot_weights.layers.": "kshot_rw.",
        "base_learner.pool.": "ppm.",
        "base_learner.classifier.0.": "cls.0.",
        "base_learner.classifier.1.": "cls.1.",
        "base_learner.classifier.4.": "base_learnear.2.",
        "parsing.": f"{root}parse_layers.",
        "classifier.": f"{root}cls.",
    }
    for n in range(3):
        stage, match = f"{root}down_sample_layers.{n}.", f"{root}match_layers.{n}."
        names |= block(f"stages.{n}.blocks.0.", f"{stage}1.")
        names |= block(f"stages.{n}.blocks.1.", f"{stage}2.")
        names[f"stages.{n}.embed."] = f"{stage}0.projection."
        names[f"stages.{n}.embed_norm."] = f"{stage}0.norm."
        names[f"stages.{n}.norm."] = f"{stage}3."
        names |= block(f"matching.{n}.block.", f"{match}0.")
        names[f"matching.{n}.merge.0."] = f"{match}1.conv."
        names[f"matching.{n}.merge.1."] = f"{match}1.bn."
    return names


HDMNet.official_names = _official_names()
