"""What holds for every model: seams, regimes, memory, precisions."""

import functools
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import svf_fast
from fss.config import METHODS, DataConfig, ModelConfig, RegimeConfig, TrainConfig
from fss.models import (
    BAM,
    DCAMA,
    MODELS,
    CANet,
    Prediction,
    build_backbone,
    build_model,
    rebuild_model,
)
from fss.models.backbone import ARCHITECTURES, Architecture, BasicBlock
from fss.models.pfenet import PFENet
from fss.models.regimes import apply_regime
from fss.training.measure import saved_bytes
from tests.long import LONG

BACKBONES = ("resnet18", "resnet50", "vgg16_bn")
MAIN_LOSS_ONLY = ("baseline", "canet", "pmm", "sgone", "cwt", "dcama")
# A shift that the next batch norm takes out again.
NORMED = {
    "pmm": {
        f"{n}.bias" for n in ("reduce.0", "comparison.0", "merge.0", "project.0", "aspp.pooled")
    },
    "rpmm": {"reduce.0.bias"},
}
# The paper's models on every backbone; the others on the smallest, on all with SVF_LONG=1.
RUNS_ON = [
    (name, backbone)
    for name, kind in MODELS.items()
    for backbone in BACKBONES
    if backbone in kind.backbones
    and (LONG or name in ("baseline", "pfenet", "bam") or backbone == "resnet18")
]
# Those whose forward passes have the most kinds of operations; all with SVF_LONG=1.
COMPILED = list(MODELS) if LONG else ["baseline", "pfenet", "bam", "hsnet"]
ROUNDED = {"ppnet": 0.15}  # its k-means gives a position to a part by the last digits
CHANNELS = {"dcama": 64}  # whose last convolutions have an 8th
BASE = {c: f"class {c}" for c in range(1, 6)}
WITH_HEAD = [name for name in MODELS if name != "panet"]  # something besides the backbone trains


def _model(name, backbone="resnet18", shots=1, **options):
    torch.manual_seed(0)
    values = {"width": 4, "weights": "none", "dropout": 0.0, **options}
    values.setdefault("channels", CHANNELS.get(name, 16))
    if MODELS[name].needs_base_learner:
        values["base_weights"] = "none"
    return build_model(ModelConfig(name=name, backbone=backbone, **values), BASE, shots)


def _batch(batch=2, shots=1, height=41, width=49):
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.rand, generator=generator)
    masks = (random(batch, 1 + shots, height, width) > 0.4).long()
    masks[:, :, 30:35] = 255
    return {
        "query_image": 2 * random(batch, 3, height, width) - 1,
        "support_images": 2 * random(batch, shots, 3, height, width) - 1,
        "support_masks": masks[:, 1:],
        "query_mask": masks[:, 0],
        "query_base_mask": torch.where(masks[:, 0] == 1, 4, masks[:, 0]),
        "support_base_masks": torch.where(masks[:, 1:] == 1, 4, masks[:, 1:]),
        "base_class": torch.arange(batch) - 1,
        "sampling": torch.arange(batch) + 7,
        "query_padding": masks[:, 0] == 255,
    }


def _predict(model, batch):
    return model(*(batch[name] for name in model.inputs))


def _loss(model, batch, call=None):
    prediction = (
        _predict(call or model, batch)
        if call is None
        else call(*(batch[name] for name in model.inputs))
    )
    weight = torch.tensor([1.0, 2.0])
    return model.loss(prediction, *(batch[name] for name in model.targets), class_weight=weight)


def _grow(model):
    """Let a fresh head see all that it reads.

    BAM's ensemble begins blind to the base learner and the distance, its weights of the shots
    perhaps with dead units, and CyCTR's deformable attention blind to its tokens; CANet's small
    weights are made for wide heads. A random backbone's features are of hundreds, beside which
    DCAMA's masks are nothing.
    """
    if isinstance(model, DCAMA):
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.mul_(0.5)
    for name, parameter in model.named_parameters():
        if ".self_attention." in name and name.endswith(("offsets.weight", "weights.weight")):
            nn.init.normal_(parameter, std=0.3)
        if name.endswith("_merge.weight"):
            parameter.data += torch.tensor([0.1, 0.3])
        elif name == "shot_weights.layers.0.bias":
            parameter.data.fill_(1)
        elif isinstance(model, CANet) and not name.startswith("backbone.") and parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize(("name", "backbone"), RUNS_ON)
def test_logits_have_the_size_of_the_query(name, backbone, shots):
    model, batch = _model(name, backbone, shots), _batch(shots=shots)
    for mode in (True, False):
        prediction = _predict(model.train(mode), batch)
        assert isinstance(prediction, Prediction)
        assert prediction.logits.shape == (2, 2, 41, 49)
        assert prediction.logits.isfinite().all()
        trains_more = name not in MAIN_LOSS_ONLY and (name != "hsnet" or shots > 1)
        assert bool(prediction.auxiliary) == (mode and trains_more)


@pytest.mark.parametrize(
    ("name", "backbone", "regime"),
    [
        (name, backbone, regime)
        for name, backbone in RUNS_ON
        for regime in ("freeze", "svf", "full")
        if name in WITH_HEAD or regime != "freeze"
    ],
)
def test_a_step_of_each_regime(name, backbone, regime):
    """What the regime trains gets a gradient and moves, the rest stays as it was."""
    shots = 1 if backbone == "resnet50" else 2
    # HDMNet's self-attention needs several keys, of four positions each way, to choose from
    size = {"height": 137, "width": 129} if (name, backbone) == ("hdmnet", "vgg16_bn") else {}
    size = size or ({"height": 65, "width": 73} if name == "hdmnet" else {})
    model, batch = _model(name, backbone, shots), _batch(shots=shots, **size)
    _grow(model)
    apply_regime(model, RegimeConfig(name=regime))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # a softmax is blind to what it gets added, as here the keys' biases in DCAMA
    trained = {
        key: p
        for key, p in model.named_parameters()
        if p.requires_grad and not key.endswith(".key.bias")
    }
    assert any(key.startswith("backbone.") for key in trained) == (regime != "freeze")
    assert not any(key.startswith("base_learner.") for key in trained)
    loss = _loss(model, batch)
    loss.backward()
    without = [key for key, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not without
    torch.optim.Adam(trained.values(), lr=0.01, eps=1e-15).step()  # by the rate, if by little
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    # a head may have batch norms
    counted = ("running_mean", "running_var", "num_batches_tracked")
    moved -= {key for key in moved if not key.startswith("backbone.") and key.endswith(counted)}
    assert trained.keys() - NORMED.get(name, set()) <= moved <= trained.keys()
    assert _loss(model, batch) != loss
    # arithmetic on state dicts, as of averages, destroys integers; torch's batch norms have one
    integers = [key for key, value in before.items() if not value.is_floating_point()]
    assert all(key.endswith("num_batches_tracked") for key in integers)


def _saved(name, backbone, regime, strategy="auto", shots=1):
    model = _model(name, backbone, shots, width=8)
    apply_regime(model, RegimeConfig(name=regime, strategy=strategy))
    model.train()
    with saved_bytes(model) as saved:
        _loss(model, _batch(batch=1, shots=shots, height=81, width=81))
    return saved.total


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        (name, backbone)
        for name, kind in MODELS.items()
        for backbone in ("resnet50", "vgg16_bn")
        if backbone in kind.backbones
        and (LONG or backbone == "resnet50" or name in ("baseline", "pfenet", "bam"))
    ],
)
def test_svf_saves_less_than_the_papers_layers(name, backbone):
    """And what it adds to a frozen backbone is at most half of what they add.

    A little more where blocks end in the sum: autograd keeps the ReLUs between them.
    """
    frozen = _saved(name, backbone, "freeze")
    fast, paper = (_saved(name, backbone, "svf", strategy) for strategy in ("auto", "reference"))
    assert frozen < fast < paper
    share = 0.55 if MODELS[name].backbone_options.get("sums") else 0.5
    assert fast - frozen < share * (paper - frozen)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast(name):
    model, batch = _model(name, shots=2), _batch(shots=2)
    apply_regime(model, RegimeConfig())
    _grow(model)
    model.train()
    expected = _loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDED.get(name, 0.05))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_other_precisions(name, dtype):
    model, batch = _model(name, shots=2), _batch(shots=2)
    expected = _loss(model, batch).item()
    images = {k: v.to(dtype) for k, v in batch.items() if v.is_floating_point()}
    loss = _loss(model.to(dtype), batch | images)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=ROUNDED.get(name, 0.05))


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(monkeypatch, name):
    """A block of each layer, singular values in the last: what takes long is tracing the others."""
    monkeypatch.setitem(ARCHITECTURES, "resnet18", Architecture(BasicBlock, (1, 1, 1, 1)))
    model, batch = _model(name), _batch()
    last = [f"layer{n}" for n in range(1, 5) if f"layer{n}" not in model.unused_layers][-1]
    apply_regime(model, RegimeConfig(layers=(last,)))
    model.train()
    torch._dynamo.reset()  # the forward of all methods is one code, compiled for a few at most
    if name == "cwt":
        model.iterations = 3  # of 200, each of which is traced
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(_loss(model, batch, compiled), _loss(model, batch))


@pytest.mark.parametrize("name", list(MODELS) if LONG else ["baseline", "pfenet", "bam", "hsnet"])
def test_deep_stem_and_resnet101(name):
    model = _model(name, "resnet101", stem="deep", width=2)
    _loss(model, _batch(batch=1, height=33, width=33)).backward()
    assert model.backbone.conv3.weight.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_supports_and_episodes_are_not_mixed_up(name):
    """Each query sees its own supports, whose order does not matter, but for HDMNet's weights.

    HSNet's votes hide small differences, so it is in training mode.
    """
    model, batch = _model(name, shots=3).train(name == "hsnet"), _batch(batch=3, shots=3)
    _grow(model)
    together = _predict(model, batch).logits
    for b in range(3):
        alone = _predict(model, {key: value[b : b + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-5)
    swapped = {k: batch[k].flip(1) for k in ("support_images", "support_masks")}
    if name == "hdmnet":  # as published
        model.shot_weights.restore_order = True
        together = _predict(model, batch).logits
    if name != "cyctr":  # which takes tokens for object or not by their place among all
        torch.testing.assert_close(
            _predict(model, batch | swapped).logits, together, atol=1e-5, rtol=1e-4
        )
    other = batch | {"support_images": batch["support_images"].roll(1, 0)}
    assert (_predict(model, other).logits - together).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_modes_of_what_is_frozen(name):
    model = _model(name)
    for mode in (True, False, True):
        assert model.train(mode).training is mode
        parts = dict(model.named_children())
        frozen = [parts.pop(part) for part in ("backbone", "base_learner") if part in parts]
        assert not any(m.training for part in frozen for m in part.modules())
        assert bool(parts) == (name in WITH_HEAD)
        assert all(
            m.training is mode
            for part in parts.values()
            for m in part.modules()
            if not isinstance(m, nn.BatchNorm2d)  # HDMNet's keep their statistics
        )


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_support_mask_is_no_accident(name):
    model, batch = _model(name), _batch()
    loss = _loss(model, batch | {"support_masks": torch.zeros_like(batch["support_masks"])})
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "name",
    [n for n in WITH_HEAD if n not in ("ppnet", "cwt") and (LONG or n not in ("hdmnet", "rpmm"))],
)
def test_learns_two_episodes(name):
    """CWT reads frozen features alone, of which random ones do not tell: see its own tests."""
    model, batch = _model(name), _batch()
    apply_regime(model, RegimeConfig(name="freeze"))
    lr = 0.01 if name == "cyctr" else 0.003
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batch["query_mask"][:] = 0
    batch["query_mask"][:, 5:25, 5:25] = 1
    scores = []
    for _ in range(40):
        optimizer.zero_grad()
        prediction = _predict(model, batch)
        targets = [batch[name] for name in model.targets]
        scores.append(model.loss(Prediction(prediction.logits, ()), *targets).item())
        model.loss(prediction, *targets).backward()
        optimizer.step()
    assert scores[-1] < (0.8 if MODELS[name].needs_base_learner else 0.5) * scores[0]


def test_singular_values_of_vgg_run_fused():
    model = _model("bam", "vgg16_bn")
    apply_regime(model, RegimeConfig())
    layers = [model.backbone.layer2, model.backbone.layer3, model.backbone.layer4]
    assert all(layer.unfused_reason() == "" for layer in layers)
    assert len(list(svf_fast.svf_parameters(model))) == 9


def test_the_configuration_knows_the_models_of_the_registry():
    assert get_args(get_type_hints(ModelConfig)["name"]) == tuple(MODELS) == tuple(METHODS)
    for name, kind in MODELS.items():
        method = METHODS[name]
        assert method.official == bool(kind.official_names), name
        assert method.base_learner == kind.needs_base_learner, name
        assert method.any_size == kind.any_size, name


@pytest.mark.parametrize(
    ("name", "as_trained", "regime"),
    [
        (name, as_trained, regime)
        for name in MODELS
        for as_trained in (True, False)
        for regime in ("svf", "freeze")
        if LONG or name in ("baseline", "pfenet", "bam") or (regime == "svf" and not as_trained)
    ],
)
def test_a_saved_network_is_rebuilt_from_its_state_dict(name, as_trained, regime):
    base = {"base_weights": "gone"} if MODELS[name].needs_base_learner else {}
    small = {"backbone": "resnet18", "width": 4, "channels": CHANNELS.get(name, 16)}
    config = TrainConfig(
        data=DataConfig(source="shapes", shots=2),
        model=ModelConfig(name=name, weights="gone", **small, **base),
        regime=RegimeConfig(name=regime),
    )
    model = _model(name, shots=2)
    apply_regime(model, config.regime)
    _grow(model)
    rebuilt = rebuild_model(config, model.state_dict(), as_trained)
    assert len(list(svf_fast.svf_parameters(rebuilt))) == len(list(svf_fast.svf_parameters(model)))
    if regime == "svf":
        adapters = [svf_fast.Adapter.of(each.backbone) for each in (model, rebuilt)]
        assert adapters[0].fingerprints == adapters[1].fingerprints  # of the pretrained weights
    batch = _batch(shots=2)
    with torch.no_grad():
        expected, got = (_predict(each.eval(), batch).logits for each in (model, rebuilt))
    torch.testing.assert_close(got, expected)
    last = "layer4" if name == "panet" else "classifier"
    short = {name: value for name, value in model.state_dict().items() if last not in name}
    with pytest.raises(RuntimeError, match="Missing key"):
        rebuild_model(config, short, as_trained)


@pytest.mark.parametrize("as_trained", [True, False])
@pytest.mark.parametrize(
    "regime",
    [
        {"name": "svf"},
        {"name": "svf", "factors": ("U", "S", "V")},
        {"name": "svf_scale"},
        {"name": "rotated_svf"},
        {"name": "rotated_svf", "factors": ()},
        {"name": "rotated_scale"},
        {"name": "scale_input"},
    ],
)
def test_a_rebuilt_network_is_not_decomposed(monkeypatch, regime, as_trained):
    config = TrainConfig(
        data=DataConfig(source="shapes"),
        model=ModelConfig(weights="gone", backbone="resnet18", width=4, channels=16),
        regime=RegimeConfig(**regime),
    )
    model = _model("baseline")
    apply_regime(model, config.regime)
    _grow(model)

    def refuse(*_: object) -> None:
        raise AssertionError("decomposed again")

    for owner in (
        svf_fast,
        sys.modules["svf_fast.convert"],
        sys.modules["svf_fast.layers.factored"],
    ):
        monkeypatch.setattr(owner, "decompose", refuse)
    rebuilt = rebuild_model(config, model.state_dict(), as_trained)
    batch = _batch()
    with torch.no_grad():
        expected, got = (_predict(each.eval(), batch).logits for each in (model, rebuilt))
    torch.testing.assert_close(got, expected)


def test_build_model_wants_what_bam_needs():
    with pytest.raises(
        ValueError, match="model.base_weights: expected the base learner of bam, got no"
    ):
        ModelConfig(name="bam")
    with pytest.raises(ValueError, match="model.base_weights: .*pfenet has no base learner"):
        ModelConfig(name="pfenet", base_weights="runs/base")
    with pytest.raises(ValueError, match="model.official: .*baseline has no checkpoint"):
        ModelConfig(official="x.pth")
    with pytest.raises(ValueError, match="base_classes: expected the names"):
        build_model(ModelConfig(name="bam", base_weights="none", weights="none"))


def test_pfenets_bins_may_be_shares_of_the_map():
    """As published for COCO: 65 px have maps of 9, so shares of 1 and a half are 9 and 4 bins."""
    backbone = build_backbone("resnet18", width=4)
    shares = PFENet(backbone, channels=8, dropout=0, bins=(1.0, 0.5)).eval()
    numbers = PFENet(backbone, channels=8, dropout=0, bins=(9, 4)).eval()
    numbers.load_state_dict(shares.state_dict())
    images, masks = torch.randn(2, 3, 65, 65), torch.ones(1, 1, 65, 65).long()
    episode = images[:1], images[None, 1:], masks
    assert torch.equal(shares(*episode).logits, numbers(*episode).logits)


def test_pfenet_wants_bins():
    for bins in ((), (60, 0), (2.5,), (-1,)):
        with pytest.raises(ValueError, match="bins: expected integers above 1, or shares"):
            PFENet(build_backbone("resnet18", width=4), channels=8, bins=bins)


def test_pfenet_averages_its_auxiliary_losses():
    model, batch = _model("pfenet"), _batch()
    prediction, mask = _predict(model, batch), batch["query_mask"]
    main = model.loss(Prediction(prediction.logits, ()), mask)
    single = [model.loss(Prediction(prediction.logits, (a,)), mask) for a in prediction.auxiliary]
    assert len(single) == 4
    torch.testing.assert_close(model.loss(prediction, mask), sum(single) / 4)
    assert all(loss > main for loss in single)


def test_bam_does_not_hold_the_episodes_class_against_it():
    """While training its own class is no background; in evaluation and of novel ones all are."""
    model, batch = _model("bam"), _batch()
    _grow(model)
    with torch.no_grad():
        novel, own, other = (
            _predict(model, batch | {"base_class": torch.tensor([c, -1])}).logits
            for c in (-1, 2, 3)
        )
        evaluated = _predict(model.eval(), batch).logits
    torch.testing.assert_close(novel, evaluated)
    assert torch.equal(own[1], novel[1]) and torch.equal(own[:, 1], novel[:, 1])
    assert (own[0, 0] < novel[0, 0]).all() and not torch.equal(own, other)


def test_bam_begins_as_its_meta_learner():
    model, batch = _model("bam"), _batch()
    prediction = _predict(model, batch)
    meta = prediction.auxiliary[0].softmax(dim=1)
    expected = nn.functional.interpolate(meta, (41, 49), mode="bilinear", align_corners=True)
    torch.testing.assert_close(prediction.logits, expected)


def test_bam_segments_without_a_base_class_but_does_not_train():
    model, batch = _model("bam"), _batch()
    three = [batch[name] for name in model.inputs[:3]]
    assert torch.equal(model.eval()(*three).logits, _predict(model, batch).logits)
    with pytest.raises(TypeError, match="base_class: expected int64, .* got NoneType"):
        model.train()(*three)
    with pytest.raises(TypeError, match="base_class: expected int64, .* got torch.int32"):
        model(*three, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"base_class: expected \[2\] on cpu, .*got \[3\] on cpu"):
        model(*three, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"query_base_mask: expected \[2, 41, 49\]"):
        model.loss(_predict(model, batch), batch["query_mask"], batch["query_base_mask"][:1])


def test_bam_weighs_the_shots_it_was_built_for():
    model = _model("bam", shots=5)
    assert _predict(model, _batch(shots=1)).logits.isfinite().all()
    with pytest.raises(ValueError, match="support_images: expected K = 1 or 5 .*got K = 3"):
        _predict(model, _batch(shots=3))
    with pytest.raises(ValueError, match="support_images: expected K = 1 supports"):
        _predict(_model("bam"), _batch(shots=2))
    with pytest.raises(ValueError, match="classes: expected at least one base class, got 0"):
        BAM(build_backbone("resnet18", width=4), 0, channels=8)
