from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric

from fss.data import build_episodes, collate_episodes
from fss.evaluation import episode_classes, evaluate
from fss.feature_cache import FeatureCache
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


@pytest.mark.parametrize("name", ["baseline", "pfenet", "bam"])
@pytest.mark.parametrize("shots", [1, 3])
def test_the_score_is_exactly_that_without_a_cache(tiny, fabric, name, shots):
    """Also in batches, where photos of a batch are computed together, and when little fits."""
    model = {"name": name, "width": 8}
    if name == "bam":
        model |= {"base_weights": "none"}
    config = tiny(model=model, data={"shots": shots})
    episodes = build_episodes(config.data, "test", 16, 0)
    classes = list(episode_classes(episodes.source, 0))
    network = model_of(config)
    undecided(network, episodes[0])
    network = fabric.setup(network)
    plain = evaluate(network, episodes, classes, fabric, 1)
    assert plain.miou > 0.02
    for batch_size, gib in ((1, 1.0), (5, 1.0), (3, 1e-4)):
        cache = FeatureCache(network, gib)
        assert evaluate(network, episodes, classes, fabric, batch_size, cache=cache) == plain
        assert cache.bytes <= gib * 2**30
        assert cache.misses > 0 and (cache.hits > 0 or gib < 1)
    assert "features" not in vars(network.module)


def test_a_second_evaluation_computes_nothing(tiny, fabric):
    config = tiny()
    episodes = build_episodes(config.data, "test", 6, 0)
    network = fabric.setup(model_of(config))
    cache = FeatureCache(network, 1.0)
    classes = list(episode_classes(episodes.source, 0))
    evaluate(network, episodes, classes, fabric, 2, cache=cache)
    misses = cache.misses
    evaluate(network, episodes, classes, fabric, 3, cache=cache)
    assert cache.misses == misses


def test_a_support_is_another_one_under_the_mask_of_another_class(tiny, fabric):
    config = tiny()
    episodes = build_episodes(config.data, "test", 4, 0)
    network = model_of(config).eval()
    cache = FeatureCache(network, 1.0)
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
    assert cache.misses == 2 + 1 + 2


def test_a_cache_of_nothing_and_another_model_are_left_alone(tiny):
    network = model_of(tiny())
    for cache in (FeatureCache(network, 0), FeatureCache(torch.nn.Identity(), 1)):
        with cache.serve({}):
            assert "features" not in vars(network)
