from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fss.data.transforms import MEAN, STD
from fss.models import Matching, build_backbone, build_matching
from fss.models.loss import cross_entropy
from fss.models.matching import _covered, _surest


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Matching(build_backbone("resnet18", width=4)).double().requires_grad_(False)


def episode(batch: int = 2, shots: int = 3, size: int = 33):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    supports = torch.randn(batch, shots, 3, size, size, generator=generator, dtype=torch.float64)
    masks = torch.zeros(batch, shots, size, size, dtype=torch.int64)
    masks[..., 8:20, 4:24] = 1
    masks[..., 25:] = 255
    return queries, supports, masks


def test_the_first_score_is_of_prototypes_and_nearest_positions(model):
    """Position by position, from the definition; a map of one position a pixel has whole shares."""
    from fss.models import matching

    generator = torch.Generator().manual_seed(2)
    levels = [torch.randn(2, c, 6, 6, generator=generator, dtype=torch.float64) for c in (5, 7, 9)]
    levels = [functional.normalize(x, dim=1) for x in levels]
    mask = torch.zeros(1, 6, 6, dtype=torch.int64)
    mask[0, 1:4, 2:5] = 1
    mask[0, 5] = 255
    examples = matching._examples([x[1:] for x in levels], mask)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for level in levels:
        f, s = level[0], level[1]
        found, background = (s[:, mask[0] == c].mean(1) for c in (1, 0))
        for sign, mean in ((1, found), (-1, background)):
            expected += sign * functional.cosine_similarity(f, mean[:, None, None], dim=0) / 3
    score = matching._compare([x[0] for x in levels], examples.prototypes, (6, 6))
    torch.testing.assert_close(score, expected)
    f, s = levels[0]
    cosines = torch.einsum("chw,cn->nhw", f, s[:, mask[0] == 1])
    near = cosines.topk(5, dim=0).values.mean(0)
    cosines = torch.einsum("chw,cn->nhw", f, s[:, mask[0] == 0])
    near -= cosines.topk(5, dim=0).values.mean(0)
    torch.testing.assert_close(matching._nearest(f, *examples.positions[0], 1), near)


def test_the_object_is_found_where_the_query_repeats_it(model):
    """The query is the support: what is under the mask scores higher than what is not."""
    _, supports, masks = episode(1, 1, 65)
    margin = model(supports[:, 0], supports, masks).logits[0, 1]
    assert margin[masks[0, 0] == 1].mean() > margin[masks[0, 0] == 0].mean() + 0.5


def test_the_order_of_supports_does_not_matter(model):
    queries, supports, masks = episode()
    turned = model(queries, supports.flip(1), masks.flip(1)).logits
    torch.testing.assert_close(model(queries, supports, masks).logits, turned)


def test_the_surest_positions():
    score = torch.arange(100.0).reshape(10, 10)
    inside = torch.ones(10, 10, dtype=torch.bool)
    inside[9] = False
    background, found = _surest(score, inside)
    assert background.sum() == 27 and score[background].max() == 26
    assert found.sum() == 15 and score[found].min() == 75
    few = torch.zeros(10, 10)
    few[0, :3] = 1
    assert _surest(few, inside)[1].sum() == 3  # not more than Otsu's threshold parts
    assert not _surest(score, torch.zeros_like(inside)).any()


def test_several_supports_move_the_threshold(model):
    _, supports, masks = episode(1, 4)
    alone = model.encode_supports(supports[0, :1], masks[0, :1])
    several = model.encode_supports(supports[0], masks[0])
    assert alone.threshold == 0.06 and several.threshold != 0.06
    assert -0.1 <= several.threshold <= 0.2


def test_what_a_photo_covers_of_its_canvas():
    black = torch.as_tensor(-MEAN / STD)
    image = torch.zeros(3, 17, 17) + black[:, None, None]
    image[:, :9, :13] = torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(0))
    assert _covered(image) == (slice(0, 9), slice(0, 13))
    image[:, 2] = black[:, None]  # a black line in the photo
    assert _covered(image) == (slice(0, 9), slice(0, 13))
    centered = torch.zeros(3, 17, 17)  # as training pads
    centered[:, 4:10, 3:16] = image[:, :6, :13]
    assert _covered(centered) == (slice(4, 10), slice(3, 16))
    assert _covered(torch.zeros(3, 5, 6)) == (slice(0, 5), slice(0, 6))


def test_segment_is_forward_for_one_support_set(model):
    queries, supports, masks = episode()
    examples = model.encode_supports(supports[0], masks[0])
    torch.testing.assert_close(
        model.segment(queries[:1], examples), model(queries[:1], supports[:1], masks[:1]).logits
    )


def test_a_batch_is_its_episodes(model):
    queries, supports, masks = episode()
    together = model(queries, supports, masks).logits
    for n in range(2):
        alone = model(queries[n : n + 1], supports[n : n + 1], masks[n : n + 1]).logits
        torch.testing.assert_close(together[n : n + 1], alone)


def test_images_are_queries_and_supports_of_each_other(model, monkeypatch):
    queries, supports, masks = episode(1, 2)
    images = torch.cat([queries, supports[0]])
    marks = torch.cat([masks[0, :1], masks[0]])
    seen = []
    levels = model.backbone.levels
    monkeypatch.setattr(model.backbone, "levels", lambda x: seen.append(len(x)) or levels(x))
    found = model.compare(images, marks, [(0, (1, 2)), (2, [0, 1]), (1, (2,))])
    assert seen == [3]
    for logits, query, chosen in zip(found, (0, 2, 1), ([1, 2], [0, 1], [2]), strict=True):
        alone = model(images[query][None], images[chosen][None], marks[chosen][None]).logits
        torch.testing.assert_close(logits[None], alone)


def test_gradients_reach_what_trains_and_nothing_else_is_recorded(model):
    queries, supports, masks = episode(1, 2)
    assert not model(queries, supports, masks).logits.requires_grad
    weight = model.backbone.layer4[0].conv1.weight.requires_grad_(True)
    try:
        prediction = model(queries, supports, masks)
        (slope,) = torch.autograd.grad(cross_entropy(prediction.logits, masks[:, 0]), weight)
        step = 1e-6 * slope / slope.norm()
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                weight += sign * step
                logits = model(queries, supports, masks).logits
                losses.append(cross_entropy(logits, masks[:, 0]))
                weight -= sign * step
        assert slope.norm() > 0
        expected = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close(slope.norm(), expected, rtol=1e-3, atol=1e-7)
    finally:
        weight.requires_grad_(False)


def test_masks_without_one_of_the_two_give_numbers(model):
    queries, supports, masks = episode()
    for value in (0, 1, 255):
        assert model(queries, supports, torch.full_like(masks, value)).logits.isfinite().all()


def test_an_object_smaller_than_a_position_is_not_lost(model):
    _, supports, masks = episode(1, 1)
    masks[:] = 0
    masks[..., 11, 13] = 1
    found = model.encode_supports(supports[0], masks[0]).prototypes
    assert all(torch.allclose(x[1].norm(), x.new_ones(())) for x in found)


def test_output_strides_of_photos_and_of_the_embedded_backbone(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(build_backbone("resnet18", width=4).state_dict(), tmp_path / "w.safetensors")
    image = torch.zeros(1, 3, 65, 65)
    for weights, sides in ((str(tmp_path / "w.safetensors"), [5, 3, 3]), ("shapes", [9, 9, 9])):
        levels = build_matching(weights).backbone.levels(image)
        assert [x.shape[-1] for x in levels] == sides


def test_a_wrong_size_is_explained(model):
    queries, supports, masks = episode(size=32)
    with pytest.raises(ValueError, match="33×33 would do"):
        model(queries, supports, masks)


def test_a_vgg_has_levels():
    torch.manual_seed(0)
    model = Matching(build_backbone("vgg16_bn", width=4))
    queries, supports, masks = episode(1, 1)
    logits = model(queries.float(), supports.float(), masks).logits
    assert logits.shape == (1, 2, 33, 33) and logits.isfinite().all()
    low, high = model.backbone.levels(queries.float())
    torch.testing.assert_close(low, model.backbone.features(queries.float())[1])
    torch.testing.assert_close(high, model.backbone(queries.float()))
