"""CWT: the fit of its classifier, its transformer, the authors' files."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fss.config import ModelConfig, RegimeConfig
from fss.models import CWT, Prediction, PSPNet, build_backbone, build_model, load_official
from fss.models.cwt import WeightTransformer, fit_classifier, initial_weights
from fss.models.official import load_base_learner, official_keys
from fss.models.regimes import apply_regime


def _episodes(batch=2, shots=2, size=33):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch, 1 + shots, 3, size, size, generator=generator)
    masks = (torch.rand(batch, 1 + shots, size, size, generator=generator) > 0.6).long()
    masks[:, :, -6:] = 255
    return images[:, 0], images[:, 1:], masks[:, 1:], masks[:, 0]


def _model(iterations=20, **options):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", width=4)
    values = {"channels": 8, "dropout": 0.0, "iterations": iterations, **options}
    return CWT(backbone, **values).eval()


def _maps(batch=2, shots=3, channels=5, size=(5, 6), large=(33, 41)):
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(batch, shots, channels, *size, generator=generator).double()
    masks = (torch.rand(batch, shots, *large, generator=generator) > 0.8).long()
    masks[:, :, :4] = 255
    return maps, masks


def _sgd(maps, masks, initial, iterations, lr):
    """The fit of an episode, by torch's optimizer, layer, resizing and loss."""
    layer = nn.Conv2d(maps.shape[1], 2, 1, bias=False).double()
    layer.weight.data = initial.double()[:, :, None, None].clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    ratio = (masks == 0).sum().double() / (masks == 1).sum()
    weight = torch.stack([torch.ones_like(ratio), ratio])
    for _ in range(iterations):
        logits = F.interpolate(layer(maps), masks.shape[1:], mode="bilinear", align_corners=True)
        optimizer.zero_grad()
        F.cross_entropy(logits, masks, weight, ignore_index=255).backward()
        optimizer.step()
    return layer.weight.detach()[:, :, 0, 0]


@pytest.mark.parametrize("shots", [1, 5])
def test_the_fit_is_that_of_torchs_optimizer(shots):
    maps, masks = _maps(shots=shots)
    initial = initial_weights(masks, 5)
    fitted = fit_classifier(maps, masks, initial, 30, 0.7)
    assert fitted.dtype == torch.float64 and (fitted - initial).abs().max() > 0.1
    for b in range(2):
        expected = _sgd(maps[b], masks[b], initial[b], 30, 0.7)
        torch.testing.assert_close(fitted[b], expected, rtol=1e-9, atol=1e-9)


def test_the_fit_needs_no_autograd_and_leaves_no_gradient():
    maps, masks = _maps()
    maps.requires_grad_(True)
    initial = initial_weights(masks, 5)
    fitted = fit_classifier(maps, masks, initial, 3)
    assert not fitted.requires_grad
    with torch.inference_mode():
        assert torch.equal(fit_classifier(maps, masks, initial, 3), fitted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fit_classifier(maps, masks, initial, 3), fitted)
    half = fit_classifier(maps.bfloat16(), masks, initial, 3)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("value", [0, 1, 255])
def test_supports_of_one_class_or_none(value):
    maps, masks = _maps()
    masks[:] = value
    initial = initial_weights(masks, 5)
    fitted = fit_classifier(maps, masks, initial, 5)
    assert fitted.isfinite().all()
    moved = (fitted - initial).abs().max()
    assert moved < 1e-7 if value == 255 else moved > 1e-3


def test_what_is_ignored_does_not_matter():
    maps, masks = _maps(size=(5, 5), large=(33, 33))
    masks[:, :, 16:] = 255  # the fifth row of the map has weight 0 in the rows that count
    changed = maps.clone()
    changed[:, :, :, 3:] += 5
    initial = initial_weights(masks, 5)
    kept = fit_classifier(maps, masks, initial, 9)
    assert torch.equal(fit_classifier(changed, masks, initial, 9), kept)


def test_initial_weights_are_the_episodes_own():
    _, masks = _maps(batch=4)
    weights = initial_weights(masks, 512)
    assert weights.shape == (4, 2, 512)
    bound = 1 / math.sqrt(512)
    assert weights.abs().max() <= bound
    flat = weights.flatten(1).double() / bound
    assert flat.mean(1).abs().max() < 0.1 and (flat.var(1) - 1 / 3).abs().max() < 0.05
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.15
    assert torch.equal(initial_weights(masks[2:3], 512), weights[2:3])
    assert torch.equal(initial_weights(masks.flip(1), 512), weights)
    assert torch.equal(initial_weights(masks == 1, 512), weights)
    other = masks.clone()
    other[0, 0, 20, 20] = 1 - other[0, 0, 20, 20]
    changed = (initial_weights(other, 512) != weights).double().mean((1, 2))
    assert changed[0] > 0.99 and changed[1:].max() == 0


def test_initial_weights_are_the_same_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Initial(nn.Module):
        def forward(self, masks: torch.Tensor) -> torch.Tensor:
            return initial_weights(masks, 16)

    masks = (torch.rand(2, 3, 161, 161) < 0.5).long()
    path = tmp_path / "initial.onnx"
    torch.onnx.export(Initial().eval(), (masks,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: masks.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), initial_weights(masks, 16))


def test_initial_weights_are_uniform_and_not_correlated():
    masks = (torch.rand(200, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    drawn = (initial_weights(masks, 50) * math.sqrt(50) + 1).flatten() / 2
    counts = torch.histc(drawn, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi squared of 19 degrees: 0.1 %
    pairs = torch.corrcoef(drawn.unflatten(0, (200, 100)).T)
    # 4950 correlations of 200 samples each have a standard deviation of 0.07
    assert (pairs - torch.eye(100)).abs().max() < 0.32


def test_the_transformer_projects_positions_in_theory_only():
    torch.manual_seed(1)
    layer = WeightTransformer(6, 4, heads=3, dropout=0.0).double()
    weights, positions = torch.randn(2, 2, 6).double(), torch.randn(2, 6, 7).double()
    got = layer(weights, positions)
    P, out = layer.project.weight, layer.out
    for b in range(2):
        for n in range(2):
            heads = []
            for h in range(3):
                own = P[4 * h : 4 * h + 4]
                keys = torch.stack([own @ positions[b, :, i] for i in range(7)])
                scores = torch.stack([(own @ weights[b, n]).dot(key) / 2 for key in keys])
                heads.append(sum(a * key for a, key in zip(scores.softmax(0), keys)))
            x = weights[b, n] + out.weight @ torch.cat(heads) + out.bias
            expected = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
            torch.testing.assert_close(got[b, n], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shots", [1, 5])
def test_the_prediction_is_a_product_with_normalized_features(shots):
    model, (query, supports, masks, _) = _model().double(), _episodes(shots=shots)
    query, supports = query.double(), supports.double()
    with torch.no_grad():
        got = model(query, supports, masks).logits
        for b in range(2):
            (found,) = model.maps(torch.cat([query[b : b + 1], supports[b]]))
            initial = initial_weights(masks[b : b + 1], 512)
            fitted = fit_classifier(found[None, 1:], masks[b : b + 1], initial, 20)
            f = found[:1] / found[:1].norm(dim=1, keepdim=True)
            weights = model.weight_transformer(fitted, f.flatten(2))[0]
            logits = torch.einsum("nc,chw->nhw", weights, f[0])
            expected = F.interpolate(logits[None], (33, 33), mode="bilinear", align_corners=True)
            torch.testing.assert_close(got[b : b + 1], expected, rtol=1e-9, atol=1e-9)


def test_evaluation_repeats_itself_whatever_the_state_of_the_random_generator():
    model, (query, supports, masks, _) = _model(dropout=0.5), _episodes()
    with torch.no_grad():
        first = model(query, supports, masks).logits
        torch.manual_seed(9)
        assert torch.equal(model(query, supports, masks).logits, first)
        model.train()
        assert not torch.equal(model(query, supports, masks).logits, first)


def test_supports_that_serve_many_queries_are_fitted_once(monkeypatch):
    model, (query, supports, masks, _) = _model().double(), _episodes()
    query, supports = query.double(), supports.double()
    with torch.no_grad():
        expected = model(
            query, supports[:1].expand(2, -1, -1, -1, -1), masks[:1].expand(2, -1, -1, -1)
        )
    encoded = model.encode_supports(supports[0], masks[0])
    assert [tuple(each.shape) for each in encoded.summaries] == [(1, 2, 512)]
    monkeypatch.setattr(model, "fit", None)
    torch.testing.assert_close(model.segment(query, encoded), expected.logits)


def test_the_loss_gives_both_classes_of_an_episode_the_same_weight():
    logits = torch.randn(3, 2, 6, 7).double()
    mask = (torch.rand(3, 6, 7) > 0.7).long()
    mask[:, 0], mask[0, 1:] = 255, 0  # the first without foreground
    each = F.cross_entropy(logits, mask, reduction="none", ignore_index=255)
    means = [each[0, 1:].mean()]
    means += [(each[b][mask[b] == 0].mean() + each[b][mask[b] == 1].mean()) / 2 for b in (1, 2)]
    model, prediction = _model(), Prediction(logits, ())
    got = model.loss(prediction, mask)
    torch.testing.assert_close(got, sum(means) / 3, rtol=1e-9, atol=1e-9)
    three = model.loss(prediction, mask, torch.tensor([1.0, 3.0]))
    means[1:] = [
        (each[b][mask[b] == 0].mean() + 3 * each[b][mask[b] == 1].mean()) / 4 for b in (1, 2)
    ]
    torch.testing.assert_close(three, sum(means) / 3, rtol=1e-9, atol=1e-9)
    nothing = torch.full_like(mask, 255)
    assert model.loss(prediction, nothing) == 0


@pytest.mark.parametrize("regime", ["freeze", "svf"])
def test_what_trains(regime):
    """The backbone's gradient is that of the query's features: supports are as if fixed."""
    model, (query, supports, masks, target) = _model(5), _episodes()
    apply_regime(model, RegimeConfig(name=regime))
    model.double().train()
    query, supports = query.double(), supports.double()
    loss = model.loss(model(query, supports, masks), target)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("backbone.") for name in trained) == (regime == "svf")
    assert not any(name.startswith("base_learner.") for name in trained)
    grads = torch.autograd.grad(loss, list(trained.values()))
    with torch.no_grad():
        (found,) = model.maps(supports.flatten(0, 1))
        fixed = model.fit(found.unflatten(0, (2, 2)), masks)
    (maps,) = model.maps(query)
    f = F.normalize(maps, dim=1).flatten(2)
    logits = (model.weight_transformer(fixed, f) @ f).unflatten(2, maps.shape[2:])
    logits = F.interpolate(logits, (33, 33), mode="bilinear", align_corners=True)
    expected = torch.autograd.grad(
        model.loss(Prediction(logits, ()), target), list(trained.values())
    )
    largest = max(grad.abs().max() for grad in expected)
    for mine, wanted in zip(grads, expected):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9 * largest)


def test_learns_where_features_tell(monkeypatch):
    """Queries whose object has another colour than the supports': the transformer corrects it."""
    model, (query, supports, masks, target) = _model(50), _episodes(batch=3, shots=1)
    colours = torch.randn(512, 3)
    monkeypatch.setattr(
        model, "maps", lambda x: (torch.einsum("cd,ndhw->nchw", colours, x[..., ::8, ::8]).relu(),)
    )
    target[:] = 0
    target[:, 8:25, 8:25] = 1
    query, supports = query / 5, supports / 5
    query[:, 0] += torch.where(target == 1, -1.0, 1.0)
    supports[:, :, 1] += torch.where(masks == 1, -1.0, 1.0)
    apply_regime(model, RegimeConfig(name="freeze"))
    optimizer = torch.optim.AdamW(model.weight_transformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(model(query, supports, masks), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def _their_names(state):
    """What the authors' two files have: a PSPNet with its last convolution, and a transformer."""
    keys = official_keys(_big())
    theirs = {
        keys[name]: torch.rand_like(value, dtype=torch.float32) for name, value in state.items()
    }
    return theirs | {"classifier.weight": torch.rand(16, 512, 1, 1)}


def _big():
    return CWT(build_backbone("resnet50", stem="deep", width=8), channels=16, dropout=0.0)


def _save(path, state):
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return str(path)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = CWT(build_backbone("resnet50", stem="deep"), channels=512)
    keys = official_keys(model)
    shapes = {keys[name]: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "layer0.0.weight": (64, 3, 3, 3),
        "layer0.6.weight": (128, 64, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        **{f"ppm.features.{n}.1.weight": (512, 2048, 1, 1) for n in range(4)},
        **{f"ppm.features.{n}.2.running_var": (512,) for n in range(4)},
        "bottleneck.0.weight": (512, 4096, 3, 3),
        "bottleneck.1.bias": (512,),
        "w_qkvs.weight": (2048, 512),
        "fc.weight": (512, 2048),
        "fc.bias": (512,),
        "layer_norm.weight": (512,),
        "layer_norm.bias": (512,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    heads = [
        name
        for name in shapes
        if not name.startswith(("layer0", "layer1", "layer2", "layer3", "layer4"))
    ]
    # 4 pooled branches and a convolution with a batch norm each, and the transformer's five
    assert len(heads) == 5 * 6 + 5 and "classifier.weight" not in shapes
    assert sum(p.numel() for p in model.weight_transformer.parameters()) == 2_098_688


def test_the_authors_files_in_one(tmp_path):
    model = _big()
    theirs = _their_names(model.state_dict())
    load_official(model, _save(tmp_path / "theirs.pth", theirs))
    keys = official_keys(model)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, theirs[keys[name]])
    del theirs["fc.bias"]
    with pytest.raises(ValueError, match=r"fc\.bias"):
        load_official(model, _save(tmp_path / "short.pth", theirs))


def test_the_authors_pspnet(tmp_path):
    theirs = _their_names(_big().state_dict())
    theirs = {name: v for name, v in theirs.items() if not name.startswith(("w_", "fc", "layer_n"))}
    path = _save(tmp_path / "pspnet.pth", theirs)
    options = {"backbone": "resnet50", "stem": "deep", "width": 8, "channels": 16}
    model = build_model(ModelConfig(name="cwt", base_weights=path, **options), {1: "cat"})
    assert torch.equal(model.base_learner.classifier[0].weight, theirs["bottleneck.0.weight"])
    assert torch.equal(model.backbone.conv3.weight, theirs["layer0.6.weight"])
    del theirs["ppm.features.2.1.weight"]
    with pytest.raises(ValueError, match=r"ppm\.features\.2\.1\.weight"):
        load_base_learner(_big(), _save(tmp_path / "short.pth", theirs))


@pytest.mark.parametrize("layout", ["ours", "BAM's"])
def test_a_base_learner_gives_its_encoder(tmp_path, layout):
    pspnet, model = PSPNet(build_backbone("resnet18", width=4), 3), _model()
    state = pspnet.state_dict()
    if layout == "ours":
        classes = {1: "cat", 2: "dog", 3: "cow"}
        torch.save({"state_dict": state, "classes": classes}, tmp_path / "base.pt")
        with pytest.raises(ValueError, match="another fold or data set"):
            load_base_learner(model, str(tmp_path), {1: "cat"})
        load_base_learner(model, str(tmp_path), classes)
    else:
        keys = official_keys(pspnet)
        load_base_learner(model, _save(tmp_path / "w.pth", {keys[k]: v for k, v in state.items()}))
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        logits = pspnet.eval().base_learner.classifier[4](model.maps(images)[0])
        expected = pspnet(images)
    logits = F.interpolate(logits, (33, 33), mode="bilinear", align_corners=True)
    torch.testing.assert_close(logits, expected)
