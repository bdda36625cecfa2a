"""SG-One: the similarity map, its guidance, and the authors' files."""

import pytest
import torch
from torch.nn import functional

from fss.config import ModelConfig
from fss.models import SGOne, build_backbone, build_model
from fss.models.official import load_official
from fss.models.vgg import PLAIN_CUTS

# Their VGG-16: convolutions of each stage and their channels.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


def _sgone(backbone="vgg16", channels=8):
    torch.manual_seed(0)
    backbone = build_backbone(backbone, width=4, **SGOne.backbone_options)
    return SGOne(backbone, channels).double().eval()


def _episode(batch=2, shots=1, side=33):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1 + shots, 3, side, side, generator=generator).double()
    masks = (torch.rand(batch, 1 + shots, side, side, generator=generator) > 0.6).long()
    masks[:, :, :2] = 255
    return images[:, 0], images[:, 1:], masks[:, 1:], masks[:, 0]


def _their_shapes():
    shapes, into = {}, 3

    def convolution(name, out, channels, kernel=3):
        shapes[f"{name}.weight"] = (out, channels, kernel, kernel)
        shapes[f"{name}.bias"] = (out,)

    for n, (depth, width) in enumerate(STAGES, 1):
        for i in range(depth):
            convolution(f"netB.features_{n}.{2 * i}", width, into)
            into = width
    convolution("netB.cls.0", 512, 512)
    convolution("netB.side3_1.0", 128, 256)
    convolution("netB.side4_1.0", 128, 640)
    convolution("netB.side5_1.0", 128, 640)
    convolution("classifier_6.0", 128, 128)
    convolution("exit_layer", 2, 128, 1)
    return shapes


def test_the_similarity_guides_each_position():
    """Position by position, from the published definition, and the padded classifier."""
    model, (query, images, masks, _) = _sgone(), _episode(batch=1, shots=2)
    with torch.no_grad():
        vectors = []
        for k in (0, 1):
            guidance = model.guide(model.maps(images[:, k])[2])
            large = functional.interpolate(guidance, (33, 33), mode="bilinear")[0]
            vectors.append(large[:, masks[0, k] == 1].mean(1))
        v = sum(vectors) / 2
        maps = model.maps(query)
        guidance, branch = model.guide(maps[2])[0], model.segmentation(*maps)[0]
        guided = torch.zeros_like(branch)
        for y in range(5):
            for x in range(5):
                g = guidance[:, y, x]
                guided[:, y, x] = branch[:, y, x] * (g @ v) / (g.norm() * v.norm())
        merged = model.merge(guided[None])[0].relu()
        weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
        logits = bias[:, None, None].expand(2, 7, 7).clone()
        logits[:, 1:6, 1:6] += torch.einsum("oc,cyx->oyx", weight, merged)
        expected = functional.interpolate(logits[None], (33, 33), mode="bilinear")
        torch.testing.assert_close(model(query, images, masks).logits, expected, rtol=0, atol=1e-9)


def test_layers_meet_at_an_eighth_of_the_photo():
    images = torch.randn(1, 3, 33, 41)
    for name in ("vgg16", "vgg16_bn", "resnet18"):
        backbone = build_backbone(name, width=4, **SGOne.backbone_options).eval()
        maps = SGOne(backbone, 8).maps(images)
        assert [each.shape[1:] for each in maps] == [(c, 5, 6) for c in backbone.channels[1:]]
        own = backbone(images)[0, 0]
        assert maps[2][0, 0, 2, 3] == own[1:4, 2:5].max()


def test_background_and_ignored_pixels_of_supports_are_not_read():
    model, (query, images, masks, _) = _sgone(), _episode()
    with torch.no_grad():
        logits = model(query, images, masks).logits
        other = torch.where(masks == 1, 1, torch.where(masks == 0, 255, 0))
        assert torch.equal(model(query, images, other).logits, logits)


def test_the_order_of_supports_does_not_matter():
    config = ModelConfig(name="sgone", backbone="vgg16", width=4, weights="none", channels=8)
    model = build_model(config).double().eval()
    query, images, masks, _ = _episode(shots=5, side=38)
    order = [3, 1, 4, 0, 2]
    with torch.no_grad():
        logits = model(query, images, masks).logits
        again = model(query, images[:, order], masks[:, order]).logits
    assert logits.shape == (2, 2, 38, 38)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-12)


def test_every_parameter_is_reached():
    model, (query, images, masks, target) = _sgone().train(), _episode()
    model.loss(model(query, images, masks), target).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        _sgone(channels=0)


def test_the_authors_file_loads_whole(tmp_path):
    state = {name: torch.randn(shape) for name, shape in _their_shapes().items()}
    path = tmp_path / "step_100000.pth.tar"
    torch.save({"global_counter": 100000, "state_dict": state}, path)
    model = SGOne(build_backbone("vgg16", **SGOne.backbone_options))
    load_official(model, str(path))
    ours = {
        f"netB.features_{n + 1}.{int(i) - PLAIN_CUTS[n]}": module
        for n in range(5)
        for i, module in model.backbone.get_submodule(f"layer{n}").named_children()
    }
    ours |= {"netB.cls.0": model.guide, "netB.side3_1.0": model.side2}
    ours |= {"netB.side4_1.0": model.side3, "netB.side5_1.0": model.side4}
    ours |= {"classifier_6.0": model.merge, "exit_layer": model.classifier}
    for name, value in state.items():
        layer, kind = name.rsplit(".", 1)
        assert torch.equal(getattr(ours[layer], kind), value)
    del state["netB.cls.0.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="1 missing: netB.cls.0.weight"):
        load_official(model, str(path))
