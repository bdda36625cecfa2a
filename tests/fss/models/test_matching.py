from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fss.models import Matching, build_backbone


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Matching(build_backbone("resnet18", width=4)).double()


def episode(batch: int = 2, shots: int = 3, size: int = 33):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    supports = torch.randn(batch, shots, 3, size, size, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, 2, (batch, shots, size, size), generator=generator)
    masks[..., 25:] = 255
    return queries, supports, masks


def test_logits_are_cosines_with_mean_features(model):
    """Position by position, from the definition."""
    queries, supports, masks = episode(1, 1)
    layers = [queries, supports[0]]
    layers = [(*model.backbone.features(x), model.backbone(x)) for x in layers]
    query, support = (
        torch.cat([functional.normalize(each, dim=1) for each in maps], 1) for maps in layers
    )
    share = [functional.interpolate((masks[0] == c)[None].double(), size=(5, 5), mode="bilinear",
                                    align_corners=True) for c in (0, 1)]  # fmt: skip
    prototypes = [(support * each).sum((2, 3)) / each.sum() for each in share]
    cosines = [functional.cosine_similarity(query, p[..., None, None]) for p in prototypes]
    logits = model(queries, supports, masks).logits
    assert logits.shape == (1, 2, 33, 33)
    torch.testing.assert_close(logits[..., ::8, ::8], 20 * torch.stack(cosines, dim=1))


def test_supports_count_the_same_whatever_their_area(model):
    queries, supports, masks = episode()
    few = masks.clone()
    few[:, 0] = 255
    few[:, 0, :9, :9] = masks[:, 0, :9, :9]
    prototypes = [
        torch.cat([model.encode_supports(s[None], m[None])[None] for s, m in zip(*each)])
        for each in zip(supports, few)
    ]
    normalised = functional.normalize(torch.stack(prototypes), dim=3).mean(1)
    expected = model.segment(queries, normalised)
    torch.testing.assert_close(model(queries, supports, few).logits, expected)


def test_a_batch_is_its_episodes(model):
    queries, supports, masks = episode()
    together = model(queries, supports, masks).logits
    for n in range(2):
        alone = model(queries[n : n + 1], supports[n : n + 1], masks[n : n + 1]).logits
        torch.testing.assert_close(together[n : n + 1], alone)


def test_masks_without_one_of_the_two_give_numbers(model):
    queries, supports, masks = episode()
    for value in (0, 1, 255):
        assert model(queries, supports, torch.full_like(masks, value)).logits.isfinite().all()


def test_a_wrong_size_is_explained(model):
    queries, supports, masks = episode(size=32)
    with pytest.raises(ValueError, match="33×33 would do"):
        model(queries, supports, masks)
