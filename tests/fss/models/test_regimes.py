"""Each regime of the paper: what it computes at first, what it trains, its gradients, its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import svf_fast
from fss.config import DataConfig, ModelConfig, RegimeConfig, TrainConfig
from fss.models import build_model, rebuild_model
from fss.models.regime_layers import ComposedConv2d, FactoredConv2d, ScaledConv2d, random_rotation
from fss.models.regimes import apply_regime
from fss.runs.checkpoint import load_checkpoint, save_checkpoint
from fss.settings import config_file, read_settings
from fss.training.run import train
from fss.training.trainer import Trainer

LAYERS = ("layer3", "layer4")
ALL = ("layer1", "layer2", "layer3", "layer4")
# resnet50: its channels, with those of the paper's ResNet-50 divided by 16
WIDTH = 4

REGIMES = {
    "freeze": {"name": "freeze"},
    "full": {"name": "full"},
    "full_3x3": {"name": "full", "kernel": "3x3"},
    "full_1x1": {"name": "full", "kernel": "1x1"},
    "svf": {"name": "svf"},
    "svf_1x1": {"name": "svf", "kernel": "1x1"},
    "svf_stem": {"name": "svf", "layers": ["conv1", "layer1"]},
    **{
        f"svf_{''.join(factors)}": {"name": "svf", "factors": tuple(factors)}
        for factors in ("U", "V", "SU", "SV", "UV", "SUV")
    },
    "svf_scale": {"name": "svf_scale"},
    "svf_scale_S": {"name": "svf_scale", "factors": ["S", "S'"]},
    "scale_output": {"name": "scale_output"},
    "scale_input": {"name": "scale_input"},
    "rotated_scale": {"name": "rotated_scale"},
    "rotated_svf": {"name": "rotated_svf"},
    "rotated_frozen": {"name": "rotated_svf", "factors": []},
    "adapter": {"name": "adapter"},
    "bias": {"name": "bias"},
    "bn": {"name": "freeze", "batch_norm": "both"},
    "bn_weight": {"name": "freeze", "batch_norm": "weight"},
    "bn_bias": {"name": "freeze", "batch_norm": "bias"},
    "bn_S": {"name": "svf", "batch_norm": "both"},
}
every_regime = pytest.mark.parametrize("key", REGIMES)


def regime(key: str) -> RegimeConfig:
    return RegimeConfig(**{"layers": LAYERS, **REGIMES[key]})


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A ResNet-50 whose batch norms have statistics and affine parameters of their own."""
    torch.manual_seed(1)
    config = ModelConfig(width=WIDTH, weights="none", channels=8, dropout=0.0)
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(dtype)


def episode(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 3, 33, 41, generator=generator, dtype=torch.float64).to(dtype)
    masks = (torch.rand(2, 3, 33, 41, generator=generator) < 0.4).long()
    return {
        "query_image": images[:, 0],
        "support_images": images[:, 1:],
        "support_masks": masks[:, 1:],
        "query_mask": masks[:, 0],
    }


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["query_image"], batch["support_images"], batch["support_masks"]).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    batch = episode(torch.float64)
    prediction = model(batch["query_image"], batch["support_images"], batch["support_masks"])
    model.loss(prediction, batch["query_mask"]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in the backbone."""
    backbone = model.get_submodule("backbone")
    return {name: p for name, p in backbone.named_parameters() if p.requires_grad}


def convolutions(model: nn.Module, layers: tuple[str, ...], kernel: int | None = None) -> dict:
    backbone = model.get_submodule("backbone")
    return {
        name: m
        for name, m in backbone.named_modules()
        if isinstance(m, nn.Conv2d)
        and name.split(".")[0] in layers
        and kernel in (None, m.kernel_size[0])
    }


@every_regime
def test_step_0_computes_the_network_that_was_there(key):
    model, batch = build(torch.float64), episode(torch.float64)
    before = logits(model, batch)
    apply_regime(model, regime(key))
    after = logits(model, batch)
    if regime(key).name == "rotated_svf":
        assert (after - before).abs().max() > 0.01 * before.abs().max()
    else:
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)


@every_regime
def test_exactly_what_the_regime_says_trains(key):
    model = build()
    config = regime(key)
    chosen = convolutions(model, config.layers, {"3x3": 3, "1x1": 1}.get(config.kernel))
    norms = {
        name
        for name, m in model.get_submodule("backbone").named_modules()
        if isinstance(m, nn.BatchNorm2d) and name.split(".")[0] in config.layers
    }
    head = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    apply_regime(model, config)
    kinds = {
        "full": ["weight"],
        "svf": config.trained_factors,
        "rotated_svf": config.trained_factors,
        "svf_scale": [{"S'": "log_scale"}.get(f, f) for f in config.trained_factors],
        "scale_output": ["log_scale"],
        "scale_input": ["log_scale"],
        "rotated_scale": ["log_scale"],
    }.get(config.name, [])
    expected = {f"{name}.{kind}" for name in chosen for kind in kinds}
    affine = {"both": ["weight", "bias"], "none": []}.get(config.batch_norm, [config.batch_norm])
    if config.name == "bias":
        affine = ["bias"]
    expected |= {f"{name}.{kind}" for name in norms for kind in affine}
    if config.name == "adapter":
        parts = ("down.weight", "down.bias", "up.weight", "up.bias")
        expected = {f"{layer}.adapter.{part}" for layer in LAYERS for part in parts}
    assert set(trained(model)) == expected
    assert head <= {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("key", "layers", "count"),
    [
        # of the real ResNet-50, layers 2-4: 12 544 singular values, 25 088 channels in batch norms
        ("svf", ALL[1:], 12_544 // 16),
        ("svf", ALL, 13_184 // 16),
        ("bn", ALL[1:], 2 * 25_088 // 16),
        ("bn_weight", ALL[1:], 25_088 // 16),
        ("bias", ALL[1:], 25_088 // 16),
        ("bn_S", ALL[1:], (12_544 + 2 * 25_088) // 16),
        ("scale_output", ALL[1:], 25_088 // 16),
        ("svf_scale", ALL[1:], 12_544 // 16),
        # weights grow with the square of the width
        ("full", ALL[1:], 23_232_512 // 256),
        ("full_3x3", ALL[1:], 11_206_656 // 256),
        ("full_1x1", ALL[1:], 12_025_856 // 256),
    ],
)
def test_parameter_counts(key, layers, count):
    model = build()
    apply_regime(model, RegimeConfig(**REGIMES[key] | {"layers": layers}))
    assert sum(p.numel() for p in trained(model).values()) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("full", 23_508_032),  # 23 454 912 weights, 53 120 of batch norms
        ("full_layers2-4", 23_232_512),
        ("bias", 26_560),  # half of the batch norms', with the stem's and layer 1's
        ("batch_norm_bias", 26_560),  # the paper prints the same numbers for both
        ("batch_norm_weight", 26_560),
        ("batch_norm", 53_120),
        ("batch_norm_svf", 12_544 + 50_176),
        ("svf", 12_544),
    ],
)
def test_parameter_counts_of_the_files_on_a_real_resnet50(name, count):
    stated = read_settings(config_file(f"regimes/{name}"))["regime"]
    model = build_model(ModelConfig(weights="none", channels=4))
    everything = set(dict(model.get_submodule("backbone").named_parameters()))
    apply_regime(model, RegimeConfig(**stated))
    assert sum(p.numel() for p in trained(model).values()) == count
    if name == "full":
        assert set(trained(model)) == everything
    if name == "bias":
        norms = {n.removesuffix(".bias") for n in everything if n.endswith(".bias")}
        assert set(trained(model)) == {f"{n}.bias" for n in norms}
        assert len(norms) == 53 and "bn1" in norms


def test_the_papers_share_of_the_backbone():
    """0.25 % of ResNet-50, it says; singular values and batch norms together come to 0.27 %."""
    weights, norms, singular_values = 23_454_912, 53_120, 12_544
    assert round(100 * (singular_values + 50_176) / (weights + norms), 2) == 0.27
    assert round(100 * singular_values / (weights + norms), 3) == 0.053
    wide = build_model(ModelConfig(weights="none")).get_submodule("backbone")
    assert sum(p.numel() for p in wide.parameters()) == weights + norms
    found = [
        min(m.weight.shape[0], m.weight[0].numel())
        for layer in ALL[1:]
        for m in wide.get_submodule(layer).modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert sum(found) == singular_values


@every_regime
def test_gradients_are_those_of_the_weights_they_make(key):
    """Against the gradient of each plain weight, from the network with that very weight."""
    config = regime(key)
    model = build(torch.float64)
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    apply_regime(model, config)
    backbone = model.get_submodule("backbone")
    with torch.no_grad():
        for parameter in trained(model).values():  # away from where everything began
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(
                0.02 * torch.randn_like(parameter)
            )
    if config.name == "adapter":
        return _check_by_differences(model)
    for name, layer in convolutions(plain, (*ALL, "conv1")).items():
        own = backbone.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(_composed(own))
    for name, module in plain.get_submodule("backbone").named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(backbone.get_submodule(name).state_dict())
    truth = gradients(plain)
    for name, gradient in gradients(model).items():
        layer_name, _, kind = name.rpartition(".")
        expected = truth.get(name)
        if expected is None:
            expected = _chained(
                model.get_submodule(layer_name), kind, truth[f"{layer_name}.weight"]
            )
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10, msg=name)
        assert gradient.abs().max() > 0, name
    return None


def _composed(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, ComposedConv2d):
        return layer.composed_weight()
    if isinstance(layer, svf_fast.SVFConv2d):
        S = layer.S if layer.log_scale is None else layer.S * layer.log_scale.exp()
        return svf_fast.compose(layer.U, S, layer.V)
    return layer.weight


def _chained(layer: nn.Module, kind: str, grad_weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a factor, by hand, from the weight's."""
    G = grad_weight.flatten(1)
    log_scale = getattr(layer, "log_scale", None)
    if not hasattr(layer, "U"):
        dot = (grad_weight * layer.composed_weight()).flatten(1)
        return dot.sum(1) if layer.side == "output" else dot.sum(0)
    U, S, V = layer.U, layer.S, layer.V.flatten(1)
    factor = torch.ones_like(S) if log_scale is None else log_scale.exp()
    along = torch.einsum("or,oc,rc->r", U, G, V)
    if kind == "U":
        return G @ V.mT * S
    if kind == "V":
        return ((U * S).mT @ G).view_as(layer.V)
    return along * factor if kind == "S" else along * factor * S


def _check_by_differences(model: nn.Module) -> None:
    found = gradients(model)
    batch = episode(torch.float64)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in trained(model).items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                outputs = (batch["query_image"], batch["support_images"], batch["support_masks"])
                losses.append(model.loss(model(*outputs), batch["query_mask"]).item())
                parameter.sub_(direction, alpha=step)
        slope = (losses[0] - losses[1]) / 2e-6
        assert (found[f"backbone.{name}"] * direction).sum().item() == pytest.approx(
            slope, rel=1e-4, abs=1e-9
        ), name


@every_regime
def test_a_state_dict_carries_the_regime(key):
    """Also the random rotation: it is in the weights, not drawn again."""
    model, batch = build(), episode()
    apply_regime(model, regime(key))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.manual_seed(99)
    other = build_model(ModelConfig(width=WIDTH, weights="none", channels=8, dropout=0.0))
    apply_regime(other, regime(key))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(logits(model, batch), logits(other, batch))


def test_scaled_values_train_as_fast_as_S_and_as_before():
    """They run fused; a checkpoint of their former layers, without fingerprints, is theirs too."""
    model, former, batch = build(), build(), episode()
    apply_regime(model, regime("svf_scale"))
    for name, conv in convolutions(former, LAYERS).items():
        layer = FactoredConv2d(conv, *svf_fast.decompose(conv.weight), ("S'",))
        former.get_submodule("backbone").set_submodule(name, layer)
    former.requires_grad_(False)
    for name, parameter in former.named_parameters():
        if name.endswith("log_scale"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = former.state_dict()
    prints = {name: own.clone() for name, own in model.state_dict().items() if "print" in name}
    with torch.no_grad():
        expected = logits(former, batch)
        model.load_state_dict(state)
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-3, atol=1e-4)
    assert prints and not state.keys() & prints.keys()
    assert all(torch.equal(model.state_dict()[name], own) for name, own in prints.items())
    config = TrainConfig(
        DataConfig(source="shapes"),
        ModelConfig(width=WIDTH, weights="gone", channels=8),
        regime("svf_scale"),
    )
    for as_trained in (False, True):
        rebuilt = rebuild_model(config, state, as_trained).eval()
        fused = [m for m in rebuilt.modules() if isinstance(m, svf_fast.Fused)]
        assert bool(fused) == as_trained
        with torch.no_grad():
            torch.testing.assert_close(logits(rebuilt, batch), expected, rtol=1e-3, atol=1e-4)
        half = {
            key: own.bfloat16() if own.is_floating_point() else own for key, own in state.items()
        }
        with torch.no_grad():  # of a run in another precision
            found = logits(rebuild_model(config, half, as_trained).eval(), batch)
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    adapters = [svf_fast.Adapter.of(each.backbone) for each in (model, rebuilt)]
    adapters[0].apply(rebuilt.backbone)  # of the same pretrained weights
    other = build()
    apply_regime(other, regime("svf"))
    with pytest.raises(RuntimeError, match=r"Missing key(.|\n)*fingerprint"):
        other.load_state_dict({k: v for k, v in other.state_dict().items() if "print" not in k})


@pytest.mark.parametrize("key", ["svf_U", "svf_scale", "scale_input", "rotated_scale", "adapter"])
@pytest.mark.parametrize("precision", ["autocast", "true"])
def test_bfloat16(key, precision):
    model, batch = build(), episode()
    apply_regime(model, regime(key))
    expected = logits(model, batch)
    if precision == "true":
        batch = {n: x.bfloat16() if x.is_floating_point() else x for n, x in batch.items()}
        got = logits(model.bfloat16(), batch)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = logits(model, batch)
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    got.float().square().mean().backward()
    for parameter in trained(model).values():
        assert parameter.grad.isfinite().all() and parameter.grad.dtype == parameter.dtype


def test_statistics_of_the_batch():
    """Batch norms of the layers follow the mode of the model; all others keep theirs."""
    model, batch = build(), episode()
    config = RegimeConfig(
        name="svf", layers=LAYERS, batch_norm="both", batch_norm_statistics="batch"
    )
    apply_regime(model, config)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    still = logits(model, batch)
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
    model.train()
    moving = logits(model, batch)
    assert not torch.allclose(still, moving)
    moved = {n for n, x in model.state_dict().items() if not torch.equal(before[n], x)}
    assert moved and {name.split(".")[1] for name in moved} == set(LAYERS)
    assert {name.rpartition(".")[2] for name in moved} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    moving.mean().backward()
    model.eval()
    logits(model, batch)
    assert not any(m.training for m in model.modules())


def test_all_layers_are_the_children_with_parameters():
    model = build()
    apply_regime(model, RegimeConfig(layers=("all",), batch_norm="bias"))
    names = set(trained(model))
    assert {"conv1.S", "bn1.bias", "layer1.0.conv1.S", "layer4.2.bn3.bias"} <= names
    assert len([n for n in names if n.endswith(".S")]) == 53


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": ["bn1"]}, "layers with a convolution, 'bn1' has none"),
        ({"layers": ["conv1"], "kernel": "3x3"}, "layers with a 3x3 convolution, 'conv1' has none"),
        ({"name": "bias", "layers": ["conv1"]}, "a bias of Conv2d or BatchNorm2d .*'conv1' has"),
        ({"name": "freeze", "layers": ["conv1"], "batch_norm": "both"}, "'conv1' has none"),
        ({"name": "adapter", "layers": ["conv1"]}, "expected stages .*'conv1' is a single Conv2d"),
        ({"name": "adapter", "layers": ["layer9"]}, "children of the backbone .*'layer9'"),
    ],
)
def test_layers_without_what_trains(values, message):
    with pytest.raises(ValueError, match=f"regime.layers: .*{message}"):
        apply_regime(build(), RegimeConfig(**values))


@pytest.mark.parametrize("name", ["svf", "full"])
def test_an_unknown_layer_is_refused(name):
    with pytest.raises(ValueError, match="layers: expected .*'layer5'"):
        apply_regime(build(), RegimeConfig(name=name, layers=("layer5",)))


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="conv: expected groups 1 .*got groups 2"):
        ScaledConv2d(nn.Conv2d(4, 4, 3, groups=2), "output")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_random_rotation(size):
    rotation = random_rotation(size)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.mT, eye, rtol=0, atol=1e-13)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)


def test_random_rotations_have_no_preferred_direction():
    torch.manual_seed(0)
    drawn = torch.stack([random_rotation(3) for _ in range(4000)])
    # every entry has mean 0 and variance 1/3
    assert drawn.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 4000)
    assert (drawn.square().mean(0) - 1 / 3).abs().max() < 0.03


def test_signatures_tell_regimes_apart():
    """Two regimes share a signature only if a checkpoint of one fits the other."""
    seen: dict[str, str] = {}
    for key in REGIMES:
        signature = str(regime(key).signature())
        assert signature not in seen, (key, seen.get(signature))
        seen[signature] = key
    same = RegimeConfig(factors=("S",), strategy="fold", keep="int8")
    assert RegimeConfig().signature() == same.signature()


@pytest.mark.parametrize("name", ("svf", "svf_scale"))
def test_blocks_keep_what_the_regime_says(name):
    kept = {}
    for keep in ("exact", "int8"):
        model = build()
        apply_regime(model, RegimeConfig(name=name, keep=keep))
        blocks = [m for m in model.backbone.modules() if isinstance(m, svf_fast.Fused)]
        assert blocks and all(block.keeps_int8 == (keep == "int8") for block in blocks)
        kept[keep] = model
    assert kept["exact"].state_dict().keys() == kept["int8"].state_dict().keys()


def test_config_round_trip():
    for values in REGIMES.values():
        config = TrainConfig.from_dict({"data": {"source": "shapes"}, "regime": values})
        assert TrainConfig.from_dict(config.to_dict()) == config


class Killed(Exception):
    pass


@pytest.mark.parametrize("key", ["rotated_scale", "svf_SUV", "scale_input", "adapter", "bn_S"])
def test_a_killed_run_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch, key):
    values = REGIMES[key] | {"layers": list(LAYERS)}
    settings = {"steps": 4, "save_every": 2, "regime": values}
    whole, cut = (tiny(out=str(tmp_path / name), **settings) for name in ("whole", "cut"))
    train(whole)
    original = Trainer._save

    def save_then_die(self, name):
        original(self, name)
        if self.step == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_save", save_then_die)
        train(cut)
    torch.rand(10)
    train(cut, resume=True)
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert one["step"] == two["step"] == 4
    assert all(torch.equal(x, two["model"][name]) for name, x in one["model"].items())


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"batch_norm": "both"}, "regime.batch_norm: expected 'both', the checkpoint has 'none'"),
        (
            {"factors": ["S", "U"]},
            r"regime.factors: expected \['S', 'U'\], the checkpoint has \['S'\]",
        ),
        ({"kernel": "3x3"}, "regime.kernel: expected '3x3', the checkpoint has 'all'"),
        ({"name": "scale_input"}, "regime.name: expected 'scale_input', the checkpoint has 'svf'"),
    ],
)
def test_a_checkpoint_of_another_regime_says_what_differs(tiny, tmp_path, other, difference):
    path = tmp_path / "last.pt"
    save_checkpoint(path, tiny(), {"step": 1, "model": {}})
    with pytest.raises(ValueError, match=f"belongs to another run: {difference}"):
        load_checkpoint(path, tiny(regime=other))
