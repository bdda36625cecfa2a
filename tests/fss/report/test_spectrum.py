"""What a report tells of the singular values, against the definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

import svf_fast
from fss.models import build_model, rebuild_model
from fss.report import write_report
from fss.report.components import _responses, change_in_words, changed_most
from fss.report.cost import step_memory
from fss.report.runs import ReportedRun, read_runs
from fss.report.spectrum import (
    Spectrum,
    change_rows,
    default_layers,
    last_of_blocks,
    read_spectra,
)
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


@pytest.mark.parametrize("name", ["pfenet", "bam", "cyctr"])
def test_networks_of_other_models(tiny, name):
    base = "none" if name == "bam" else None
    config = tiny(model={"name": name, "base_weights": base})
    train(config)
    (run,) = read_runs([config.out])
    state = run.folder.checkpoint("best.pt")["model"]
    network = rebuild_model(config, state)
    report = step_memory(run, network)
    assert 0 < report.saved_bytes < report.reference_bytes


@pytest.mark.parametrize("factors", [None, ("S", "S'")])
def test_spectra_of_scaled_values(factors, tiny, weights):
    """Trained are the values S exp(s') of Table 23; the weight is composed of them."""
    path, state = weights
    regime = {"name": "svf_scale", "layers": ("layer3",), "factors": factors}
    config = tiny(model={"weights": str(path)}, regime=regime, optimizer={"lr": 0.5})
    train(config)
    (run,) = read_runs([config.out])
    assert run.trains_singular_values
    trained = run.folder.checkpoint("best.pt")["model"]
    for spectrum in read_spectra(run, trained):
        weight = state[f"{spectrum.layer}.weight"].double().flatten(1)
        expected = torch.linalg.svdvals(weight)
        torch.testing.assert_close(spectrum.before.double(), expected, rtol=1e-5, atol=1e-6)
        factors_now = (trained[f"backbone.{spectrum.layer}.{part}"].double() for part in "USV")
        U, S, V = (part.flatten(1) if part.dim() > 2 else part for part in factors_now)
        scale = trained[f"backbone.{spectrum.layer}.log_scale"].double().exp()
        composed = torch.linalg.svdvals(U * (S * scale) @ V)
        ours = spectrum.after.double().abs().sort(descending=True).values
        torch.testing.assert_close(ours, composed, rtol=1e-4, atol=1e-5)
        assert not torch.equal(spectrum.after, spectrum.before)
    page = write_report([config.out]).read_text(encoding="utf-8")
    assert "Change of the 30 largest" in page and "nothing to show" not in page


@pytest.mark.parametrize(
    ("regime", "shown"),
    [
        ({"name": "svf"}, True),
        ({"name": "rotated_svf"}, True),
        ({"name": "svf_scale"}, True),
        ({"name": "svf", "factors": ("U", "S")}, False),
        ({"name": "rotated_svf", "factors": ()}, False),
        ({"name": "scale_output"}, False),
        ({"name": "freeze"}, False),
        ({"name": "full"}, False),
    ],
)
def test_regimes_of_which_spectra_are_shown(regime, shown, tiny):
    run = ReportedRun(None, "run", tiny(regime=regime), None, {}, {})
    assert run.trains_singular_values == shown


def test_last_convolutions_of_blocks():
    names = [("layer3.0.conv1", 1), ("layer3.0.conv3", 1), ("layer3.0.downsample.0", 1)]
    names += [("layer3.1.conv1", 1), ("layer3.1.conv2", 3), ("layer3.1.conv3", 1)]
    names += [("layer4.0.downsample.0", 1)]
    spectra = [spectrum(name, (side, side), [1.0], [1.0]) for name, side in names]
    assert last_of_blocks(spectra, "layer3", (1, 1)) == ["layer3.0.conv3", "layer3.1.conv3"]
    assert last_of_blocks(spectra, "layer3", (3, 3)) == ["layer3.1.conv2"]
    assert last_of_blocks(spectra, "layer4", (1, 1)) == ["layer4.0.downsample.0"]
    assert last_of_blocks(spectra, "layer2", (1, 1)) == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (1.92013, 1.92048, "1.92013 → 1.92048\n+0.00035"),
        (1.92, 1.85, "1.920 → 1.850\n−0.070"),
        (10.0, 14.5, "10.00 → 14.50\n+4.50"),
        (0.5, 0.5 - 3e-7, "0.50000000 → 0.49999970\n−0.00000030"),
        (2.0, 2.0, "2.00 → 2.00\n+0.00"),
    ],
)
def test_a_change_is_seen_in_its_label(before, after, words):
    assert change_in_words(before, after) == words


def test_components_are_ranked_by_the_change_that_is_printed():
    """Not by percent: the smallest value changes most in percent, the third by most."""
    one = spectrum("layer3.0.conv1", (1, 1), [8.0, 4.0, 2.0, 1.0], [8.5, 3.0, 5.0, 9e-2])
    rose, fell = changed_most(one, 3)
    assert (rose.tolist(), fell.tolist()) == ([2, 0], [1, 3])
    rose, fell = changed_most(one, 1)
    assert (rose.tolist(), fell.tolist()) == ([2], [1])


def test_a_report_shows_the_last_3x3_and_1x1_of_layer_3(tiny):
    """On a bottleneck: conv2 and conv3 of the last block."""
    config = tiny(model={"backbone": "resnet50"}, steps=1)
    train(config)
    page = write_report([config.out]).read_text(encoding="utf-8")
    assert "All singular values of layer3.5.conv2 and layer3.5.conv3, before and after" in page
