"""A network in channels_last computes the same, and lays no map out anew between convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fss.config import ModelConfig
from fss.evaluation.feature_cache import FeatureCache, Names
from fss.models import Matching, build_backbone, build_model
from fss.models.pooling import cat_maps

SHOTS = 2
# The mean of all positions, which BAM's base learner enlarges: torch then has no format to keep.
WITHOUT = ("baseline", "pfenet", "canet", "pmm", "rpmm", "asgnet", "cyctr", "dcama", "hsnet")
ANEW = {"bam": 1, **dict.fromkeys(WITHOUT, 0)}


class LaidOutAnew(TorchDispatchMode):
    """Counts what convolutions and their gradients read with the channels apart, but for images."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: Counter[tuple[int, ...]] = Counter()
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            read = args[:2] if "backward" in func.name() else args[:1]
            self.convolutions += 1
            for x in read:
                if x.shape[1] > 3 and x.shape[2:].numel() > 1 and x.stride(1) != 1:
                    self.maps[tuple(x.shape)] += 1
        return func(*args, **(kwargs or {}))


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    config = ModelConfig(
        name=name,
        backbone="resnet50",
        width=8,
        weights="none",
        base_weights="none" if name in ("bam", "hdmnet") else None,
        channels=16,
        dropout=0.0,
        bins=(0.5, 0.25),
    )
    return build_model(config, {1: "a", 2: "b"}, SHOTS)


def episodes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    return {
        "query_image": torch.randn(2, 3, 65, 65, generator=generator),
        "support_images": torch.randn(2, SHOTS, 3, 65, 65, generator=generator),
        "support_masks": integers(2, 2, SHOTS, 65, 65),
        "base_class": torch.tensor([0, 1]),
        "query_mask": integers(2, 2, 65, 65),
        "query_base_mask": integers(3, 2, 65, 65),
        "sampling": torch.tensor([3, 5]),
        "query_padding": integers(2, 2, 65, 65).bool(),
    }


def step(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss and all gradients."""
    prediction = model(*(batch[name] for name in model.inputs))
    loss = model.loss(prediction, *(batch[name] for name in model.targets))
    return [loss, *torch.autograd.grad(loss, trained(model.parameters()), allow_unused=True)]


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


@pytest.mark.parametrize("name", ANEW)
def test_a_step(name):
    model, batch = network(name), episodes()
    expected = step(model, batch)
    model.to(memory_format=torch.channels_last)
    with LaidOutAnew() as watch:
        got = step(model, batch)
    assert watch.convolutions > 100
    assert watch.maps.total() == ANEW[name], watch.maps
    for mine, wanted in zip(got, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-2, atol=1e-3)


def test_the_watch_sees_maps_that_lie_otherwise():
    with LaidOutAnew() as watch:
        step(network("baseline"), episodes())
    assert watch.maps.total() > 100


@pytest.mark.parametrize("name", [*ANEW, "matching"])
def test_supports_that_are_seen_once(name):
    matching = name == "matching"
    model = Matching(build_backbone("resnet50", width=8)) if matching else network(name)
    model.to(memory_format=torch.channels_last).eval()
    batch = episodes()
    with LaidOutAnew() as watch:
        supports = model.encode_supports(batch["support_images"][0], batch["support_masks"][0])
        model.segment(batch["query_image"], supports)
    assert watch.convolutions > 50
    assert watch.maps.total() == ANEW.get(name, 0), watch.maps


@pytest.mark.parametrize("name", ANEW)
def test_features_that_are_kept(name):
    model, batch = network(name), episodes()
    model.to(memory_format=torch.channels_last).eval()
    batch |= {"class_id": torch.tensor([1, 2]), "query_name": ["a", "b"]}
    batch |= {"support_names": [["b", "c"], ["c", "a"]]}
    names = [Names("a", ("b", "c"), 1), Names("b", ("c", "a"), 2)]
    cache = FeatureCache(model, 1.0, names * 2)
    with LaidOutAnew() as watch, torch.no_grad():
        for _ in range(2):
            model.head(cache.features(batch), batch["query_image"].shape[-2:])
    assert cache.photos == 3
    assert watch.maps.total() == 2 * ANEW[name], watch.maps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_side_by_side(layout):
    maps = torch.randn(2, 4, 3, 5).contiguous(memory_format=layout).requires_grad_()
    values, single = torch.randn(2, 3, 1, 1, requires_grad=True), torch.randn(2, 1, 3, 5)
    got = cat_maps([values, maps, single], like=maps)
    assert got.is_contiguous(memory_format=layout)
    expected = torch.cat([values.expand(2, 3, 3, 5), maps, single], dim=1)
    assert torch.equal(got, expected)
    grad = torch.randn_like(expected)
    for mine, wanted in zip(
        *(torch.autograd.grad(out, [values, maps], grad) for out in (got, expected)), strict=True
    ):
        torch.testing.assert_close(mine, wanted)
