from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric

from fss.data import build_episodes, collate_episodes
from fss.evaluation import evaluate as evaluation
from fss.evaluation.evaluate import episode_classes, evaluate, evaluate_all
from fss.evaluation.feature_cache import FeatureCache, Names
from fss.models import build_model


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def model_of(config, base_classes: int = 15):
    torch.manual_seed(0)
    names = {class_id: f"class {class_id}" for class_id in range(1, base_classes + 1)}
    return build_model(config.model, names, config.data.shots)


@torch.no_grad()
def undecided(network, item) -> None:
    """Moves the classifier's bias so that half the pixels of an episode are foreground."""
    batch = collate_episodes([item])
    network.eval()
    meta = []
    hook = network.classifier.register_forward_hook(lambda _, __, out: meta.append(out))
    network(*(batch[name] for name in network.inputs))
    hook.remove()
    network.classifier[-1].bias[1] -= (meta[0][:, 1] - meta[0][:, 0]).median()


@pytest.fixture
def caches(monkeypatch) -> list[FeatureCache]:
    """The caches that evaluations make."""
    made = []

    def make(*arguments):
        made.append(FeatureCache(*arguments))
        return made[-1]

    monkeypatch.setattr(evaluation, "FeatureCache", make)
    return made


def configured(tiny, name: str, shots: int):
    model = {"name": name, "width": 8}
    if name == "bam":
        model |= {"base_weights": "none"}
    return tiny(model=model, data={"shots": shots})


@pytest.mark.parametrize("name", ["baseline", "pfenet", "bam"])
@pytest.mark.parametrize("shots", [1, 3])
def test_the_scores_are_exactly_those_without_a_cache(tiny, fabric, caches, name, shots):
    """Also in batches, where photos of a batch are computed together, and when little fits."""
    config = configured(tiny, name, shots)
    sets = [build_episodes(config.data, "test", count, seed) for count, seed in ((16, 0), (7, 1))]
    classes = list(episode_classes(sets[0].source, 0))
    network = model_of(config)
    undecided(network, sets[0][0])
    network = fabric.setup(network)
    plain = [evaluate(network, episodes, classes, fabric, 1) for episodes in sets]
    assert plain[0].miou > 0.02 and plain[0] != plain[1]
    for batch_size, gib in ((1, 1.0), (5, 1.0), (3, 1e-6)):
        scores = evaluate_all(network, sets, classes, fabric, batch_size, feature_cache=gib)
        assert scores == plain
    assert "features" not in vars(network.module)
    all_fits, _, little_fits = (cache for cache in caches if cache.photos)
    done, redone = (cache.photos + cache.layer4 for cache in (all_fits, little_fits))
    assert 0 < done < redone <= 2 * (1 + shots) * 23


@pytest.mark.parametrize("name", ["baseline", "pfenet", "bam"])
def test_features_are_the_models_own(tiny, name):
    """Also of a support that is all foreground, of one without any, and of a photo seen before."""
    config = configured(tiny, name, 2)
    network = model_of(config).double().eval()
    images, masks = torch.randn(4, 3, 33, 33).double(), torch.zeros(2, 2, 33, 33).long()
    masks[0, 0, 4:21, 9:30] = 1
    masks[0, 1] = 1
    masks[1, 0, :3, :5] = 1
    batch = {
        "query_name": ["a", "b"],
        "support_names": [("b", "c"), ("a", "d")],
        "class_id": torch.tensor([1, 2]),
    }
    arguments = images[:2], images[torch.tensor([[1, 2], [0, 3]])], masks
    episodes = [Names("a", ("b", "c"), 1), Names("b", ("a", "d"), 2)] * 2
    cache = FeatureCache(network, 1.0, episodes)
    with torch.no_grad():
        expected = network.features(*arguments)
        for _ in range(2):
            with cache.serve(batch):
                found = network.features(*arguments)
            for a, b in zip((*found[:3], *found.supports), (*expected[:3], *expected.supports)):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.priors, expected.priors, rtol=1e-9, atol=1e-9)
    assert cache.photos == 4 and cache.layer4 == 2 + 4
    assert cache.shelf.nbytes == 0


def test_each_photo_and_support_is_computed_once_where_all_fits(tiny, fabric, caches):
    config = tiny(data={"shots": 2})
    sets = [build_episodes(config.data, "test", 20, seed) for seed in range(3)]
    network = fabric.setup(model_of(config))
    classes = list(episode_classes(sets[0].source, 0))
    evaluate_all(network, sets, classes, fabric, 4, feature_cache=1.0)
    drawn = [episodes.draw(i) for episodes in sets for i in range(20)]
    queries = {e.query for e in drawn}
    supports = {(e.class_id, i) for e in drawn for i in e.supports}
    assert caches[0].photos == len(queries | {i for _, i in supports})
    assert caches[0].layer4 == len(queries) + len(supports)


def test_a_support_is_another_one_under_the_mask_of_another_class(tiny, fabric):
    config = tiny()
    episodes = build_episodes(config.data, "test", 4, 0)
    network = model_of(config).eval()
    cache = FeatureCache(network, 1.0, [Names("a", ("b",), c) for c in (1, 2)])
    item = episodes[0]
    image, mask = item["query_image"][None], item["support_masks"][None]
    for class_id, masks in ((1, mask), (2, 1 - mask.clamp(max=1))):
        batch = {
            "query_name": ["a"],
            "support_names": [["b"]],
            "class_id": torch.tensor([class_id]),
        }
        with torch.no_grad():
            expected = network(image, image[:, None], masks).logits
            with cache.serve(batch):
                cached = network(image, image[:, None], masks).logits
        torch.testing.assert_close(cached, expected)
    assert cache.photos == 2 and cache.layer4 == 1 + 2


def test_a_cache_of_nothing_and_another_model_are_left_alone(tiny):
    network = model_of(tiny())
    for cache in (FeatureCache(network, 0, []), FeatureCache(torch.nn.Identity(), 1, [])):
        with cache.serve({}):
            assert "features" not in vars(network)


def test_episodes_that_were_not_foreseen_are_computed(tiny):
    network = model_of(tiny()).eval()
    image, mask = torch.randn(1, 3, 33, 33), torch.ones(1, 1, 33, 33).long()
    cache = FeatureCache(network, 1.0, [Names("a", ("b",), 1)])
    batch = {"query_name": ["c"], "support_names": [["d"]], "class_id": torch.tensor([1])}
    with torch.no_grad(), cache.serve(batch):
        network(image, image[:, None], mask)
    assert cache.photos == 2 and cache.shelf.nbytes == 0
