"""Segmentation by comparison with the supports' features, without any training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.data.transforms import MEAN, STD
from fss.models.backbone import Backbone
from fss.models.episode import Prediction, check_episode
from fss.models.pooling import average_bins, resize
from fss.models.sharpen import box_mean, guided_filter, sharpen
from fss.models.weights import backbone_of

P, R = ParamSpec("P"), TypeVar("R")

# Chosen on training photos of Pascal-5i, one support each; benchmarks/LOG.md has what was tried.
_SHARPNESS = 15.0
_THRESHOLD = 0.06
_DENSE = 0.5
_NEAREST = 5
_OWN = 0.4
_OBJECT_SHARE, _BACKGROUND_SHARE = 0.15, 0.3
_RADIUS = 1 / 20

_CANDIDATES = torch.arange(-0.1, 0.201, 0.01)
"""Thresholds that are tried on the supports."""


def build_matching(
    weights: str, backbone: str | None = None, stride_on: str | None = None
) -> Matching:
    """Build matching on a pretrained backbone, at the output stride that suits its pictures.

    That is 32, with which networks are pretrained; the objects of the embedded one's pictures are
    too small for it. The arguments and errors are those of `backbone_of`.
    """
    stride = 8 if weights == "shapes" else 32
    return Matching(backbone_of(weights, backbone, stride_on, stride))


def matching_size(weights: str) -> int:
    """Return the side of the input at which weights are matched by default, pixels."""
    return 161 if weights == "shapes" else 513


class Examples(NamedTuple):
    """What `Matching` keeps of K supports.

    prototypes: per level, the mean features of background and object, unit vectors [2, C].
    positions: per level that is compared position by position, unit features [C, n] of the
        supports' background and of their object.
    shots: K.
    threshold: score above which a position belongs to the object.
    """

    prototypes: tuple[Tensor, ...]
    positions: tuple[tuple[Tensor, Tensor], ...]
    shots: int
    threshold: float


class Matching(nn.Module):
    """Compares each position of a query with the object and the background of the supports.

    The levels are the output of layer 3 of the backbone and of each block of layer 4; their
    features have length 1 at each position. The score of a position is, averaged over the levels,

        cos(f, object) - cos(f, background) + ½·(5 nearest of the object - of the background)

    where object and background are prototypes: the mean feature under the mask, of all supports
    alike. "Nearest" are the mean cosines with the 5·K most similar positions of the supports, of
    layers 3 and 4. The score then chooses what is most surely object and background in the query
    itself, whose means are mixed into the prototypes, two fifths, and the score is computed again:
    the query's own background is unlike the supports'. What lies above a threshold is the object;
    with several supports it is moved to what serves each best by the example of the others.
    A guided filter then lays the edges of the map on those of the picture:

        logits = (0, 15·(score - threshold)).

    Sources: PANet (Wang et al. 2019), section 3.3 (prototypes); Fan et al.,
    "Self-Support Few-Shot Semantic Segmentation", 2022 (prototypes of the query); `guided_filter`.

    Args:
        backbone: a pretrained backbone, which stays in evaluation mode. For photos the strides
            that it was trained with (output stride 32) and a larger picture are better and cheaper
            than the stride of 8 that trained heads want: see `build_matching`.
    """

    inputs = ("query_image", "support_images", "support_masks")

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def train(self, mode: bool = True) -> Matching:
        """Set the mode; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self, query_image: Tensor, support_images: Tensor, support_masks: Tensor
    ) -> Prediction:
        """Segment the queries into background and what the supports show.

        Differentiable in what trains in the backbone; nothing is recorded where nothing does.

        Args:
            query_image: normalized images [B, 3, H, W], H-1 and W-1 multiples of 8.
            support_images: K supports per query [B, K, 3, H, W].
            support_masks: integers or bool [B, K, H, W]; 1 is the object, 255 neither object nor
                background.

        Raises:
            TypeError, ValueError: inputs of another type, shape, size or device.
        """
        parameter = next(self.backbone.parameters())
        check_episode(query_image, support_images, support_masks, parameter)
        trains = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            images = torch.cat([query_image, support_images.flatten(0, 1)])
            unknown = torch.full_like(support_masks[:, 0], 255)  # a query's mask is not read
            masks = torch.cat([unknown, support_masks.flatten(0, 1)])
            batch, shots = support_masks.shape[:2]
            supports = torch.arange(batch, batch + batch * shots).reshape(batch, shots).tolist()
            return Prediction(self.compare(images, masks, list(enumerate(supports))), ())

    def compare(
        self, images: Tensor, masks: Tensor, episodes: Sequence[tuple[int, Sequence[int]]]
    ) -> Tensor:
        """Segment some of the images by the example of others, each image computed once.

        Args:
            images: normalized [N, 3, H, W], H-1 and W-1 multiples of 8.
            masks: integers or bool [N, H, W], see `forward`; a query's is not read.
            episodes: E queries with their supports, by their places among the images.

        Returns logits [E, 2, H, W]. Differentiable in what trains in the backbone.
        """
        levels = self._levels(images)
        margins = []
        for query, supports in episodes:
            chosen = list(supports)
            examples = _examples([x[chosen] for x in levels], masks[chosen])
            margins.append(_margin([x[query] for x in levels], examples, images[query]))
        return _logits(torch.stack(margins))

    @torch.no_grad()
    def encode_supports(self, images: Tensor, masks: Tensor) -> Examples:
        """Compute what `segment` reads of K supports, which serve any number of queries.

        Of images [K, 3, H, W] and masks [K, H, W] as in `forward`.
        """
        return _examples(self._levels(images), masks)

    @torch.no_grad()
    def segment(self, queries: Tensor, examples: Examples) -> Tensor:
        """Compute logits [B, 2, H, W] of queries [B, 3, H, W] by the example of supports."""
        levels = self._levels(queries)
        margins = [
            _margin([x[n] for x in levels], examples, image) for n, image in enumerate(queries)
        ]
        return _logits(torch.stack(margins))

    def sharpen(self, logits: Tensor, image: Tensor, picture: Tensor) -> Tensor:
        """Enlarge logits [2, h, w] to the size of their picture, and follow its edges there.

        Args:
            logits: of the part of the canvas that the picture covers.
            image: that part, normalized [3, h, w].
            picture: uint8 [H, W, 3].

        Returns [2, H, W].
        """
        margin = _at_least_float32(logits[1] - logits[0])[None, None]
        (found,) = sharpen(margin, colors(image[None]), picture)
        return torch.cat([torch.zeros_like(found), found])

    def _levels(self, images: Tensor) -> list[Tensor]:
        """Compute the levels of images [B, 3, H, W]: [B, C, h, w], of length 1 at each position."""
        return [
            functional.normalize(_at_least_float32(x), dim=1) for x in self.backbone.levels(images)
        ]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Compute in the dtype of the levels, which come first: differences of sums need its digits."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        (first, *_), *_ = arguments
        with torch.autocast(first.device.type, enabled=False):
            return function(*arguments, **named)

    return call


def _logits(margins: Tensor) -> Tensor:
    """Return logits [B, 2, H, W] of how far scores [B, H, W] are above the threshold."""
    return torch.stack([torch.zeros_like(margins), _SHARPNESS * margins], dim=1)


@_outside_autocast
def _examples(levels: Sequence[Tensor], masks: Tensor) -> Examples:
    """Compute what is kept of supports from their levels [K, C, h, w] and masks [K, H, W]."""
    shares = [_shares(masks, x) for x in levels]
    means = [_means(x, share) for x, share in zip(levels, shares, strict=True)]
    parted = [_part(x, share) for x, share in zip(_dense(levels), _dense(shares), strict=True)]
    every = list(range(len(masks)))
    examples = _of(means, parted, every)
    if len(every) == 1:
        return examples
    with torch.no_grad():
        ious = torch.zeros_like(_CANDIDATES)
        for left in every:
            others = _of(means, parted, [each for each in every if each != left])
            background, found = shares[0][left]
            inside = background + found > 0.25
            scores = _score([x[left] for x in levels], others, inside)[inside]
            predicted = scores > _CANDIDATES.to(scores)[:, None]
            truth = (found > background)[inside]
            both, either = (predicted & truth).sum(1), (predicted | truth).sum(1)
            ious += (both / either.clamp(min=1)).cpu()
        # the more supports, the more they are believed
        weight = (len(every) - 1) / (len(every) + 3)
        best = float(_CANDIDATES[ious.argmax()])
    return examples._replace(threshold=weight * best + (1 - weight) * _THRESHOLD)


def _of(
    means: Sequence[Tensor], parted: Sequence[Sequence[tuple[Tensor, Tensor]]], chosen: list[int]
) -> Examples:
    """Join the means and the positions of the chosen supports."""
    prototypes = tuple(functional.normalize(x[chosen].sum(0), dim=1) for x in means)
    positions = tuple(
        (torch.cat([level[k][0] for k in chosen], 1), torch.cat([level[k][1] for k in chosen], 1))
        for level in parted
    )
    return Examples(prototypes, positions, len(chosen), _THRESHOLD)


def _shares(masks: Tensor, level: Tensor) -> Tensor:
    """Compute how much background and object count at each position, [K, 2, h, w].

    The square of their share of the pixels around it: a position on an edge, whose feature is of
    both, counts little, and an object that is smaller than a position is not lost.
    """
    shares = torch.stack([masks == 0, masks == 1], 1).to(level)
    stride = (masks.shape[-1] - 1) // max(1, level.shape[-1] - 1)
    return resize(box_mean(shares, stride // 2), level.shape[-2:]).square()


def _means(level: Tensor, shares: Tensor) -> Tensor:
    """Average features [K, C, h, w] by shares [K, P, h, w], to unit vectors [K, P, C]."""
    sums = torch.einsum("kchw,kphw->kpc", level, shares)
    return functional.normalize(sums, dim=2)


def _part(level: Tensor, shares: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Part the positions of each support by what they mostly show, at least one each if any."""
    parted = []
    for features, (background, found) in zip(level.flatten(2), shares.flatten(2), strict=True):
        parts = []
        for share in (background, found):
            chosen = share > share.max().clamp(max=0.999) / 2
            parts.append(features[:, chosen])
        parted.append((parts[0], parts[1]))
    return parted


def _dense(levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Choose the levels that are compared position by position: of layers 3 and 4."""
    return levels[0], levels[-1]


@_outside_autocast
def _margin(levels: Sequence[Tensor], examples: Examples, image: Tensor) -> Tensor:
    """Compute how far the score of a query [3, H, W] is above the threshold, [H, W]."""
    rows, columns = _covered(image)
    pasted = torch.zeros_like(image[:1])
    pasted[:, rows, columns] = 1
    inside = average_bins(pasted[None], levels[0].shape[-2:])[0, 0] > 0.5
    margin = _score(levels, examples, inside) - examples.threshold
    full = resize(margin[None, None], image.shape[-2:])
    picture = colors(image[None, :, rows, columns])
    radius = max(1, round(_RADIUS * max(picture.shape[-2:])))
    a, b = guided_filter(full[..., rows, columns], picture, radius)
    sharp = full.clone()
    sharp[..., rows, columns] = (a * picture).sum(1, keepdim=True) + b
    return sharp[0, 0]


def _score(levels: Sequence[Tensor], examples: Examples, inside: Tensor) -> Tensor:
    """Compute the score [h, w] of a query's levels [C, h, w], at the size of the first."""
    size = levels[0].shape[-2:]
    near = [
        _nearest(level, *positions, examples.shots)
        for level, positions in zip(_dense(levels), examples.positions, strict=True)
    ]
    dense = _average(near, size)
    score = _compare(levels, examples.prototypes, size) + _DENSE * dense
    own = _surest(score.detach(), inside).to(score)
    prototypes = []
    for level, prototype in zip(levels, examples.prototypes, strict=True):
        shares = average_bins(own[None], level.shape[-2:])
        mean = _means(level[None], shares)[0]
        prototypes.append(functional.normalize((1 - _OWN) * prototype + _OWN * mean, dim=1))
    return _compare(levels, prototypes, size) + _DENSE * dense


def _compare(levels: Sequence[Tensor], prototypes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Subtract the cosine with the background from that with the object, [h, w]."""
    maps = []
    for level, (background, found) in zip(levels, prototypes, strict=True):
        maps.append(torch.einsum("chw,c->hw", level, found - background))
    return _average(maps, size)


def _nearest(level: Tensor, background: Tensor, found: Tensor, shots: int) -> Tensor:
    """Subtract the mean cosine with the nearest background from that with the object, [h, w]."""
    query = level.flatten(1)
    near = []
    for positions in (background, found):
        if not positions.shape[1]:  # the supports show none of it
            near.append(query.new_zeros(query.shape[1]))
            continue
        count = min(_NEAREST * shots, positions.shape[1])
        near.append((positions.mT @ query).topk(count, dim=0).values.mean(0))
    return (near[1] - near[0]).reshape(level.shape[1:])


def _average(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Average maps [h, w] of several sizes at one size."""
    return torch.stack([resize(x[None, None], size)[0, 0] for x in maps]).mean(0)


def _surest(score: Tensor, inside: Tensor) -> Tensor:
    """Choose the positions that are most surely background and object, bool [2, h, w].

    The object: the highest scores that are above Otsu's threshold. Source: Otsu, "A Threshold
    Selection Method from Gray-Level Histograms", 1979.
    """
    values = score[inside].sort().values
    count = len(values)
    if count == 0:
        return torch.zeros(2, *score.shape, dtype=torch.bool, device=score.device)
    below = torch.arange(1, count, device=score.device, dtype=values.dtype)
    sums = values.cumsum(0)[:-1]
    between = (
        below * (count - below) * (sums / below - (values.sum() - sums) / (count - below)) ** 2
    )
    otsu = values[between.argmax() + 1] if count > 1 else values[0]
    high = torch.maximum(values[int((1 - _OBJECT_SHARE) * (count - 1))], otsu)
    low = values[int(_BACKGROUND_SHARE * (count - 1))]
    return torch.stack([(score <= low) & inside, (score >= high) & inside])


def _covered(image: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns of a canvas [3, H, W] that its photo covers.

    Around it is black, which the evaluation transform fills in, or the mean color, as in training.
    """
    black = torch.as_tensor(-MEAN / STD, dtype=image.dtype, device=image.device)
    empty = ((image - black[:, None, None]).abs() < 0.01).all(0) | (image.abs() < 1e-6).all(0)
    parts = []
    for dim, size in ((1, image.shape[1]), (0, image.shape[2])):
        shown = torch.nonzero(~empty.all(dim))
        parts.append(slice(int(shown[0]), int(shown[-1]) + 1) if len(shown) else slice(0, size))
    return parts[0], parts[1]


def colors(images: Tensor) -> Tensor:
    """Undo the normalization of images [B, 3, H, W], to colors from 0 to 1."""
    mean, std = (torch.as_tensor(x, dtype=images.dtype, device=images.device) for x in (MEAN, STD))
    return images * std[:, None, None] + mean[:, None, None]
