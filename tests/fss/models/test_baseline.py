import pytest
import torch
from torch import nn
from torch.nn import functional

import svf_fast
from fss.config import ModelConfig
from fss.models import MODELS, Baseline, Prediction, backbone_of, build_backbone, build_model
from fss.models.baseline import ASPP
from fss.models.pooling import masked_average_pool


def _model(name="resnet18", **options):
    torch.manual_seed(0)
    return Baseline(build_backbone(name, width=4), **{"channels": 8, **options})


def _episodes(batch=2, shots=1, height=41, width=49, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query_image = torch.randn(batch, 3, height, width, generator=generator)
    support_images = torch.randn(batch, shots, 3, height, width, generator=generator)
    support_masks = torch.zeros(batch, shots, height, width, dtype=torch.int64)
    support_masks[..., 8:30, 10:40] = 1
    support_masks[..., 8:10, :] = 255
    return query_image, support_images, support_masks


def _target(batch=2, height=41, width=49):
    mask = torch.zeros(batch, height, width, dtype=torch.int64)
    mask[:, 5:25, 5:25] = 1
    mask[:, 25:27] = 255
    return mask


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("shots", [1, 3])
def test_logits_have_the_size_of_the_query(name, shots):
    prediction = _model(name)(*_episodes(shots=shots))
    assert isinstance(prediction, Prediction)
    assert prediction.logits.shape == (2, 2, 41, 49)
    assert prediction.auxiliary == ()


@pytest.mark.parametrize("size", [1, 9])
def test_small_images_and_a_batch_of_one(size):
    prediction = _model()(*_episodes(batch=1, height=size, width=size))
    assert prediction.logits.shape == (1, 2, size, size)
    assert prediction.logits.isfinite().all()


def test_masks_of_integers_and_bool_agree_and_255_is_not_foreground():
    model = _model().eval()
    query_image, support_images, support_masks = _episodes()
    expected = model(query_image, support_images, support_masks).logits
    for masks in (support_masks == 1, (support_masks == 1).to(torch.uint8)):
        assert torch.equal(model(query_image, support_images, masks).logits, expected)


def test_identical_supports_equal_one():
    model = _model().eval()
    query_image, support_images, support_masks = _episodes()
    one = model(query_image, support_images, support_masks).logits
    three = model(
        query_image, support_images.repeat(1, 3, 1, 1, 1), support_masks.repeat(1, 3, 1, 1)
    ).logits
    torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-5)


def test_supports_and_their_order_within_the_batch():
    """Each query sees its own supports: episodes alone give what they give in a batch."""
    model = _model().eval()
    query_image, support_images, support_masks = _episodes(batch=3, shots=2)
    support_masks[1, 0, 20:] = 0
    together = model(query_image, support_images, support_masks).logits
    for b in range(3):
        alone = model(
            query_image[b : b + 1], support_images[b : b + 1], support_masks[b : b + 1]
        ).logits
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-5)
    swapped = model(query_image, support_images.flip(1), support_masks.flip(1)).logits
    torch.testing.assert_close(together, swapped, rtol=1e-4, atol=1e-5)
    other = model(query_image, support_images.roll(1, dims=0), support_masks).logits
    assert (together - other).abs().max() > 1e-3


def test_dropout_acts_in_training_only():
    model, episodes = _model(), _episodes()
    assert not torch.equal(model(*episodes).logits, model(*episodes).logits)
    model.eval()
    assert torch.equal(model(*episodes).logits, model(*episodes).logits)
    steady = _model(dropout=0.0)
    assert torch.equal(steady(*episodes).logits, steady(*episodes).logits)


def test_batch_norm_of_the_backbone_stays_in_evaluation_mode():
    model = _model()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.training is mode
        assert model.query_reduce.training is mode
        assert not any(norm.training for norm in norms)
    model(*_episodes())
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before))
    assert not any(m.training for m in _model().backbone.modules())


def _train_step(model):
    model.loss(model(*_episodes()), _target()).backward()


def _has_gradient(parameters):
    gradients = [parameter.grad for parameter in parameters]
    assert gradients
    return [gradient is not None and bool(gradient.any()) for gradient in gradients]


def test_a_frozen_backbone_trains_the_head_alone():
    model = _model(channels=16, dropout=0.0)
    model.backbone.requires_grad_(False)
    _train_step(model)
    head = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    assert all(_has_gradient(head))
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("layer", ["layer2", "layer3", "layer4"])
def test_gradients_reach_each_layer_that_needs_them(layer):
    model = _model(channels=16, dropout=0.0)
    model.backbone.requires_grad_(False)
    trained = getattr(model.backbone, layer).requires_grad_()
    _train_step(model)
    assert all(_has_gradient(m.weight for m in trained.modules() if isinstance(m, nn.Conv2d)))
    assert all(p.grad is None for p in model.backbone.layer1.parameters())


def test_gradients_reach_images():
    model = _model(channels=16, dropout=0.0)
    model.backbone.requires_grad_(False)
    query_image, support_images, support_masks = _episodes()
    query_image.requires_grad_()
    model(query_image, support_images, support_masks).logits.sum().backward()
    assert query_image.grad.any()


def test_gradients_reach_singular_values():
    model = _model(channels=16, dropout=0.0)
    model.backbone.requires_grad_(False)
    svf_fast.convert(model.backbone)
    model.train()
    _train_step(model)
    assert all(_has_gradient(svf_fast.svf_parameters(model)))


def _saved_bytes(model):
    """Bytes of the tensors kept for the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = model(*_episodes(batch=1, height=81, width=81))
    assert prediction.logits.requires_grad
    return sum(kept.values())


def test_a_frozen_backbone_saves_nothing():
    """What is kept grows with the head alone: not with a backbone eight times as wide, apart from
    the features the head reads."""
    saved, features = {}, {}
    for name, width in (("small", 4), ("large", 32)):
        backbone = build_backbone("resnet18", width=width).requires_grad_(False)
        saved[name] = _saved_bytes(Baseline(backbone, channels=8))
        features[name] = 2 * (backbone.channels[1] + backbone.channels[2]) * 11 * 11 * 4
    assert saved["large"] - features["large"] == saved["small"] - features["small"]
    trained = Baseline(build_backbone("resnet18", width=4), channels=8)
    assert _saved_bytes(trained) > 2 * saved["small"]


def test_the_backbone_runs_once_over_query_and_supports_but_for_the_masked_layer4():
    model = _model()
    batches = []
    for layer in (model.backbone.conv1, model.backbone.layer4):
        layer.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].shape[0]))
    model(*_episodes(batch=2, shots=3))
    assert batches == [8, 2, 6]


def test_an_empty_support_mask_is_no_accident():
    model = _model(dropout=0.0)
    query_image, support_images, support_masks = _episodes()
    prediction = model(query_image, support_images, torch.zeros_like(support_masks))
    model.loss(prediction, _target()).backward()
    assert prediction.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_is_weighted_cross_entropy_without_255():
    model = _model()
    logits = torch.randn(2, 2, 41, 49)
    target, weight = _target(), torch.tensor([1.0, 4.0])
    log_probability = logits.log_softmax(dim=1)
    kept = target != 255
    weights = weight[target.clamp(max=1)] * kept
    picked = log_probability.gather(1, target.clamp(max=1).unsqueeze(1)).squeeze(1)
    expected = -(weights * picked).sum() / weights.sum()
    torch.testing.assert_close(model.loss(Prediction(logits, ()), target, weight), expected)
    torch.testing.assert_close(
        model.loss(Prediction(logits, ()), target),
        functional.cross_entropy(logits, target, ignore_index=255),
    )


def test_learns_one_episode():
    model = _model(channels=16, dropout=0.0)
    model.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(model(*_episodes()), _target())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    query_image, support_images, support_masks = _episodes()
    model = _model().to(dtype).eval()
    logits = model(query_image.to(dtype), support_images.to(dtype), support_masks).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_autocast():
    model, episodes = _model().eval(), _episodes()
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(*episodes)
        loss = model.loss(prediction, _target())
    loss.backward()
    assert loss.dtype == torch.float32
    expected = model(*episodes).logits
    assert (prediction.logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_masked_average_pool():
    features, mask = torch.randn(2, 5, 3, 4), torch.rand(2, 1, 3, 4)
    expected = (features * mask).sum(dim=(2, 3)) / (mask.sum(dim=(2, 3)) + 0.0005)
    torch.testing.assert_close(masked_average_pool(features, mask).flatten(1), expected)
    assert not masked_average_pool(features, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("name", ["baseline", "bam"])
@pytest.mark.parametrize("channels", [256, 64])
def test_aspp_starts_from_hes_normal_distribution(name, channels):
    """As in BAM's code: of 256 channels std 0.0884 at 1×1, 0.0295 at 3×3; torch's own is 0.036."""
    torch.manual_seed(0)
    sizes = {"width": 4, "weights": "none", "channels": channels}
    base = "none" if name == "bam" else None
    config = ModelConfig(name, "resnet18", base_weights=base, **sizes)
    aspp = build_model(config, {1: "cat", 2: "dog"}).aspp
    layers = [aspp.pooled, aspp.pointwise, *aspp.atrous]
    for layer in layers:
        weight, inputs = layer.weight.detach(), layer.weight[0].numel()
        assert weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.03)
        assert weight.mean().abs() < 4 * weight.std() / weight.numel() ** 0.5
        # normal, not uniform: 4.6 % lie beyond two standard deviations, of a uniform one none
        share = (weight.abs() > 2 * weight.std()).double().mean().item()
        assert share == pytest.approx(0.0455, rel=0.3)
        assert layer.bias.abs().max() <= inputs**-0.5
    assert len(layers) == 5


def test_aspp_sees_the_image_mean_on_a_single_pixel():
    aspp = ASPP(4)
    x = torch.randn(1, 4, 1, 1)
    out = aspp(x)
    assert out.shape == (1, 20, 1, 1)
    torch.testing.assert_close(out[:, :4], aspp.pooled(x).relu())


def _config(**values):
    return ModelConfig(
        **{"backbone": "resnet18", "width": 4, "weights": "none", "channels": 8, **values}
    )


def test_build_model():
    model = build_model(_config(backbone="resnet50", stem="deep", stride_on="conv1", dropout=0.3))
    assert isinstance(model, Baseline)
    assert model.backbone.deep_stem
    assert model.backbone.stride_on == "conv1"
    assert model.backbone.channels == (16, 32, 64, 128)
    assert model.query_reduce[0].weight.shape == (8, 96, 1, 1)
    assert model.query_reduce[2].p == 0.3


def test_build_model_reports_unknown_names():
    config = _config()
    config.name = "unet"
    with pytest.raises(ValueError, match=f"model: expected one of {', '.join(MODELS)}; got 'unet'"):
        build_model(config)
    with pytest.raises(FileNotFoundError, match="weights: expected none, shapes, torchvision"):
        build_model(_config(weights="absent.pth"))
    with pytest.raises(FileNotFoundError, match="weights: expected shapes, torchvision or"):
        backbone_of("none")  # matching without weights would find nothing


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
        ({"channels": 8.0}, TypeError, "channels: expected an integer, got 8.0"),
        ({"dropout": 1.0}, ValueError, "dropout: expected at least 0 and less than 1, got 1.0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        _model(**options)


Q, S, M = _episodes()


@pytest.mark.parametrize(
    "query_image, support_images, support_masks, error, message",
    [
        ([1.0], S, M, TypeError, "query_image: expected a tensor, got list"),
        (Q.byte(), S, M, TypeError, "query_image: .*torch.float32, got torch.uint8; normalize"),
        (Q, S.double(), M, TypeError, "support_images: .*torch.float32, got torch.float64"),
        (Q, S, M.float(), TypeError, "support_masks: expected integers .*got torch.float32"),
        (Q[0], S, M, ValueError, r"query_image: expected \[B, 3, H, W\], got \[3, 41, 49\]"),
        (Q[:, :1], S, M, ValueError, r"query_image: expected \[B, 3, H, W\], got \[2, 1, 41"),
        (Q[..., :48], S, M, ValueError, "a multiple of 8 plus 1 .*got 41×48; 41×49 would do"),
        (Q[..., :40, :], S, M, ValueError, "got 40×49; 41×49 would do"),
        (Q, S[:, 0], M, ValueError, r"support_images: expected \[B, K, 3, H, W\], got \[2, 3"),
        (Q, S[:, :0], M[:, :0], ValueError, "at least one support per query, got K = 0"),
        (Q, S[:1], M, ValueError, r"support_images: expected \[2, 1, 3, 41, 49\].*got \[1, 1"),
        (Q, S[..., :41], M, ValueError, r"support_images: .*the size of query_image, got \[2, 1"),
        (Q, S, M[..., :41], ValueError, r"support_masks: expected \[2, 1, 41, 49\].*got \[2, 1"),
        (Q, S, M[:, 0], ValueError, r"support_masks: .*one mask .*got \[2, 41, 49\]"),
        (Q, S, M.to("meta"), ValueError, "support_masks: .*device cpu, got meta"),
        (Q.to("meta"), S, M, ValueError, "query_image: .*device cpu, got meta"),
    ],
)
def test_bad_episodes(query_image, support_images, support_masks, error, message):
    with pytest.raises(error, match=message):
        _model()(query_image, support_images, support_masks)


@pytest.mark.parametrize(
    "query_mask, class_weight, error, message",
    [
        (None, None, TypeError, "query_mask: expected uint8 or int64 .*got NoneType"),
        (_target().int(), None, TypeError, "query_mask: expected uint8 or int64 .*got torch.int32"),
        (_target()[:, :40], None, ValueError, r"expected \[2, 41, 49\].*got \[2, 40, 49\]"),
        (_target().to("meta"), None, ValueError, "query_mask: .*device cpu, got meta"),
        (_target(), torch.ones(3), ValueError, r"class_weight: expected \[2\].*got \[3\]"),
    ],
)
def test_bad_targets(query_mask, class_weight, error, message):
    prediction = Prediction(torch.zeros(2, 2, 41, 49), ())
    with pytest.raises(error, match=message):
        _model().loss(prediction, query_mask, class_weight)
