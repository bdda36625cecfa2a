"""PPNet: parts of supports and queries, the semantic branch, and the authors' files."""

import pytest
import torch
from torch.nn import functional

from fss.models import PPNet, Prediction, build_backbone
from fss.models.official import load_official
from fss.models.ppnet import find_parts


def _ppnet(backbone="resnet18", classes=3):
    torch.manual_seed(0)
    backbone = build_backbone(backbone, width=4, **PPNet.backbone_options)
    return PPNet(backbone, classes).double()


def _episode(batch=2, shots=1, side=33):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1 + shots, 3, side, side, generator=generator).double()
    masks = torch.zeros(batch, 1 + shots, side, side, dtype=torch.long)
    masks[:, :, 4:24, 5:20] = 1
    masks[:, 1:, 25:30, 22:] = 1
    masks[:, :, :2] = 255
    return images + 2.0 * (masks == 1)[:, :, None], masks


def _run(model, images, masks):
    return model(images[:, 0], images[:, 1:], masks[:, 1:])


def _divide(points, parts):
    """k-means of points [N, C] as published, but for where it starts: loops over its rounds."""
    points = sorted(points, key=lambda x: float(x @ points.mean(0)))
    centers = [points[(2 * i + 1) * len(points) // (2 * parts)] for i in range(parts)]
    for round_ in range(10):
        members = [[] for _ in centers]
        for x in points:
            distances = [((x - c) ** 2).sum() for c in centers]
            members[min(range(parts), key=lambda i: distances[i])].append(x)
        if round_ < 9:
            centers = [torch.stack(m).mean(0) if m else c for m, c in zip(members, centers)]
    return torch.stack([torch.stack(m).mean(0) if m else 0 * points[0] for m in members])


@pytest.mark.parametrize("scale", [1, 2])
def test_parts_are_those_of_the_resized_maps(scale):
    """One support by its positions at `scale`, one of few by those at the size of the photo."""
    maps = torch.randn(1, 2, 3, 5, 6, dtype=torch.float64)
    masks = torch.rand(1, 2, 21, 25, generator=torch.Generator().manual_seed(3)) > 0.3
    masks[0, 1, 6:], masks[0, 1, :, 7:] = False, False
    points, counts = [], []
    for k in range(2):
        size = (5 * scale, 6 * scale)
        mask = functional.interpolate(masks[:, k, None].double(), size, mode="nearest")[0, 0] == 1
        counts.append(int(mask.sum()))
        if counts[-1] <= 10:
            size, mask = (21, 25), masks[0, k]
        large = functional.interpolate(maps[:, k], size, mode="bilinear", align_corners=True)[0]
        points.append(large[:, mask].T)
    assert counts[1] <= 10 < counts[0]
    expected = _divide(torch.cat(points), 4)
    found = find_parts(maps, masks, masks, scale, 4)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_fewer_positions_than_parts():
    maps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, 1, 1:3] = True
    found = find_parts(maps, masks, masks, 1, 5)
    assert not found[1].any()
    assert found[0].any(dim=1).sum() == 2
    for position in (maps[0, 0, :, 1, 1], maps[0, 0, :, 1, 2]):
        assert (found[0] - position).abs().amax(dim=1).min() < 1e-12


def test_parts_do_not_depend_on_the_batch_or_on_random_numbers():
    model = _ppnet().eval()
    images, masks = _episode(shots=2)
    with torch.no_grad():
        logits = _run(model, images, masks).logits
        torch.manual_seed(5)
        torch.testing.assert_close(
            _run(model, images[1:], masks[1:]).logits, logits[1:], rtol=0, atol=1e-9
        )


def test_logits_are_the_largest_cosines_of_parts():
    model = _ppnet().eval()
    images, masks = _episode(batch=1)
    with torch.no_grad():
        query, support = model.backbone(images[0])
        logits = torch.zeros(2, 5, 5, dtype=torch.float64)
        large = functional.interpolate(support[None], (33, 33), mode="bilinear", align_corners=True)
        for j, scale in ((0, 1), (1, 2)):
            mask = masks[:, 1] == j
            mean = large[0][:, mask[0]].sum(1) / (mask.sum().item() + 1e-5)
            parts = find_parts(support[None, None], mask[:, None], mask[:, None], scale, 5)[0]
            for y in range(5):
                for x in range(5):
                    f = query[:, y, x]
                    cosines = [f @ p / (f.norm() * p.norm()) for p in parts + 0.5 * mean]
                    logits[j, y, x] = 20 * max(cosines)
        expected = functional.interpolate(
            logits[None], (33, 33), mode="bilinear", align_corners=True
        )
        torch.testing.assert_close(_run(model, images, masks).logits, expected, rtol=0, atol=1e-9)


def test_the_losses_add_up():
    model = _ppnet().train()
    images, masks = _episode(shots=2)
    base = torch.where(masks == 1, 3, masks)
    prediction = _run(model, images, masks)
    targets = masks[:, 0], masks[:, 1:], base[:, 0], base[:, 1:]
    main = model.loss(Prediction(prediction.logits, ()), *targets)
    supports, found, semantic = prediction.auxiliary
    assert supports.shape == (2, 2, 2, 5, 5) and semantic.shape == (2, 3, 4, 5, 5)
    expected = main
    for b in range(2):
        for k in range(2):
            large = functional.interpolate(
                supports[b, k][None], (33, 33), mode="bilinear", align_corners=True
            )
            own = functional.cross_entropy(large, masks[b, None, 1 + k], ignore_index=255)
            expected = expected + found[b] * own / 4
    large = functional.interpolate(
        semantic.flatten(0, 1), (33, 33), mode="bilinear", align_corners=True
    )
    ordered = torch.cat([base[:, 1:], base[:, :1]], dim=1).flatten(0, 1)
    expected = expected + 0.1 * functional.cross_entropy(large, ordered, ignore_index=255)
    loss = model.loss(prediction, *targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_authors_file_loads_whole(tmp_path):
    """Named as torchvision's ResNet-50 below `encoder.`, of which a few shapes are checked."""
    backbone = build_backbone("resnet50", **PPNet.backbone_options)
    model = PPNet(backbone, 15)
    shapes = {f"encoder.{key}": value.shape for key, value in backbone.state_dict().items()}
    assert shapes["encoder.conv1.weight"] == (64, 3, 7, 7)
    assert shapes["encoder.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    for i in range(4):
        shapes |= {f"aspp.c{i}.weight": (16, 2048, 3, 3), f"aspp.c{i}.bias": (16,)}
    state = {f"module.{name}": torch.rand(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "best.pth")
    load_official(model, str(tmp_path / "best.pth"))
    assert torch.equal(model.base_classifier[2].bias, state["module.aspp.c2.bias"])
    weight = "layer3.5.conv2.weight"
    assert torch.equal(backbone.get_parameter(weight), state[f"module.encoder.{weight}"])
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    assert PPNet.count_base_classes(plain) == PPNet.count_base_classes(model.state_dict()) == 15
    del state["module.aspp.c3.weight"]
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(ValueError, match="1 missing: aspp.c3.weight"):
        load_official(model, str(tmp_path / "best.pth"))


def test_it_wants_base_classes():
    with pytest.raises(ValueError, match="base_classes: expected at least one .*got 0"):
        _ppnet(classes=0)
