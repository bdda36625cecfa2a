from __future__ import annotations

import pytest
import torch
from torch import nn

import svf_fast


@pytest.mark.parametrize("strategy", ("reference", "fold", "chain", "gram"))
def test_predicted_bytes_are_the_bytes_kept(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 12, 1, bias=False)
    )
    svf_fast.convert(model, None, strategy=strategy)
    with torch.no_grad():
        model[0].S[-1] = 0
    report = svf_fast.memory_report(model, (2, 6, 9, 9))
    resident = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    measured = []
    for layer, shape in zip(model, ((2, 6, 9, 9), (2, 4, 5, 5)), strict=True):
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            if tensor.data_ptr() not in resident:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(shape, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        measured.append(sum(kept.values()))
        del y
    assert [layer.saved_bytes for layer in report.layers] == measured
    assert [layer.strategy for layer in report.layers] == [strategy] * 2
    assert report.saved_bytes == sum(measured)
    assert report.layers[0].output_shape == (2, 4, 5, 5)


def test_the_model_still_works_after_its_report_and_half_the_bytes_in_bfloat16():
    model = svf_fast.convert(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), None)
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    full = svf_fast.memory_report(model, x.shape)
    half = svf_fast.memory_report(model, x.shape, torch.bfloat16)
    assert half.saved_bytes * 2 == full.saved_bytes > 0
    assert torch.equal(model(x), expected)
    text = str(full)
    assert "1×4×4×4" in text and text.splitlines()[-2].startswith("total")


def test_flops_of_a_bottleneck_are_those_of_the_design():
    """Per position, in units of C² multiplications: the paper's chain 20 + 20, gram 17 + 17 + 3."""
    C, size = 16, 10
    model = nn.Sequential(
        nn.Conv2d(4 * C, C, 1, bias=False),
        nn.Conv2d(C, C, 3, padding=1, bias=False),
        nn.Conv2d(C, 4 * C, 1, bias=False),
    )
    for conv in model:
        nn.init.orthogonal_(conv.weight)
    svf_fast.convert(model, None, strategy="gram")
    report = svf_fast.memory_report(model, (1, 4 * C, size, size))
    unit = 2 * C * C * size * size
    assert report.reference_flops == 40 * unit
    assert report.flops == 37 * unit


def test_refusals():
    with pytest.raises(ValueError, match="was it converted"):
        svf_fast.memory_report(nn.Linear(1, 1), (1, 1))
