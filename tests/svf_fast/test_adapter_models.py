"""Adapters of what people have: averaged models, wrapped, in other dtypes, plain, with a head."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import svf_fast


class Net(nn.Module):
    """Two residual layers that convert, a stem that does not, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.fc = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.stem(x))).mean((2, 3)))


LAYERS = ("layer2", "layer3")
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def plain(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval().requires_grad_(False)


def converted(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return svf_fast.convert(plain(seed).to(dtype), LAYERS, progress=False)


@torch.no_grad()
def trained(seed: int = 0, head: bool = False) -> nn.Module:
    model = converted()
    generator = torch.Generator().manual_seed(seed)
    for S in svf_fast.svf_parameters(model):
        S.mul_(0.5 + torch.rand(S.shape, generator=generator))
    for tensor in model.fc.state_dict().values() if head else ():
        tensor.copy_(7 * torch.rand(tensor.shape, generator=generator))
    return model


# Averages of models.


def timm_ema(decay: float) -> Callable[[], nn.Module]:
    def average() -> nn.Module:
        ema = converted()
        for seed in range(20):
            states = zip(ema.state_dict().values(), trained(seed).state_dict().values())
            for e, m in states:
                e.copy_(decay * e + (1.0 - decay) * m)
        return ema

    return average


def mean_of_states(mean: Callable[[list[Tensor]], Tensor]) -> Callable[[], nn.Module]:
    def average() -> nn.Module:
        states = [trained(seed).state_dict() for seed in range(3)]
        model = converted()
        model.load_state_dict({key: mean([state[key] for state in states]) for key in states[0]})
        return model

    return average


def task_arithmetic() -> nn.Module:
    base, a, b = (model.state_dict() for model in (converted(), trained(1), trained(2)))
    model = converted()
    model.load_state_dict(
        {key: base[key] + (a[key] - base[key]) + (b[key] - base[key]) for key in base}
    )
    return model


def averaged_model(**options) -> Callable[[], nn.Module]:
    def average() -> nn.Module:
        swa = AveragedModel(converted(), **options)
        for seed in range(3):
            swa.update_parameters(trained(seed))
        return swa

    return average


AVERAGES = {
    **{f"timm EMA {decay}": timm_ema(decay) for decay in (0.9, 0.99, 0.996, 0.9995, 0.9999)},
    "FedAvg": mean_of_states(lambda parts: torch.div(sum(parts), len(parts))),
    "FedAvg by weights": mean_of_states(
        lambda parts: sum(w * x for w, x in zip((0.2, 0.3, 0.5), parts))
    ),
    "soup": mean_of_states(lambda parts: torch.stack([x.float() for x in parts]).mean(0)),
    "soup in half": mean_of_states(lambda parts: sum(x.half() for x in parts) / len(parts)),
    "task arithmetic": task_arithmetic,
    "SWA": averaged_model(),
    "SWA with buffers": averaged_model(use_buffers=True),
    "EMA of torch": averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_an_average_of_models_has_an_adapter_of_their_backbone(average, tmp_path):
    model = average().eval()
    svf_fast.save_adapter(model, tmp_path / "x.safetensors")
    other = svf_fast.load_adapter(converted(), tmp_path / "x.safetensors")
    expected, found = svf_fast.Adapter.of(model), svf_fast.Adapter.of(other)
    assert all(torch.equal(expected.S[name], S) for name, S in found.S.items())
    assert any(
        not torch.equal(found.S[name], S) for name, S in svf_fast.Adapter.of(converted()).S.items()
    )


def test_nothing_of_a_converted_model_is_an_integer():
    """Arithmetic on a state dict destroys integers; batch norms of torch count their batches."""
    integers = [
        name for name, tensor in converted().state_dict().items() if not tensor.is_floating_point()
    ]
    assert all(name.endswith("num_batches_tracked") for name in integers)


# Wrappers.


@pytest.fixture(scope="module")
def process_group(tmp_path_factory) -> Iterator[None]:
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    store = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Parent(nn.Module):
    """As of Lightning: a backbone with something beside it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.loss = nn.Linear(2, 2)


class Average(nn.Module):
    """As of ema_pytorch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ema_model = model
        self.register_buffer("step", torch.tensor(0))


def compiled_inside(model: nn.Module) -> nn.Module:
    model.layer2 = torch.compile(model.layer2)
    return model


WRAPPERS = {
    "none": lambda model: model,
    "DDP": DistributedDataParallel,
    "compile": torch.compile,
    "compile(DDP)": lambda model: torch.compile(DistributedDataParallel(model)),
    "DDP(compile)": lambda model: DistributedDataParallel(torch.compile(model)),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "parent": Parent,
    "parent, compiled": lambda model: torch.compile(Parent(model)),
    "average": Average,
    "compiled inside": compiled_inside,
}


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", ["none", "DDP", "compile", "parent", "compiled inside"])
def test_wrappers_save_and_load(process_group, tmp_path, saved, loaded):
    model = WRAPPERS[saved](trained(head=True))
    svf_fast.save_adapter(model, tmp_path / "x.safetensors", also=("*fc",))
    inner = converted()
    other = WRAPPERS[loaded](inner)
    assert svf_fast.load_adapter(other, tmp_path / "x.safetensors") is other
    expected, found = (
        svf_fast.Adapter.of(net, also=("fc",)) for net in (trained(head=True), inner)
    )
    for one, other in ((expected.S, found.S), (expected.also, found.also)):
        assert one.keys() == other.keys()
        assert all(torch.equal(other[name], values) for name, values in one.items())


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if "DDP" not in name])
def test_a_wrapped_model_is_converted(wrapper):
    inner = plain()
    model = WRAPPERS[wrapper](inner)
    inside = model.module if wrapper == "AveragedModel" else inner  # which copies its model
    has_parent = wrapper in ("parent", "parent, compiled", "average")
    layers = [f"*.{name}" for name in LAYERS] if has_parent else LAYERS
    assert svf_fast.convert(model, layers, progress=False) is model
    torch.testing.assert_close(inside(X), plain()(X))
    assert len(list(svf_fast.svf_parameters(inside))) == 3
    svf_fast.merge(model)
    torch.testing.assert_close(inside(X), plain()(X))


@pytest.mark.parametrize("wrapper", ["DDP", "compile(DDP)", "DDP(compile)"])
def test_what_synchronizes_its_parameters_is_converted_before(process_group, wrapper):
    model = plain()
    model.fc.requires_grad_(True)
    model = WRAPPERS[wrapper](model)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="not yet in DistributedDataParallel.*then wrap it"):
        svf_fast.convert(model, LAYERS)
    assert list(model.state_dict()) == before


def test_names_of_wrappers_may_still_be_given():
    model = svf_fast.convert(torch.compile(plain()), ["_orig_mod.layer3"], progress=False)
    assert len(list(svf_fast.svf_parameters(model))) == 2
    with pytest.raises(ValueError, match="'layer9'.*at its top are stem, layer2, layer3, fc"):
        svf_fast.convert(torch.compile(plain()), ["layer9"])


# Other weights: rounded, or of another backbone.

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("used", DTYPES, ids=str)
@pytest.mark.parametrize("wrote", DTYPES, ids=str)
def test_an_adapter_fits_its_weights_in_another_dtype(tmp_path, wrote, used):
    svf_fast.save_adapter(converted(dtype=wrote), tmp_path / "x.safetensors")
    adapter = svf_fast.Adapter.load(tmp_path / "x.safetensors")
    for model in (converted(dtype=used), converted().to(used), plain().to(used)):
        svf_fast.load_adapter(model, tmp_path / "x.safetensors")
        for name, S in svf_fast.Adapter.of(model).S.items():
            assert torch.equal(S, adapter.S[name].to(S.dtype))


@pytest.mark.parametrize("share", [0.04, 0.2, 1.0])
def test_other_weights_are_refused_with_how_far_they_are(share):
    adapter, model = svf_fast.Adapter.of(converted()), plain()
    with torch.no_grad():
        weight = model.layer3[0].weight
        noise = torch.randn_like(weight)
        weight += share * noise * (weight.norm() / noise.norm())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="another backbone: .* layer3.0 of 3 layers differ by"
    ) as caught:
        adapter.apply(model)
    percent = float(str(caught.value).split("up to ")[1].split("%")[0])
    assert 0.4 * share < percent / 100 < 2 * share
    assert model.state_dict().keys() == before.keys()  # nor is it converted
    adapter.apply(plain())


def old_fingerprint(weight: Tensor) -> Tensor:
    digest = hashlib.sha256(str(tuple(weight.shape)).encode() + weight.float().numpy().tobytes())
    return torch.tensor(list(digest.digest()[:16]), dtype=torch.uint8)


def old_file(path) -> None:
    """Write an adapter as versions without distances did."""
    S = {f"{name}.S": S for name, S in svf_fast.Adapter.of(trained()).S.items()}
    weights = {
        name: plain().get_submodule(name).weight for name in svf_fast.Adapter.of(trained()).S
    }
    digits = {
        name: bytes(old_fingerprint(weight).tolist()).hex() for name, weight in weights.items()
    }
    metadata = {"format": "svf_fast adapter 1", "fingerprints": json.dumps(digits), "card": "{}"}
    save_file(S, path, metadata)


def old_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for key in state:
        name, _, own = key.rpartition(".")
        if own == "fingerprint":
            state[key] = old_fingerprint(plain().get_submodule(name).weight)
    return state


def test_files_and_states_of_older_versions_load(tmp_path):
    old_file(tmp_path / "old.safetensors")
    svf_fast.save_adapter(trained(), tmp_path / "new.safetensors")
    from_old = converted(seed=1)
    from_old.load_state_dict(old_state(converted()))
    for file in ("old.safetensors", "new.safetensors"):
        for model in (converted(), plain(), copy.deepcopy(from_old)):
            svf_fast.load_adapter(model, tmp_path / file)
            torch.testing.assert_close(model(X), trained()(X))
        with pytest.raises(ValueError, match="trained on another backbone"):
            svf_fast.load_adapter(converted(seed=1), tmp_path / file)
    old, new = (svf_fast.Adapter.load(tmp_path / f"{x}.safetensors") for x in ("old", "new"))
    assert old.backbone == new.backbone
    assert svf_fast.interpolate_adapters(old, new, 0.5).backbone == new.backbone
    with pytest.raises(ValueError, match="older version.*another dtype.*model.to"):
        old.apply(converted(dtype=torch.float16))
    old.apply(converted().half())  # as it says


# Plain models, and what goes with an adapter.


@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"strategy": "chain"}], ids=str)
def test_a_plain_model_is_converted_as_the_adapter_needs_it(tmp_path, options):
    svf_fast.save_adapter(trained(), tmp_path / "x.safetensors")
    model = svf_fast.load_adapter(plain(), tmp_path / "x.safetensors", **options)
    torch.testing.assert_close(model(X), trained()(X))
    assert svf_fast.Adapter.of(model).S.keys() == svf_fast.Adapter.of(trained()).S.keys()
    assert (type(model.layer2) is not nn.Sequential) == options.get("fuse", True)
    assert model.layer3[0].strategy == options.get("strategy", "auto")
    svf_fast.load_adapter(model, tmp_path / "x.safetensors")  # and again, when it is converted


@pytest.mark.parametrize("wrapper", ["compile", "parent", "average", "compiled inside"])
def test_a_plain_model_in_a_wrapper_too(wrapper):
    inner = plain()
    svf_fast.Adapter.of(WRAPPERS[wrapper](trained())).apply(inner)
    torch.testing.assert_close(inner(X), trained()(X))
    inner = plain()
    svf_fast.Adapter.of(trained()).apply(WRAPPERS[wrapper](inner))
    torch.testing.assert_close(inner(X), trained()(X))


def test_a_layer_of_two_names_is_converted_under_both():
    model, other = plain(), plain()
    for net in (model, other):
        net.again = net.layer3[0]
    svf_fast.convert(model, [*LAYERS, "again"], progress=False)
    svf_fast.Adapter.of(model).apply(other)
    assert isinstance(other.again, svf_fast.SVFConv2d) and other.again is other.layer3[0]


class Standardized(nn.Conv2d):
    """As of BiT: the weight that computes is of its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), True)) / self.weight.std((1, 2, 3))[
            :, None, None, None
        ]
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_weight_that_a_subclass_computes_is_the_adapters():
    def network() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(Standardized(3, 6, 3)), nn.ReLU())
        return model.eval().requires_grad_(False)

    model = svf_fast.convert(network(), progress=False, layers=("0",))
    model[0][0].S.data.mul_(torch.rand(6))
    other = svf_fast.Adapter.of(model).apply(network())
    torch.testing.assert_close(other(X), model(X))


def test_another_network_is_named():
    adapter = svf_fast.Adapter.of(trained())
    model = plain()
    model.layer3 = nn.Sequential(nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"no convolution 'layer3.2'.*1 of 3 layers are unknown"):
        adapter.apply(model)
    model = plain()
    model.layer3[0] = nn.Conv2d(8, 6, 3)
    with pytest.raises(ValueError, match=r"layer3.0.S: expected \[6\] singular values, got \[8\]"):
        adapter.apply(model)


def test_a_model_without_values_is_named_and_fits_once_they_are_loaded():
    adapter = svf_fast.Adapter.of(trained())
    for model in (plain().to("meta"), converted().to("meta")):
        with pytest.raises(ValueError, match="adapter: expected a model with values.*on meta"):
            adapter.apply(model)
    model.load_state_dict(converted().state_dict(), assign=True)
    torch.testing.assert_close(adapter.apply(model)(X), trained()(X))


def test_pretrained_values_stay_until_the_adapter_is_applied():
    adapter, model = svf_fast.Adapter.of(trained()), plain()
    assert adapter.convert(model) is model
    torch.testing.assert_close(model(X), plain()(X))
    assert not torch.equal(adapter.apply(model)(X), plain()(X))


@pytest.mark.parametrize(
    ("also", "names"),
    [
        (("fc",), ["fc.0", "fc.1"]),
        ("fc.1", ["fc.1"]),
        (("fc.*", "stem.1"), ["fc.0", "fc.1", "stem.1"]),
        (("fc.1.bias",), ["fc.1"]),
    ],
    ids=str,
)
def test_a_head_goes_with_its_adapter(tmp_path, also, names):
    model = trained(3, head=True)
    svf_fast.save_adapter(model, tmp_path / "x.safetensors", {"data": "shapes"}, also)
    adapter = svf_fast.Adapter.load(tmp_path / "x.safetensors")
    assert sorted({name.rpartition(".")[0] for name in adapter.also}) == names
    assert f"also {len(adapter.also)} tensors" in repr(adapter)
    for other in (plain(), converted(), torch.compile(plain())):
        svf_fast.load_adapter(other, tmp_path / "x.safetensors")
        state = getattr(other, "_orig_mod", other).state_dict()
        expected = model.state_dict()
        for name in adapter.also:
            assert (
                torch.equal(state[name], expected[name])
                and state[name].dtype == expected[name].dtype
            )
        if also == ("fc",) and isinstance(other, Net):
            torch.testing.assert_close(other(X), model(X))
    assert not load_file(tmp_path / "x.safetensors").keys() & {"layer3.0.U", "layer3.0.fingerprint"}


def test_what_goes_with_an_adapter_is_interpolated():
    a, b = (svf_fast.Adapter.of(trained(n, head=True), also=("fc",)) for n in (1, 2))
    mixed = svf_fast.interpolate_adapters(a, b, 0.25)
    for name, values in mixed.also.items():
        if values.is_floating_point():
            torch.testing.assert_close(values, 0.75 * a.also[name] + 0.25 * b.also[name])
    with pytest.raises(ValueError, match="same tensors besides S as a, got none for fc.0.weight"):
        svf_fast.interpolate_adapters(a, svf_fast.Adapter.of(trained()), 0.5)


def test_a_head_that_does_not_fit_is_named_and_nothing_changes(tmp_path):
    adapter = svf_fast.Adapter.of(trained(head=True), also=("fc",))
    model = plain()
    model.fc[1] = nn.Linear(4, 9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"fc.1.weight: expected \[9, 4\].*got \[5, 4\]"):
        adapter.apply(model)
    del model.fc
    with pytest.raises(ValueError, match="fc.0.weight: expected in the model"):
        adapter.apply(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for pattern in ("head", "layer3.0.S", "layer3.0"):
        with pytest.raises(ValueError, match=f"also: expected names.*got {pattern!r}"):
            svf_fast.save_adapter(trained(), tmp_path / "x.safetensors", also=(pattern,))
    diverged = trained()
    diverged.fc[1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="fc.1.bias: expected finite values"):
        svf_fast.save_adapter(diverged, tmp_path / "x.safetensors", also=("fc",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("{}", "also: expected a JSON list, got dict"),
        ("[", "also: expected JSON"),
        ('["fc.weight", "gone"]', "also: expected the 2 tensors it names, got 1"),
        ("[]", "expected names of layers and '.S', got 'fc.weight'"),
        ('["0.S", "fc.weight"]', "at least one layer, got none"),
    ],
)
def test_a_strangers_head_is_refused_by_name(tmp_path, extra, words):
    metadata = {"format": "svf_fast adapter 1", "fingerprints": json.dumps({"0": "a" * 32})}
    tensors = {"0.S": torch.ones(2), "fc.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {**metadata, "also": extra})
    with pytest.raises(ValueError, match=f"x.safetensors: .*{words}"):
        svf_fast.Adapter.load(tmp_path / "x.safetensors")


def test_a_large_head_is_no_reason_to_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr("svf_fast.files._FILE_BYTES", 1000)
    svf_fast.save_adapter(trained(head=True), tmp_path / "x.safetensors", also=("fc",))
    assert (tmp_path / "x.safetensors").stat().st_size > 1000
    svf_fast.load_adapter(plain(), tmp_path / "x.safetensors")
