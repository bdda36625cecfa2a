"""`convert` on what people have: networks of torchvision and timm by name, Lightning, compile."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import svf_fast
from svf_fast import Fused
from svf_fast.layers.factored import svf_layers
from tests.svf_fast.saved_bytes import saved_by


class Net(NamedTuple):
    """A network by name, the modules to convert, and the side of its pictures in pixels."""

    library: str
    name: str
    layers: tuple[str, ...]
    size: int = 64
    options: dict = {}  # noqa: RUF012


# One of each popular family that test_zoo.py has not; late or narrow layers, whose
# decompositions take no time.
NETS = [
    Net("torchvision", "densenet121", ("features.denseblock1.denselayer1", "features.transition1")),
    Net("torchvision", "mobilenet_v2", ("features",)),
    Net("torchvision", "mobilenet_v3_small", ("features",)),
    Net("torchvision", "efficientnet_b0", ("features.1", "features.2", "features.3")),
    Net("torchvision", "convnext_tiny", ("features.1",)),
    Net("torchvision", "regnet_y_400mf", ("trunk_output.block1", "trunk_output.block2")),
    Net("torchvision", "shufflenet_v2_x1_0", ("stage2", "stage3")),
    Net("torchvision", "squeezenet1_1", ("features",)),
    Net("torchvision", "googlenet", ("inception3a",), 64, {"init_weights": False}),
    Net("torchvision", "swin_t", ("features.1",)),
    Net("torchvision", "vit_b_16", ("encoder.layers.encoder_layer_0.mlp",), 32, {"image_size": 32}),
    Net("timm", "convnext_atto", ("stages.0", "stages.1")),
    Net("timm", "efficientnet_lite0", ("blocks.1", "blocks.2")),
    Net("timm", "mobilenetv3_small_100", ("blocks",)),
    Net("timm", "regnetx_002", ("s1", "s2", "s3")),
    Net("timm", "resnetv2_50", ("stages.0",)),
    Net("timm", "res2net50_26w_4s", ("layer1",)),
    Net("timm", "vit_tiny_patch16_224", ("blocks.0", "blocks.1"), 64, {"img_size": 64}),
    Net("timm", "deit_tiny_patch16_224", ("blocks.*.attn.qkv",), 64, {"img_size": 64}),
    Net("timm", "swin_tiny_patch4_window7_224", ("layers.0",), 224),
    Net("timm", "mixer_s32_224", ("blocks.0",), 224),
]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def build(net: Net) -> nn.Module:
    library = pytest.importorskip(net.library)
    torch.manual_seed(0)
    if net.library == "timm":
        model = library.create_model(net.name, **net.options)
    else:
        model = library.models.get_model(net.name, weights=None, **net.options)
    for parameter in model.parameters():
        if not parameter.any():  # some begin with a head of zeros
            nn.init.normal_(parameter, 0, 0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{net.library}-{net.name}")
def test_converts_and_merges_back(net):
    model = build(net)
    original = copy.deepcopy(model)
    x = torch.randn(2, 3, net.size, net.size, generator=torch.Generator().manual_seed(1))
    expected = original(x)
    svf_fast.convert(model, net.layers, progress=False)
    assert svf_layers(model)
    assert distance(model(x), expected) < 2e-5
    model(x).square().sum().backward()
    assert all(S.grad.isfinite().all() and S.grad.any() for S in svf_fast.svf_parameters(model))

    state = svf_fast.merge(model).state_dict()
    assert list(state) == list(original.state_dict())
    for tensor in original.state_dict().values():
        tensor.zero_()
    original.load_state_dict(state, strict=True)
    assert distance(original(x), expected) < 2e-5


VITS = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},  # with LayerScale
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},  # with registers
    "vit_tiny_patch16_224 with norms of queries and keys": {"qk_norm": True},
    "vit_tiny_patch16_224 with a norm of what attends": {"scale_attn_norm": True},
}


@pytest.mark.parametrize("name", VITS)
def test_the_blocks_of_timms_vits_are_fused(name):
    """Exact, and at the memory of a frozen network."""
    size = 56 if "dinov2" in name else 64
    options = {"depth": 2, "img_size": size, **VITS[name]}
    model = build(Net("timm", name.split()[0], (), size, options))
    frozen = copy.deepcopy(model)
    svf_fast.convert(model, ["blocks"], progress=False)
    assert all(isinstance(block, svf_fast.SVFTransformerBlock) for block in model.blocks)
    assert all(block.unfused_reason() == "" for block in model.blocks)
    truth = copy.deepcopy(model).double()
    for block in truth.blocks:
        block.unfuse()
    for layer in svf_layers(truth).values():
        layer.strategy = "reference"
        layer.refresh()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    for recompute in (False, True):
        for block in model.blocks:
            block.recompute = recompute
        mine, exact = model(x), truth(x.double())
        assert distance(mine, exact) < 1e-5
        both = (
            torch.autograd.grad(y.square().sum(), list(svf_fast.svf_parameters(network)))
            for y, network in ((mine, model), (exact, truth))
        )
        assert all(distance(*pair) < 2e-5 for pair in zip(*both, strict=True))

    tokens = torch.randn(2, 9, model.embed_dim, requires_grad=True)
    kept = saved_by(frozen.blocks, tokens)
    for block in model.blocks:
        block.recompute = False
    fc2 = (layer for layer in svf_layers(model).values() if layer.in_features > layer.out_features)
    kept += 4 * 2 * 9 * sum(layer.guarded for layer in fc2)
    if " with " in name:  # what these norms leave is copied, or made anew, before `proj` reads it
        kept += 2 * tokens.nbytes
    statistics = 4 * 2 * 9 * 2 * 2 * 2  # of two layer norms in two blocks
    assert saved_by(model.blocks, tokens) == kept - statistics


def test_linear_layers_of_a_vit_are_named_like_any_module():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    with pytest.raises(ValueError, match="at its top are patch_embed, .*blocks"):
        svf_fast.convert(model)  # a ResNet's names
    svf_fast.convert(model, ["blocks.*.attn", "blocks.1.mlp.fc1"])
    assert set(svf_layers(model)) == {
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.1.attn.qkv",
        "blocks.1.attn.proj",
        "blocks.1.mlp.fc1",
    }
    assert all(isinstance(layer, svf_fast.SVFLinear) for layer in svf_layers(model).values())


def test_an_adapter_moves_between_fss_and_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    from fss.models import build_backbone

    theirs = torchvision.models.resnet18(weights=None).eval().requires_grad_(False)
    ours = build_backbone("resnet18", output_stride=32).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for model in (ours, theirs):
        svf_fast.convert(model, ["layer2"], progress=False)
    with torch.no_grad():
        for S in svf_fast.svf_parameters(ours):
            S.mul_(0.5 + torch.rand_like(S))
    svf_fast.save_adapter(ours, tmp_path / "x.safetensors")
    svf_fast.load_adapter(theirs, tmp_path / "x.safetensors")
    x = torch.randn(1, 64, 16, 16)
    assert torch.equal(ours.layer2(x), theirs.layer2(x))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Small().requires_grad_(False)
            svf_fast.convert(self, ["net.features"])

        def on_train_epoch_start(self) -> None:
            self.net.features.eval()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(svf_fast.svf_parameters(self), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 9, 9), torch.arange(8) % 2)
    module = Module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    after = module.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"net.features.0.S", "net.features.3.S"}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(again.eval().net(x), module.eval().net(x))


def test_switching_adapters_under_compile():
    """One graph serves all adapters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = svf_fast.convert(Small().eval().requires_grad_(False), ["features"])
    pretrained = svf_fast.Adapter.of(model)
    other = svf_fast.Adapter(
        {name: S * (1 + 0.1 * torch.rand_like(S)) for name, S in pretrained.S.items()},
        pretrained.fingerprints,
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 9, 9)
    for adapter in (pretrained, other, pretrained, other):
        adapter.apply(model)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "node"),
    [("vgg11_bn", "features"), ("resnet18", "layer3"), ("mobilenet_v2", "features.17")],
)
def test_a_converted_network_is_traced_with_what_is_fused_as_leaves(name, node):
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain = models.get_model(name).eval().requires_grad_(False)
    model = svf_fast.convert(copy.deepcopy(plain), None, progress=False)
    leaves = {"leaf_modules": [Fused, svf_fast.SVFConv2d, svf_fast.SVFLinear]}
    traced = extraction.create_feature_extractor(model, [node], tracer_kwargs=leaves)
    x = torch.rand(1, 3, 64, 64)
    expected = extraction.create_feature_extractor(plain, [node])(x)[node]
    torch.testing.assert_close(traced(x)[node], expected, rtol=1e-3, atol=1e-4)
    fused = [module for module in traced.modules() if isinstance(module, Fused)]
    assert fused and not any(module.unfused_reason() for module in fused)
