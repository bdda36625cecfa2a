"""What a report tells of the singular values, against the definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

import svf_fast
from fss.models import build_model, rebuild_model
from fss.report.components import _responses
from fss.report.cost import step_memory
from fss.report.runs import read_runs
from fss.report.spectrum import Spectrum, change_rows, default_layers, read_spectra
from fss.training.run import train


@pytest.fixture
def weights(tiny, tmp_path):
    """A file of backbone weights, and the weights."""
    state = build_model(tiny().model).backbone.state_dict()
    save_file(state, tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors", state


def test_pretrained_values_are_kept_and_found_again(tiny, weights):
    path, state = weights
    config = tiny(model={"weights": str(path)}, regime={"layers": ("layer3",)})
    train(config)
    (run,) = read_runs([config.out])
    trained = run.folder.checkpoint("best.pt")["model"]
    kept = read_spectra(run, trained)
    assert [s.layer for s in kept][:2] == ["layer3.0.conv1", "layer3.0.conv2"]
    for spectrum in kept:
        expected = torch.linalg.svdvals(state[f"{spectrum.layer}.weight"].double().flatten(1))
        torch.testing.assert_close(spectrum.before.double(), expected, rtol=1e-6, atol=1e-6)
        S = trained[f"backbone.{spectrum.layer}.S"]
        assert torch.equal(spectrum.after, S[spectrum.component])
        assert not torch.equal(spectrum.after, spectrum.before)

    run.folder.pretrained.unlink()
    for spectrum, found in zip(kept, read_spectra(run, trained)):
        torch.testing.assert_close(found.before, spectrum.before, rtol=1e-5, atol=1e-6)

    state["layer3.0.conv1.weight"] += 1
    save_file(state, path)
    with pytest.raises(FileNotFoundError, match="are others by now"):
        read_spectra(run, trained)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="are missing"):
        read_spectra(run, trained)


def spectrum(layer: str, kernel: tuple[int, int], before: list, after: list) -> Spectrum:
    return Spectrum(
        layer, kernel, torch.arange(len(before)), torch.tensor(before), torch.tensor(after)
    )


def test_change():
    one = spectrum("layer2.0.conv1", (3, 3), [4.0, 2.0, 1.0, 0.0], [5.0, 2.0, -1.0, 1.0])
    assert one.change[:3].tolist() == [25.0, 0.0, -200.0] and one.change[3].isnan()
    (row,) = change_rows([one])
    assert (row["lowest"], row["highest"], row["rank"]) == (-200.0, 25.0, 4)
    assert row["rms"] == pytest.approx(((25**2 + 200**2) / 3) ** 0.5)


def test_layers_of_the_heat_maps():
    def layers(*names: tuple[str, int]) -> list[Spectrum]:
        return [spectrum(name, (side, side), [1.0], [1.0]) for name, side in names]

    resnet = layers(
        ("layer2.3.conv3", 1), ("layer3.5.conv2", 3), ("layer3.5.conv3", 1), ("layer4.2.conv3", 1)
    )
    assert default_layers(resnet) == ["layer3.5.conv2", "layer3.5.conv3"]
    assert default_layers(resnet[3:]) == ["layer4.2.conv3"]
    assert default_layers(layers(("layer3.0", 3), ("layer3.7", 3))) == ["layer3.7"]
    assert default_layers(layers(("layer1.0", 7))) == ["layer1.0"]


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 2), (1, 2, 1), (3, 2, 1)])
def test_response_of_a_component(kernel, stride, dilation):
    torch.manual_seed(0)
    padding = dilation * (kernel // 2)
    convolution = torch.nn.Conv2d(6, 5, kernel, stride, padding, dilation, bias=False)
    layer = svf_fast.SVFConv2d.from_conv(convolution)
    x = torch.randn(1, 6, 9, 11)
    components = torch.tensor([3, 0])
    # y = Σ_r u_r S_r v_r with orthonormal u_r, so v_r = u_rᵀ y / S_r
    v = torch.einsum("or,nohw->rhw", layer.U, layer(x)) / layer.S[:, None, None]
    torch.testing.assert_close(_responses(layer, x, components), v[components].abs().detach())


def test_memory_of_a_step_is_that_which_the_run_measured(tiny):
    config = tiny()
    measured = train(config)["saved_bytes_per_step"]
    (run,) = read_runs([config.out])
    state = run.folder.checkpoint("best.pt")["model"]
    counted = step_memory(run, rebuild_model(config, state)).saved_bytes
    # the loss keeps the logits, their logarithms and the target besides
    pixels = config.batch_size * config.data.size**2
    assert 0 <= measured - counted <= 40 * pixels
    halves = dataclasses.replace(run, config=dataclasses.replace(config, accumulate=2))
    assert step_memory(halves, rebuild_model(config, state)).saved_bytes < 0.6 * counted


@pytest.mark.parametrize("name", ["pfenet", "bam"])
def test_networks_of_other_models(tiny, name):
    base = "none" if name == "bam" else None
    config = tiny(model={"name": name, "base_weights": base})
    train(config)
    (run,) = read_runs([config.out])
    state = run.folder.checkpoint("best.pt")["model"]
    network = rebuild_model(config, state)
    report = step_memory(run, network)
    assert 0 < report.saved_bytes < report.reference_bytes
