"""HSNet: its 4D convolution, correlations, vote, loss, and the authors' layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from fss.config import ModelConfig, RegimeConfig
from fss.evaluation.score import evaluate_run
from fss.models import HSNet, build_backbone, build_model, load_official
from fss.models.hsnet import CenterPivotConv4d, hypercorrelation, unit, vote
from fss.models.official import official_keys
from fss.models.pooling import resize
from fss.models.regimes import apply_regime
from fss.segment.segmenter import FewShotSegmenter
from fss.training.measure import saved_bytes
from fss.training.run import train

OPTIONS = HSNet.backbone_options


def network(backbone: str = "resnet18", channels: int = 16, width: int = 4) -> HSNet:
    torch.manual_seed(0)
    return HSNet(build_backbone(backbone, width=width, **OPTIONS), channels).double()


def episode(shots: int, height: int = 40, width: int = 56, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1 + shots, 3, height, width, generator=generator).double()
    masks = torch.randint(0, 2, (batch, shots, height, width), generator=generator)
    masks[:, :, 9:12] = 255
    return images[:, 0], images[:, 1:], masks


@torch.no_grad()
def undecided(model: HSNet, batch) -> HSNet:
    """Moves the bias so that half the pixels are foreground."""
    logits = model.compare(*_features(model, batch))
    model.classifier[-1].bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    return model


def _features(model, batch):
    features = model.features(*batch)
    return [unit(each) for each in features.query], [each[:, 0] for each in features.supports]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 4)])
@torch.no_grad()
def test_a_4d_convolution_whose_kernel_is_zero_but_at_its_pivots(kernel, stride):
    """Σ over all four offsets of the dense kernel, which holds conv1 and conv2 at the center."""
    torch.manual_seed(0)
    conv = CenterPivotConv4d(2, 3, kernel, stride).double()
    x = torch.randn(1, 3, 4, 6, 5, 2).double()
    half = kernel // 2
    dense = torch.zeros(3, 2, kernel, kernel, kernel, kernel).double()
    dense[:, :, :, :, half, half] += conv.conv1.weight
    dense[:, :, half, half] += conv.conv2.weight
    padded = functional.pad(x[0].permute(4, 0, 1, 2, 3), (half,) * 8)
    got = conv(x)
    assert got.shape == (1, 3, 4, -(-6 // stride), -(-5 // stride), 3)
    for a, b, c, d in itertools.product(*map(range, got.shape[1:5])):
        e, f = c * stride, d * stride
        window = padded[:, a : a + kernel, b : b + kernel, e : e + kernel, f : f + kernel]
        expected = (dense * window).flatten(1).sum(1) + conv.conv1.bias + conv.conv2.bias
        torch.testing.assert_close(got[0, a, b, c, d], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (3, 1), (5, 2)])
def test_gradients_in_bfloat16_where_a_support_is_shorter_than_the_stride(sides):
    """Of such maps oneDNN may leave what was in memory: here numbers that are none."""
    torch.manual_seed(0)
    conv = CenterPivotConv4d(8, 8, 5, 4)
    x = torch.randn(2, 3, 3, *sides, 8)
    conv(x).square().sum().backward()
    expected = [p.grad for p in conv.parameters()]
    for _ in range(5):
        conv.zero_grad()
        del [torch.full((1 << 14,), torch.nan) for _ in range(64)][:]
        with torch.autocast("cpu", torch.bfloat16):
            conv(x).float().square().sum().backward()
        for parameter, grad in zip(conv.parameters(), expected, strict=True):
            torch.testing.assert_close(
                parameter.grad, grad, rtol=0.02, atol=0.02 * grad.abs().max().item()
            )


def test_correlations_are_cosines_without_the_negative_ones():
    torch.manual_seed(0)
    query = [torch.randn(2, 5, 3, 4).double() for _ in range(2)]
    support = [torch.randn(2, 5, 2, 3).double() for _ in range(2)]
    support[0][:, :, 1] = 0  # masked
    got = hypercorrelation([unit(q) for q in query], [unit(s) for s in support])
    assert got.shape == (2, 3, 4, 2, 3, 2)
    for b, y, x, v, u, n in itertools.product(*map(range, got.shape)):
        q, s = query[n][b, :, y, x], support[n][b, :, v, u]
        cosine = (q @ s) / ((q.norm() + 1e-5) * (s.norm() + 1e-5))
        assert got[b, y, x, v, u, n].item() == pytest.approx(max(cosine.item(), 0.0), abs=1e-9)


@pytest.mark.parametrize("shots", [1, 2, 5])
@torch.no_grad()
def test_the_vote_is_the_published_one(shots):
    torch.manual_seed(shots)
    logits = [torch.randn(3, 2, 6, 7) for _ in range(shots)]
    for each in logits:
        each[1, 0] += 9  # nobody votes for anything
    for each in logits[:-3]:
        each[2, 0] += 9  # never all of five
    votes = sum(each.argmax(dim=1) for each in logits)
    share = votes / votes.flatten(1).amax(dim=1).clamp(min=1)[:, None, None]
    found = vote(logits)
    assert torch.equal(found.argmax(dim=1), (share >= 0.5).long())
    assert not found.argmax(dim=1)[1].any() and (found[:, 0] != found[:, 1]).all()
    if shots == 5:
        enough = (votes == 2) & (found.argmax(dim=1) == 1)
        assert enough[2].any() and not enough[0].any()


@torch.no_grad()
def test_each_of_several_supports_has_a_vote():
    batch = query, supports, masks = episode(5)
    model = undecided(network(), batch).eval()
    single = [model(query, supports[:, [k]], masks[:, [k]]).logits for k in range(5)]
    votes = sum(each.argmax(dim=1) for each in single)
    assert {1, 2, 3} < set(votes.unique().tolist())
    assert torch.equal(model(*batch).logits, vote(single))


def test_a_vote_has_the_gradient_of_the_mean():
    model, batch = network().eval(), episode(3)
    logits = model(*batch).logits
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    got = [p.grad.clone() for p in model.classifier.parameters()]
    model.zero_grad()
    query, supports = _features_of_each(model, batch)
    mean = torch.stack([resize(model.compare(query, s), (40, 56)) for s in supports]).mean(0)
    (mean * weight).sum().backward()
    for parameter, grad in zip(model.classifier.parameters(), got, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    with torch.no_grad():
        assert torch.equal(model(*batch).logits, logits)


def test_a_run_is_tuned_on_three_supports(tiny):
    train(config := tiny(steps=1, model={"name": "hsnet", "channels": 16}, data={"size": 40}))
    segmenter = FewShotSegmenter.load(config.out)
    pictures = [np.random.default_rng(n).integers(0, 255, (40, 40, 3), "uint8") for n in range(3)]
    masks = [np.zeros((40, 40), "uint8") for _ in pictures]
    for mask in masks:
        mask[8:30, 10:32] = 1
    tuned = segmenter.support(pictures, masks).tune(1, progress=False)
    assert len(tuned.history) > 0


def _features_of_each(model, batch):
    features = model.features(*batch)
    supports = zip(*(each.unbind(1) for each in features.supports), strict=True)
    return [unit(each) for each in features.query], list(supports)


def test_training_with_several_supports_is_the_mean_of_their_losses():
    query, supports, masks = episode(3)
    model, target = network().train(), masks[:, 0]
    loss = model.loss(model(query, supports, masks), target)
    single = [
        model.loss(model(query, supports[:, [k]], masks[:, [k]]), target).item() for k in range(3)
    ]
    assert loss.item() == pytest.approx(sum(single) / 3, rel=1e-12)
    assert len(set(single)) == 3


@torch.no_grad()
def test_the_boundary_is_background():
    """In the loss, whatever is not 1; of a support likewise."""
    batch = query, supports, masks = episode(1)
    model = network().eval()
    prediction, weight = model(*batch), torch.tensor([1.0, 3.0]).double()
    target = torch.where(masks == 255, 0, masks)
    assert torch.equal(model(query, supports, target).logits, prediction.logits)
    log = prediction.logits.log_softmax(dim=1)
    chosen = log.gather(1, target)[:, 0]
    assert model.loss(prediction, masks[:, 0]).item() == pytest.approx(-chosen.mean().item())
    each = weight[target[:, 0]]
    expected = -(each * chosen).sum().item() / each.sum().item()
    assert model.loss(prediction, masks[:, 0], weight).item() == pytest.approx(expected)
    uint8 = model.loss(prediction, masks[:, 0].to(torch.uint8))
    assert uint8.item() == pytest.approx(-chosen.mean().item())


@pytest.mark.parametrize("size", [(40, 56), (33, 41), (31, 50)])
@torch.no_grad()
def test_any_size(size):
    model = network("resnet50").eval()
    logits = model(*episode(1, *size)).logits
    assert logits.shape == (2, 2, *size) and logits.std() > 0


def test_what_is_masked_out_of_a_support_does_not_matter():
    """But through the receptive field: no position of the object's side sees the other one."""
    torch.manual_seed(0)
    model = network().eval()
    maps = tuple(torch.randn(1, c, 5, 7).double() for c in (8, 8, 16, 16, 32, 32))
    mask = torch.zeros(1, 5, 7).long()
    mask[:, :, :3] = 1
    other = tuple(torch.where(mask == 1, each, torch.randn_like(each)) for each in maps)
    a, b = (model.support_features(each, mask).summaries for each in (maps, other))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and a[0].any()


def test_the_4d_maps_are_kept_once():
    """Of a frozen backbone's step: the correlations, and the maps that the 4D convolutions make."""
    model = network(channels=128).float()
    apply_regime(model, RegimeConfig(name="freeze"))
    batch = [each.float() if each.is_floating_point() else each for each in episode(1, 192, 192, 1)]
    with saved_bytes(model) as saved:
        model.train()(*batch)
    correlations = 4 * 2 * (24**4 + 12**4 + 6**4)
    assert correlations < saved.total < 6 * correlations


@pytest.mark.parametrize("name", ["hsnet", "dcama"])
def test_it_trains_and_is_tested_and_segments(tiny, name):
    """By its own protocol and at its own sides; pictures are segmented at their size."""
    data = {"size": 40, "protocol": "hsnet", "shuffle_test": False, "shots": 2}
    options = {"model": {"name": name, "channels": 64}, "resize": "network", "data": data}
    config = tiny(steps=1, optimizer={"name": "adamw", "schedule": "constant"}, **options)
    result = train(config)["test"]
    assert 0 < result["fb_iou"]["mean"] < 1
    asked = {"protocol": "hsnet", "episodes": 4}
    cached = evaluate_run(config.out, checkpoint="last", feature_cache=1.0, **asked)
    plain = evaluate_run(config.out, checkpoint="last", feature_cache=0.0, **asked)
    assert cached["miou"] == plain["miou"] and cached["fb_iou"] == plain["fb_iou"]

    segmenter = FewShotSegmenter.load(config.out, "last", device="cpu")
    picture = torch.randint(256, (50, 70, 3), dtype=torch.uint8).numpy()
    mask = torch.zeros(50, 70, dtype=torch.bool).numpy()
    mask[10:30, 20:40] = True
    segmenter.support([picture, picture[::-1]], [mask, mask[::-1]])
    assert segmenter(picture).probability.shape == (50, 70)


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match=r"model.backbone: .*resnet101 for hsnet, got 'vgg16_bn'"):
        build_model(ModelConfig(name="hsnet", backbone="vgg16_bn", weights="none"))
    for channels in (4, 12):
        with pytest.raises(ValueError, match="channels: expected a multiple of 8, .*got"):
            network(channels=channels)
    with pytest.raises(TypeError, match="channels: expected an integer, got 8.0"):
        network(channels=8.0)


def published_backbone(prefix: str, depths=(3, 4, 6, 3)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNet with its classifier."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}

    def add(conv: str, bn: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (out, into, kernel, kernel)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{tensor}"] = (out,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    add("conv1", "bn1", 64, 3, 7)
    into = 64
    for n, depth in enumerate(depths, 1):
        width = 32 * 2**n
        for b in range(depth):
            name = f"layer{n}.{b}"
            if b == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, into, 1)
            for i, (o, c, k) in enumerate(
                ((width, into, 1), (width, width, 3), (4 * width, width, 1)), 1
            ):
                add(f"{name}.conv{i}", f"{name}.bn{i}", o, c, k)
            into = 4 * width
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def widening(prefix: str, channels, kernels, halves=("",)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of convolutions with bias, each followed by a group norm and a ReLU."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n, ((into, out), kernel) in enumerate(zip(itertools.pairwise(channels), kernels)):
        for half in halves:
            shapes[f"{prefix}.{3 * n}{half}.weight"] = (out, into, kernel, kernel)
            shapes[f"{prefix}.{3 * n}{half}.bias"] = (out,)
        shapes[f"{prefix}.{3 * n + 1}.weight"] = shapes[f"{prefix}.{3 * n + 1}.bias"] = (out,)
    return shapes


def convolutions(prefix: str, channels) -> dict[str, tuple[int, ...]]:
    """Names and shapes of 3×3 convolutions with bias and a ReLU between."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n, (into, out) in enumerate(itertools.pairwise(channels)):
        shapes[f"{prefix}.{2 * n}.weight"] = (out, into, 3, 3)
        shapes[f"{prefix}.{2 * n}.bias"] = (out,)
    return shapes


def published() -> dict[str, tuple[int, ...]]:
    shapes = published_backbone("backbone.")
    squeezed = {4: (3, (3, 3, 3)), 3: (6, (5, 3, 3)), 2: (4, (5, 5, 3))}
    for layer, (depth, kernels) in squeezed.items():
        name = f"hpn_learner.encoder_layer{layer}"
        shapes |= widening(name, (depth, 16, 64, 128), kernels, (".conv1", ".conv2"))
    for pair in ("4to3", "3to2"):
        name = f"hpn_learner.encoder_layer{pair}"
        shapes |= widening(name, (128,) * 4, (3, 3, 3), (".conv1", ".conv2"))
    shapes |= convolutions("hpn_learner.decoder1", (128, 128, 64))
    return shapes | convolutions("hpn_learner.decoder2", (64, 64, 2))


def save_numbered(path, shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Saves a tensor of a single value, its number, under each name; returns the numbers."""
    numbers = {name: float(n) for n, name in enumerate(shapes, 1)}
    state = {f"module.{n}": torch.tensor(numbers[n]).expand(shapes[n]) for n in shapes}
    torch.save(state, path)
    return numbers


def check_loaded(model, path, shapes, unused: tuple[str, ...]) -> None:
    """The whole file is in the model but for what is unused; a lacking name is an error."""
    numbers = save_numbered(path, shapes)
    load_official(model, str(path))
    names = official_keys(model)
    assert set(names.values()) == {name for name in shapes if not name.startswith(unused)}
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert (value == numbers[names[key]]).all(), key
    lost = list(shapes)[-1]
    save_numbered(path, {name: shape for name, shape in shapes.items() if name != lost})
    with pytest.raises(ValueError, match=f"1 missing: {lost}"):
        load_official(model, str(path))


def test_the_authors_layout(tmp_path):
    model = HSNet(build_backbone("resnet50", **OPTIONS))
    learner = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert sum(p.numel() for p in learner.values()) == 2_573_794
    check_loaded(model, tmp_path / "model.pt", published(), ("backbone.fc.",))
    names = official_keys(model)
    for ours, theirs in {
        "backbone.layer3.5.conv2.weight": "backbone.layer3.5.conv2.weight",
        "squeeze.0.3.conv1.bias": "hpn_learner.encoder_layer2.3.conv1.bias",
        "mix.1.6.conv2.weight": "hpn_learner.encoder_layer4to3.6.conv2.weight",
        "mix.0.7.bias": "hpn_learner.encoder_layer3to2.7.bias",
    }.items():
        assert names.get(ours) == theirs
