"""Batch norms of a frozen backbone in training mode, as in the published PFENet code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fss.config import ModelConfig, RegimeConfig
from fss.evaluation.evaluate import evaluate
from fss.models import build_model
from fss.models.pooling import resize
from fss.models.regimes import apply_regime
from fss.processes import build_fabric
from fss.training.trainer import Trainer

AS_PFENET = RegimeConfig(name="freeze", layers=("all",), batch_norm_statistics="batch")
CLASSES = {c: str(c) for c in range(1, 5)}


def build(name: str, backbone: str, shots: int, stem: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"width": 4, "weights": "none", "channels": 8, "dropout": 0.0}
    base = "none" if name == "bam" else None
    config = ModelConfig(name, backbone, stem, base_weights=base, **sizes)
    model = build_model(config, CLASSES, shots).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def episode(shots: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 1 + shots, 3, 33, 41, generator=generator, dtype=torch.float64)
    masks = (torch.rand(3, shots, 33, 41, generator=generator) < 0.4).long()
    return images[:, 0], images[:, 1:], masks


def as_published(backbone: nn.Module, query, supports, masks) -> list[tuple[torch.Tensor, ...]]:
    """Layers 2, 3 and 4 of the query, then of each shot, whose layer 4 sees the masked layer 3."""
    backbone.train()
    with torch.no_grad():
        low, middle = backbone.features(query)
        maps = [(low, middle, backbone.layer4(middle))]
        for shot in range(supports.shape[1]):
            low, middle = backbone.features(supports[:, shot])
            mask = resize((masks[:, shot] == 1).double().unsqueeze(1), middle.shape[-2:])
            maps.append((low, middle, backbone.layer4(middle * mask)))
    backbone.eval()
    return maps


MODELS = [
    ("pfenet", "resnet50", 1, "deep"),
    ("pfenet", "vgg16_bn", 2, "plain"),
    ("baseline", "resnet18", 3, "plain"),
    ("bam", "resnet18", 2, "plain"),
]


@pytest.mark.parametrize(("name", "backbone", "shots", "stem"), MODELS)
def test_maps_and_statistics_are_those_of_the_published_passes(name, backbone, shots, stem):
    model = build(name, backbone, shots, stem)
    batch = episode(shots)
    other = copy.deepcopy(model.backbone)
    before = {n: x.clone() for n, x in other.state_dict().items()}
    maps = as_published(other, *batch)
    apply_regime(model, AS_PFENET)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.train()
    extra = (torch.tensor([0, 1, 2]),) if name == "bam" else ()
    model(*batch, *extra)
    after = model.backbone.state_dict()
    for key, expected in other.state_dict().items():
        torch.testing.assert_close(after[key], expected, rtol=1e-10, atol=1e-12, msg=key)
    means = [key for key in before if key.endswith("running_mean")]
    assert means and all((after[key] - before[key]).abs().max() > 1e-3 for key in means)
    with torch.no_grad():  # once more: the maps do not depend on what is stored
        features = model.features(*batch)
    for got, expected in zip(features.query, maps[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for shot in range(shots):
        torch.testing.assert_close(
            features.supports[0][:, shot], _summary(model, maps[1 + shot], batch[2][:, shot])
        )


def _summary(model: nn.Module, maps: tuple[torch.Tensor, ...], masks: torch.Tensor):
    low, middle, _ = maps
    mask = resize((masks == 1).double().unsqueeze(1), middle.shape[-2:])
    return model.summarize(low, middle, mask)[0]


@pytest.mark.parametrize(("name", "backbone", "shots", "stem"), MODELS[:3])
def test_a_test_uses_what_is_stored(name, backbone, shots, stem):
    """In evaluation mode nothing moves, and queries and supports run together as ever."""
    model = build(name, backbone, shots, stem).eval()
    batch = episode(shots)
    expected = model(*batch).logits
    apply_regime(model, AS_PFENET)
    state = {n: x.clone() for n, x in model.state_dict().items()}
    torch.testing.assert_close(model.eval()(*batch).logits, expected, rtol=0, atol=0)
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())


def test_batch_norms_with_stored_statistics_run_all_images_together(monkeypatch):
    model = build("baseline", "resnet18", 2).train()
    apply_regime(model, RegimeConfig(name="freeze"))
    seen = []
    features = model.backbone.features
    monkeypatch.setattr(model.backbone, "features", lambda x: seen.append(len(x)) or features(x))
    model.train()(*episode(2))
    assert seen == [9]


@pytest.mark.parametrize("shots", [1, 2])
def test_the_feature_cache_scores_as_without_it(tiny, shots):
    """A validation between two training steps, the statistics of which it must not touch."""
    regime = {"name": "freeze", "layers": ["all"], "batch_norm_statistics": "batch"}
    config = tiny(regime=regime, data={"shots": shots}, model={"name": "pfenet"})
    fabric = build_fabric(config)
    trainer = Trainer(config, fabric)
    trainer.model.train()
    trainer._train_step([next(trainer._batches())])
    stored = {n: x.clone() for n, x in trainer.network.state_dict().items()}
    scores = [
        evaluate(
            trainer.model,
            trainer.validation_episodes,
            list(trainer.validated),
            fabric,
            feature_cache=gib,
        )
        for gib in (0.0, 1.0)
    ]
    assert scores[0] == scores[1]
    assert all(torch.equal(x, stored[n]) for n, x in trainer.network.state_dict().items())
    assert trainer.network.training


def test_what_the_signature_of_a_checkpoint_says():
    plain = RegimeConfig(name="freeze", layers=("layer4",)).signature()
    assert plain == RegimeConfig(name="freeze").signature() and plain["layers"] is None
    assert AS_PFENET.signature()["layers"] == ["all"]
    assert AS_PFENET.signature() != plain
