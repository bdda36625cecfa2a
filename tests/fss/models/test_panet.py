"""PANet: prototypes, their alignment, and the authors' files."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from fss.config import ModelConfig, OptimizerConfig, RegimeConfig
from fss.evaluation.score import evaluate_run
from fss.models import PANet, Prediction, build_backbone, build_model, load_backbone
from fss.models.official import load_official
from fss.models.panet import compare, support_cross_entropy
from fss.models.pooling import enlarged_average_pool
from fss.models.regimes import apply_regime
from fss.models.vgg import PLAIN_CUTS
from fss.training.optimizer import build_optimizer, parameter_groups
from fss.training.run import train

# Their encoder: convolutions of each stage, their channels, and the index of the stage.
STAGES = ((2, 64, 0), (2, 128, 2), (3, 256, 4), (3, 512, 6), (3, 512, 8))


def _panet(backbone="resnet18", width=4):
    torch.manual_seed(0)
    return PANet(build_backbone(backbone, width=width, **PANet.backbone_options)).double()


def _episode(batch=2, shots=1, side=33):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1 + shots, 3, side, side, generator=generator, dtype=torch.float64)
    masks = torch.zeros(batch, 1 + shots, side, side, dtype=torch.long)
    for b in range(batch):
        for k in range(1 + shots):
            masks[b, k, 3 + k : 20 + b, 4 + b : 22] = 1
    masks[:, :, :2] = 255
    images += 2.0 * (masks == 1)[:, :, None]
    return images[:, 0], images[:, 1:], masks[:, 1:], masks[:, 0]


def _their_shapes():
    shapes, channels = {}, 3
    for depth, width, stage in STAGES:
        for i in range(depth):
            name = f"module.encoder.backbone.features.{stage}.{2 * i}"
            shapes |= {f"{name}.weight": (width, channels, 3, 3), f"{name}.bias": (width,)}
            channels = width
    return shapes


def _steps_of_sampling(size, large, align_corners):
    """Where bilinear resizing reads `size` positions: [large, size], rows sum to 1."""
    rows = torch.zeros(large, size, dtype=torch.float64)
    for i in range(large):
        if align_corners:
            at = i * (size - 1) / (large - 1)
        else:
            at = max((i + 0.5) * size / large - 0.5, 0)
        low = min(int(at), size - 1)
        rows[i, low] += 1 - (at - low)
        rows[i, min(low + 1, size - 1)] += at - low
    return rows


@pytest.mark.parametrize("align_corners", [False, True])
def test_prototypes_are_means_of_the_features_at_the_size_of_the_mask(align_corners):
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 11, 13) > 0.6
    rows, columns = (_steps_of_sampling(*each, align_corners) for each in ((4, 11), (5, 13)))
    for b in range(2):
        total, area = torch.zeros(3, dtype=torch.float64), 0
        for y, x in mask[b].nonzero().tolist():
            total += torch.einsum("chw,h,w->c", features[b], rows[y], columns[x])
            area += 1
        found = enlarged_average_pool(features, mask, align_corners)[b]
        torch.testing.assert_close(found, total / (area + 1e-5), rtol=0, atol=1e-9)


def test_a_pooled_mask_may_be_empty_and_of_low_precision():
    features = torch.randn(1, 3, 4, 4)
    nothing = torch.zeros(1, 9, 9, dtype=torch.bool)
    for offset in (1e-5, 0):
        assert not enlarged_average_pool(features, nothing, offset=offset).any()
    expected = enlarged_average_pool(features, ~nothing)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(enlarged_average_pool(features, ~nothing), expected)


def test_logits_are_cosines_to_the_mean_prototypes():
    """Position by position, from the published definition; resized without aligned corners."""
    model, (query, images, masks, _) = _panet().eval(), _episode(batch=1, shots=2)
    with torch.no_grad():
        maps = [model.backbone(each)[0] for each in (query, images[:, 0], images[:, 1])]
        prototypes = []
        for j in (0, 1):
            means = []
            for k in (0, 1):
                large = functional.interpolate(maps[1 + k][None], (33, 33), mode="bilinear")[0]
                means.append(
                    large[:, masks[0, k] == j].sum(1) / ((masks[0, k] == j).sum().item() + 1e-5)
                )
            prototypes.append(sum(means) / 2)
        expected = torch.zeros(2, 5, 5, dtype=torch.float64)
        for j, p in enumerate(prototypes):
            for y in range(5):
                for x in range(5):
                    f = maps[0][:, y, x]
                    expected[j, y, x] = 20 * (f @ p) / (f.norm() * p.norm())
        expected = functional.interpolate(expected[None], (33, 33), mode="bilinear")
        torch.testing.assert_close(model(query, images, masks).logits, expected, rtol=0, atol=1e-9)


def test_the_last_stage_is_dilated_and_ends_without_a_relu():
    images = torch.randn(1, 3, 33, 41)
    for name in ("vgg16", "vgg16_bn", "resnet18", "resnet50"):
        backbone = build_backbone(name, width=4, **PANet.backbone_options).eval()
        maps = backbone(images)
        assert maps.shape[-2:] == (5, 6)
        assert (maps < 0).any()
        assert all((backbone.features(images)[1] >= 0).flatten())
    vgg = build_backbone("vgg16", width=4, **PANet.backbone_options)
    convolutions = [m for m in vgg.layer4 if isinstance(m, torch.nn.Conv2d)]
    assert [m.dilation for m in convolutions] == 3 * [(2, 2)]
    resnet = build_backbone("resnet50", width=4, **PANet.backbone_options)
    assert [block.conv2.dilation[0] for block in resnet.layer4] == [2, 4, 4]
    assert [block.conv2.dilation[0] for block in resnet.layer3] == [1, 2, 2, 2, 2, 2]


def test_supports_are_segmented_by_what_was_found_in_the_query():
    """The alignment from its definition; an episode whose query shows no object counts nothing."""
    model, (query, images, masks, target) = _panet().train(), _episode(shots=2)
    prediction = model(query, images, masks)
    maps = model.backbone(query)
    supports = model.features(query, images, masks).supports
    predicted = compare(maps, supports[0].mean(1)).argmax(1)
    assert 0 < predicted[0].sum() < predicted[0].numel()
    alignment = 0.0
    for b in range(2):
        means = [maps[b][:, predicted[b] == j].mean(1) for j in (0, 1)]
        for k in range(2):
            feature = model.backbone(images[b, k][None])
            logits = [
                20 * functional.cosine_similarity(feature, m[None, :, None, None]) for m in means
            ]
            logits = functional.interpolate(torch.stack(logits, 1), (33, 33), mode="bilinear")
            alignment += functional.cross_entropy(logits, masks[b, k][None], ignore_index=255) / 4
    main = model.loss(Prediction(prediction.logits, ()), target, masks)
    torch.testing.assert_close(
        model.loss(prediction, target, masks), main + alignment, rtol=0, atol=1e-5
    )
    supports, found = prediction.auxiliary
    assert found.tolist() == [1, 1]
    nothing = Prediction(prediction.logits, (supports, torch.zeros_like(found)))
    assert torch.equal(model.loss(nothing, target, masks), main)


def test_support_losses_are_weighted_means():
    logits = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    masks = torch.randint(0, 2, (2, 9, 9))
    masks[:, 0], masks[1, 1:] = 255, 255
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    large = functional.interpolate(logits, (9, 9), mode="bilinear")
    expected = functional.cross_entropy(large[:1], masks[:1], weight, ignore_index=255)
    found = support_cross_entropy(logits, masks, weight)
    torch.testing.assert_close(found, torch.stack([expected, expected * 0]))
    assert torch.equal(
        support_cross_entropy(logits, masks.to(torch.uint8)), support_cross_entropy(logits, masks)
    )


def test_ignored_pixels_are_neither_background_nor_object():
    model, (query, images, masks, _) = _panet().eval(), _episode()
    with torch.no_grad():
        whole = model.features(query, images, masks).supports[0]
        ignored = model.features(query, images, torch.where(masks == 1, masks, 255)).supports[0]
    assert not ignored[:, :, 0].any()
    assert torch.equal(ignored[:, :, 1], whole[:, :, 1])


def test_the_authors_file_loads_whole(tmp_path):
    state = {name: torch.randn(shape) for name, shape in _their_shapes().items()}
    torch.save(state, tmp_path / "30000.pth")
    model = PANet(build_backbone("vgg16", **PANet.backbone_options))
    load_official(model, str(tmp_path / "30000.pth"))
    named = {
        f"module.encoder.backbone.features.{2 * n}.{int(i) - PLAIN_CUTS[n]}": module
        for n in range(5)
        for i, module in model.backbone.get_submodule(f"layer{n}").named_children()
    }
    for name, value in state.items():
        layer, kind = name.rsplit(".", 1)
        assert torch.equal(getattr(named[layer], kind), value)
    del state["module.encoder.backbone.features.8.4.bias"]
    torch.save(state, tmp_path / "30000.pth")
    with pytest.raises(ValueError, match="1 missing: encoder.backbone.features.8.4.bias"):
        load_official(model, str(tmp_path / "30000.pth"))


def test_resnets_are_named_as_in_ppnets_code(tmp_path):
    model = _panet("resnet50").float()
    state = {f"encoder.{key}": value + 1 for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "best.pth")
    other = _panet("resnet50").float()
    load_official(other, str(tmp_path / "best.pth"))
    weight = other.backbone.layer4[0].conv2.weight
    assert torch.equal(weight, model.backbone.layer4[0].conv2.weight + 1)


def test_a_plain_vgg_loads_torchvisions_keys(tmp_path):
    source = build_backbone("vgg16", width=4)
    state = {"features." + key.partition(".")[2]: each for key, each in source.state_dict().items()}
    assert {"features.0.weight", "features.2.bias", "features.28.weight"} <= state.keys()
    state["classifier.0.weight"] = torch.zeros(3, 4)
    torch.save(state, tmp_path / "vgg.pth")
    target = build_backbone("vgg16", width=4)
    load_backbone(target, str(tmp_path / "vgg.pth"))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters()))
    with pytest.raises(ValueError, match="like vgg16 weights.*set backbone=vgg16"):
        load_backbone(build_backbone("vgg16_bn", width=4), str(tmp_path / "vgg.pth"))


def test_it_trains_without_a_head():
    model = _panet().float()
    apply_regime(model, RegimeConfig(name="freeze"))
    with pytest.raises(ValueError, match="regime: .*PANet has no parameters beside its backbone"):
        parameter_groups(model, OptimizerConfig())
    apply_regime(model, RegimeConfig(name="full", layers=("all",)))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.03, backbone_lr=0.03))
    assert [len(group["params"]) > 0 for group in optimizer.param_groups] == [False, True]
    query, images, masks, target = _episode()
    losses = []
    for _ in range(15):
        model.train()
        prediction = model(query.float(), images.float(), masks)
        losses.append(model.loss(prediction, target, masks))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("regime", ["svf", "full"])
def test_a_run_is_trained_and_tested(tiny, regime):
    config = tiny(steps=2, regime={"name": regime}, data={"shots": 2})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="panet"))
    result = train(config)["test"]
    assert 0 < result["fb_iou"]["mean"] < 1
    cached = evaluate_run(config.out, checkpoint="last", feature_cache=1.0)
    assert cached["miou"] == result["miou"]


def test_other_numbers_of_supports_and_any_size():
    config = ModelConfig(name="panet", backbone="resnet18", width=4, weights="none")
    model = build_model(config).double().eval()
    query, images, masks, _ = _episode(shots=5, side=38)
    with torch.no_grad():
        logits = model(query, images, masks).logits
        assert logits.shape == (2, 2, 38, 38)
        order = [3, 1, 4, 0, 2]
        again = model(query, images[:, order], masks[:, order]).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-9)
