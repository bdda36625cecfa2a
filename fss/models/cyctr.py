"""CyCTR: Zhang et al., "Few-Shot Segmentation via Cycle-Consistent Transformer", NeurIPS 2021.

Where paper and published code differ, this is the code (YanFangCS/CyCTR-Pytorch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fss.models.backbone import Backbone
from fss.models.cyctr_transformer import CycleTransformer
from fss.models.episode import Prediction, check_target
from fss.models.features import Features, Maps, Supports
from fss.models.layers import classifier, pointwise, pointwise_cat, two_convolutions
from fss.models.loss import dice
from fss.models.pooling import masked_average_pool, nearest, resize
from fss.models.prior_guided import PriorGuided

_QKV = ("query", "key", "value")


def _transformer_names() -> dict[str, str]:
    """Map the beginnings of our transformer's names to theirs, which number across the layers."""
    names = {"cycle_transformer.level": "transformer.level_embed"}
    linears = {"offsets": "sampling_offsets", "weights": "attention_weights"}
    linears |= {"values": "value_proj", "project": "output_proj"}
    for n in range(2):
        parts = {f"self_attention.{a}.": f"qry_self_layers.{n}.{b}." for a, b in linears.items()}
        parts |= {f"cross_attention.{a}.": f"cross_layers.{n}.{a[0]}_fc." for a in _QKV}
        parts["cross_attention.project."] = f"cross_layers.{n}.proj."
        parts |= {f"norms.{i}.": f"layer_norms.{4 * n + i}." for i in range(4)}
        for i in range(2):
            parts[f"feed_forward.{i}.0."] = f"ffns.{2 * n + i}.layers.0.0."
            parts[f"feed_forward.{i}.3."] = f"ffns.{2 * n + i}.layers.1."
        names |= {f"cycle_transformer.layers.{n}.{a}": f"transformer.{b}" for a, b in parts.items()}
    return names


class CyCTR(PriorGuided):
    """Cycle-consistent transformer.

    Layers 2 and 3 are reduced as in PFENet. Each support is merged with its own prototype, the
    query with the mean prototype and the prior mask. A transformer lets the query attend to itself
    and to the tokens of its supports, see `CycleTransformer`; the query is segmented from its
    output. While training there is the way back: a prototype of the query under its true mask
    segments the supports.

    As in the published code, and other than in PFENet: the first block of a dilated layer keeps
    the dilation of the layer before; the prior compares with layer 4 of the whole support, masked
    afterwards; the loss is the dice loss of both channels' sigmoids.

    Which support tokens the transformer sees is random there, also in tests. Here it depends on
    `sampling` alone, a number of the episode. The order of the supports matters through it.

    Args:
        backbone: a backbone of output stride 8, or a VGG.
        channels: width of the head, a multiple of 8 or 12.
        dropout: probability that a reduced channel is dropped; unless it is 0, the classifiers
            and the transformer drop 0.1 of theirs too.
    """

    inputs = (*PriorGuided.inputs, "query_mask", "sampling", "query_padding")
    targets = (*PriorGuided.targets, "support_masks")
    backbone_options: ClassVar[Mapping[str, Any]] = {"late_dilation": True}
    transformer: ClassVar[tuple[str, ...]] = ("cycle_transformer.",)
    official_names: ClassVar[Mapping[str, str]] = {
        "backbone.": "backbone.body.",
        "query_reduce.": "adjust_feature_qry.",
        "support_reduce.": "adjust_feature_supp.",
        "query_merge.": "qry_merge_feat.",
        "support_merge.": "supp_merge_feat.",
        **_transformer_names(),
        "project.": "merge_multi_lvl_reduce.",
        "residual.": "merge_multi_lvl_sum.",
        "classifier.": "cls.",
        "back_project.": "pred_supp_qry_proj.",
        "back_merge.": "supp_init_merge.",
        "back_residual.": "supp_beta_conv.",
        "back_classifier.": "supp_cls.",
    }
    official_unused: ClassVar[tuple[str, ...]] = ("addtional_proj.",)

    def __init__(self, backbone: Backbone, channels: int = 256, dropout: float = 0.5) -> None:
        super().__init__(backbone, channels, dropout)
        dropped = 0.1 if dropout else 0.0
        self.query_merge = pointwise(2 * channels + 1, channels)
        self.support_merge = pointwise(2 * channels, channels)
        self.cycle_transformer = CycleTransformer(channels, dropped)
        self.project = pointwise(channels, channels)
        self.residual = two_convolutions(channels)
        self.classifier = classifier(channels, 2, dropped)
        self.back_project = pointwise(channels, channels)
        self.back_merge = pointwise(2 * channels, channels)
        self.back_residual = two_convolutions(channels)
        self.back_classifier = classifier(channels, 2, dropped)

    def maps(self, images: Tensor) -> Maps:
        """Compute layers 2, 3 and 4 of photos [N, 3, H, W], each [N, C, h, w]."""
        low, middle = self.backbone.features(images)
        return low, middle, self.backbone.layer4(middle)

    def query_maps(self, *maps: Tensor) -> Maps:
        """Compute nothing: the queries' layer 4 is among their `maps`."""
        return ()

    def support_features(self, maps: Maps, masks: Tensor) -> Supports:
        """Compute layer 4, the mask to put on it, and summaries.

        These are the prototype, the reduced features merged with it, which tokens of these are
        foreground and which padding, bool [N, h, w], and while training the reduced features. A
        support without foreground has some in its middle, one without background some in its
        corners: the transformer needs both.
        """
        low, middle, high = maps
        mask = self.shrink_mask(masks, middle)
        reduced = pointwise_cat(self.support_reduce, low, middle)
        prototype = masked_average_pool(reduced, mask)
        merged = pointwise_cat(self.support_merge, reduced, prototype)
        foreground, padded = (nearest(masks == n, middle.shape[2:]) for n in (1, 255))
        summaries = (prototype, merged, _with_both(foreground), padded)
        return Supports((*summaries, reduced) if self.training else summaries, mask, high)

    def query(self, features: Features) -> Tensor:
        """Reduce the features of the queries to [B, C, h, w]."""
        low, middle, _ = features.query
        return pointwise_cat(self.query_reduce, low, middle)

    def head(
        self,
        features: Features,
        size: Sequence[int],
        query_mask: Tensor | None = None,
        sampling: Tensor | None = None,
        query_padding: Tensor | None = None,
    ) -> Prediction:
        """Segment the queries; while training, the supports from them too.

        Auxiliary are then logits of the supports [B·K, 2, h, w], those of the first query first.

        Args:
            features: of the episodes.
            size: height and width of the logits.
            query_mask: uint8 or int64 [B, H, W], needed while training; 1 is foreground.
            sampling: int64 [B], the number of each episode that its random tokens depend on; None
                is 0 for all.
            query_padding: bool [B, H, W], what is no part of the query photo but was added to it;
                None is nothing.
        """
        prototypes, merged, foreground, padded, *supports = features.supports
        reduced = self.query(features)
        batch, (height, width) = len(reduced), reduced.shape[2:]
        if sampling is None:
            sampling = torch.zeros(batch, dtype=torch.int64, device=reduced.device)
        _check("sampling", sampling, (torch.int64,), [batch], reduced.device)
        if query_padding is None:
            padding = torch.zeros(batch, height, width, dtype=torch.bool, device=reduced.device)
        else:
            expected = [batch, *size]
            _check("query_padding", query_padding, (torch.bool,), expected, reduced.device)
            padding = nearest(query_padding, (height, width))

        query = pointwise_cat(
            self.query_merge, reduced, prototypes.mean(dim=1), features.priors.mean(dim=0)
        )
        fused = self.cycle_transformer(query, padding, merged, foreground, padded, sampling)
        fused = self.project(fused)
        fused = fused + self.residual(fused)
        logits = resize(self.classifier(fused), size)
        if not self.training:
            return Prediction(logits, ())
        expected = [batch, *size]
        dtypes = (torch.uint8, torch.int64)
        _check("query_mask", query_mask, dtypes, expected, reduced.device)
        back = self._way_back(fused, reduced, supports[0].flatten(0, 1), query_mask)
        return Prediction(logits, (back,))

    def _way_back(
        self, fused: Tensor, reduced: Tensor, supports: Tensor, query_mask: Tensor
    ) -> Tensor:
        """Segment supports [B·K, C, h, w] by the queries' prototypes, as logits [B·K, 2, h, w]."""
        query = self.back_project(fused) + reduced
        prototype = masked_average_pool(query, self.shrink_mask(query_mask, query))
        prototype = prototype.repeat_interleave(len(supports) // len(prototype), dim=0)
        merged = pointwise_cat(self.back_merge, supports, prototype)
        return self.back_classifier(merged + self.back_residual(merged))

    def loss(
        self,
        prediction: Prediction,
        query_mask: Tensor,
        support_masks: Tensor,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Sum the dice losses of the queries and, while training, of their supports.

        Pixels that are 255 are neither background nor foreground, and are pushed to be neither, as
        in the published code.

        Args:
            prediction: of this model.
            query_mask: uint8 or int64 [B, H, W]; 0 background, 1 foreground, 255 neither.
            support_masks: the same of the supports [B, K, H, W].
            class_weight: weights of background and foreground [2], see `dice`.

        Raises:
            TypeError, ValueError: a mask or weights of another dtype, shape or device.
        """
        check_target(prediction, query_mask, class_weight)
        loss = dice(prediction.logits, query_mask, class_weight)
        for logits in prediction.auxiliary:
            back = Prediction(resize(logits, prediction.logits.shape[2:]), ())
            masks = support_masks.flatten(0, 1)
            check_target(back, masks, class_weight, "support_masks")
            loss = loss + dice(back.logits, masks, class_weight)
        return loss


def _with_both(foreground: Tensor) -> Tensor:
    """Give masks [N, h, w] without foreground some in the middle; free the corners of full ones."""
    height, width = foreground.shape[1:]
    middle, corners = (torch.zeros_like(foreground[0]) for _ in range(2))
    rows, columns = (slice(max(0, side // 2 - 1), side // 2 + 1) for side in (height, width))
    middle[rows, columns] = True
    corners[:: max(1, height - 1), :: max(1, width - 1)] = True
    foreground = foreground | (middle & ~foreground.flatten(1).any(dim=1)[:, None, None])
    return foreground & ~(corners & foreground.flatten(1).all(dim=1)[:, None, None])


def _check(
    name: str,
    tensor: Tensor | None,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
) -> None:
    """Raise TypeError or ValueError unless an input is a tensor of this kind."""
    expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name}: expected {expected} {list(shape)}, got {got}")
    if list(tensor.shape) != list(shape) or tensor.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} on {device}, got {list(tensor.shape)} on "
            f"{tensor.device}"
        )
