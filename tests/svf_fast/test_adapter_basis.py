"""What S is of: the directions it scales and the weight they compose, and which of two networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import svf_fast
from svf_fast import Adapter, Factors
from svf_fast.layers.factored import svf_layers

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(7))


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    convs = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2))
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(150, 5)).eval().requires_grad_(False)


def convert(model: nn.Module, factors: Mapping[str, Factors] | None = None) -> nn.Module:
    return svf_fast.convert(model, None, progress=False, factors=factors)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for S in svf_fast.svf_parameters(model):
        S.mul_(0.5 + torch.rand(S.shape, generator=generator))
    return model


def decompositions(change: Callable[[Tensor, Tensor, Tensor], tuple]) -> dict[str, Factors]:
    """Decompose the layers and change each group's U [Co, R], S [R] and V [R, fan_in]."""
    found = {}
    for name, layer in svf_layers(convert(plain())).items():
        groups = layer.geometry.groups
        blocks = zip(layer.U.chunk(groups), layer.S.detach().chunk(groups), layer.V.chunk(groups))
        turned = [change(U, S, V.flatten(1)) for U, S, V in blocks]
        U, S, V = (torch.cat(parts) for parts in zip(*turned))
        found[name] = Factors(U, S, V.view_as(layer.V))
    return found


def permuted(U, S, V):
    order = torch.randperm(len(S), generator=torch.Generator().manual_seed(1))
    return U[:, order], S[order], V[order]


def swapped(U, S, V):
    order = [*range(len(S) - 2), len(S) - 1, len(S) - 2]
    return U[:, order], S[order], V[order]


def negative(U, S, V):
    signs = torch.tensor([(-1.0) ** r for r in range(len(S))])
    return U * signs, S * signs, V


def rotated(U, S, V):
    R = torch.linalg.qr(torch.randn(len(S), len(S), generator=torch.Generator().manual_seed(2)))[0]
    return U @ R, torch.ones_like(S), R.mT @ (S[:, None] * V)


def scaled(U, S, V):
    return 2 * U, S / 2, V


TURNED = {f.__name__: f for f in (permuted, swapped, negative, rotated, scaled)}


@pytest.mark.parametrize("way", TURNED)
def test_an_adapter_of_other_directions_is_refused(way, tmp_path):
    factors = decompositions(TURNED[way])
    usual, turned = trained(convert(plain())), trained(convert(plain(), factors))
    torch.testing.assert_close(convert(plain(), factors)(X), plain()(X), rtol=1e-4, atol=1e-5)
    for model, name in ((usual, "usual"), (turned, "turned")):
        svf_fast.save_adapter(model, tmp_path / name)
    fresh = convert(plain(), factors)
    before = copy.deepcopy(fresh.state_dict())
    for file, model, options in (
        ("usual", fresh, {}),
        ("usual", plain(), {"factors": factors}),
        ("turned", convert(plain()), {}),
        ("turned", plain(), {}),
    ):
        with pytest.raises(ValueError, match="trained in another basis: 0, 2, 4 of 3 layers"):
            svf_fast.load_adapter(model, tmp_path / file, progress=False, **options)
    torch.testing.assert_close(fresh.state_dict(), before)
    for model, options in ((fresh, {}), (plain(), {"factors": factors})):
        svf_fast.load_adapter(model, tmp_path / "turned", progress=False, **options)
        torch.testing.assert_close(model(X), turned(X))
    with pytest.raises(ValueError, match="basis"):
        svf_fast.interpolate_adapters(Adapter.of(usual), Adapter.of(turned), 0.5)
    svf_fast.interpolate_adapters(Adapter.of(turned), Adapter.of(fresh), 0.5).apply(fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", [permuted, rotated, scaled])
def test_directions_are_the_same_to_rounding(way, dtype):
    factors = decompositions(way)
    adapter = Adapter.of(trained(convert(plain(), factors)))
    rounded = {name: Factors(*(x.to(dtype) for x in each)) for name, each in factors.items()}
    for model in (
        convert(plain(), factors).to(dtype),
        convert(plain().to(dtype), rounded),
        copy.deepcopy(convert(plain(), factors)),
    ):
        adapter.apply(model)


def as_they_are(U, S, V):
    return U, S, V


def other_signs(U, S, V):
    signs = torch.tensor([(-1.0) ** r for r in range(len(S))])
    return U * signs, S, signs[:, None] * V


def rounded(U, S, V):
    return U.half().float(), S.half().float(), V.half().float()


@pytest.mark.parametrize("way", [as_they_are, other_signs, rounded])
@pytest.mark.parametrize("seed", [0, 1], ids=["on its weights", "on a blank network"])
def test_usual_factors_are_of_the_weight_that_they_compose(way, seed, tmp_path):
    model = plain(seed)
    model.load_state_dict({k: v for k, v in plain().state_dict().items() if "bias" in k}, False)
    model = trained(convert(model, decompositions(way)))
    usual = trained(convert(plain()))
    svf_fast.save_adapter(model, tmp_path / "x")
    svf_fast.save_adapter(usual, tmp_path / "usual")
    for there in (plain(), convert(plain()), convert(plain(1), decompositions(way))):
        for file in ("x", "usual"):
            svf_fast.load_adapter(there, tmp_path / file, progress=False)
    if seed == 0 and way is not rounded:
        assert Adapter.of(model).backbone == Adapter.of(usual).backbone
    for file in ("x", "usual"):
        with pytest.raises(ValueError, match="another backbone"):
            svf_fast.load_adapter(plain(1), tmp_path / file, progress=False)


def test_a_state_dict_brings_the_fingerprints_of_the_pretrained_weight():
    source = trained(convert(plain()))
    known = {name: Factors(m.U, m.S.detach(), m.V) for name, m in svf_layers(source).items()}
    model = convert(plain(1), known)
    assert Adapter.of(model).backbone != Adapter.of(source).backbone
    model.load_state_dict(source.state_dict())
    assert Adapter.of(model).fingerprints == Adapter.of(source).fingerprints
    Adapter.of(model).apply(plain(), progress=False)


def test_states_and_files_without_a_basis_load(tmp_path):
    source = trained(convert(plain()))
    state = source.state_dict()
    for key in [key for key in state if key.endswith("fingerprint")]:
        assert state[key].shape == (66,) and not state[key][49:].any()
        state[key] = state[key][:49]
    model = convert(plain(1))
    model.load_state_dict(state)
    assert Adapter.of(model).fingerprints == Adapter.of(source).fingerprints
    assert {len(text) for text in Adapter.of(source).fingerprints.values()} == {100}
    for layer in svf_layers(source).values():
        layer.fingerprint = layer.fingerprint[:49]  # as in a pickle
    assert Adapter.of(copy.deepcopy(source)).fingerprints == Adapter.of(model).fingerprints
    Adapter.of(model).save(tmp_path / "x")
    assert load_file(tmp_path / "x").keys() == {"0.S", "2.S", "4.S"}


# Two networks in one model.


def copies(*names: str) -> nn.Module:
    """Build what MoCo, DINO and BYOL hold: a network, and a copy as momentum or teacher."""
    model = nn.Module()
    for name in names:
        outer, _, inner = name.partition(".")
        model.add_module(outer, nn.ModuleDict({inner: plain()}) if inner else plain())
    return model


@pytest.mark.parametrize(
    "names",
    [("s", "t"), ("encoder_q", "encoder_k"), ("student.backbone", "teacher.backbone")],
    ids=" ".join,
)
@pytest.mark.parametrize("outer", ["", "net."])
def test_of_two_copies_one_must_be_named(names, outer):
    source = trained(convert(plain()))
    adapter = Adapter.of(nn.ModuleDict({"net": source}) if outer else source)
    model = copies(*names)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected one network") as caught:
        adapter.apply(model, progress=False)
    assert all(repr(name) in str(caught.value) for name in names)
    assert model.state_dict().keys() == before.keys()
    adapter.apply(model.get_submodule(names[1]), progress=False)
    torch.testing.assert_close(model.get_submodule(names[1])(X), source(X))
    assert not svf_layers(model.get_submodule(names[0]))


def test_one_network_that_fits_is_found_beside_others():
    source = trained(convert(plain()))
    adapter = Adapter.of(source)
    for model, name in (
        (nn.ModuleDict({"s": plain(1), "t": plain()}), "t"),
        (nn.ModuleDict({"s": convert(plain()), "t": plain()}), "s"),
        (nn.ModuleDict(dict.fromkeys(("s", "t"), plain())), "s"),  # one by two names
    ):
        adapter.apply(model, progress=False)
        torch.testing.assert_close(model[name](X), source(X))
    own = plain()
    own.add_module("teacher", plain())  # of the very names: meant is the model itself
    adapter.apply(own, progress=False)
    assert svf_layers(own).keys() == {"0", "2", "4"}
