from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fss
import svf_fast
from fss.config import TrainConfig
from fss.data import ShapesSource, build_episodes, collate_episodes
from fss.evaluation.evaluate import predict
from fss.models import Baseline, FewShotModel, build_backbone
from fss.runs.checkpoint import save_checkpoint
from fss.segment.segmenter import FewShotSegmenter


@pytest.fixture(scope="module")
def shapes():
    return ShapesSource(size=97)


@pytest.fixture(scope="module")
def embedded():
    return FewShotSegmenter(size=97, device="cpu")


@torch.no_grad()
def undecided(network: FewShotModel, episode: dict) -> None:
    """Moves the classifier's bias so that half the pixels of an episode are foreground.

    CWT has none: it fits one to the supports.
    """
    if not hasattr(network, "classifier"):
        return
    batch = collate_episodes([episode])
    network.eval()
    seen = []
    hook = network.classifier.register_forward_hook(lambda _, __, logits: seen.append(logits))
    network(*(batch[name] for name in Baseline.inputs))
    hook.remove()
    network.classifier[-1].bias[1] -= (seen[0][:, 1] - seen[0][:, 0]).median()


@pytest.fixture
def run(tmp_path, untrained):
    """Writes the checkpoint of an untrained run whose mask is about half of a photo."""

    def make(**overrides: object) -> tuple[TrainConfig, FewShotModel]:
        config, network = untrained(**overrides)
        undecided(network, build_episodes(config.data, "test", 1, 0)[0])
        save_checkpoint(tmp_path / "best.pt", config, {"model": network.state_dict(), "step": 1})
        return config, network

    return make


def photo(source, number: int):
    return source.load(source.indices("test")[number])


def pictures_of(source, class_id: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Photos that show at least 3 % of a class, with its mask."""
    found = []
    for index in source.indices("test"):
        if source.class_areas(index).get(class_id, 0) > 0.03 * source.image_size**2:
            image, mask = source.load(index)
            found.append((image, mask == class_id))
        if len(found) == count:
            break
    return found


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def test_novel_shapes_from_one_support(shapes, embedded):
    """Above the best that can be said of every photo without looking: all of it is the object."""
    scores, trivial = [], []
    for class_id in shapes.class_names:
        (support, mask), (query, truth) = pictures_of(shapes, class_id, 2)
        scores.append(iou(embedded.support(support, mask)(query).mask, truth))
        trivial.append(truth.mean())
    assert np.mean(scores) > 1.5 * np.mean(trivial)


def test_more_supports_help():
    shapes, embedded = ShapesSource(size=161), FewShotSegmenter(device="cpu")
    few, many = [], []
    for class_id in list(shapes.class_names)[:10]:
        *supports, (query, truth) = pictures_of(shapes, class_id, 6)
        images, masks = zip(*supports)
        few.append(np.mean([iou(embedded.support(*s)(query).mask, truth) for s in supports]))
        many.append(iou(embedded.support(list(images), list(masks))(query).mask, truth))
    assert np.mean(many) > np.mean(few)


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (97, 97), (301, 203)])
def test_any_size_in_the_same_size_out(shapes, embedded, size):
    image, mask = pictures_of(shapes, 1, 1)[0]
    embedded.support(image, mask)
    query = np.array(Image.fromarray(image).resize(size[::-1]))
    result = embedded(query)
    assert result.mask.shape == result.probability.shape == size
    assert result.picture.shape == (*size, 3) and result.overlay().size == size[::-1]
    assert result.mask.dtype == bool and result.probability.dtype == np.float32
    assert result.probability.min() >= 0 and result.probability.max() <= 1
    np.testing.assert_array_equal(result.mask, result.probability > 0.5)


def test_batches_and_forms_of_pictures_are_the_same(shapes, embedded, tmp_path):
    image, mask = pictures_of(shapes, 2, 1)[0]
    embedded.support([image], [mask])
    images = [photo(shapes, number)[0][: 40 + 9 * number] for number in range(5)]
    alone = [embedded(each) for each in images]
    Image.fromarray(images[1]).save(tmp_path / "a.png")
    together = embedded([images[0], tmp_path / "a.png", *images[2:]], batch_size=2)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.probability, other.probability, atol=1e-4)
    assert embedded([]) == []


def test_the_threshold_moves_the_mask_only(shapes, embedded):
    image, mask = pictures_of(shapes, 3, 1)[0]
    embedded.support(image, mask)
    before = embedded(image)
    embedded.threshold = 0.7
    after = embedded(image)
    embedded.threshold = 0.5
    np.testing.assert_array_equal(before.probability, after.probability)
    assert (after.mask <= before.mask).all() and after.mask.sum() < before.mask.sum()


@pytest.mark.parametrize(
    "overrides",
    [
        {"regime": {"name": "freeze"}, "resize": "canvas"},
        {"regime": {"name": "svf"}, "data": {"shots": 2}},
        {"regime": {"name": "full"}, "data": {"protocol": "hsnet"}},
        {"regime": {"name": "svf", "factors": ["U", "S", "V"]}},
        {"regime": {"name": "svf"}, "precision": "64-true"},
        {"regime": {"name": "adapter"}, "model": {"name": "pfenet"}},
        {"model": {"name": "bam", "base_weights": "none", "width": 8}, "data": {"shots": 2}},
        {"model": {"name": "cyctr"}, "data": {"shots": 2}},
        {"model": {"name": "cwt", "base_weights": "none", "width": 8}, "data": {"shots": 2}},
    ],
    ids=["freeze", "svf", "full", "factors", "float64", "pfenet", "bam", "cyctr", "cwt"],
)
def test_a_run_segments_as_its_evaluation_does(run, tmp_path, overrides):
    config, network = run(**overrides)
    episodes = build_episodes(config.data, "test", 4, 0)
    segmenter = FewShotSegmenter.load(tmp_path, device="cpu")
    assert not any(p.requires_grad for p in segmenter.model.parameters())
    shares = []
    for index in range(4):
        drawn = episodes.draw(index)
        loaded = [episodes.source.load(i) for i in drawn.supports]
        segmenter.support([i for i, _ in loaded], [m == drawn.class_id for _, m in loaded])
        expected = predict(network, collate_episodes([episodes[index]]), config.resize)[0].numpy()
        mask = segmenter(episodes.source.load(drawn.query)[0]).mask
        # W is composed once here, the evaluation may multiply by U and V instead: rounding
        assert (mask == (expected == 1)).mean() >= (0.999 if config.regime.name == "svf" else 1)
        shares.append(mask.mean())
    assert 0.01 < np.mean(shares) < 0.99


def test_supports_go_through_the_network_once(run, tmp_path, shapes):
    run()
    segmenter = FewShotSegmenter.load(tmp_path / "best.pt", device="cpu")
    image, mask = pictures_of(shapes, 1, 1)[0]
    seen = []
    hook = segmenter.model.backbone.layer1.register_forward_hook(
        lambda _, inputs, __: seen.append(len(inputs[0]))
    )
    segmenter.support([image] * 3, [mask] * 3)
    segmenter([image] * 5, batch_size=4)
    hook.remove()
    assert seen == [3, 4, 1]


def test_an_adapter_is_set_and_taken_away_without_decomposing(run, tmp_path, monkeypatch, shapes):
    _, network = run()
    with torch.no_grad():
        for parameter in svf_fast.svf_parameters(network):
            parameter.mul_(1.5)
    svf_fast.save_adapter(network.backbone, tmp_path / "x.safetensors")
    save_checkpoint(tmp_path / "other.pt", run()[0], {"model": network.state_dict(), "step": 1})
    # from here on
    monkeypatch.setattr(torch.linalg, "svd", None)
    segmenter = FewShotSegmenter.load(tmp_path, device="cpu")
    other = FewShotSegmenter.load(tmp_path / "other.pt", device="cpu")
    (image, mask), (query, _) = pictures_of(shapes, 1, 2)
    own = segmenter.support(image, mask)(query).probability
    expected = other.support(image, mask)(query).probability
    segmenter.adapter(tmp_path / "x.safetensors")
    np.testing.assert_allclose(segmenter(query).probability, expected, atol=1e-6)
    assert np.abs(own - expected).max() > 1e-3
    segmenter.adapter(None)
    np.testing.assert_array_equal(segmenter(query).probability, own)
    loaded = FewShotSegmenter.load(tmp_path, adapter=tmp_path / "x.safetensors", device="cpu")
    np.testing.assert_array_equal(
        loaded.support(image, mask)(query).probability,
        FewShotSegmenter.load(tmp_path, adapter=tmp_path / "x.safetensors", device="cpu")
        .support(image, mask)(query)
        .probability,
    )


def test_an_adapter_on_a_backbone_that_is_not_decomposed(embedded, shapes, tmp_path):
    backbone = svf_fast.convert(FewShotSegmenter(size=97).model.backbone, ["layer4"])
    (image, mask), (query, _) = pictures_of(shapes, 1, 2)
    before = embedded.support(image, mask)(query).probability
    segmenter = FewShotSegmenter(size=97, device="cpu").support(image, mask)
    svf_fast.save_adapter(backbone, tmp_path / "same.safetensors")
    segmenter.adapter(tmp_path / "same.safetensors")
    np.testing.assert_allclose(segmenter(query).probability, before, atol=1e-4)
    with torch.no_grad():
        for parameter in svf_fast.svf_parameters(backbone):
            parameter[1:].zero_()
    svf_fast.save_adapter(backbone, tmp_path / "other.safetensors")
    segmenter.adapter(tmp_path / "other.safetensors")
    assert np.abs(segmenter(query).probability - before).max() > 0.01
    segmenter.adapter(None)
    np.testing.assert_allclose(segmenter(query).probability, before, atol=1e-4)


def test_an_adapter_of_another_backbone_is_refused(run, tmp_path, embedded):
    _, network = run()
    svf_fast.save_adapter(network.backbone, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="fingerprint|singular values"):
        FewShotSegmenter(size=97, adapter=tmp_path / "x.safetensors", device="cpu")
    network.backbone.elsewhere = network.backbone.layer4
    del network.backbone.layer4
    svf_fast.save_adapter(network.backbone, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="has no convolution 'elsewhere"):
        embedded.adapter(tmp_path / "y.safetensors")


def test_an_object_of_a_pixel_is_not_lost(embedded):
    image = np.zeros((400, 300, 3), np.uint8)
    image[200, 151] = 255
    mask = np.zeros((400, 300), bool)
    mask[200, 151] = True
    assert np.isfinite(embedded.support(image, mask)(image).probability).all()
    assert (embedded._examples[1] == 1).sum() == 1


def test_weights_tell_their_backbone(tmp_path):
    backbone = build_backbone("resnet50", stem="deep", stride_on="conv1", width=4)
    save_file(backbone.state_dict(), tmp_path / "w.safetensors", {"stride": "conv1 (first)"})
    model = FewShotSegmenter(weights=tmp_path / "w.safetensors", size=33, device="cpu").model
    assert model.backbone.stride_on == "conv1" and model.backbone.deep_stem
    assert model.backbone.channels == backbone.channels
    with pytest.raises(ValueError, match="expected those of resnet18.*of resnet50"):
        FewShotSegmenter("resnet18", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="stride_on=conv1"):
        FewShotSegmenter(weights=tmp_path / "w.safetensors", stride_on="conv2")
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="of no ResNet, VGG or ViT"):
        FewShotSegmenter(weights=tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s, i, m: s(i), ValueError, r"call support\(images, masks\) first"),
        (lambda s, i, m: s.support([], []), ValueError, "at least one, got 0"),
        (lambda s, i, m: s.support([i], [m, m]), ValueError, "each of the 1 images.*got 2"),
        (lambda s, i, m: s.support([i], m), ValueError, "got ndarray"),
        (lambda s, i, m: s.support([i, i], [m, ~m & m]), ValueError, "mask 2: .*empty mask"),
        (lambda s, i, m: s.support(i, m | True), ValueError, "expected some background"),
        (lambda s, i, m: s.support(i, m)([i, 3]), TypeError, "image 2: .*got int"),
        (lambda s, i, m: s.support(i, m)([i], batch_size=0), ValueError, "batch_size"),
        (lambda s, i, m: setattr(s, "threshold", 1.0), ValueError, "between 0 and 1, got 1.0"),
        (lambda s, i, m: FewShotSegmenter(device="tpu"), ValueError, "got 'tpu'"),
        (lambda s, i, m: FewShotSegmenter(size=100), ValueError, "multiple of 8 plus 1"),
        (lambda s, i, m: FewShotSegmenter.load("nowhere"), FileNotFoundError, "nowhere"),
    ],
)
def test_wrong_use_is_explained(shapes, call, error, message):
    segmenter = FewShotSegmenter(size=33, device="cpu")
    with pytest.raises(error, match=message):
        call(segmenter, *pictures_of(shapes, 1, 1)[0])


def test_a_failed_support_leaves_the_former(shapes, embedded):
    image, mask = pictures_of(shapes, 1, 1)[0]
    before = embedded.support(image, mask)(image).probability
    with pytest.raises(ValueError, match="empty"):
        embedded.support(image, mask & ~mask)
    np.testing.assert_array_equal(embedded(image).probability, before)


def test_conventions_of_masks_are_said(shapes, embedded):
    image, mask = pictures_of(shapes, 1, 1)[0]
    plain = embedded.support(image, mask)(image).probability
    assert embedded.conventions == ["true and false"]
    ids = mask * np.uint8(15)
    ids[0] = np.where(mask[0], 15, 255)
    two = np.where(mask, 3, 0).astype(np.uint8)
    two[:2] = np.where(mask[:2], 3, 9)
    with pytest.raises(ValueError, match="values 3, 9"):
        embedded.support(image, two)
    assert embedded.conventions == ["true and false"]
    np.testing.assert_array_equal(embedded.support(image, two, 3)(image).probability, plain)
    assert embedded.conventions == ["the value 3"]
    # what is ignored is no background either: it counts as little as it is
    ignoring = embedded.support(image, ids)(image).probability
    assert embedded.conventions == ["class id 15, 255 ignored"]
    assert 0 < np.abs(ignoring - plain).max() < 0.1


def test_it_is_in_the_package_and_imports_nothing_before():
    assert fss.FewShotSegmenter is FewShotSegmenter
    code = "import sys, fss; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="Segmenter"):
        fss.Segmenter  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_what_the_cpu_says(shapes, embedded):
    (image, mask), (query, _) = pictures_of(shapes, 1, 2)
    there = FewShotSegmenter(size=97, device="cuda").support(image, mask)(query).probability
    here = embedded.support(image, mask)(query).probability
    np.testing.assert_allclose(there, here, atol=1e-2)
