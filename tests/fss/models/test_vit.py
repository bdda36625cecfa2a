from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svf_fast
from fss.config import DataConfig, ModelConfig, RegimeConfig, TrainConfig
from fss.models import (
    Baseline,
    Matching,
    PFENet,
    backbone_name,
    backbone_of,
    build_backbone,
    build_model,
    load_backbone,
)
from fss.models.regimes import apply_regime
from fss.models.vit import VITS, ViT, own_keys
from fss.models.weights import _describe

PLAIN, DINO, REGISTERS = (
    "vit_tiny_patch16",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
)


def drawn(name: str = DINO, width: int = 4) -> ViT:
    """A small one with every parameter drawn, frozen."""
    torch.manual_seed(0)
    backbone = build_backbone(name, width=width)
    assert isinstance(backbone, ViT)
    for key, parameter in backbone.named_parameters():
        if key.endswith((".gamma", ".bias")) or "norm" in key or "token" in key:
            nn.init.normal_(parameter, 0.5, 0.3)
    return backbone.eval().requires_grad_(False)


def timm_keys(backbone: ViT) -> dict[str, torch.Tensor]:
    """Its state dict as timm names it."""
    state = {}
    for key, value in backbone.state_dict().items():
        first, _, rest = key.partition(".")
        state[f"blocks.{rest}" if first.startswith("layer") else key] = value.clone()
    return state | {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}


def dino_keys(backbone: ViT, chunks: bool = False) -> dict[str, torch.Tensor]:
    """Its state dict as DINOv2's own files have it."""
    state = {"mask_token": torch.zeros(1, backbone.channels[0])}
    for key, value in backbone.state_dict().items():
        parts = key.split(".")
        if parts[0].startswith("layer"):
            chunk = [str(int(parts[1]) // 4)] if chunks else []
            key = ".".join(["blocks", *chunk, *parts[1:]])
        state["register_tokens" if key == "reg_token" else key] = value.clone()
    return state


@pytest.mark.parametrize("name", (PLAIN, DINO, REGISTERS))
@pytest.mark.parametrize("height, width", ((113, 57), (112, 112), (473, 33), (1, 9)))
def test_maps(name, height, width):
    backbone = drawn(name)
    patch = VITS[name].patch
    grid = tuple(max(1, round(side / patch)) for side in (height, width))
    images = torch.randn(2, 3, height, width)
    maps = backbone.features(images)
    assert [x.shape for x in maps] == [(2, backbone.channels[0], *grid)] * 3
    levels = backbone.levels(images)
    assert len(levels) == 1 + VITS[name].depth // 4
    assert torch.equal(levels[0], maps[1]) and torch.equal(levels[-1], maps[2])
    assert torch.equal(backbone(images), maps[2])


def test_473_is_34_patches_of_14():
    assert build_backbone(DINO, width=1).grid(torch.empty(1, 3, 473, 641)) == (34, 46)


def defined(backbone: ViT, images: torch.Tensor) -> torch.Tensor:
    """The last map by the equations: no attention of torch's, no block of ours."""
    embedded = backbone.patch_embed.proj(images)
    grid = embedded.shape[-2:]
    tokens = embedded.flatten(2).transpose(1, 2) + backbone.positions(grid)[:, 1:]
    first = backbone.cls_token + backbone.pos_embed[:, :1]
    prefix = [first] if backbone.reg_token is None else [first, backbone.reg_token]
    x = torch.cat([*(p.expand(len(images), -1, -1) for p in prefix), tokens], dim=1)
    for n in range(1, 5):
        for block in backbone.get_submodule(f"layer{n}"):
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
            heads = []
            for part in range(block.attn.heads):
                width = q.shape[-1] // block.attn.heads
                q_, k_, v_ = (t[..., part * width : (part + 1) * width] for t in (q, k, v))
                heads.append((q_ @ k_.mT / width**0.5).softmax(-1) @ v_)
            x = x + block.ls1(block.attn.proj(torch.cat(heads, -1)))
            hidden = block.mlp.fc1(block.norm2(x))
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            x = x + block.ls2(block.mlp.fc2(hidden))
    count = grid[0] * grid[1]
    return backbone.norm(x)[:, -count:].mT.reshape(len(images), -1, *grid)


@pytest.mark.parametrize("name", (PLAIN, DINO, REGISTERS))
def test_computes_the_equations(name):
    backbone = drawn(name).double()
    images = torch.randn(2, 3, 3 * VITS[name].patch, 5 * VITS[name].patch).double()
    torch.testing.assert_close(backbone(images), defined(backbone, images))


def test_positions_of_a_smooth_field_stay_where_they_are():
    """A ramp over the picture is the same ramp at any size, the class token's position apart."""
    backbone = drawn(PLAIN)
    ramp = (torch.arange(14.0) + 0.5) / 14
    field = torch.stack([ramp[:, None].expand(14, 14), ramp.expand(14, 14)])
    with torch.no_grad():
        backbone.pos_embed[0, 0] = 7
        backbone.pos_embed[0, 1:, :2] = field.flatten(1).mT
    assert backbone.positions((14, 14)) is backbone.pos_embed
    for grid in ((28, 21), (7, 10)):
        found = backbone.positions(grid)
        assert torch.equal(found[:, 0], backbone.pos_embed[:, 0])
        rows, columns = found[0, 1:, :2].mT.unflatten(1, grid)
        inner = slice(2, -2)
        expected = (torch.arange(grid[0]) + 0.5) / grid[0]
        torch.testing.assert_close(rows[inner, 0], expected[inner], atol=0.02, rtol=0)
        expected = (torch.arange(grid[1]) + 0.5) / grid[1]
        torch.testing.assert_close(columns[0, inner], expected[inner], atol=0.02, rtol=0)


LAYOUTS = {
    "timm": (DINO, timm_keys),
    "timm, plain": (PLAIN, timm_keys),
    "timm, registers": (REGISTERS, timm_keys),
    "DINOv2": (DINO, dino_keys),
    "DINOv2, chunks": (DINO, lambda backbone: dino_keys(backbone, chunks=True)),
    "DINOv2, registers": (REGISTERS, dino_keys),
}


@pytest.mark.parametrize("ending", ("pth", "safetensors"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_timm_and_dinov2(tmp_path, layout, ending):
    name, keys = LAYOUTS[layout]
    source = drawn(name)
    state = keys(source)
    path = tmp_path / f"w.{ending}"
    torch.save(state, path) if ending == "pth" else save_file(state, path)
    loaded = build_backbone(name, width=4).eval()
    load_backbone(loaded, str(path))
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_backbone_inside_of_a_file(tmp_path):
    source = drawn(PLAIN)
    state = {f"backbone.{key}": value for key, value in timm_keys(source).items()}
    torch.save({"teacher": state, "epoch": 3}, tmp_path / "dino.pth")
    loaded = build_backbone(PLAIN, width=4)
    load_backbone(loaded, str(tmp_path / "dino.pth"))
    assert torch.equal(loaded.layer3[0].attn.qkv.weight, source.layer3[0].attn.qkv.weight)


def test_positions_of_another_grid_and_without_a_class_token(tmp_path):
    source = drawn(REGISTERS)
    state = timm_keys(source)
    patches = torch.randn(1, 25, source.channels[0])
    state["pos_embed"] = patches  # timm's, with registers
    torch.save(state, tmp_path / "w.pth")
    loaded = build_backbone(REGISTERS, width=4)
    load_backbone(loaded, str(tmp_path / "w.pth"))
    assert torch.equal(loaded.pos_embed[:, 1:], patches) and not loaded.pos_embed[:, 0].any()
    again = build_backbone(REGISTERS, width=4)
    again.load_state_dict(loaded.state_dict())  # as a run is loaded
    images = torch.randn(1, 3, 70, 70)
    assert torch.equal(again.eval()(images), loaded.eval()(images))


def damaged(change):
    state = timm_keys(drawn(DINO))
    change(state)
    return state


WRONG = {
    "missing: layer2.3.attn.qkv.bias": lambda s: s.pop("blocks.3.attn.qkv.bias"),
    "unexpected: dist_token": lambda s: s.update(dist_token=torch.zeros(1, 1, 24)),
    r"of another shape: layer4.11.mlp.fc1.weight \(expected \[96, 24\], got \[96, 23\]\)": (
        lambda s: s.update({"blocks.11.mlp.fc1.weight": torch.zeros(96, 23)})
    ),
    r"of another shape: pos_embed": lambda s: s.update(pos_embed=torch.zeros(1, 7, 24)),
    "missing: layer1.0.ls1.gamma": lambda s: [s.pop(k) for k in list(s) if "gamma" in k],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(tmp_path, message):
    torch.save(damaged(WRONG[message]), tmp_path / "w.pth")
    backbone = build_backbone(DINO, width=4)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(ValueError, match=message):
        load_backbone(backbone, str(tmp_path / "w.pth"))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def shapes_of(name: str) -> dict[str, torch.Tensor]:
    """The state dict of one of published size, without values."""
    with torch.device("meta"):
        return timm_keys(build_backbone(name))


def test_a_file_tells_which_it_is(tmp_path):
    for name in VITS:
        assert _describe(shapes_of(name)).backbone == name
    state = {key: torch.zeros_like(value, device="cpu") for key, value in shapes_of(PLAIN).items()}
    torch.save(state, tmp_path / "w.pth")
    backbone = backbone_of(str(tmp_path / "w.pth"))
    assert backbone_name(backbone) == PLAIN
    with pytest.raises(ValueError, match="set backbone=vit_tiny_patch16"):
        load_backbone(build_backbone("vit_small_patch16"), str(tmp_path / "w.pth"))
    del state["blocks.11.norm1.weight"]
    state["register_tokens"] = torch.zeros(1, 2, 192)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="a ViT of 12 blocks, 192 channels and patches of 16 with"):
        backbone_of(str(tmp_path / "w.pth"))


def test_there_are_none_at_torchvision():
    with pytest.raises(ValueError, match="a file of timm's or DINOv2's for vit_tiny_patch16"):
        load_backbone(build_backbone(PLAIN, width=4), "torchvision")


def episode(size: int = 65):
    torch.manual_seed(1)
    masks = torch.zeros(2, 1, size, size, dtype=torch.int64)
    masks[..., : size // 2] = 1
    return torch.randn(2, 3, size, size), torch.randn(2, 1, 3, size, size), masks


@pytest.mark.parametrize("name", (PLAIN, REGISTERS))
def test_the_baseline_trains_singular_values_on_it(name):
    model = Baseline(drawn(name), channels=8, dropout=0.0)
    query, supports, masks = episode()
    plain = model.eval()(query, supports, masks).logits
    apply_regime(model, RegimeConfig(name="svf"), progress=False)
    blocks = [m for m in model.modules() if isinstance(m, svf_fast.SVFTransformerBlock)]
    assert len(blocks) == 9 and all(block.unfused_reason() == "" for block in blocks)
    prediction = model(query, supports, masks)
    torch.testing.assert_close(prediction.logits, plain, rtol=1e-3, atol=1e-4)
    model.loss(prediction, masks[:, 0]).backward()
    layers = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert len(layers) == 4 * 9
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers.values())
    assert all(layers[f"layer2.3.{n}.S"].grad.any() for n in ("attn.qkv", "mlp.fc2"))


def test_regimes():
    for regime, count in (("full", 2 * 4 * 9), ("freeze", 0), ("bias", 6 * 9)):
        model = Baseline(drawn(PLAIN), channels=8)
        apply_regime(model, RegimeConfig(name=regime), progress=False)
        assert sum(p.requires_grad for p in model.backbone.parameters()) == count
    for regime in ("scale_output", "rotated_scale"):
        with pytest.raises(ValueError, match=r"for a vision transformer, got .*is linear"):
            apply_regime(
                Baseline(drawn(PLAIN), channels=8), RegimeConfig(name=regime), progress=False
            )


def test_matching_compares_its_levels():
    model = Matching(drawn(DINO))
    prediction = model(*episode())
    assert prediction.logits.shape == (2, 2, 65, 65) and prediction.logits.isfinite().all()


def test_methods_that_cannot_use_it_say_so():
    with pytest.raises(ValueError, match=r"for PFENet, whose head .* got vit_tiny_patch16"):
        PFENet(drawn(PLAIN), channels=8)
    config = ModelConfig(name="pfenet", backbone=PLAIN, weights="none")
    with pytest.raises(ValueError, match="model.backbone: expected one of .* for pfenet"):
        build_model(config)
    config = ModelConfig(name="baseline", backbone=PLAIN, weights="none", width=2, channels=8)
    assert isinstance(build_model(config).backbone, ViT)


TIMM = {
    PLAIN: "vit_tiny_patch16_224",
    DINO: "vit_small_patch14_dinov2",
    REGISTERS: "vit_small_patch14_reg4_dinov2",
}


@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(tmp_path, name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    patch = VITS[name].patch
    theirs = timm.create_model(
        TIMM[name], img_size=4 * patch, dynamic_img_size=True, num_classes=0
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    mine = backbone_of(str(tmp_path / "w.pth")).double()
    theirs = theirs.double()
    assert mine.name == name
    for size in ((4 * patch, 4 * patch), (6 * patch, 5 * patch)):
        images = torch.randn(2, 3, *size).double()
        maps = theirs.forward_intermediates(
            images, indices=[5, 8, 11], norm=True, intermediates_only=True
        )
        for found, expected in zip(mine.features(images), maps, strict=True):
            error = (found - expected).norm() / expected.norm()
            assert error < (1e-12 if size[0] == size[1] else 1e-6)  # positions resized in float32


def test_own_keys_leave_others_alone():
    state = {"conv1.weight": 1, "layer1.0.conv1.weight": 2}
    assert own_keys(state) == state


@pytest.mark.parametrize("side", (32, 48, 50))
def test_images_of_the_sides_that_it_was_trained_on(side):
    """Multiples of the patch, as 224 and 518 are; others are resized to the nearest."""
    config = TrainConfig(
        DataConfig(source="shapes", size=side),
        model=ModelConfig(backbone="vit_tiny_patch16", width=4, weights="none", channels=8),
    )
    model = build_model(config.model, {1: "class 1"}, 1)
    photos = torch.randn(1, 3, side, side)
    masks = torch.ones(1, 1, side, side, dtype=torch.int64)
    assert model(photos, photos[None], masks).logits.shape == (1, 2, side, side)


@pytest.mark.parametrize("kind", ("attn.qkv", "mlp.fc2"))
def test_responses_to_tokens_lie_where_their_patches_do(kind):
    from fss.report.components import _inputs, _responses

    backbone = build_backbone("vit_tiny_patch16", width=4).eval().requires_grad_(False)
    svf_fast.convert(backbone, None, progress=False)
    layer = next(name for name, _ in backbone.named_modules() if name.endswith(kind))
    x = _inputs(backbone, torch.randn(3, 64, 64), [layer])[layer]
    module = backbone.get_submodule(layer)
    maps = _responses(module, x, torch.tensor([2, 0]))
    assert maps.shape == (2, 4, 4)
    patches = x[0, 1:].unflatten(0, (4, 4))  # behind the class token
    torch.testing.assert_close(maps[0], (patches @ module.V[2]).abs())


def test_titles_of_layers_say_their_kernel_or_that_they_have_none():
    from fss.report.spectrum import Spectrum

    sizes = [Spectrum("layer", kernel, *torch.ones(3, 2)).size for kernel in ((3, 3), (1, 1), ())]
    assert sizes == ["3×3", "1×1", "linear"]
