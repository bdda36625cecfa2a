"""CANet, and the authors' files of CANet, PMM and RPMM, whose networks are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fss.config import ModelConfig, RegimeConfig
from fss.models import PMM, RPMM, CANet, build_backbone, build_model
from fss.models.canet import convolution, tiled
from fss.models.official import load_official, official_keys
from fss.models.regimes import apply_regime


def network(shots: int = 1, seed: int = 0, **options) -> CANet:
    """In float64, with weights that a narrow head sees through."""
    torch.manual_seed(seed)
    options = {"channels": 8, "dropout": 0.0, "shots": shots} | options
    model = CANet(build_backbone("resnet18", width=4), **options).double()
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone.") and parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    return model


def episode(shots: int = 1, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1 + shots, 3, 33, 41, generator=generator).double()
    masks = (torch.rand(batch, shots, 33, 41, generator=generator) > 0.5).long()
    return images[:, 0], images[:, 1:], masks


def enlarge(logits: Tensor) -> Tensor:
    return functional.interpolate(logits, (33, 41), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_vector_at_all_positions(size, dilation):
    """Also at the margin, where part of the kernel is outside of the map."""
    layer = convolution(3 + 4, 5, 3, dilation, 0.0).double()
    maps, vectors = torch.randn(2, 3, *size).double(), torch.randn(2, 3, 4).double()
    found = tiled(layer, maps, vectors)
    assert len(found) == 3
    for n, each in enumerate(found):
        vector = vectors[:, n, :, None, None].expand(-1, -1, *size)
        torch.testing.assert_close(
            each, layer(torch.cat([maps, vector], dim=1)), rtol=1e-9, atol=1e-9
        )


def test_a_vector_next_to_a_map_has_gradients():
    layer = convolution(3 + 2, 2, 3, 2, None).double().eval()
    maps = torch.randn(1, 3, 4, 5).double().requires_grad_()
    vectors = torch.randn(1, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: tiled(layer, *inputs), (maps, vectors))


@torch.no_grad()
def test_the_mask_is_refined():
    """By passes written out, whose number changes the result."""
    model, (query, support, masks) = network().eval(), episode()
    low, middle = model.backbone.features(query)
    reduced = model.reduce(torch.cat([low, middle], dim=1))
    of_support = model.reduce(torch.cat(model.backbone.features(support[:, 0]), dim=1))
    share = functional.interpolate(
        masks.double(), reduced.shape[2:], mode="bilinear", align_corners=True
    )
    prototypes = []
    for b in range(2):
        total = sum(share[b, 0, i, j] * of_support[b, :, i, j] for i in range(5) for j in range(6))
        prototypes.append(total / (share[b].sum() + 0.0005))
    tile = torch.stack(prototypes)[:, :, None, None].expand_as(reduced)
    x = model.comparison(torch.cat([reduced, tile], dim=1))
    mask, passes = torch.zeros(2, 2, 5, 6).double(), []
    for _ in range(5):
        y = x + model.residuals[0](torch.cat([x, mask], dim=1))
        y = y + model.residuals[1](y)
        y = y + model.residuals[2](y)
        passes.append(model.classifier(model.project(model.aspp(y))))
        mask = passes[-1].softmax(dim=1)
    for iterations in (0, 1, 4):
        model.iterations = iterations
        found = model(query, support, masks).logits
        torch.testing.assert_close(found, enlarge(passes[iterations]), rtol=1e-9, atol=1e-9)
    assert (passes[4] - passes[0]).abs().max() > 1e-3


def test_while_training_the_mask_is_emptied_sometimes():
    model, batch = network().train(), episode(batch=8)
    model.reset = 1.0
    empty = model(*batch).logits
    model.reset = 0.0
    given = model(*batch).logits
    assert ((empty - given).abs().flatten(1).amax(1) > 1e-6).all()
    assert CANet(build_backbone("resnet18", width=4), channels=8, dropout=0.5).reset == 0.7
    model.reset = 0.7
    kept = 0
    for _ in range(10):
        mixed = model(*batch).logits
        near = [(mixed - each).abs().flatten(1).amax(1) < 1e-9 for each in (empty, given)]
        assert (near[0] | near[1]).all()
        kept += int(near[1].sum())
    assert 10 < kept < 40  # of 80, three tenths


def test_the_mask_has_no_gradient():
    model, batch = network(iterations=3).eval(), episode()
    model(*batch).logits.sum().backward()
    bias = model.classifier.bias.grad.clone()
    model.zero_grad()
    model.iterations = 0
    model(*batch).logits.sum().backward()
    # of the last pass alone: each logit has the bias once
    torch.testing.assert_close(bias, model.classifier.bias.grad)


@torch.no_grad()
def test_several_shots_are_weighed_or_averaged():
    one, several = network().eval(), network(shots=3).eval()
    several.load_state_dict(one.state_dict(), strict=False)
    query, supports, masks = episode(shots=3)
    for model in (one, several):
        same = supports[:, :1].expand(-1, 3, -1, -1, -1), masks[:, :1].expand(-1, 3, -1, -1)
        single = model(query, supports[:, :1], masks[:, :1]).logits
        torch.testing.assert_close(model(query, *same).logits, single, rtol=1e-9, atol=1e-9)
    reduced = one.reduced(*one.backbone.features(query))
    prototypes = torch.randn(2, 3, 8).double()
    each = [one.compare(reduced, prototypes[:, k : k + 1]) for k in range(3)]
    torch.testing.assert_close(one.compare(reduced, prototypes), sum(each) / 3)
    tiles = [prototypes[:, k, :, None, None].expand(-1, -1, *reduced.shape[2:]) for k in range(3)]
    scores = [several.attention(torch.cat([reduced, t], 1)).mean(dim=(1, 2, 3)) for t in tiles]
    total = sum(score.exp() for score in scores)
    wanted = sum((score.exp() / total)[:, None, None, None] * x for score, x in zip(scores, each))
    torch.testing.assert_close(several.compare(reduced, prototypes), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - sum(each) / 3).abs().max() > 1e-4


def test_layer_4_is_taken_out():
    model = network()
    assert not any("layer4" in name for name in model.state_dict())
    apply_regime(model, RegimeConfig())  # of layers 2 to 4
    trained = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained & {"layer1", "layer2", "layer3", "layer4"} == {"layer2", "layer3"}
    with pytest.raises(ValueError, match=r"regime.layers: expected a layer .* it takes layer4 out"):
        apply_regime(network(), RegimeConfig(layers=("layer4",)))


def conv(name: str, out: int, into: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{each}": (channels,) for each in names}


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    """Of torchvision's ResNet-50 up to layer 3."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    into = 64
    for n, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256)), 1):
        for block in range(depth):
            name = f"layer{n}.{block}"
            sizes = (width, into, 1), (width, width, 3), (4 * width, width, 1)
            for i, (out, channels, kernel) in enumerate(sizes, 1):
                shapes[f"{name}.conv{i}.weight"] = (out, channels, kernel, kernel)
                shapes |= norm(f"{name}.bn{i}", out)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, into, 1, 1)
                shapes |= norm(f"{name}.downsample.1", 4 * width)
            into = 4 * width
    return shapes


def official_shapes(name: str) -> dict[str, tuple[int, ...]]:
    body, views = ("", "") if name == "canet" else ("model_res.", "layer6.")
    shapes = {body + key: shape for key, shape in resnet_shapes().items()}
    shapes |= conv("layer5.0", 256, 1536, 3) | conv("layer55.0", 256, 512, 3)
    shapes |= conv("layer7.0", 256, 1280, 1) | conv("layer9", 2, 256, 1)
    for n in range(5):
        shapes |= conv(f"{views}layer6_{n}.0", 256, 256, 1 if n < 2 else 3)
    for n in (1, 2, 3):
        shapes |= conv(f"residule{n}.1", 256, 258 if n == 1 else 256, 3)
        shapes |= conv(f"residule{n}.3", 256, 256, 3)
    if name != "canet":
        shapes |= conv("layer56.0", 256, 256 if name == "pmm" else 258, 3)
    for n in {"canet": (), "pmm": (5, 55, 56, 7), "rpmm": (5,)}[name]:
        shapes |= norm(f"layer{n}.1", 256)
    return shapes


@pytest.mark.parametrize("name", ["canet", "pmm", "rpmm"])
def test_the_authors_file_loads_whole(tmp_path, name):
    """CANet's is of a parallel network, those of PMM are in an entry of the file."""
    state = {
        key: torch.full(shape, float(n))
        for n, (key, shape) in enumerate(official_shapes(name).items())
    }
    path = str(tmp_path / "file.pth")
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save(wrapped if name == "canet" else {"state_dict": state}, path)
    model = build_model(ModelConfig(name=name, official=path, stride_on="conv1"))
    assert isinstance(model, {"canet": CANet, "pmm": PMM, "rpmm": RPMM}[name])
    own = model.state_dict()
    names = {
        key: theirs
        for key, theirs in official_keys(model).items()
        if not key.endswith("num_batches_tracked")
    }
    assert sorted(names.values()) == sorted(state)
    assert all(torch.equal(own[key], state[theirs]) for key, theirs in names.items())
    lacking = "layer55.0.bias"
    del state[lacking]
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"1 missing: {lacking}"):
        load_official(model, path)
