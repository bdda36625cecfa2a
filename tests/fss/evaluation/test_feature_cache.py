from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric

from fss.data import build_episodes, collate_episodes
from fss.evaluation import evaluate as evaluation
from fss.evaluation.evaluate import episode_classes, evaluate, evaluate_all
from fss.evaluation.feature_cache import FeatureCache, Names, Shelf
from fss.models import MODELS, Prediction, build_model
from tests.long import LONG


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def model_of(config, base_classes: int = 15):
    torch.manual_seed(1)
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
    if MODELS[name].needs_base_learner:
        model |= {"base_weights": "none"}
    if name == "dcama":
        model |= {"channels": 64}  # the last convolutions have an 8th
    return tiny(model=model, data={"shots": shots})


# Untrained, some methods find nothing; which of the others is tried tells by what it keeps.
SCORED = [(name, shots) for name in ("baseline", "pfenet", "bam") for shots in (1, 3)]
SCORED += [("hsnet", 3), ("cyctr", 3)]
if LONG:
    SCORED += [(name, shots) for name in ("hdmnet", "asgnet", "dcama") for shots in (1, 3)]


@pytest.mark.parametrize(("name", "shots"), SCORED)
def test_the_scores_are_exactly_those_without_a_cache(tiny, fabric, caches, name, shots):
    """Also in batches, where photos of a batch are computed together, and when little fits."""
    config = configured(tiny, name, shots)
    sets = [build_episodes(config.data, "test", count, seed) for count, seed in ((16, 0), (7, 1))]
    classes = list(episode_classes(sets[0].source, 0))
    network = model_of(config)
    undecided(network, sets[0][0])
    network = fabric.setup(network)
    plain = [evaluate(network, episodes, classes, fabric, 1) for episodes in sets]
    lowest = 0.01 if name == "asgnet" else 0.02  # of untrained heads: enough to tell scores apart
    assert plain[0].miou > lowest and plain[0] != plain[1]
    for batch_size, gib in ((1, 1.0), (5, 1.0), (3, 1e-6)):
        scores = evaluate_all(network, sets, classes, fabric, batch_size, feature_cache=gib)
        assert scores == plain
    all_fits, _, little_fits = caches
    done, redone = (cache.photos + cache.roles for cache in (all_fits, little_fits))
    assert 0 < done < redone <= 2 * (1 + shots) * 23


@pytest.mark.parametrize("name", sorted(MODELS))
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
    batch |= dict(zip(network.inputs, arguments))
    episodes = [Names("a", ("b", "c"), 1), Names("b", ("a", "d"), 2)] * 2
    cache = FeatureCache(network, 1.0, episodes)
    with torch.no_grad():
        expected = network.features(*arguments)
        for _ in range(2):
            found = cache.features(batch)
            for a, b in zip((*found.query, *found.supports), (*expected.query, *expected.supports)):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.priors, expected.priors, rtol=1e-9, atol=1e-9)
    assert cache.photos == 4 and cache.roles == 2 + 4
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
    assert caches[0].roles == len(queries) + len(supports)


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
            "query_image": image,
            "support_images": image[:, None],
            "support_masks": masks,
        }
        with torch.no_grad():
            expected = network(image, image[:, None], masks).logits
            cached = network.head(cache.features(batch), image.shape[-2:]).logits
        torch.testing.assert_close(cached, expected)
    assert cache.photos == 2 and cache.roles == 1 + 2


class Darkness(torch.nn.Module):
    """No few-shot model of ours: what is dark is the object."""

    def forward(self, query_image, support_images, support_masks):
        gray = query_image.mean(1)
        return Prediction(torch.stack([gray, -gray], dim=1), ())


def test_a_cache_of_nothing_and_another_model_do_without(tiny, fabric, caches):
    config = tiny()
    episodes = build_episodes(config.data, "test", 4, 0)
    classes = list(episode_classes(episodes.source, 0))
    scores = [evaluate(Darkness(), episodes, classes, fabric, feature_cache=g) for g in (0, 1)]
    assert scores[0] == scores[1] and scores[0].miou > 0
    evaluate(model_of(config), episodes, classes, fabric)
    assert not caches


def test_episodes_that_were_not_foreseen_are_computed(tiny):
    network = model_of(tiny()).eval()
    image, mask = torch.randn(1, 3, 33, 33), torch.ones(1, 1, 33, 33).long()
    cache = FeatureCache(network, 1.0, [Names("a", ("b",), 1)])
    batch = {"query_name": ["c"], "support_names": [["d"]], "class_id": torch.tensor([1])}
    batch |= {"query_image": image, "support_images": image[:, None], "support_masks": mask}
    cache.features(batch)
    assert cache.photos == 2 and cache.shelf.nbytes == 0


def misses(turns, capacity, sizes):
    """Values that are not there when a turn asks for them."""
    shelf = Shelf(capacity, turns)
    missed = 0
    for keys in turns:
        missing = [key for key in dict.fromkeys(keys) if shelf.get(key) is None]
        missed += len(missing)
        shelf.advance(1)
        for key in missing:
            shelf.put(key, key, sizes[key])
            assert shelf.nbytes <= capacity
    return missed, shelf


def test_of_equal_sizes_the_one_used_last_goes_first():
    """Belady's own rule: the best there is."""
    turns = [[key] for key in "abcdabeabcde"]
    found, _ = misses(turns, 3, dict.fromkeys("abcde", 1))
    assert found == 7


def test_a_large_value_gives_way_to_many_small_ones():
    turns = [["L"], ["a"], ["b"], ["c"], ["L"], ["a"], ["b"], ["c"]]
    assert misses(turns, 8, {"L": 6, "a": 1, "b": 1, "c": 1})[0] == 5
    assert misses(turns, 9, {"L": 6, "a": 1, "b": 1, "c": 1})[0] == 4


def test_nothing_stays_without_a_further_use():
    turns = [["a", "b"], ["b", "c"], ["c"]]
    found, shelf = misses(turns, 10, dict.fromkeys("abc", 2))
    assert found == 3 and shelf.nbytes == 0 and shelf.get("c") is None


@pytest.mark.parametrize("capacity", [0, 3])
def test_what_cannot_fit_is_not_kept(capacity):
    shelf = Shelf(capacity, [["a"], ["a"]])
    shelf.advance(1)
    shelf.put("a", "value", 4)
    shelf.put("never asked for", "value", 1)
    assert shelf.get("a") is None and shelf.nbytes == 0


def test_a_value_put_again_counts_once():
    shelf = Shelf(9, [["a"], ["a"]])
    shelf.put("a", 1, 4)
    shelf.put("a", 2, 5)
    assert shelf.get("a") == 2 and shelf.nbytes == 5
